"""Sizes of transactions, by hand and under a simple law of their cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.pace import GATHER_SECONDS, GROW, LEAST, Bound, Overlap, Pace


def test_without_a_target_transactions_are_as_large_as_they_may_be() -> None:
    pace = Pace(2_000, 0)
    pace.took(2_000, 60)
    assert pace.size(0) == 2_000


def test_a_slow_transaction_makes_the_next_one_smaller() -> None:
    pace = Pace(2_000, 0.2)
    pace.took(2_000, 0.125)
    assert pace.size(0) == 1_600  # 2,000 · 0.1 / 0.125
    pace.took(1_600, 10)
    assert pace.size(0) == 800  # by a half at most
    pace.took(800, 0.08)
    assert pace.size(0) == 800 * GROW


def test_one_that_was_not_full_says_nothing_of_larger_ones() -> None:
    pace = Pace(2_000, 0.2)
    pace.took(2_000, 0.2)
    assert pace.size(0) == 1_000
    pace.took(10, 0.01)
    assert pace.size(0) == 1_000


def test_who_is_behind_takes_the_largest() -> None:
    pace = Pace(2_000, 0.2)
    pace.took(2_000, 0.2)
    assert pace.size(2_001) == 2_000
    assert pace.size(2_000) == 1_000


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (2_000, [2_000, 2_000, 3_000, 8_000, 8_000, 2_000]),
        (5_000, [5_000, 5_000, 7_500, 8_000, 8_000, 5_000]),
        (100_000, [100_000] * 6),
    ],
)
def test_events_that_are_spread_over_many_partitions_make_larger_transactions(
    most: int, expected: list[int]
) -> None:
    pace = Pace(most, 0)
    sizes: list[int] = []
    for partitions in (0, 16, 24, 64, 4_096, 8):
        pace.spread(partitions)
        sizes.append(pace.size(0))
    assert sizes == expected


def test_under_a_target_transactions_grow_only_as_fast_as_they_end_in_time() -> None:
    pace = Pace(2_000, 0.2)
    pace.spread(256)
    assert (pace.size(8_000), pace.size(8_001)) == (2_000, 8_000)
    pace.took(2_000, 0.01)
    assert pace.size(0) == 2_000 * GROW
    pace.spread(8)
    assert pace.size(0) == 2_000


@given(
    st.floats(0.001, 0.3),
    st.floats(1e-6, 1e-3),
    st.floats(0.05, 2),
    st.integers(1, 5_000),
)
def test_it_settles_where_half_the_target_is_met(
    fixed: float, each: float, target: float, most: int
) -> None:
    pace = Pace(most, target)
    for _ in range(100):
        size = pace.size(0)
        assert min(LEAST, most) <= size <= most
        pace.took(size, fixed + each * size)
    met = fixed + each * pace.size(0) <= target / 2 * 1.1
    assert met or pace.size(0) == min(LEAST, most)


def test_a_transaction_that_was_open_for_too_long_is_halved_until_one_ends() -> None:
    bound = Bound(10)
    assert bound.most(2_000) == 2_000
    assert bound.failed(2_000, 12)
    assert bound.most(2_000) == 1_000
    assert bound.failed(600, 12)  # it was not full, and is what is known to be too many
    assert bound.most(2_000) == 300
    assert not bound.failed(300, 9)  # for another reason
    assert not bound.failed(1, 60)  # nothing is smaller
    assert bound.most(2_000) == 300


def test_transactions_grow_back_while_full_ones_end_soon() -> None:
    bound = Bound(10)
    bound.ended(2_000, 1)  # nothing has failed
    assert bound.most(2_000) == 2_000
    bound.failed(10, 12)
    bound.ended(4, 1)
    bound.ended(5, 6)
    assert bound.most(2_000) == 5
    bound.ended(5, 4)
    assert bound.most(2_000) == 6  # 6.25
    bound.ended(6, 4)
    assert bound.most(2_000) == 7  # 7.8125
    for _ in range(40):
        bound.ended(bound.most(2_000), 1)
    assert bound.most(2_000) == 2_000
    for _ in range(10_000):
        bound.ended(2_000, 1)  # not beyond


def test_a_batch_is_gathered_until_it_is_processed_just_in_time() -> None:
    overlap = Overlap()
    assert overlap.left(0) == 0  # nothing is known yet
    overlap.ended(0.25)  # a mean of 0.05
    overlap.processed(0.05)  # and of 0.01
    assert overlap.left(0) == pytest.approx(0.04)
    assert overlap.left(0.03) == pytest.approx(0.01)
    assert overlap.left(0.05) == 0
    overlap.opened(0.1)  # a mean of 0.02, in which it has no outputs yet
    assert overlap.left(0.05) == pytest.approx(0.01)


def test_a_transaction_is_opened_just_in_time() -> None:
    overlap = Overlap()
    assert overlap.spare(0) == 0
    overlap.processed(0.25)  # a mean of 0.05
    overlap.opened(0.1)  # and of 0.02
    assert overlap.spare(0) == pytest.approx(0.03)
    assert overlap.spare(0.04) == 0


def test_no_transaction_is_opened_long_before_a_slow_batch_ends() -> None:
    overlap = Overlap()
    overlap.processed(0.25)
    overlap.processed(70)
    assert overlap.spare(0) == 70


seconds = st.floats(0, 100)


@given(st.lists(st.tuples(seconds, seconds, seconds)), seconds)
def test_no_batch_is_gathered_for_long(
    turns: list[tuple[float, float, float]], elapsed: float
) -> None:
    overlap = Overlap()
    for opening, ending, processing in turns:
        overlap.opened(opening)
        overlap.ended(ending)
        overlap.processed(processing)
        assert 0 <= overlap.left(elapsed) <= GATHER_SECONDS
