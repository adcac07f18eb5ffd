"""Tables find what is in them, and give blank rows for what is not."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.ids import hash_names
from model.lookups import Store, dated, distinct, empty, table
from model.state import ITEM_ATTRIBUTES, USER

HASHES = (
    st.integers(1, 2**64 - 1)
    | st.integers(1, 2**32 - 1)
    | st.integers(1, 40)
    | st.integers(2**64 - 40, 2**64 - 1)
)


@given(st.lists(HASHES, unique=True), st.lists(st.lists(HASHES, min_size=2, max_size=2)))
def test_table_finds_as_a_dictionary_does(known: list[int], wanted: list[list[int]]) -> None:
    rows = np.arange(len(known), dtype=np.float32)[:, None] + [1, 2]
    found = table(np.array(known, np.uint64), rows)
    asked = [*wanted, *([key, key] for key in known)]
    got = found.take(np.array(asked, np.uint64).reshape(-1, 2))
    expected = dict(zip(known, rows.tolist(), strict=True))
    nothing = [0, 0]
    np.testing.assert_array_equal(
        got,
        np.array([[expected.get(k, nothing) for k in keys] for keys in asked]).reshape(got.shape),
    )


def test_names_are_found_as_fast_as_ids() -> None:
    names = np.unique(hash_names(list(map(str, range(100_000)))).astype(np.uint64))
    known = table(names, np.zeros(len(names)))
    known.find(names[:1])  # compiles
    began = time.process_time()
    assert np.array_equal(known.find(names), np.arange(len(names)))
    assert time.process_time() - began < 1


def test_a_missing_hash_gets_a_blank_row() -> None:
    for nothing in (
        empty(ITEM_ATTRIBUTES),
        table(np.array([5], np.uint64), np.ones(1, ITEM_ATTRIBUTES)),
    ):
        row = nothing.take(np.array([0, 7], np.uint64))
        assert row["version"].tolist() == [0, 0]
        assert np.isnan(row["price"]).all()


@given(st.lists(st.lists(HASHES)))
def test_store_keeps_rows_as_it_grows(batches: list[list[int]]) -> None:
    store, expected = Store(USER, 1), dict[int, int]()
    for number, batch in enumerate(batches):
        positions = store.place(np.array(batch, np.uint64))
        store.rows["sessions"][positions] = number + 1
        expected |= dict.fromkeys(batch, number + 1)
    assert (
        dict(zip(store.hashes.tolist(), store.rows["sessions"].tolist(), strict=True)) == expected
    )
    assert list(expected) == store.hashes.tolist()


@given(st.lists(HASHES | st.just(0)))
def test_distinct_hashes_stand_in_the_order_of_their_first(hashes: list[int]) -> None:
    known, index = distinct(np.array(hashes, np.uint64))
    assert known.tolist() == list(dict.fromkeys(hashes))
    assert known[index].tolist() == hashes


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9))),
    st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 12)), min_size=1),
)
def test_what_is_dated_is_found_from_then_on(
    told: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    """Of one hash and event the last counts."""
    rows = np.zeros(len(told), ITEM_ATTRIBUTES)
    rows["version"] = np.arange(1, len(told) + 1)
    hashes, since = np.array(told, np.int64).reshape(-1, 2).T
    found = dated(hashes.astype(np.uint64), since, rows)

    def expected(name: int, event: int) -> int:
        known = [
            (at, row) for row, (each, at) in enumerate(told, 1) if each == name and at <= event
        ]
        return max(known, default=(0, 0))[1]

    names, events = np.array(asked).T
    names = names.astype(np.uint64)
    answers = [expected(*each) for each in asked]
    assert found.take(names, events)["version"].tolist() == answers
    wide = found.take(np.stack([names, names], 1), events[:, None])
    assert wide["version"].tolist() == [[each, each] for each in answers]
    for name, event, answer in zip(names, events, answers, strict=True):
        assert found.at(event).take(np.array([name]))["version"] == answer
