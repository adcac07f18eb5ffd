"""What a rating model has to beat, each on the same rows.

The running mean and the running damped bias are features of every row (`model.features`), so they
need no fit here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import lightgbm
import numpy as np
from numpy.typing import NDArray

from model import features
from model.features import PRIOR_COUNT, PRIOR_HISTOGRAM
from trainer.metrics import Floats

USER_DAMPING = 5.0  # ratings; as LensKit's bias model takes by default
ITEM_DAMPING = 5.0

_ROUNDS = 500  # most trees; early stopping ends before
_PATIENCE = 30  # trees without a better validation error


@dataclass(frozen=True)
class DampedBias:
    """Global mean, and shrunken offsets of users and items as they were at the end of training.

    `users` and `items` are sorted ids (m); an id that is not among them has the offset 0.
    """

    mean: float
    users: NDArray[np.uint64]
    user_bias: Floats
    items: NDArray[np.uint64]
    item_bias: Floats


def fit_damped_bias(
    user: NDArray[np.uint64],
    item: NDArray[np.uint64],
    rating: Floats,
    user_damping: float = USER_DAMPING,
    item_damping: float = ITEM_DAMPING,
) -> DampedBias:
    """Fit offsets one after the other: items', then users' on what is left.

    b_i = Σ(r − μ) / (n_i + d) and b_u = Σ(r − μ − b_i) / (n_u + d), as in Koren 2010, "Factor in
    the neighbors", section 2.1. Users, items and ratings (n); dampings in ratings.
    """
    mean = float(rating.mean())
    items, item_row = np.unique(item, return_inverse=True)
    users, user_row = np.unique(user, return_inverse=True)
    left = rating - mean
    item_bias = np.bincount(item_row, left) / (np.bincount(item_row) + item_damping)
    left = left - item_bias[item_row]
    user_bias = np.bincount(user_row, left) / (np.bincount(user_row) + user_damping)
    return DampedBias(mean, users, user_bias, items, item_bias)


def predict_damped_bias(
    bias: DampedBias, user: NDArray[np.uint64], item: NDArray[np.uint64]
) -> Floats:
    """Predicted ratings (n) of users (n) and items (n)."""
    return (
        bias.mean
        + _look_up(bias.users, bias.user_bias, user)
        + _look_up(bias.items, bias.item_bias, item)
    )


def _look_up(keys: NDArray[np.uint64], values: Floats, wanted: NDArray[np.uint64]) -> Floats:
    row = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[row] == wanted, values[row], 0.0)


def fit_lightgbm(
    features: tuple[NDArray[np.float32], NDArray[np.float32]],
    rating: tuple[Floats, Floats],
    *,
    seed: int,
    threads: int,
) -> lightgbm.Booster:
    """Boosted trees on feature rows: (train, validation) of features (n, F) and of ratings (n).

    The running bias is among the features. Early stopping on validation squared error.
    """
    train = lightgbm.Dataset(features[0], rating[0])
    validation = lightgbm.Dataset(features[1], rating[1], reference=train)
    return lightgbm.train(
        {
            "objective": "l2",
            "metric": "l2",
            "learning_rate": 0.03,
            "num_leaves": 15,
            "min_data_in_leaf": 30,
            "bagging_fraction": 0.7,
            "bagging_freq": 1,
            "feature_fraction": 0.5,
            "lambda_l2": 10.0,
            "seed": seed,
            "deterministic": True,
            "num_threads": threads,
            "verbosity": -1,
        },
        train,
        num_boost_round=_ROUNDS,
        valid_sets=[validation],
        callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False)],
    )


def running_bias(rows: NDArray[np.float32]) -> Floats:
    """The running damped bias (n) without newcomers' level, of rows of features (n, F)."""
    parts = [features.INDEX[name] for name in ("global_mean", "item_bias", "user_bias")]
    return rows[:, parts].astype(np.float64).sum(1).clip(1, len(PRIOR_HISTOGRAM))


def running_baselines(
    users: Sequence[str], items: Sequence[str], rating: Floats
) -> tuple[Floats, Floats]:
    """The running damped bias and the running mean before each rating, both (n), in order.

    The formula and constants are those of `model.features`, without newcomers' level; here every
    rating counts at once, where live item states follow a moment later.
    """
    prior = float(PRIOR_HISTOGRAM @ np.arange(1, len(PRIOR_HISTOGRAM) + 1))
    total, count = prior, PRIOR_COUNT
    item_sums: dict[str, tuple[float, int]] = {}
    user_sums: dict[str, tuple[float, int]] = {}
    bias, means = np.empty(len(rating)), np.empty(len(rating))
    for row, (user, item, stars) in enumerate(zip(users, items, rating.tolist(), strict=True)):
        mean = means[row] = total / count
        item_sum, item_count = item_sums.get(item, (0.0, 0))
        user_sum, user_count = user_sums.get(user, (0.0, 0))
        item_bias = (item_sum - item_count * mean) / (item_count + features.ITEM_DAMPING)
        user_bias = user_sum / (user_count + features.USER_DAMPING)
        bias[row] = min(max(mean + item_bias + user_bias, 1.0), 5.0)
        total, count = total + stars, count + 1
        item_sums[item] = item_sum + stars, item_count + 1
        user_sums[user] = user_sum + stars - mean - item_bias, user_count + 1
    return bias, means
