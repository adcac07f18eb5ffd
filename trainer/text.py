"""The star head: how many stars does a review's text mean (question b).

The head is a multinomial logistic regression on the encoder's unit vectors. `frozen` fits it alone.
`top_layers`, `full` and `lora` first fit it, then fine-tune encoder and head together from there
(linear probing, then fine-tuning: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained
Features"), then fit the head anew on the new vectors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model import encoder as encoders
from model.encoder import StarHead, TextEncoder
from trainer.config import TextConfig
from trainer.exceptions import TrainerError
from trainer.metrics import Floats, TextScores, text_scores

Vectors = NDArray[np.float32]
OnProgress = Callable[[int, int], None]
"""Called with work done and work in all."""

STARS = 5
TRAIN, VALIDATION, TEST = 0, 1, 2
"""Spans of time that a text belongs to."""

_L2_TRIED = (3e-4, 1e-4, 3e-5, 1e-5, 3e-6)  # strongest first: each fit starts from the one before
_CHUNK = 256  # texts between two signs of progress
_WARM_UP = 0.1  # of a fine-tuning's steps
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class ReviewTexts:
    """n rated review texts, oldest first."""

    texts: Sequence[str]  # as `encoder.review_text` joins title and text
    rating: Floats  # (n)
    span: NDArray[np.int8]  # (n): TRAIN, VALIDATION or TEST


@dataclass(frozen=True)
class TextModel:
    """An encoder with its star head, and how well it reads the stars of the newest texts."""

    encoder: TextEncoder
    head: StarHead  # of all texts
    judged: StarHead  # of all but TEST
    scores: TextScores  # of `judged` on TEST
    texts: int
    l2: float


def soft_labels(rating: Floats) -> NDArray[np.float32]:
    """Ratings (n) as distributions over stars (n, 5): 3.5 is half a three and half a four."""
    below = np.clip(np.floor(rating), 1, STARS - 1).astype(np.int64)
    share = (rating - below).astype(np.float32)
    labels = np.zeros((len(rating), STARS), np.float32)
    rows = np.arange(len(rating))
    labels[rows, below - 1] = 1 - share
    labels[rows, below] = share
    return labels


def fit(
    reviews: ReviewTexts,
    encoder: TextEncoder,
    config: TextConfig,
    folder: Path,
    seed: int,
    on_progress: OnProgress,
) -> TextModel:
    """Fit the star head, and the encoder when `config.method` says so.

    Args:
        reviews: the texts that may be used.
        encoder: to start from; it is not changed.
        config: the method and its settings.
        folder: where a fine-tuned encoder is written.
        seed: of the order of texts.
        on_progress: called as texts are encoded.

    Raises:
        TrainerError: the encoder has no layers that `top_layers` could name.
    """
    vectors = encode(encoder, reviews.texts, on_progress)
    if config.method != "frozen":
        head, _ = _probe(vectors, reviews, config.l2)
        encoder = _fine_tune(reviews, encoder, head, config, folder, seed, on_progress)
        vectors = encode(encoder, reviews.texts, on_progress)
    head, l2 = _probe(vectors, reviews, config.l2)
    test = reviews.span == TEST
    found = text_scores(reviews.rating[test], stars(head, vectors[test]))
    whole = fit_star_head(vectors, soft_labels(reviews.rating), l2, head)
    return TextModel(encoder, whole, head, found, len(vectors), l2)


def encode(encoder: TextEncoder, texts: Sequence[str], on_progress: OnProgress) -> Vectors:
    """Unit vectors (n, hidden) of texts (n), with signs of progress."""
    parts: list[Vectors] = [np.empty((0, encoder.hidden), np.float32)]
    for start in range(0, len(texts), _CHUNK):
        parts.append(encoder.encode(texts[start : start + _CHUNK]))
        on_progress(min(start + _CHUNK, len(texts)), len(texts))
    return np.concatenate(parts)


def stars(head: StarHead, vectors: Vectors) -> Floats:
    """Distributions over stars (n, 5) of vectors (n, hidden)."""
    logits = vectors @ head.weight.T + head.bias
    weights = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float64)
    return weights / weights.sum(1, keepdims=True)


def fit_star_head(
    vectors: Vectors, labels: NDArray[np.float32], l2: float, start: StarHead | None = None
) -> StarHead:
    """Multinomial logistic regression by L-BFGS: mean cross entropy + l2 · |weight|².

    Args:
        vectors: (n, hidden).
        labels: (n, 5) distributions over stars.
        l2: weight of the squared weights; the offsets are free.
        start: where to start from; at the labels' shares when absent.
    """
    inputs, targets = torch.from_numpy(vectors), torch.from_numpy(labels)
    if start is None:
        shares = labels.mean(0) + 1e-3
        start = StarHead(
            np.zeros((STARS, vectors.shape[1]), np.float32), np.log(shares).astype(np.float32)
        )
    weight = torch.tensor(start.weight, requires_grad=True)
    bias = torch.tensor(start.bias, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = nn.functional.linear(inputs, weight, bias)
        loss = nn.functional.cross_entropy(logits, targets) + l2 * weight.square().sum()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return loss

    optimizer.step(closure)  # pyright: ignore[reportUnknownMemberType, reportArgumentType]
    return StarHead(weight.detach().numpy(), bias.detach().numpy())


def _probe(vectors: Vectors, reviews: ReviewTexts, l2: float | None) -> tuple[StarHead, float]:
    """A head of all texts but the newest; `l2` is chosen on validation when it is None."""
    labels = soft_labels(reviews.rating)
    train, validation = reviews.span == TRAIN, reviews.span == VALIDATION
    if l2 is None:
        losses: list[float] = []
        head = None
        for tried in _L2_TRIED:
            head = fit_star_head(vectors[train], labels[train], tried, head)
            claimed = np.log(np.maximum(stars(head, vectors[validation]), 1e-9))
            losses.append(-float((labels[validation] * claimed).sum(1).mean()))
        l2 = _L2_TRIED[int(np.argmin(losses))]
    known = train | validation
    return fit_star_head(vectors[known], labels[known], l2), l2


def _fine_tune(
    reviews: ReviewTexts,
    encoder: TextEncoder,
    head: StarHead,
    config: TextConfig,
    folder: Path,
    seed: int,
    on_progress: OnProgress,
) -> TextEncoder:
    """The encoder fine-tuned with its head on all texts but the newest, written to `folder`."""
    # A second copy is loaded, for the given encoder stays as it is.
    base = encoders.load(encoder.folder, str(encoder.device), longest_tokens=config.longest_tokens)
    torch.manual_seed(seed)
    model = _trainable(base.model, config)
    tuned = replace(base, model=model)
    linear = nn.Linear(encoder.hidden, STARS)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.weight))
        linear.bias.copy_(torch.from_numpy(head.bias))
    linear.to(encoder.device)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "lr": config.learning_rate},
            {"params": list(linear.parameters()), "lr": config.head_learning_rate},
        ],
        weight_decay=0.01,
    )
    rows = np.flatnonzero(reviews.span != TEST)
    labels = torch.from_numpy(soft_labels(reviews.rating)).to(encoder.device)
    steps = config.epochs * -(-len(rows) // config.batch_texts)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = np.random.default_rng(seed)
    model.train()
    done = 0
    for _ in range(config.epochs):
        for batch in _batches(rows, reviews.texts, config.batch_texts, generator):
            vectors = tuned.embed(tuned.tokens([str(reviews.texts[int(row)]) for row in batch]))
            loss = nn.functional.cross_entropy(linear(vectors), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            nn.utils.clip_grad_norm_([*weights, *linear.parameters()], _LARGEST_GRADIENT)
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]
            schedule.step()
            done += 1
            on_progress(done, steps)
    model.eval()
    if config.method == "lora":
        model = cast(Any, model).merge_and_unload()
    replace(base, model=model).save(folder)
    return encoders.load(folder, str(encoder.device), longest_tokens=config.longest_tokens)


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: a linear warm-up, then a linear decay to zero."""
    warm_up = max(int(steps * _WARM_UP), 1)
    return min((step + 1) / warm_up, max((steps - step) / max(steps - warm_up, 1), 0.0))


