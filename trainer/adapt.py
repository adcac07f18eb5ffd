"""An encoder made used to a shop's own words before it is fine-tuned to stars.

Masked-language modelling: of 15% of the tokens, 80% are masked, 10% replaced and 10% left, and the
model says what they were (Devlin et al. 2019, "BERT", section 3.1; on a task's own texts:
Gururangan et al. 2020, "Don't Stop Pretraining", section 4). It needs no ratings, so reviews
without stars count too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model import encoder as encoders
from model.encoder import TextEncoder
from trainer import batches
from trainer.config import AdaptConfig
from trainer.exceptions import TrainerError
from trainer.fine_tune import require_plain
from trainer.progress import OnProgress

_CLIP = 1.0
_WARM_UP = 0.06  # of the steps


def adapt(
    encoder: TextEncoder,
    texts: Sequence[str],
    config: AdaptConfig,
    folder: Path,
    seed: int,
    on_progress: OnProgress,
) -> TextEncoder:
    """The encoder after `config.epochs` passes over `texts`, written to `folder`.

    Raises:
        TrainerError: it is no model that fills in masks, or more than plain weights.
    """
    # Seconds to import, and of use here alone.
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

    require_plain(encoder)
    if encoder.tokenizer.mask_token is None:
        raise TrainerError(
            f"{encoder.folder} knows no mask token, so it cannot be adapted: "
            "set trainer.text.adapt.epochs to 0"
        )
    torch.manual_seed(seed)
    try:
        model: Any = AutoModelForMaskedLM.from_pretrained(
            encoder.folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
    except ValueError as error:  # a decoder, say
        raise TrainerError(
            f"{encoder.folder} is no model that fills in masks, so it cannot be adapted: "
            "set trainer.text.adapt.epochs to 0"
        ) from error
    model.to(encoder.device).train()
    mask = DataCollatorForLanguageModeling(encoder.tokenizer, mlm_probability=0.15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    steps = config.epochs * -(-len(texts) // config.batch_texts)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / max(steps * _WARM_UP, 1), 1 - step / max(steps, 1)),
    )
    random = np.random.default_rng(seed)
    done = 0
    for _ in range(config.epochs):
        for chosen in batches.shuffled(len(texts), config.batch_texts, random):
            rows = [str(texts[at]) for at in chosen.tolist()]
            cut = encoder.tokenizer(rows, truncation=True, max_length=encoder.longest_tokens)
            tokens: Any = mask([{"input_ids": each} for each in cut["input_ids"]])
            loss = model(**{name: each.to(encoder.device) for name, each in tokens.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]
            schedule.step()
            done += 1
            on_progress(done, steps)
    adapted = model.base_model.eval()
    if adapted.config.is_encoder_decoder:
        adapted = adapted.get_encoder()
    replace(encoder, model=adapted).save(folder)
    return encoders.load(folder, str(encoder.device), longest_tokens=encoder.longest_tokens)
