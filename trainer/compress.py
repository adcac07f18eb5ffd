"""Smaller and faster encoders than the one in service, each beside it.

- layers: the top ones are left out (Sajjad et al. 2023, "On the Effect of Dropping Layers of
  Pre-trained Transformer Models", section 3.1.1: top-layer dropping loses least);
- heads: of each layer, those of which the star head's loss hangs least are left out (Michel, Levy
  and Neubig 2019, "Are Sixteen Heads Really Better than One?", section 4.1);
- int8: weights and activations of all linear layers in eight bits (`model.int8`), each token's
  activations scaled as they come, or, int8 static, as they came while some texts were read;
- bf16, fp16: weights of half the size;
- student: the lowest and the highest layer alone, taught to give the parent's vectors (Sanh et al.
  2019, "DistilBERT", section 2, with the cosine loss alone).

The star head is fitted anew for each, on the same texts, and judged on the newest.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from shutil import rmtree
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model import adapters, heads
from model import encoder as encoders
from model.encoder import TextEncoder
from model.exceptions import EncoderError
from trainer import batches, layers, text
from trainer.config import TrainerConfig
from trainer.exceptions import TrainerError
from trainer.fine_tune import taken
from trainer.metrics import TextScores
from trainer.progress import OnProgress
from trainer.rates import schedule
from trainer.text import TEST, ReviewTexts

TIMED = 256  # texts by which speed is told
_ASKED = 512  # newest texts that say which heads matter, and how large activations grow
_HEAD_L2 = 1e-4  # of the star head that says which heads matter
_STUDENT_EPOCHS = 3
_STUDENT_RATE = 1e-4
_BATCH = 32
_TOKENS = 4_096  # most padded ones of a student's texts at once


@dataclass(frozen=True)
class Compressed:
    """One encoder beside the others."""

    name: str
    folder: Path
    scores: TextScores  # of its star head on the newest texts
    size_bytes: int
    texts_per_second: float


Make = Callable[[TextEncoder, ReviewTexts, Path], None]
"""Writes an encoder's directory."""


def compress(
    reviews: ReviewTexts,
    parent: TextEncoder,
    config: TrainerConfig,
    folder: Path,
    on_progress: OnProgress,
) -> list[Compressed]:
    """The parent and each way to make it smaller, below `folder`.

    Raises:
        EncoderError: the encoder has no layers.
        TrainerError: it is compressed already, or has adapters or virtual tokens.
    """
    if parent.extended:
        raise TrainerError(f"{parent.folder} is not plain: it is compressed, or was added to")
    found = [_judged("parent", parent.folder, reviews, config, on_progress)]
    for name, make in ways(parent, config.seed, on_progress).items():
        place = folder / name.replace(" ", "-")
        if not place.exists():
            part = place.with_name(f"{place.name}.part")  # a kill leaves no encoder half made
            rmtree(part, ignore_errors=True)
            make(parent, reviews, part)
            part.rename(place)
        found.append(_judged(name, place, reviews, config, on_progress))
    return found


def choose(found: Sequence[Compressed], largest_loss: float) -> Compressed:
    """The fastest whose RMSE is at most `largest_loss` (a share) above the parent's, the first."""
    bound = found[0].scores.rmse * (1 + largest_loss)
    good = [each for each in found if each.scores.rmse <= bound]
    return max(good, key=lambda each: each.texts_per_second)


