"""Rows split by time: what is tested lies after what was learnt from."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.config import SplitConfig


@dataclass(frozen=True)
class Split:
    """Row numbers of three spans of time, oldest first; together they are all rows."""

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
    test = rows - round(rows * config.test_share)
    validation = test - round(rows * config.validation_share)
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
