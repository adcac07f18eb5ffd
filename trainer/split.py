"""Rows split by time, what is tested after what was learnt from; and samples of train rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.config import SampleConfig, SplitConfig
from trainer.metrics import Floats


@dataclass(frozen=True)
class Split:
    """Row numbers of three spans of time, oldest first; together all rows, but for a sample."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def by_time(time: NDArray[np.int64], config: SplitConfig) -> Split:
    """Split rows by time; rows of one instant keep their order.

    Args:
        time: (n) milliseconds since the epoch.
        config: the shares of validation and test; train has the rest.

    Shops date by the day, so a cut may part rows of one instant. What is predicted has always been
    replayed before what comes after it, so no row sees its own answer for that.
    """
    order = np.argsort(time, kind="stable")
    rows = len(order)
    test = max(rows - max(round(rows * config.test_share), 1), 0)  # a small share of few is none
    validation = max(test - max(round(rows * config.validation_share), 1), 0)
    return Split(order[:validation], order[validation:test], order[test:])


def by_instant(time: NDArray[np.int64], config: SplitConfig) -> Split:
    """Split rows by time so that no cut parts rows of one instant.

    As `by_time`, with each cut moved to the nearer end of the instant that it would part; a span
    that would be left without a row gets the instant beside it.
    """
    order = np.argsort(time, kind="stable")
    ordered = time[order]
    edges = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [len(order)]])
    test = len(order) - round(len(order) * config.test_share)
    validation = test - round(len(order) * config.validation_share)
    inner = edges[1:-1]
    if len(inner) < 2:  # too few instants for three spans
        return by_time(time, config)
    last = int(np.clip(np.argmin(np.abs(inner - test)), 1, len(inner) - 1))
    first = int(np.clip(np.argmin(np.abs(inner - validation)), 0, last - 1))
    begin, end = int(inner[first]), int(inner[last])
    return Split(order[:begin], order[begin:end], order[end:])


def sample(
    user: NDArray[np.uint64], rating: Floats, config: SampleConfig, seed: int
) -> NDArray[np.int64]:
    """Which of n rows, oldest first, are learnt from; in their order.

    Args:
        user: (n) whose row it is.
        rating: (n) stars.
        config: how many, and by what.
        seed: of what is drawn.

    A sample by rarity draws without replacement, with odds that fall with how frequent a row's
    stars are: the largest of u^(1/w) (Efraimidis and Spirakis 2006, "Weighted random sampling with
    a reservoir", section 2). Samples of one seed are nested: more rows keep those of fewer.
    """
    rows = len(rating)
    if not config.rows or config.rows >= rows:
        return np.arange(rows)
    if config.by == "newest":
        rank = -np.arange(rows, dtype=np.float64)
    elif config.by == "rarity":
        stars = np.clip(np.rint(rating), 1, 5).astype(np.int64)
        weight = 1 / np.bincount(stars, minlength=6)[stars]
        rank = -np.log(np.random.default_rng(seed).random(rows)) / weight  # least is drawn first
    else:
        newer = np.arange(rows)[::-1]
        order = np.lexsort((newer, user))  # by user, newest first
        begins = np.r_[True, np.diff(user[order].astype(np.uint64)) != 0]
        turn = np.arange(rows) - np.maximum.accumulate(np.where(begins, np.arange(rows), 0))
        rank = np.empty(rows)
        rank[order] = turn + newer[order] / (2 * rows)  # of one turn, the newest first
    chosen = np.argpartition(rank, config.rows)[: config.rows]
    return np.sort(chosen)
