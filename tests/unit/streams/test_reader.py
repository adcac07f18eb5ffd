"""Copies of what the store has, kept in the worker."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.ids import Hashes
from streams import reader
from streams.reader import Copy, Fetched, VectorCopy

WIDTH = 3


def vector(text: int) -> list[float]:
    """The one vector of a text; every third text has none."""
    return [float(text), 1.0, 2.0]


def fetch(texts: Hashes) -> Fetched:
    rows = np.array([vector(text) for text in texts.tolist()], np.float32)
    found = texts % 3 > 0
    rows[~found] = 0
    return Fetched(rows, found)


@pytest.mark.parametrize("most", [2, 1_000])
@given(batches=st.lists(st.sets(st.integers(1, 40), min_size=1)))
def test_vectors_stay_where_they_are_as_long_as_the_source_is_the_same(
    most: int, batches: list[set[int]]
) -> None:
    with patch.object(reader, "MOST_ROWS", most):
        copy, earlier = VectorCopy(WIDTH, fetch), list[reader.Vectors]()
        for batch in batches:
            texts = np.array(sorted(batch), np.uint64)
            found = copy.take(texts)
            places = found.find(texts)
            np.testing.assert_array_equal(places > 0, texts % 3 > 0)
            expected = [vector(text) if text % 3 else [0.0] * WIDTH for text in texts.tolist()]
            np.testing.assert_array_equal(found.rows[places], np.array(expected, np.float32))
            assert found.find(np.array([[99]], np.uint64)).tolist() == [[0]]
            for before in earlier:
                if before.source is found.source:
                    np.testing.assert_array_equal(before.rows, found.rows[: len(before.rows)])
            earlier.append(found)


def test_vectors_outgrow_the_first_room_for_them() -> None:
    copy, texts = VectorCopy(WIDTH, fetch), np.arange(1, 5_000, dtype=np.uint64)
    first = copy.take(texts[:10])
    found = copy.take(texts)
    assert found.source is first.source
    np.testing.assert_array_equal(found.rows[found.find(texts), 0], np.where(texts % 3, texts, 0))


def test_what_had_no_vector_gets_one() -> None:
    there = set[int]()

    def arriving(texts: Hashes) -> Fetched:
        found = np.array([text in there for text in texts.tolist()])
        return Fetched(np.where(found[:, None], 1.0, 0.0).repeat(WIDTH, 1), found)

    texts = np.array([5, 7], np.uint64)
    with patch.object(reader, "MISSING_SECONDS", -1.0):
        copy = VectorCopy(WIDTH, arriving)
        assert copy.take(texts).find(texts).tolist() == [0, 0]
        there.add(7)
        assert copy.take(texts).find(texts).tolist() == [0, 1]
        there.add(5)
        assert copy.take(texts).find(texts).tolist() == [2, 1]


def test_what_is_in_steady_use_may_be_read_before_it_is_stale() -> None:
    copy = Copy(np.dtype([("number", np.int64)]), seconds=10.0, missing_seconds=2.0)
    there, missing = np.array([5], np.uint64), np.array([7], np.uint64)
    both = np.concatenate([there, missing])
    with patch.object(reader.time, "monotonic") as now:
        now.return_value = 100.0
        assert copy.stale(both).tolist() == [5, 7]
        copy.put(both, Fetched(np.zeros(2, [("number", np.int64)]), np.array([True, False])))
        for seconds, early, stale in (
            (0.9, [], []),
            (1.1, [7], []),
            (4.9, [7], [7]),
            (5.1, [5, 7], [7]),
        ):
            now.return_value = 100.0 + seconds
            assert copy.stale(both).tolist() == stale
            assert copy.stale(both, early=True).tolist() == early
        now.return_value = 110.1
        assert copy.stale(there).tolist() == [5]
