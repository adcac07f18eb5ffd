"""Alarms are raised by what leaks, and by nothing else."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.events import DAY_MS
from model.features import FEATURES
from schemas.files import write_records
from tests.unit.trainer.shop import START, item, review
from trainer.data import from_file
from trainer.leaks import Leak, _explained, known_later, telling_features
from trainer.metrics import Floats


def telling(rows: NDArray[np.float32], rating: Floats) -> list[Leak]:
    """Each row is of a day of its own."""
    return telling_features(rows, rating, np.arange(len(rows)) * DAY_MS)


def test_a_feature_that_says_the_rating_is_named() -> None:
    random = np.random.default_rng(0)
    rating = random.integers(1, 6, 1_000).astype(np.float64)
    rows = random.normal(size=(1_000, len(FEATURES))).astype(np.float32)
    assert telling(rows, rating) == []
    rows[:, 3] = (rating - 3) ** 2 * 10 + rating  # not in a line, and yet it says all
    assert [leak.kind for leak in telling(rows, rating)] == [
        f"feature {FEATURES[3].name} says the rating"
    ]


def test_a_feature_may_explain_much_and_not_nearly_all() -> None:
    """Of 500 ratings of 1 and 500 of 5, some of which it takes for 1: n say 1 - 4n / (500 + n)."""
    rating = np.repeat([1.0, 5.0], 500)
    rows = np.full((1_000, len(FEATURES)), np.nan, np.float32)
    for wrong, leaks in ((2, 1), (3, 0)):
        rows[:, 3] = rating
        rows[500 : 500 + 2 * wrong, 3] = 1
        assert len(telling(rows, rating)) == leaks


def test_what_a_feature_explains_by_chance_is_no_alarm() -> None:
    """Two hundred bins of one row each, or of one and two, tell ratings that they never saw."""
    random = np.random.default_rng(0)
    rows = np.full((400, len(FEATURES)), np.nan, np.float32)
    rows[:, 3] = np.arange(400)
    for count in (200, 201, 300, 400):
        rating = random.permutation(np.resize([1.0, 5.0], count))
        assert telling(rows[:count], rating) == []
        rating.sort()  # a row of its own bin is told by no other
        assert len(telling(rows[:count], rating)) == (count == 400)


def test_what_too_few_rows_say_is_no_alarm() -> None:
    rating = np.tile([1.0, 5.0], 500)
    rows = np.full((1_000, len(FEATURES)), np.nan, np.float32)
    rows[:, 3] = rating
    assert telling(rows[:199], rating[:199]) == []
    assert [leak.rows for leak in telling(rows[:200], rating[:200])] == [200]
    assert telling(rows, np.full(1_000, 4.0)) == []  # there is nothing to be told
    rows[199:, 3] = np.nan
    assert telling(rows, rating) == []


def test_a_feature_that_says_the_ratings_of_the_rows_where_it_is_known_is_named() -> None:
    rating = np.random.default_rng(0).integers(1, 6, 1_000).astype(np.float64)
    rows = np.full((1_000, len(FEATURES)), np.nan, np.float32)
    rows[:300, 3] = rating[:300]
    assert [leak.rows for leak in telling(rows, rating)] == [300]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 5)), min_size=1))
def test_what_is_explained_is_what_other_days_of_the_bin_say(
    rows: list[tuple[int, int, int]],
) -> None:
    bins, day, stars = np.array(rows).T
    mean = stars.mean()
    left = 0.0
    for place, own, rating in rows:
        others = [each for other, when, each in rows if other == place and when != own]
        left += (rating - (np.mean(others) if others else mean)) ** 2
    spread = float(((stars - mean) ** 2).sum())
    expected = 1 - left / spread if spread else 0
    assert _explained(bins, day, stars.astype(np.float64)) == pytest.approx(expected)


def test_a_feature_that_is_known_of_one_rating_alone_is_named() -> None:
    rating = np.repeat([5.0, 1.0], 300)
    rows = np.full((600, len(FEATURES)), np.nan, np.float32)
    rows[:300, 3] = 7
    assert [leak.rows for leak in telling(rows, rating)] == [300]


def test_what_few_other_ratings_happen_to_have_is_no_alarm() -> None:
    """A shop of fives, but for one row: a value of its own, and what is known of fives alone."""
    rating = np.full(1_000, 5.0)
    rating[7] = 1.0
    rows = np.full((1_000, len(FEATURES)), np.nan, np.float32)
    rows[:, 3] = np.arange(1_000) % 40
    rows[7, 3] = 99
    rows[100:400, 4] = np.arange(300)
    assert telling(rows, rating) == []


@pytest.mark.parametrize("days", [1, 3])
def test_a_day_of_one_star_is_no_alarm_and_a_leak_on_it_is(days: int) -> None:
    """Three hundred ratings of 5 on other days, each with a mean of its own, as the days of 1."""
    rating = np.repeat([5.0, 1.0], [300, 10 * days])
    time = np.concatenate([np.arange(300), np.repeat(300 + np.arange(days), 10)]) * DAY_MS
    rows = np.full((len(rating), len(FEATURES)), np.nan, np.float32)
    rows[:, 3] = time / DAY_MS
    assert telling_features(rows, rating, time) == []
    rows[:, 4] = rating
    assert len(telling_features(rows, rating, time)) == (days > 1)
    rows[:, 3] = np.nan
    # A file of one day has no others to ask.
    assert len(telling_features(rows, rating, time // time.max())) == 1


def test_an_item_that_is_described_later_than_it_is_seen_is_named(tmp_path: Path) -> None:
    path = tmp_path / "late.jsonl"
    late = item(1).model_copy(update={"event_time": START + timedelta(days=9)})
    events = [("reviews", review(n, n, 1 + n % 2, START, 4)) for n in range(4)]
    write_records(path, [("items", late), ("items", item(2)), *events])
    (leak,) = known_later(from_file(path))
    assert leak.examples == ("i1",)
    write_records(path, [*events, ("items", late)])
    assert known_later(from_file(path)) == []
    write_records(path, [*events, ("items", late), ("reviews", review(4, 4, 1, START, 4))])
    assert [leak.rows for leak in known_later(from_file(path))] == [1]


def test_a_description_from_the_time_of_an_event_is_not_later(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    seen = review(1, 1, 1, START, 4)
    for later, leaks in ((0, 0), (1, 1)):
        said = {"event_time": seen.event_time + timedelta(milliseconds=later)}
        write_records(path, [("items", item(1).model_copy(update=said)), ("reviews", seen)])
        assert len(known_later(from_file(path))) == leaks


def test_descriptions_are_held_against_events_with_their_own_item(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    late = {"event_time": START + timedelta(days=9)}
    items = [("items", item(n).model_copy(update=late)) for n in range(12)]
    write_records(path, [*items, ("items", item(12)), ("reviews", review(1, 1, 12, START, 4))])
    assert known_later(from_file(path)) == []
    seen = [("reviews", review(n, n, n, START, 4)) for n in range(12)]
    write_records(path, [*items, *seen])
    (leak,) = known_later(from_file(path))
    assert (leak.rows, leak.examples) == (12, tuple(f"i{n}" for n in range(10)))