def _batches(
    rows: NDArray[np.intp], texts: Sequence[str], size: int, generator: np.random.Generator
) -> Iterator[NDArray[np.intp]]:
    """All rows in batches of like length (little padding), in random order."""
    lengths = np.array([len(texts[row]) for row in rows]) * generator.uniform(0.9, 1.1, len(rows))
    sorted_rows = rows[np.argsort(lengths)]
    batches = [sorted_rows[start : start + size] for start in range(0, len(rows), size)]
    for index in generator.permutation(len(batches)):
        yield batches[index]


def _trainable(model: nn.Module, config: TextConfig) -> nn.Module:
    """The model with only those weights requiring gradients that the method fits."""
    if config.method == "lora":
        import peft  # slow to import, and of use here alone

        settings = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            lora_dropout=0.05,
            target_modules="all-linear",
        )
        return cast(nn.Module, peft.get_peft_model(cast(Any, model), settings))
    model.requires_grad_(config.method == "full")
    if config.method == "top_layers":
        for layer in _layers(model)[-config.top_layers :]:
            layer.requires_grad_(True)
    return model


def _layers(model: nn.Module) -> nn.ModuleList:
    """The model's stack of layers: its longest list of modules."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise TrainerError(
            f"{type(model).__name__} has no stack of layers, so top_layers cannot be fitted; "
            "choose text.method frozen, full or lora"
        )
    return max(stacks, key=len)
