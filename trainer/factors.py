"""Item factors for `model.taste`, by variational Bayes.

Of ratings r of users u and items i, with e = r - level,

    e = d_u + b_i + p_u · q_i + noise,    (d_u, p_u) ~ N(0, spread),    (b_i, q_i) ~ N(0, drawn).

Given means and covariances of one side, those of the other are a ridge regression's on expected
products (Lim and Teh 2007, "Variational Bayesian approach to movie rating prediction", section 3):
items that are seldom rated stay uncertain, and uncertain users teach items less. The variances are
fitted too, so a factor that the ratings do not prove goes to zero by itself. Factors of users are
held at a variance of one. Moods are not fitted: to all of a user's ratings they are noise.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from model.ids import low_half
from model.network import Inputs, NetworkConfig, bucket, tensors
from model.taste import COLUMNS, Taste
from trainer.metrics import Floats

Rows = NDArray[np.int64]  # row numbers

_SWEEPS = 20  # users, then items
_OFFSETS, _FACTORS = 0.2, 0.03  # of the variance of e, to begin with
_MOST = 2_000_000  # newest ratings that factors are fitted to
_AT_ONCE = 200_000  # ratings whose products are held at one time
_LEAST = 1e-6  # of a variance: where all ratings are told, or none can be
_MOODY = 0.5  # variance of moods, of that of levels
_UNTOLD = 0.5  # at least, of the variance: few ratings seem to be told better than they are
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
    items, item = np.unique(
        bucket(low_half(inputs.items[rows]), config.buckets), return_inverse=True
    )
    _, user = np.unique(inputs.users[rows], return_inverse=True)
    level = float(rating[rows].mean())
    learnt, ridge, damping = _factors(user, item, rating[rows] - level, config.factors, seed)
    where = torch.from_numpy(items.astype(np.int64))
    taste.factors[where] = torch.from_numpy(learnt[:, 1:].astype(np.float32))
    taste.offsets[where] = torch.from_numpy(learnt[:, 0].astype(np.float32))
    taste.level.fill_(level)
    ridge = np.insert(ridge, 1, ridge[0] / _MOODY)
    taste.ridge.copy_(torch.from_numpy(ridge.astype(np.float32)))
    taste.damping.fill_(damping)
    return taste


def _factors(
    user: NDArray[np.intp], item: NDArray[np.intp], left: Floats, count: int, seed: int
) -> tuple[Floats, Floats, float]:
    """Offsets and then factors of items (m, 1 + k), users' ridge (1 + k), the offsets' damping.

    Fitted to what is `left` (n); `user`, `item` (n): numbers without a gap.
    """
    by_user, by_item = _Side(user, item), _Side(item, user)
    noise = variance = max(float(left.var()), _LEAST)
    spread = np.r_[_OFFSETS * variance, np.ones(count)]
    drawn = np.r_[_OFFSETS * variance, np.full(count, _FACTORS * variance)]
    random = np.random.default_rng(seed).normal(0, 0.1, (by_item.size, count))
    means = np.concatenate([np.zeros((by_item.size, 1)), random], 1)
    items = _Normal(means, np.zeros((*means.shape, 1 + count)))
    for _ in range(_SWEEPS):
        people = _posterior(*by_user.sums(items, left), noise, spread)
        spread = people.variance
        gram, right = by_item.sums(people, left)
        items = _posterior(gram, right, noise, drawn)
        # What remains of e - d, whose square is expected to be this; b + p · q explains the rest.
        whole = left**2 - 2 * left * people.mean[user, 0] + people.second[user, 0, 0]
        explained = 2 * (right * items.mean).sum() - (gram * items.second).sum()
        noise = max((whole.sum() - explained) / len(left), _UNTOLD * variance)
        scale = np.r_[1.0, np.sqrt(spread[1:])]
        items, spread = items.scaled(scale), np.r_[spread[0], np.ones(count)]
        drawn = items.variance
    return items.mean, noise / spread, noise / float(drawn[0])


def told(taste: Taste, config: NetworkConfig, inputs: Inputs, rows: Rows) -> NDArray[np.float32]:
    """What a taste says of rows (n): the columns (n, 8) of `model.taste`."""
    parts = [np.empty((0, len(COLUMNS)), np.float32)]
    for begin in range(0, len(rows), _TOLD):
        with torch.no_grad():
            read = tensors(config, inputs.take(rows[begin : begin + _TOLD]))
            parts.append(taste(*read.folded(config)).numpy())
    return np.concatenate(parts)


def told_ahead(
    config: NetworkConfig, inputs: Inputs, rating: Floats, rows: Rows, seed: int
) -> NDArray[np.float32]:
    """What tastes of older ratings said of rows (n), oldest first: columns (n, 8).

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


@dataclass(frozen=True)
class _Normal:
    """What is believed of the m rows of a side: of each the offset, then k factors."""

    mean: Floats  # (m, 1 + k)
    covariance: Floats  # (m, 1 + k, 1 + k)

    @cached_property
    def second(self) -> Floats:
        """Expected products (m, 1 + k, 1 + k)."""
        return self.mean[:, :, None] * self.mean[:, None, :] + self.covariance

    @property
    def variance(self) -> Floats:
        """About zero, over the rows (1 + k)."""
        return np.maximum(np.diagonal(self.second, axis1=1, axis2=2).mean(0), _LEAST)

    def scaled(self, scale: Floats) -> "_Normal":
        """The same with each number times its scale (1 + k)."""
        return _Normal(self.mean * scale, self.covariance * scale[:, None] * scale)


def _posterior(gram: Floats, right: Floats, noise: float, prior: Floats) -> _Normal:
    """Of sums as `_Side.sums` gives them, about zero with variances `prior` (1 + k)."""
    covariance = np.asarray(np.linalg.inv(gram / noise + np.diag(1 / prior)), np.float64)
    return _Normal((covariance @ right[..., None])[..., 0] / noise, covariance)


class _Side:
    """The ratings (n) of each user, or of each item, side by side."""

    def __init__(self, one: NDArray[np.intp], other: NDArray[np.intp]) -> None:
        self._order = np.argsort(one, kind="stable")
        self._other = other[self._order]
        self._begins = np.flatnonzero(np.r_[True, np.diff(one[self._order]) != 0])
        self.size = len(self._begins)

    def sums(self, others: _Normal, left: Floats) -> tuple[Floats, Floats]:
        """Over each row's ratings, expected products of x (m, 1 + k, 1 + k), and of x and e - o.

        x = (1, factors) and o, the offset, are the other side's; e is what is `left` (n).
        """
        products, known = others.second.copy(), others.mean.copy()
        offset = others.second[:, 0].copy()
        offset[:, 0] = known[:, 0]
        known[:, 0] = 1.0
        products[:, 0], products[:, :, 0] = known, known
        gram = np.empty((self.size, *products.shape[1:]))
        right = np.empty((self.size, known.shape[1]))
        ends = np.append(self._begins[1:], len(self._order))
        first = 0
        while first < self.size:
            begin = self._begins[first]
            last = max(int(np.searchsorted(ends, begin + _AT_ONCE, "right")), first + 1)
            rows = slice(begin, ends[last - 1])
            begins, other = self._begins[first:last] - begin, self._other[rows]
            told = known[other] * left[self._order[rows], None] - offset[other]
            gram[first:last] = np.add.reduceat(products[other], begins)
            right[first:last] = np.add.reduceat(told, begins)
            first = last
        return gram, right
