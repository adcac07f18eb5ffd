"""The star head: how many stars does a review's text mean (question b).

The head is a multinomial logistic regression on the encoder's unit vectors. `frozen` fits it alone.
Every other method first fits it, then fine-tunes encoder and head together from there (linear
probing, then fine-tuning: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features"). The
head is not fitted anew to the new vectors: they know the texts that they were fitted to, so it
would be too sure of itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.encoder import StarHead, TextEncoder
from model.state import STARS
from trainer import checkpoints
from trainer.adapt import adapt
from trainer.config import AdaptConfig, Method, TextConfig
from trainer.fine_tune import Cost, Labelled, fine_tune, joined, taken
from trainer.metrics import Floats, TextScores, log_loss, text_scores
from trainer.progress import OnProgress, unseen
from trainer.tracking import Note, unnoted

Vectors = NDArray[np.float32]

TRAIN, VALIDATION, TEST = 0, 1, 2
"""Spans of time that a text belongs to."""

_L2_TRIED = (3e-4, 1e-4, 3e-5, 1e-5, 3e-6)  # strongest first: each fit starts from the one before
_PROBED = 2_000  # newest texts that a head is fitted to before the encoder is fine-tuned
_CHUNK = 256  # texts between two signs of progress


@dataclass(frozen=True)
class ReviewTexts:
    """n rated review texts, oldest first."""

    texts: Sequence[str]  # as `encoder.review_text` joins title and text
    rating: Floats  # (n)
    span: NDArray[np.int8]  # (n): TRAIN, VALIDATION or TEST
    unrated: Sequence[str] = ()  # texts without stars


@dataclass(frozen=True)
class TextModel:
    """An encoder with its star head, and how well it reads the stars of the newest texts."""

    encoder: TextEncoder
    head: StarHead  # of all texts
    judged: StarHead  # of all but TEST
    scores: TextScores  # of `judged` on TEST
    texts: int
    method: Method
    l2: float
    cost: Cost  # of fine-tuning; the head alone when frozen


def soft_labels(rating: Floats) -> NDArray[np.float32]:
    """Ratings (n) as distributions over stars (n, 5): 3.5 is half a three and half a four."""
    below = np.clip(np.floor(rating), 1, STARS - 1).astype(np.int64)
    share = (rating - below).astype(np.float32)
    labels = np.zeros((len(rating), STARS), np.float32)
    rows = np.arange(len(rating))
    labels[rows, below - 1] = 1 - share
    labels[rows, below] = share
    return labels


def settled(config: TextConfig, in_service: bool) -> TextConfig:
    """The settings with `auto` made a method; `in_service`: the encoder is that of a model."""
    if config.method != "auto":
        return config
    return untouched(config) if in_service else config.model_copy(update={"method": "full"})


def untouched(config: TextConfig) -> TextConfig:
    """The settings by which the encoder stays as it is: the head is fitted alone."""
    return config.model_copy(update={"method": "frozen", "adapt": AdaptConfig(epochs=0)})


def checkpoint_of(
    root: Path, reviews: ReviewTexts, encoder: TextEncoder, config: TextConfig, seed: int
) -> Path:
    """The checkpoint of a fit, below `root`."""
    settings = config.model_dump(mode="json")
    rows = [reviews.texts, reviews.rating, reviews.span, reviews.unrated]
    return checkpoints.named(root, [encoder.hash, settings, seed, *rows])


def fit(
    reviews: ReviewTexts,
    encoder: TextEncoder,
    config: TextConfig,
    folder: Path,
    seed: int,
    on_progress: OnProgress,
    checkpoint: Path | None = None,
    note: Note = unnoted,
) -> TextModel:
    """Fit the star head, and the encoder when `config.method` says so.

    Args:
        reviews: the texts that may be used.
        encoder: to start from; it is not changed.
        config: the method and its settings.
        folder: below which a new encoder is written.
        seed: of the order of texts.
        on_progress: called as texts are encoded.
        checkpoint, note: as `fine_tune` has them.

    Raises:
        EncoderError, TrainerError: the encoder does not take the method.
    """
    config = settled(config, in_service=False)
    if config.adapt.epochs:
        known = taken(reviews.texts, np.flatnonzero(reviews.span != TEST))
        place = folder / "adapted"
        kept = None if checkpoint is None else checkpoint.with_suffix(".adapted")
        encoder = adapt(
            encoder, [*known, *reviews.unrated], config.adapt, place, seed, on_progress, kept
        )
    probed = reviews if config.method == "frozen" else _known(reviews, _PROBED)
    vectors = encode(encoder, probed.texts, on_progress)
    head, l2 = _probe(vectors, probed, config.l2)
    test = reviews.span == TEST
    if config.method == "frozen":
        found = text_scores(reviews.rating[test], head.stars(vectors[test]))
        whole = fit_star_head(vectors, soft_labels(reviews.rating), l2, head)
        cost = Cost(STARS * (encoder.hidden + 1), 0)
        return TextModel(encoder, whole, head, found, len(vectors), config.method, l2, cost)
    train, validation = (_labelled(reviews, span) for span in (TRAIN, VALIDATION))
    if config.pseudo_labels and reviews.unrated:
        train = joined(train, _pseudo_labelled(reviews.unrated, encoder, head, config))
    place = folder / "tuned"
    tuned = fine_tune(
        train, validation, encoder, head, config, place, seed, on_progress, checkpoint, note
    )
    head = tuned.head or _head_on(tuned.encoder, joined(train, validation), l2)
    newest = taken(reviews.texts, np.flatnonzero(test))
    read = head.stars(encode(tuned.encoder, newest, on_progress))
    found = text_scores(reviews.rating[test], read)
    count = len(reviews.texts)
    return TextModel(tuned.encoder, head, head, found, count, config.method, l2, tuned.cost)


def _known(reviews: ReviewTexts, count: int) -> ReviewTexts:
    """The newest texts but for TEST, at most `count`."""
    rows = np.flatnonzero(reviews.span != TEST)[-count:]
    texts = taken(reviews.texts, rows)
    return ReviewTexts(texts, reviews.rating[rows], reviews.span[rows])


def validate(
    reviews: ReviewTexts, encoder: TextEncoder, config: TextConfig, folder: Path, seed: int
) -> Floats:
    """Expected ratings of VALIDATION texts (n), by an encoder and a head fitted to TRAIN."""
    config = settled(config, in_service=False)
    train, validation = (_labelled(reviews, span) for span in (TRAIN, VALIDATION))
    if config.adapt.epochs:
        place, known = folder / "adapted", [*train.texts, *reviews.unrated]
        encoder = adapt(encoder, known, config.adapt, place, seed, unseen)
    l2 = _L2_TRIED[len(_L2_TRIED) // 2] if config.l2 is None else config.l2
    head = _head_on(encoder, train, l2)
    if config.pseudo_labels and reviews.unrated:
        train = joined(train, _pseudo_labelled(reviews.unrated, encoder, head, config))
    none = Labelled([], np.empty((0, STARS), np.float32))
    watched = validation if config.fine_tune.patience else none
    tuned = fine_tune(train, watched, encoder, head, config, folder, seed, unseen)
    head = tuned.head or _head_on(tuned.encoder, train, l2)
    shares = head.stars(encode(tuned.encoder, validation.texts, unseen))
    return shares @ np.arange(1.0, STARS + 1)


def _head_on(encoder: TextEncoder, rows: Labelled, l2: float) -> StarHead:
    """A head fitted to labelled texts as an encoder reads them."""
    return fit_star_head(encode(encoder, rows.texts, unseen), rows.labels, l2)


def _pseudo_labelled(
    texts: Sequence[str], encoder: TextEncoder, head: StarHead, config: TextConfig
) -> Labelled:
    """Texts of which a head is sure, labelled with what it says of them.

    Lee 2013, "Pseudo-Label", section 2, with soft labels.
    """
    shares = head.stars(encode(encoder, texts, unseen)).astype(np.float32)
    sure = np.flatnonzero(shares.max(1, initial=0) >= config.pseudo_labels)
    return Labelled(taken(texts, sure), shares[sure])


def _labelled(reviews: ReviewTexts, span: int) -> Labelled:
    rows = np.flatnonzero(reviews.span == span)
    texts = taken(reviews.texts, rows)
    return Labelled(texts, soft_labels(reviews.rating[rows]))


def encode(encoder: TextEncoder, texts: Sequence[str], on_progress: OnProgress) -> Vectors:
    """Unit vectors (n, hidden) of texts (n), with signs of progress."""
    parts: list[Vectors] = [np.empty((0, encoder.hidden), np.float32)]
    for start in range(0, len(texts), _CHUNK):
        parts.append(encoder.encode(texts[start : start + _CHUNK]))
        on_progress(min(start + _CHUNK, len(texts)), len(texts))
    return np.concatenate(parts)


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
    """A head of all texts but the newest; `l2` is chosen on validation when it is None.

    Where all texts are of validation, as among the newest of very many, it is the strongest.
    """
    labels = soft_labels(reviews.rating)
    train, validation = reviews.span == TRAIN, reviews.span == VALIDATION
    if l2 is None and not train.any():
        l2 = _L2_TRIED[0]
    if l2 is None:
        losses: list[float] = []
        head = None
        for tried in _L2_TRIED:
            head = fit_star_head(vectors[train], labels[train], tried, head)
            losses.append(log_loss(head.stars(vectors[validation]), labels[validation]))
        l2 = _L2_TRIED[int(np.argmin(losses))]
    known = train | validation
    return fit_star_head(vectors[known], labels[known], l2), l2
