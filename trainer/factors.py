"""Item factors for `model.taste`, by variational Bayes.

Of ratings r of users u and items i, with e = r - level,

    e = d_u + b_i + p_u · q_i + noise,    (d_u, p_u) ~ N(0, spread),    (b_i, q_i) ~ N(g_i, drawn).

What is expected of an item, g, is what items of its categories have in common, level by level, and
what is drawn about it goes together: one that is seldom rated is taken for what it is like. Given
means and covariances of one side, those of the other are a ridge regression's on expected products
(Lim and Teh 2007, "Variational Bayesian approach to movie rating prediction", section 3): items
that are seldom rated stay uncertain, and uncertain users teach items less. The variances are fitted
too, so a factor that the ratings do not prove goes to zero by itself. Factors of users are held at
a variance of one. Moods are not fitted: to all of a user's ratings they are noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from model.ids import low_half
from model.network import Inputs, NetworkConfig, bucket, tensors
from model.taste import COLUMNS, Taste
from trainer.metrics import Floats

Rows = NDArray[np.int64]  # row numbers

_SWEEPS = 20  # users, then items
_OFFSETS, _FACTORS = 0.2, 0.03  # of the variance of e, to begin with
_MOST = 2_000_000  # newest ratings that factors are fitted to
_LEAST = 1e-6  # of a variance: where all ratings are told, or none can be
_MOODY = 0.5  # variance of moods, of that of levels
_UNTOLD = 0.5  # at least, of the variance: few ratings seem to be told better than they are
_ALIKE = 10.0  # items' worth of nothing in common
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
    left = rating[rows] - level
    described = np.zeros(len(items), np.int64)
    described[item] = rows  # by the newest of its ratings
    alike = inputs.categories[described]
    learnt, ridge, damping = _factors(user, item, left, alike, config.factors, seed)
    count = np.bincount(item)
    mean = np.bincount(item, left) / (count + damping)
    where = torch.from_numpy(items.astype(np.int64))
    taste.factors[where] = torch.from_numpy(learnt[:, 1:].astype(np.float32))
    taste.offsets[where] = torch.from_numpy(learnt[:, 0].astype(np.float32))
    taste.corrections[where] = torch.from_numpy((learnt[:, 0] - mean).astype(np.float32))
    taste.ratings[where] = torch.from_numpy(count.astype(np.float32))
    taste.level.fill_(level)
    ridge = np.insert(ridge, 1, ridge[0] / _MOODY)
    taste.ridge.copy_(torch.from_numpy(ridge.astype(np.float32)))
    taste.damping.fill_(damping)
    return taste


def _factors(
    user: NDArray[np.intp],
    item: NDArray[np.intp],
    left: Floats,
    alike: NDArray[np.uint32],
    count: int,
    seed: int,
) -> tuple[Floats, Floats, float]:
    """Offsets and then factors of items (m, 1 + k), users' ridge (1 + k), the offsets' damping.

    Fitted to what is `left` (n); `user`, `item` (n): numbers without a gap; `alike` (m, 4): hashes
    of items' categories, 0: none.
    """
    by_user, by_item = _Side(user, item, left), _Side(item, user, left)
    noise = variance = max(float(left.var()), _LEAST)
    spread = np.r_[_OFFSETS * variance, np.ones(count)]
    drawn = np.diag(np.r_[_OFFSETS * variance, np.full(count, _FACTORS * variance)])
    random = np.random.default_rng(seed).normal(0, 0.1, (by_item.size, count))
    means = np.concatenate([np.zeros((by_item.size, 1)), random], 1)
    items = _Normal(means, np.zeros((*means.shape, 1 + count)))
    expected, nobody = np.zeros_like(means), np.zeros(1 + count)
    groups = [np.unique(names, return_inverse=True) for names in alike.T]
    for _ in range(_SWEEPS):
        people = _posterior(*by_user.sums(items), noise, np.diag(spread), nobody)
        spread = people.variance
        gram, right = by_item.sums(people)
        items = _posterior(gram, right, noise, drawn, expected)
        # What remains of e - d, whose square is expected to be this; b + p · q explains the rest.
        whole = left**2 - 2 * left * people.mean[user, 0] + people.second[user, 0, 0]
        explained = 2 * (right * items.mean).sum() - (gram * items.second).sum()
        noise = max((whole.sum() - explained) / len(left), _UNTOLD * variance)
        scale = np.r_[1.0, np.sqrt(spread[1:])]
        items, spread = items.scaled(scale), np.r_[spread[0], np.ones(count)]
        expected = _expected(items.mean, groups)
        drawn = items.spread(expected)
    return items.mean, noise / spread, noise / float(drawn[0, 0])


def _expected(
    means: Floats, groups: Sequence[tuple[NDArray[np.uint32], NDArray[np.intp]]]
) -> Floats:
    """What groups of items lead to expect of their means (m, 1 + k), each after those before it.

    Of each grouping the names, 0 being none, and which of them each item has (m).
    """
    left = means.copy()
    for names, which in groups:
        sums = np.stack([np.bincount(which, column) for column in left.T], 1)
        common = sums / (np.bincount(which) + _ALIKE)[:, None]
        common[names == 0] = 0
        left -= common[which]
    return means - left


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

    def spread(self, centre: Floats) -> Floats:
        """Covariance (1 + k, 1 + k) about a centre (m, 1 + k).

        What goes together is told by means alone, and what is not known of them adds to variances:
        so few ratings prove no covariance.
        """
        apart = self.mean - centre
        unknown = np.diagonal(self.covariance, axis1=1, axis2=2).mean(0)
        return np.asarray(apart.T @ apart / len(apart) + np.diag(unknown + _LEAST), np.float64)

    def scaled(self, scale: Floats) -> "_Normal":
        """The same with each number times its scale (1 + k)."""
        return _Normal(self.mean * scale, self.covariance * scale[:, None] * scale)


def _posterior(
    gram: Floats, right: Floats, noise: float, prior: Floats, expected: Floats
) -> _Normal:
    """Of sums as `_Side.sums` gives them, with covariance `prior` about what is expected.

    That is (m, 1 + k), or (1 + k) of all alike.
    """
    doubt = np.linalg.inv(prior)
    covariance = np.asarray(np.linalg.inv(gram / noise + doubt), np.float64)
    pulled = right / noise + expected @ doubt
    return _Normal((covariance @ pulled[..., None])[..., 0], covariance)


class _Side:
    """The ratings (n) of each user, or of each item, side by side."""

    def __init__(self, one: NDArray[np.intp], other: NDArray[np.intp], left: Floats) -> None:
        self.size = int(one.max()) + 1
        self._met = csr_array((np.ones(len(left)), (one, other)))
        self._left = csr_array((left, (one, other)))

    def sums(self, others: _Normal) -> tuple[Floats, Floats]:
        """Over each row's ratings, expected products of x (m, 1 + k, 1 + k), and of x and e - o.

        x = (1, factors) and o, the offset, are the other side's; e is what is left.
        """
        products, known = others.second.copy(), others.mean.copy()
        offset = others.second[:, 0].copy()
        offset[:, 0] = known[:, 0]
        known[:, 0] = 1.0
        products[:, 0], products[:, :, 0] = known, known
        gram = self._met @ products.reshape(len(products), -1)
        right = self._left @ known - self._met @ offset
        return gram.reshape(-1, *products.shape[1:]), right