def ways(parent: TextEncoder, seed: int, on_progress: OnProgress) -> Mapping[str, Make]:
    """What is tried for an encoder; `seed` and `on_progress` are of what has to learn."""
    count = len(adapters.layers(parent.model))
    kept = sorted({max(count * share // 4, 1) for share in (3, 2)} - {count}, reverse=True)
    fewer = {}
    with suppress(EncoderError):  # an attention of another kind
        count = min(each.count for each in heads.attentions(parent.model))
        left = max(2 * count // 3, 1)
        fewer = {f"{left} heads": _heads(left)} if left < count else {}
    # GPT-2 multiplies by layers of another kind, which stay as they are.
    linear = any(isinstance(each, nn.Linear) for each in parent.model.modules())
    return {
        **{f"{number} layers": _layers(number) for number in kept},
        **fewer,
        "bf16": _stored(torch.bfloat16),
        "fp16": _stored(torch.float16),
        **({"int8": _int8, "int8 static": _int8_static} if linear else {}),
        "student": partial(_student, seed=seed, on_progress=on_progress),
    }


def _judged(
    name: str, folder: Path, reviews: ReviewTexts, config: TrainerConfig, on_progress: OnProgress
) -> Compressed:
    encoder = encoders.load(folder, config.device)
    settings = text.untouched(config.text)
    fitted = text.fit(reviews, encoder, settings, folder, config.seed, on_progress)
    newest = taken(reviews.texts, np.flatnonzero(reviews.span == TEST))
    timed = newest[:TIMED]
    encoder.encode(timed[:8])  # what is set up at first is not timed
    began = time.perf_counter()
    encoder.encode(timed)
    speed = len(timed) / (time.perf_counter() - began)
    size = sum((folder / each).stat().st_size for each in encoders.files(folder))
    return Compressed(name, folder, fitted.scores, size, speed)


def _copy(parent: TextEncoder) -> TextEncoder:
    return encoders.load(parent.folder, str(parent.device))


def _keep(encoder: TextEncoder, rows: Sequence[int]) -> None:
    """Leave only these layers."""
    stack = adapters.layers(encoder.model)
    kept = [stack[row] for row in rows]
    settings: Any = encoder.model.config
    if kinds := getattr(settings, "layer_types", None):
        settings.layer_types = [kinds[row] for row in rows]
    settings.num_hidden_layers = len(kept)
    del stack[:]
    stack.extend(kept)
    for at, layer in enumerate(kept):  # a decoder's layers know their number
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = at


def _layers(number: int) -> Make:
    def make(parent: TextEncoder, reviews: ReviewTexts, folder: Path) -> None:
        shorter = _copy(parent)
        _keep(shorter, range(number))
        shorter.save(folder)

    return make


def _heads(number: int) -> Make:
    def make(parent: TextEncoder, reviews: ReviewTexts, folder: Path) -> None:
        copy = _copy(parent)
        rows = np.flatnonzero(reviews.span != TEST)[-_ASKED:]
        texts = taken(reviews.texts, rows)
        importance = _importance(copy, texts, text.soft_labels(reviews.rating[rows]))
        kept = [sorted(np.argsort(-each)[:number].tolist()) for each in importance]
        heads.silence(copy.model, kept)
        copy.save(folder)
        heads.write(folder, kept)

    return make


def _importance(
    encoder: TextEncoder, texts: Sequence[str], labels: NDArray[np.float32]
) -> list[NDArray[np.float64]]:
    """How much a star head's loss hangs on each head, for each layer.

    The mean over texts of |what the head says · the loss's gradient by it|.
    """
    head = text.fit_star_head(encoder.encode(texts), labels, _HEAD_L2)
    weight, bias = torch.from_numpy(head.weight), torch.from_numpy(head.bias)
    said: dict[int, torch.Tensor] = {}
    found = heads.attentions(encoder.model)
    totals = [np.zeros(each.count) for each in found]

    def note(layer: int, given: torch.Tensor) -> None:
        given.retain_grad()
        said[layer] = given

    hooks = [
        each.output.dense.register_forward_pre_hook(
            lambda _, given, layer=layer: note(layer, given[0])
        )
        for layer, each in enumerate(found)
    ]
    for start in range(0, len(texts), _BATCH):
        tokens = encoder.tokens(texts[start : start + _BATCH])
        logits = nn.functional.linear(encoder.embed(tokens).cpu(), weight, bias)
        targets = torch.from_numpy(labels[start : start + _BATCH])
        nn.functional.cross_entropy(logits, targets, reduction="sum").backward()  # pyright: ignore[reportUnknownMemberType]
        for layer, given in said.items():
            if given.grad is not None:
                hangs = (given * given.grad).detach()
                hangs = hangs.unflatten(-1, (found[layer].count, -1)).sum((1, 3)).abs()
                totals[layer] += hangs.sum(0).double().cpu().numpy() / len(texts)
        encoder.model.zero_grad()
    for hook in hooks:
        hook.remove()
    return totals


def _stored(dtype: torch.dtype) -> Make:
    def make(parent: TextEncoder, reviews: ReviewTexts, folder: Path) -> None:
        copy = _copy(parent)
        replace(copy, model=copy.model.to(dtype)).save(folder)

    return make


def _int8(parent: TextEncoder, reviews: ReviewTexts, folder: Path) -> None:
    _copy(parent).save(folder)
    encoders.write_quantization(folder)


def _int8_static(parent: TextEncoder, reviews: ReviewTexts, folder: Path) -> None:
    copy = _copy(parent)
    known = np.flatnonzero(reviews.span != TEST)[-_ASKED:]
    ranges = encoders.observed_ranges(copy, taken(reviews.texts, known))
    copy.save(folder)
    encoders.write_quantization(folder, ranges)


def _student(
    parent: TextEncoder, reviews: ReviewTexts, folder: Path, seed: int, on_progress: OnProgress
) -> None:
    """Two layers that learn to give the parent's vectors of all but the newest texts."""
    torch.manual_seed(seed)
    student = _copy(parent)
    last = len(adapters.layers(student.model)) - 1
    _keep(student, sorted({0, last}))
    known = taken(reviews.texts, np.flatnonzero(reviews.span != TEST))
    wanted = torch.from_numpy(text.encode(parent, known, on_progress)).to(parent.device)
    layers.lighten(student.model, student.device)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=_STUDENT_RATE, fused=True)
    random = np.random.default_rng(seed)
    steps = _STUDENT_EPOCHS * -(-len(known) // _BATCH)
    rates = schedule(optimizer, steps, 0.0, "linear")
    tokens, overhead = np.array(student.count_tokens(known)), batches.overhead(student.device)
    student.model.train()
    epochs = (batches.shuffled(len(known), _BATCH, random) for _ in range(_STUDENT_EPOCHS))
    for done, step in enumerate(chain.from_iterable(epochs), 1):
        for part in batches.parts(tokens[step], _TOKENS, overhead):
            rows = step[part]
            vectors = student.embed(student.tokens(taken(known, rows)))
            loss = (1 - (vectors * wanted[rows]).sum(1)).sum() / len(step)
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
        nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        optimizer.zero_grad()
        rates.step()
        on_progress(done, steps)
    student.model.eval()
    student.save(folder)
