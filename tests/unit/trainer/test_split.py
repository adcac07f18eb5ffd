"""Splits by time."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.config import SampleConfig, SplitConfig
from trainer.split import Split, by_instant, by_time, sample


def test_spans_follow_each_other_in_time() -> None:
    split = by_time(np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 0]), SplitConfig())
    assert split.train.tolist() == [9, 1, 5, 3, 7, 0, 8, 4]
    assert (split.validation.tolist(), split.test.tolist()) == ([6], [2])


@pytest.mark.parametrize("cut", [by_time, by_instant])
def test_spans_have_their_shares(cut: Callable[[np.ndarray, SplitConfig], Split]) -> None:
    split = cut(np.arange(60)[::-1] // 2, SplitConfig(validation_share=0.2, test_share=0.1))
    assert [len(span) for span in (split.train, split.validation, split.test)] == [42, 12, 6]
    assert split.test.max() == 5  # the newest stand first


@given(
    st.lists(st.integers(0, 5), max_size=60),
    st.floats(0.01, 0.4),
    st.floats(0.01, 0.4),
)
def test_every_row_is_in_one_span_and_none_is_older_than_the_span_before(
    times: list[int], validation: float, test: float
) -> None:
    time = np.array(times, np.int64)
    split = by_time(time, SplitConfig(validation_share=validation, test_share=test))
    order = np.concatenate([split.train, split.validation, split.test])
    assert sorted(order.tolist()) == list(range(len(times)))
    assert (np.diff(time[order]) >= 0).all()


def test_a_cut_moves_to_the_nearer_end_of_an_instant() -> None:
    days = np.array([1, 1, 1, 1, 1, 1, 1, 2, 2, 3])  # cuts at 8 and 9 of 10
    split = by_instant(days, SplitConfig())
    assert [len(span) for span in (split.train, split.validation, split.test)] == [7, 2, 1]


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=60),
    st.floats(0.01, 0.4),
    st.floats(0.01, 0.4),
)
def test_no_instant_is_parted_where_there_are_three(
    times: list[int], validation: float, test: float
) -> None:
    time = np.array(times, np.int64)
    split = by_instant(time, SplitConfig(validation_share=validation, test_share=test))
    spans = [split.train, split.validation, split.test]
    assert sorted(np.concatenate(spans).tolist()) == list(range(len(times)))
    if len(set(times)) >= 3:
        assert all(len(span) for span in spans)
        assert time[split.train].max() < time[split.validation].min()
        assert time[split.validation].max() < time[split.test].min()


USERS = np.array([7, 8, 7, 7, 7, 9], np.uint64)  # oldest first
STARS = np.array([5.0, 5, 5, 5, 5, 1])


def test_samples_by_hand() -> None:
    def chosen(rows: int, by: str) -> list[int]:
        config = SampleConfig.model_construct(rows=rows, by=by)  # fewer than are allowed
        return sample(USERS, STARS, config, 3).tolist()

    assert chosen(3, "newest") == [3, 4, 5]
    assert chosen(2, "user") == [4, 5]
    assert chosen(3, "user") == [1, 4, 5]  # one of each
    assert chosen(4, "user") == [1, 3, 4, 5]
    assert chosen(0, "user") == chosen(6, "newest") == chosen(9, "rarity") == [0, 1, 2, 3, 4, 5]


def test_seldom_stars_are_drawn_more_often_and_samples_are_nested() -> None:
    random = np.random.default_rng(1)
    stars = np.where(random.random(2_000) < 0.1, 1.0, 5.0)
    users = np.arange(2_000, dtype=np.uint64)
    few, more = (
        sample(users, stars, SampleConfig(rows=rows, by="rarity"), 5) for rows in (200, 400)
    )
    assert set(few.tolist()) < set(more.tolist())
    assert (stars[few] == 1).mean() > 0.3  # a tenth of the rows
    assert (np.diff(more) > 0).all()


def test_a_span_has_a_row_though_its_share_is_less() -> None:
    config = SplitConfig(validation_share=0.001, test_share=0.001)
    for cut in (by_time, by_instant):
        for time in (np.arange(50), np.zeros(50, np.int64)):
            split = cut(time, config)
            assert [len(span) for span in (split.train, split.validation, split.test)] == [48, 1, 1]


@pytest.mark.parametrize("rows", [1, 49])
def test_samples_that_teach_nothing_are_refused(rows: int) -> None:
    with pytest.raises(ValidationError, match="teach nothing; 0 takes all"):
        SampleConfig(rows=rows)


def test_rows_of_one_instant_keep_their_order() -> None:
    """Of more rows than a sort that is not stable leaves in place."""
    split = by_time(np.zeros(100, np.int64), SplitConfig())
    assert np.concatenate([split.train, split.validation, split.test]).tolist() == [*range(100)]
    days = np.arange(120)[::-1] % 3  # 0, 1, 2: forty rows of each
    split = by_instant(days, SplitConfig(validation_share=0.3, test_share=0.3))
    for day, span in enumerate((split.train, split.validation, split.test)):
        assert span.tolist() == np.flatnonzero(days == day).tolist()


@pytest.mark.parametrize(
    ("rows", "spans"), [(1, (0, 0, 1)), (2, (0, 1, 1)), (3, (1, 1, 1)), (4, (2, 1, 1))]
)
def test_of_few_rows_the_newest_are_asked_for(rows: int, spans: tuple[int, int, int]) -> None:
    split = by_time(np.arange(rows), SplitConfig())
    assert tuple(map(len, (split.train, split.validation, split.test))) == spans


@pytest.mark.parametrize(
    ("sizes", "spans"),
    [
        ((90, 5, 2, 3), (90, 5, 5)),  # the oldest day alone is more than all but the test's share
        ((80, 5, 5, 5, 5), (80, 10, 10)),
        ((5, 5, 90), (5, 5, 90)),
        ((5, 90, 5), (5, 90, 5)),
    ],
)
def test_large_instants_leave_each_span_a_day(
    sizes: tuple[int, ...], spans: tuple[int, int, int]
) -> None:
    split = by_instant(np.repeat(np.arange(len(sizes)), sizes), SplitConfig())
    assert tuple(map(len, (split.train, split.validation, split.test))) == spans
