"""Item factors for `model.taste`, by alternating least squares.

Of ratings r of users u and items i, with the residual e = r - level - b_i - b_u,

    min  sum (e - p_u · q_i)² + penalty (sum |p_u|² + sum |q_i|²),

where for fixed item factors each user's are a ridge regression's, and the other way round (Zhou et
al. 2008, "Large-Scale Parallel Collaborative Filtering for the Netflix Prize", section 3; without
their weights by count).
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from model.features import ITEM_DAMPING, USER_DAMPING
from model.ids import low_half
from model.network import Inputs, NetworkConfig, bucket, tensors
from model.taste import COLUMNS, Taste
from trainer.baselines import fit_damped_bias, predict_damped_bias
from trainer.metrics import Floats

Rows = NDArray[np.int64]  # row numbers

PENALTY = 12.0  # ratings' worth of no factors at all
_SWEEPS = 8  # users, then items
_MOST = 2_000_000  # newest ratings that factors are fitted to
_AT_ONCE = 200_000  # ratings whose products are held at one time
_CHAIN = (0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of rows at which factors are fitted
_TOLD = 8_192  # rows at a time


def fit_taste(
    config: NetworkConfig, inputs: Inputs, rating: Floats, rows: Rows, seed: int
) -> Taste:
    """A taste of `config.factors` factors, fitted to `rows` of rated inputs, oldest first."""
    rows = rows[-_MOST:]
    taste = Taste(config.buckets, config.factors)
    if not len(rows):
        return taste
    users, buckets = inputs.users[rows], bucket(low_half(inputs.items[rows]), config.buckets)
    bias = fit_damped_bias(users, buckets, rating[rows], USER_DAMPING, ITEM_DAMPING)
    residual = rating[rows] - predict_damped_bias(bias, users, buckets)
    user, item = np.searchsorted(bias.users, users), np.searchsorted(bias.items, buckets)
    by_user, by_item = _Side.of(user, item), _Side.of(item, user)
    factors = np.random.default_rng(seed).normal(0, 0.1, (len(bias.items), config.factors))
    for _ in range(_SWEEPS):
        people = by_user.solve(factors, residual)
        factors = by_item.solve(people, residual)
    where = torch.from_numpy(bias.items.astype(np.int64))
    taste.factors[where] = torch.from_numpy(factors.astype(np.float32))
    taste.offsets[where] = torch.from_numpy(bias.item_bias.astype(np.float32))
    taste.level.fill_(bias.mean)
    return taste


def told(taste: Taste, config: NetworkConfig, inputs: Inputs, rows: Rows) -> NDArray[np.float32]:
    """What a taste says of rows (n): the columns (n, 4) of `model.taste`."""
    parts = [np.empty((0, len(COLUMNS)), np.float32)]
    for begin in range(0, len(rows), _TOLD):
        with torch.no_grad():
            read = tensors(config, inputs.take(rows[begin : begin + _TOLD]))
            parts.append(taste(*read.folded(config)).numpy())
    return np.concatenate(parts)


def told_ahead(
    config: NetworkConfig, inputs: Inputs, rating: Floats, rows: Rows, seed: int
) -> NDArray[np.float32]:
    """What tastes of older ratings said of rows (n), oldest first: columns (n, 4).

    Each span of rows is told by factors of the rows before it, so that no row's own rating is in
    what is said of it; nan for the first span, before which there is nothing.
    """
    said = np.full((len(rows), len(COLUMNS)), np.nan, np.float32)
    ends = [int(len(rows) * share) for share in _CHAIN]
    for begin, end in pairwise(ends):
        if begin and end > begin:
            taste = fit_taste(config, inputs, rating, rows[:begin], seed)
            said[begin:end] = told(taste, config, inputs, rows[begin:end])
    return said


class _Side:
    """The rows of each user, or of each item, side by side."""

    def __init__(self, order: NDArray[np.intp], begins: NDArray[np.intp], other: Rows) -> None:
        self._order, self._begins, self._other = order, begins, other

    @classmethod
    def of(cls, one: NDArray[np.intp], other: NDArray[np.intp]) -> "_Side":
        """Of rows (n) that belong to `one` (numbers without a gap) and name an `other`."""
        order = np.argsort(one, kind="stable")
        begins = np.flatnonzero(np.r_[True, np.diff(one[order]) != 0])
        return cls(order, begins, other[order])

    def solve(self, factors: Floats, residual: Floats) -> Floats:
        """The factors of this side that leave the least, given the other side's."""
        count = factors.shape[1]
        found = np.empty((len(self._begins), count))
        ends = np.append(self._begins[1:], len(self._order))
        first = 0
        while first < len(found):
            begin = self._begins[first]
            last = max(int(np.searchsorted(ends, begin + _AT_ONCE, "right")), first + 1)
            rows = slice(begin, ends[last - 1])
            begins = self._begins[first:last] - begin
            known = factors[self._other[rows]]  # (n, k)
            products = (known[:, :, None] * known[:, None, :]).reshape(len(known), -1)
            gram = np.add.reduceat(products, begins).reshape(-1, count, count)
            right = np.add.reduceat(known * residual[self._order[rows], None], begins)
            ridge = gram + PENALTY * np.eye(count)
            found[first:last] = np.linalg.solve(ridge, right[..., None])[..., 0]
            first = last
        return found
