"""Boosted trees of what the running bias leaves, as LightGBM fits them, for `model.trees`.

How they grow and how many there are is chosen by forward chaining over time: fit on the past, test
on what comes next. Several ensembles of other seeds are averaged, as bagging has it (Breiman 1996).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightgbm
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.trees import Trees
from trainer.metrics import Floats

Features = NDArray[np.float32]

DEPTH = 6  # of trees; served as full binary trees, so each level doubles what they hold
ROUNDS = 160  # most trees of an ensemble
_ENSEMBLES = 2
_TOLD = 4_096  # rows at a time
_TRIED: tuple[Mapping[str, float], ...] = (
    {"num_leaves": 4, "min_data_in_leaf": 50, "feature_fraction": 0.3, "lambda_l2": 30.0},
    {"num_leaves": 8, "min_data_in_leaf": 30, "feature_fraction": 0.3, "lambda_l2": 10.0},
    {"num_leaves": 16, "min_data_in_leaf": 50, "feature_fraction": 0.3, "lambda_l2": 30.0},
)
_FIXED: Mapping[str, Any] = {
    "objective": "l2",
    "learning_rate": 0.07,
    "max_depth": DEPTH,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "deterministic": True,
    "verbosity": -1,
}


@dataclass(frozen=True)
class Grown:
    """How trees are to grow."""

    settings: Mapping[str, float]
    rounds: int  # 0: none were of use


def choose(features: Features, target: Floats, ends: list[int], seed: int) -> Grown:
    """The settings and the number of trees with the least squared error ahead.

    Args:
        features: (n, F), oldest first; nan: missing.
        target: (n) what the trees are to say.
        ends: row numbers; the chain fits on what is before each, and tests up to the next.
        seed: of what is drawn.
    """
    spread = [float((target[start:end] ** 2).mean()) for start, end in pairwise(ends)]
    rows = [end - start for start, end in pairwise(ends)]
    best, found = float(np.average(spread, weights=rows)), Grown(_TRIED[0], 0)
    for settings in _TRIED:
        curves: list[list[float]] = []
        for start, end in pairwise(ends):
            curve: dict[str, Any] = {}
            known = lightgbm.Dataset(features[:start], target[:start])
            ahead = lightgbm.Dataset(features[start:end], target[start:end], reference=known)
            lightgbm.train(
                _parameters(settings, seed),
                known,
                num_boost_round=ROUNDS,
                valid_sets=[ahead],
                callbacks=[lightgbm.record_evaluation(curve)],
            )
            curves.append(curve["valid_0"]["l2"])
        mean = np.average(np.array(curves), axis=0, weights=rows)
        if mean.min() < best:
            best, found = float(mean.min()), Grown(settings, int(mean.argmin()) + 1)
    return found


def grow(features: Features, target: Floats, how: Grown, seed: int) -> Trees | None:
    """Trees of rows (n, F) and what they are to say (n); None where none are of use."""
    if not how.rounds:
        return None
    found: list[Any] = []
    for number in range(_ENSEMBLES):
        booster = lightgbm.train(
            _parameters(how.settings, seed + number),
            lightgbm.Dataset(features, target),
            num_boost_round=how.rounds,
        )
        found += booster.dump_model()["tree_info"]
    trees = Trees(len(found), DEPTH)
    for number, each in enumerate(found):
        _place(trees, number, 0, each["tree_structure"], features.shape[1])
    trees.value /= _ENSEMBLES
    return trees


@torch.no_grad()
def values(trees: Trees, features: Features) -> Floats:
    """What trees say of rows (n, F), some at a time."""
    rows = torch.from_numpy(features)
    return np.concatenate([trees(part).double().numpy() for part in rows.split(_TOLD)])


def _parameters(settings: Mapping[str, float], seed: int) -> dict[str, Any]:
    """LightGBM's, with as many threads as torch has."""
    threads = torch.get_num_threads()
    return {**_FIXED, **settings, "seed": seed, "num_threads": threads, "metric": "l2"}


def _place(trees: Trees, tree: int, node: int, found: Mapping[str, Any], columns: int) -> None:
    """Put a node of LightGBM's, and all below it, where the full tree has it."""
    leaf = "leaf_value" in found
    trees.value[tree, node] = found["leaf_value" if leaf else "internal_value"]
    if node >= trees.threshold.shape[1]:
        return
    if leaf:  # all below is this leaf, whatever is asked
        children = (found, found)
    else:
        missing_left = found["default_left"]
        if found["missing_type"] == "None":  # LightGBM then takes it for 0
            missing_left = found["threshold"] >= 0
        trees.feature[tree, node] = found["split_feature"] + (0 if missing_left else columns)
        trees.threshold[tree, node] = _single(found["threshold"])
        children = (found["left_child"], found["right_child"])
    for side, child in enumerate(children):
        _place(trees, tree, 2 * node + 1 + side, child, columns)


def _single(threshold: float) -> Tensor:
    """The largest single that is not above a threshold: singles go the same way at both."""
    rounded = torch.tensor(threshold, dtype=torch.float32)
    if float(rounded) > threshold:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf))
    return rounded
