"""How good predictions are, on the same rows for every model.

Two questions are kept apart everywhere: (a) what will this user rate this item, before the review
exists (`Scores` of ratings), and (b) how many stars does this review's text mean (`TextScores`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.ids import Hashes

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

HISTORY_BUCKETS: tuple[tuple[str, int, float], ...] = (
    ("0", 0, 0),
    ("1-2", 1, 2),
    ("3-9", 3, 9),
    ("10+", 10, np.inf),
)
"""Name, least and most ratings that a user had given (or an item had got) before the row."""

RELIABILITY_BINS = 10


@dataclass(frozen=True)
class Scores:
    """Errors of predicted ratings; NaN when there are no rows."""

    rows: int
    rmse: float
    mse: float
    mae: float


@dataclass(frozen=True)
class Evaluation:
    """One model on the common rows: over all of them, and by the user's history."""

    all: Scores
    buckets: dict[str, Scores]


@dataclass(frozen=True)
class Calibration:
    """Whether probabilities mean what they say."""

    ece: float  # expected calibration error of P(stars ≥ k), over k = 2..5
    coverage: float  # share of ratings within their interval
    width: float  # mean width of the interval, in stars
    log_loss: float
    bins: list[tuple[float, float, int]]  # mean predicted probability, observed share, rows


@dataclass(frozen=True)
class Chance:
    """What a calibrated model shows by chance on as many rows: worse than this, it is none."""

    ece: float
    coverage: float


@dataclass(frozen=True)
class Difference:
    """Mean squared error of one model minus another's on the same rows, with its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class TextScores:
    """Question (b): stars read off a review's text."""

    rows: int
    rmse: float
    mae: float
    accuracy: float
    macro_f1: float
    off_by_one: float  # share of rows whose likeliest stars are at most one off


def scores(rating: Floats, predicted: Floats) -> Scores:
    """RMSE, MSE and MAE of predictions (n) of true ratings (n)."""
    if not len(rating):
        return Scores(0, np.nan, np.nan, np.nan)
    error = predicted - rating
    mse = float(np.mean(error**2))
    return Scores(len(rating), mse**0.5, mse, float(np.mean(np.abs(error))))


def shown(*numbers: float) -> list[str]:
    """Figures for people; a dash for what there is none of."""
    return ["–" if np.isnan(number) else f"{number:.4f}" for number in numbers]


def shown_difference(found: Mapping[str, Any] | None) -> str:
    """A `Difference` as a mapping, for people; of one without a mean its interval alone.

    A dash where nothing tells of the interval (NaN, or null of JSON); empty for no difference.
    """
    if not found:
        return ""
    mean, low, high = (found.get(name) for name in ("mean", "low", "high"))
    known = low is not None and not np.isnan(low)
    ends = f"[{low:+.4f}, {high:+.4f}]" if known else "–"
    return ends if mean is None else f"{mean:+.4f} {ends}"


def rmse(rating: Floats, predicted: Floats) -> float:
    """RMSE of predictions (n), clipped to 1..5, of true ratings (n); NaN when there are no rows."""
    return scores(rating, np.clip(predicted, 1, 5)).rmse


def log_loss(distribution: Floats | Singles, labels: Singles) -> float:
    """Mean cross entropy of star distributions (n, 5) against those of true ratings (n, 5)."""
    return -float((labels * np.log(np.maximum(distribution, 1e-9))).sum(1).mean())


def evaluate(
    rating: Floats, history: NDArray[np.float64], models: Mapping[str, Floats]
) -> dict[str, Evaluation]:
    """Every model on the same rows.

    Args:
        rating: (n) true ratings.
        history: (n) ratings that the row's user had given before it.
        models: name to predicted ratings (n); they are clipped to 1..5.

    Raises:
        ValueError: a model has predictions for other rows.
    """
    masks = by_history(history)
    results: dict[str, Evaluation] = {}
    for name, raw in models.items():
        if raw.shape != rating.shape:
            raise ValueError(f"{name} predicts {raw.shape}, the rows are {rating.shape}")
        predicted = np.clip(raw, 1, 5)
        results[name] = Evaluation(
            scores(rating, predicted),
            {bucket: scores(rating[mask], predicted[mask]) for bucket, mask in masks.items()},
        )
    return results


def by_history(history: Floats) -> dict[str, NDArray[np.bool_]]:
    """Masks (n) of rows by how many ratings (n) there were before."""
    return {name: (history >= low) & (history <= high) for name, low, high in HISTORY_BUCKETS}


def by_rating(rating: Floats) -> dict[str, NDArray[np.bool_]]:
    """Masks (n) of rows by their rounded rating."""
    stars = np.clip(np.rint(rating), 1, 5)
    return {f"{star} stars": stars == star for star in range(1, 6)}


