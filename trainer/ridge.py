"""Ridge regression, and how much it is shrunk: by forward chaining over time.

The past is fitted and what comes next is tested, as when the model serves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.metrics import Floats

_PENALTIES = (100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5, math.inf)  # rows' worth of "no correction"
_DOUBT = 0.5  # standard errors: with few rows, the stronger penalty of two that are as good


@dataclass(frozen=True)
class _Sums:
    """What a regression asks of its rows: computed once, whatever the penalty."""

    centre: Floats  # (c): the columns' means
    level: float  # the target's mean
    gram: Floats  # (c, c): of centred columns
    right: Floats  # (c): of them and the target


def solve(design: Floats, target: Floats, penalty: float) -> tuple[Floats, float]:
    """Weights (c) and intercept of columns (n, c) for a target (n).

    The intercept is not penalised; by an infinite penalty both are zero.
    """
    return _solve(_sums(design, target), penalty)


def _sums(design: Floats, target: Floats) -> _Sums:
    centre, level = design.mean(0), float(target.mean())
    centred = design - centre
    return _Sums(centre, level, centred.T @ centred, centred.T @ (target - level))


def _solve(sums: _Sums, penalty: float) -> tuple[Floats, float]:
    count = len(sums.centre)
    if math.isinf(penalty):
        return np.zeros(count), 0.0
    weights = np.linalg.solve(sums.gram + penalty * np.eye(count), sums.right)
    return np.asarray(weights, np.float64), float(sums.level - sums.centre @ weights)


def choose(design: Floats, target: Floats, ends: Sequence[int]) -> float:
    """The penalty with the least squared error ahead.

    Of penalties that are as good as the best within `_DOUBT` standard errors, the largest.

    Args:
        design: (n, c), oldest first.
        target: (n).
        ends: row numbers; the chain fits on what is before each, and tests up to the next.
    """
    ahead: list[list[Floats]] = [[] for _ in _PENALTIES]
    for start, end in pairwise(ends):
        sums = _sums(design[:start], target[:start])
        for penalty, found in zip(_PENALTIES, ahead, strict=True):
            weights, intercept = _solve(sums, penalty)
            found.append((target[start:end] - design[start:end] @ weights - intercept) ** 2)
    losses = [np.concatenate(found) for found in ahead]
    best = min(losses, key=np.mean)
    gaps = [loss - best for loss in losses]
    doubt = [_DOUBT * gap.std() / math.sqrt(len(gap)) for gap in gaps]
    return max(
        penalty
        for penalty, gap, allowed in zip(_PENALTIES, gaps, doubt, strict=True)
        if gap.mean() <= allowed
    )
