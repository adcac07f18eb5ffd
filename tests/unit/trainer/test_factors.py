"""Item factors and what they say ahead of time."""

from dataclasses import replace

import numpy as np
import pytest

from model.ids import low_half
from model.network import NetworkConfig, bucket
from model.taste import COLUMNS
from tests.unit.model.networks import default_config
from trainer import factors
from trainer.data import Examples
from trainer.factors import fit_taste, told, told_ahead

CONFIG = default_config(vector=0, factors=2, buckets=256)


def tasteful(
    examples: Examples, config: NetworkConfig
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Ratings by a taste that no bias knows: users of one parity love items of the same."""
    inputs = examples.inputs
    items = bucket(low_half(inputs.items), config.buckets).astype(np.int64)
    alike = inputs.users.astype(np.int64) % 2 == items % 2
    return np.where(alike, 5.0, 1.0)


def test_factors_tell_what_biases_cannot(examples: Examples) -> None:
    """Recent ratings and labels alike follow the taste."""
    rating = tasteful(examples, CONFIG)
    parity = bucket(low_half(examples.inputs.recents), CONFIG.buckets).astype(np.int64) % 2
    mine = examples.inputs.users.astype(np.int64)[:, None] % 2
    known = ~np.isnan(examples.inputs.recent_ratings)
    stars = np.where(known, np.where(parity == mine, 5, 1), np.nan).astype(np.float32)
    inputs = replace(examples.inputs, recent_ratings=stars)
    rows = np.arange(len(examples))
    taste = fit_taste(CONFIG, inputs, rating, rows[:500], 3)
    said = told(taste, CONFIG, inputs, rows[500:])[:, COLUMNS.index("taste")]
    sure = np.abs(said) > 0.3
    assert sure.sum() > 30
    assert (np.sign(said[sure]) == np.sign(rating[500:][sure] - 3)).mean() > 0.9


def test_factors_that_ratings_do_not_prove_are_none(examples: Examples) -> None:
    """Stars at random, though some users are stricter than others."""
    random = np.random.default_rng(4)
    users = random.integers(0, 60, 3_000).astype(np.uint64) + 1
    items = random.integers(0, 40, 3_000).astype(np.uint64) + 1
    strict = random.normal(0, 0.5, 61)
    rating = 3 + strict[users.astype(int)] + random.normal(0, 1, 3_000)
    several = np.zeros(3_000, np.int64)
    inputs = replace(examples.inputs.take(several), users=users, items=items)
    taste = fit_taste(CONFIG, inputs, rating, np.arange(3_000), 3)
    assert taste.factors.square().sum(1).max() < 0.01
    assert taste.ridge[0].item() == pytest.approx(1 / strict[1:].var(), rel=0.2)
    assert taste.damping.item() > 100  # no item is better than another


def test_an_item_is_corrected_for_who_rated_it(examples: Examples) -> None:
    """Items of odd numbers are as good as others, and mostly the strict rate them."""
    random = np.random.default_rng(5)
    users = random.integers(0, 100, 4_000)
    items = random.integers(0, 20, 4_000) * 2
    items += (users < 50) ^ (random.random(4_000) < 0.2)
    quality = random.normal(0, 0.5, 40)[items]
    rating = np.where(users < 50, 2.0, 4.0) + quality + random.normal(0, 0.3, 4_000)
    hashes = {"users": users.astype(np.uint64) + 1, "items": items.astype(np.uint64) + 1}
    inputs = replace(examples.inputs.take(np.zeros(4_000, np.int64)), **hashes)
    taste = fit_taste(CONFIG, inputs, rating, np.arange(4_000), 3)
    bucketed = bucket(low_half(hashes["items"]), CONFIG.buckets).astype(np.int64)
    corrections = taste.corrections.numpy()[bucketed]
    assert corrections[items % 2 == 1].mean() == pytest.approx(0.6, abs=0.2)
    assert corrections[items % 2 == 0].mean() == pytest.approx(-0.6, abs=0.2)
    assert taste.ratings.sum().item() == 4_000


def test_an_item_that_is_seldom_rated_is_taken_for_what_it_is_like(examples: Examples) -> None:
    """Of each category 30 items, rated 40 times, and one that is rated once."""
    random = np.random.default_rng(6)
    items = np.append(np.repeat(np.arange(60), 40), [60, 61])
    category = items % 2
    users = random.integers(0, 50, len(items))
    rating = 3 + np.where(category == 1, 1.0, -1.0) + random.normal(0, 0.5, len(items))
    rating[-2:] = 3.0
    names = np.zeros((len(items), 4), np.uint32)
    names[:, 0] = category + 7

    def offsets(names: np.ndarray[tuple[int, int], np.dtype[np.uint32]]) -> list[float]:
        inputs = replace(
            examples.inputs.take(np.zeros(len(items), np.int64)),
            users=users.astype(np.uint64) + 1,
            items=items.astype(np.uint64) + 1,
            categories=names,
        )
        taste = fit_taste(CONFIG, inputs, rating, np.arange(len(items)), 3)
        return taste.offsets[bucket(np.array([61, 62]), CONFIG.buckets)].tolist()

    low, high = offsets(names)
    assert low < -0.5
    assert high > 0.5
    assert offsets(np.zeros_like(names)) == pytest.approx([0, 0], abs=0.3)


def test_no_row_is_told_by_its_own_rating_or_a_later_one(examples: Examples) -> None:
    rows = np.arange(len(examples))
    said = told_ahead(CONFIG, examples.inputs, examples.rating, rows, 3)
    assert said.shape == (len(rows), len(COLUMNS))
    changed = examples.rating.copy()
    half = int(len(rows) * 0.6)
    changed[half:] = 6 - changed[half:]
    again = told_ahead(CONFIG, examples.inputs, changed, rows, 3)
    span = int(len(rows) * 0.7)
    np.testing.assert_array_equal(said[:span], again[:span])
    assert not np.array_equal(said[span:], again[span:])
    assert np.isnan(said[: int(len(rows) * 0.15)]).all()
    assert np.isfinite(said[int(len(rows) * 0.15) :]).all()


def test_a_side_sums_what_it_met() -> None:
    """By hand: the first met offsets 0.5 and 1 and factors 2 and 3, the second the latter alone."""
    side = factors._Side(np.array([1, 0, 0]), np.array([1, 0, 1]), np.array([3.0, 1.0, 2.0]))
    known = np.array([[0.5, 2.0], [1.0, 3.0]])
    gram, right = side.sums(factors._Normal(known, np.zeros((2, 2, 2))))
    assert gram.tolist() == [[[2, 5], [5, 4 + 9]], [[1, 3], [3, 9]]]
    assert right.tolist() == [[0.5 + 1, 2 * 0.5 + 3 * 1], [2, 3 * 2]]


def test_without_rows_nothing_is_said(examples: Examples) -> None:
    none = np.empty(0, np.int64)
    taste = fit_taste(CONFIG, examples.inputs, examples.rating, none, 3)
    assert not taste.factors.any()
    assert told_ahead(CONFIG, examples.inputs, examples.rating, none, 3).shape == (0, len(COLUMNS))