def paired(
    rating: Floats,
    model: Floats,
    other: Floats,
    *,
    confidence: float,
    resamples: int,
    seed: int,
    users: Hashes | None = None,
) -> Difference:
    """Squared error of `model` minus that of `other`, with a paired bootstrap interval.

    All (n). The percentile interval of the mean over rows drawn with replacement (Efron and
    Tibshirani 1993, chapter 13); below zero means that `model` is better. With `users`, whose the
    rows are, whole users are drawn (Davison and Hinkley 1997, section 3.8): ratings of one user go
    together, so that rows alone seem to tell more than they do. Of one row or user alone nothing
    is told, and the interval's ends are NaN.
    """
    gap = (np.clip(model, 1, 5) - rating) ** 2 - (np.clip(other, 1, 5) - rating) ** 2
    total, rows = gap, np.ones(len(gap))
    if users is not None:
        _, whose = np.unique(users, return_inverse=True)
        total, rows = np.bincount(whose, gap), np.bincount(whose)
    if len(total) < 2:
        return Difference(float(gap.mean()), np.nan, np.nan)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, len(total), len(total)) for _ in range(resamples))
    means = [total[drawn].sum() / rows[drawn].sum() for drawn in draws]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(gap.mean()), float(low), float(high))


def calibration(rating: Floats, distribution: Floats, low: Floats, high: Floats) -> Calibration:
    """Calibration of distributions (n, 5) and of intervals (n) against true ratings (n).

    The expected calibration error (Naeini et al. 2015) is taken of the four cumulative events
    "at least k stars", so that it knows stars are ordered. A rating between two stars is a share of
    each, as it is learnt: of 4.5 "at least five" happened by half.
    """
    claimed = distribution[:, ::-1].cumsum(1)[:, ::-1][:, 1:].ravel()  # (n·4) P(stars ≥ 2..5)
    reached = np.clip(rating[:, None] - np.arange(1, 5), 0, 1)  # (n, 4)
    edge = np.minimum((claimed * RELIABILITY_BINS).astype(np.int64), RELIABILITY_BINS - 1)
    rows = np.bincount(edge, minlength=RELIABILITY_BINS)
    some = np.maximum(rows, 1)
    mean_claimed = np.bincount(edge, claimed, RELIABILITY_BINS) / some
    mean_happened = np.bincount(edge, reached.ravel(), RELIABILITY_BINS) / some
    ece = float(np.sum(rows * np.abs(mean_claimed - mean_happened)) / max(rows.sum(), 1))
    labels = -np.diff(reached, prepend=1, append=0).astype(np.float32)
    return Calibration(
        ece=ece,
        coverage=float(np.mean((rating >= low) & (rating <= high))),
        width=float(np.mean(high - low)),
        log_loss=log_loss(distribution, labels),
        bins=[
            (float(p), float(o), int(n))
            for p, o, n in zip(mean_claimed, mean_happened, rows, strict=True)
            if n
        ],
    )


def calibrated_by_chance(
    distribution: Floats,
    low: Floats,
    high: Floats,
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> Chance:
    """The error and the coverage that distributions (n, 5) and intervals (n) have where they hold.

    Of ratings that are drawn from the distributions themselves (Bröcker and Smith 2007,
    "Increasing the Reliability of Reliability Diagrams", section 3), the share `confidence` errs no
    more, and as many are covered no less. Few rows say little: thirty, on which a model is exactly
    right, show an error above a tenth once in four times.
    """
    generator = np.random.default_rng(seed)
    reached = distribution.cumsum(1)[:, :-1]
    draws = (generator.random((len(reached), 1)) for _ in range(resamples))
    found = [
        calibration(1.0 + (drawn > reached).sum(1), distribution, low, high) for drawn in draws
    ]
    return Chance(
        float(np.quantile([each.ece for each in found], confidence)),
        float(np.quantile([each.coverage for each in found], 1 - confidence)),
    )


def text_scores(rating: Floats, distribution: Floats) -> TextScores:
    """Question (b): star distributions (n, 5) read off texts against true ratings (n)."""
    return class_scores(rating, distribution @ np.arange(1, 6), distribution.argmax(1) + 1)


def class_scores(rating: Floats, expected: Floats, stars: NDArray[np.int64]) -> TextScores:
    """Question (b): expected ratings (n) and likeliest stars (n) against true ratings (n).

    Macro-F1 is the mean of 2·hits / (claimed + true) over the stars that occur, each alike; a
    rating between two stars is rounded.
    """
    error = scores(rating, np.clip(expected, 1, 5))
    if not len(rating):
        return TextScores(0, error.rmse, error.mae, np.nan, np.nan, np.nan)
    truth = np.clip(np.rint(rating), 1, 5).astype(np.int64)
    f1 = [
        2 * np.sum((stars == star) & (truth == star)) / (np.sum(stars == star) + count)
        for star, count in zip(*np.unique(truth, return_counts=True), strict=True)
    ]
    return TextScores(
        error.rows,
        error.rmse,
        error.mae,
        float(np.mean(stars == truth)),
        float(np.mean(f1)),
        float(np.mean(np.abs(stars - truth) <= 1)),
    )
