"""Ridge regression, and how much it is shrunk: by forward chaining over time.

The past is fitted and what comes next is tested, as when the model serves.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from trainer.metrics import Floats

_PENALTIES = (100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5, math.inf)  # rows' worth of "no correction"
_DOUBT = 0.5  # standard errors: with few rows, the stronger penalty of two that are as good


def solve(design: Floats, target: Floats, penalty: float) -> tuple[Floats, float]:
    """Weights (c) and intercept of columns (n, c) for a target (n).

    The intercept is not penalised; by an infinite penalty both are zero.
    """
    if math.isinf(penalty):
        return np.zeros(design.shape[1]), 0.0
    centre, level = design.mean(0), target.mean()
    centred = design - centre
    gram = centred.T @ centred + penalty * np.eye(design.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (target - level))
    return weights, float(level - centre @ weights)


def choose(design: Floats, target: Floats, ends: Sequence[int]) -> float:
    """The penalty with the least squared error ahead.

    Of penalties that are as good as the best within `_DOUBT` standard errors, the largest.

    Args:
        design: (n, c), oldest first.
        target: (n).
        ends: row numbers; the chain fits on what is before each, and tests up to the next.
    """
    losses: list[Floats] = []
    for penalty in _PENALTIES:
        ahead: list[Floats] = []
        for start, end in pairwise(ends):
            weights, intercept = solve(design[:start], target[:start], penalty)
            ahead.append((target[start:end] - design[start:end] @ weights - intercept) ** 2)
        losses.append(np.concatenate(ahead))
    best = min(losses, key=np.mean)
    gaps = [loss - best for loss in losses]
    doubt = [_DOUBT * gap.std() / math.sqrt(len(gap)) for gap in gaps]
    return max(
        penalty
        for penalty, gap, allowed in zip(_PENALTIES, gaps, doubt, strict=True)
        if gap.mean() <= allowed
    )
