"""An encoder made used to a shop's own words before it is fine-tuned to stars.

Masked-language modelling: of 15% of the tokens, 80% are masked, 10% replaced and 10% left, and the
model says what they were (Devlin et al. 2019, "BERT", section 3.1; on a task's own texts:
Gururangan et al. 2020, "Don't Stop Pretraining", section 4). It needs no ratings, so reviews
without stars count too.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model import encoder as encoders
from model.encoder import TextEncoder
from trainer import batches, checkpoints, layers
from trainer.config import AdaptConfig
from trainer.exceptions import TrainerError
from trainer.fine_tune import is_first, require_plain, seed_of
from trainer.progress import OnProgress
from trainer.rates import schedule

_CLIP = 1.0
_WARM_UP = 0.06  # of the steps


def adapt(
    encoder: TextEncoder,
    texts: Sequence[str],
    config: AdaptConfig,
    folder: Path,
    seed: int,
    on_progress: OnProgress,
    checkpoint: Path | None = None,
) -> TextEncoder:
    """The encoder after `config.epochs` passes over `texts`, written to `folder`.

    `checkpoint` is a file to go on from, and to write every half minute and in the end.

    Raises:
        TrainerError: it is no model that fills in masks, or more than plain weights.
    """
    from transformers import DataCollatorForLanguageModeling  # seconds to import

    require_plain(encoder)
    torch.manual_seed(seed)
    model = _masked_model(encoder)
    mask = DataCollatorForLanguageModeling(encoder.tokenizer, mlm_probability=0.15)
    layers.lighten(model, encoder.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=0.01, fused=True
    )
    steps = config.epochs * -(-len(texts) // config.batch_texts)
    rates = schedule(optimizer, steps, _WARM_UP, "linear")
    parts = {"model": model, "optimizer": optimizer, "schedule": rates}
    done, saved = 0, time.monotonic()
    if checkpoint is not None and checkpoint.exists():
        state = checkpoints.load(checkpoint, encoder.device)
        done = state["done"]
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def save() -> None:
        if checkpoint is not None and is_first():
            state = {name: part.state_dict() for name, part in parts.items()}
            checkpoints.save(checkpoint, {"done": done, **state})

    order = _order(len(texts), config, seed)
    for chosen in order[done:]:
        torch.manual_seed(seed_of(seed, done))  # of what is masked
        rows = [str(texts[at]) for at in chosen.tolist()]
        tokens: Any = mask([{"input_ids": each} for each in encoder.cut(rows)])
        loss = model(**{name: each.to(encoder.device) for name, each in tokens.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        rates.step()
        done += 1
        on_progress(done, len(order))
        if time.monotonic() - saved > checkpoints.CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
    save()
    adapted = model.base_model.eval()
    if adapted.config.is_encoder_decoder:
        adapted = adapted.get_encoder()
    replace(encoder, model=adapted).save(folder)
    return encoders.load(folder, str(encoder.device))


def _masked_model(encoder: TextEncoder) -> Any:
    """The encoder with its head that fills in masks, to be trained."""
    from transformers import AutoModelForMaskedLM  # seconds to import

    instead = "so it cannot be adapted: set trainer.text.adapt.epochs to 0"
    if encoder.tokenizer.mask_token is None:
        raise TrainerError(f"{encoder.folder} knows no mask token, {instead}")
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
            f"{encoder.folder} is no model that fills in masks, {instead}"
        ) from error
    return model.to(encoder.device).train()


def _order(count: int, config: AdaptConfig, seed: int) -> list[batches.Rows]:
    """The texts of each step."""
    random = np.random.default_rng(seed)
    epochs = (batches.shuffled(count, config.batch_texts, random) for _ in range(config.epochs))
    return [chosen for epoch in epochs for chosen in epoch]
