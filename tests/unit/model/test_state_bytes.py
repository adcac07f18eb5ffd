"""What the store keeps of a state is short, and gives the state back."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.events import EVENT, VIEW, Rows, blank
from model.exceptions import LayoutError
from model.state import ITEM, USER, advance
from model.state_bytes import from_bytes, to_bytes


def after_one_view() -> Rows:
    """The state of a user who has looked at one item, USER (1)."""
    event = blank(EVENT, 1)
    event["user"], event["item"], event["event_id"] = 1, 10, 1
    event["action"], event["time"] = VIEW, 1_700_000_000_000
    none = np.zeros(1, np.float32)
    first, repeated, step = np.zeros(1, np.intp), np.zeros(1, bool), np.zeros(1, np.uint64)
    return advance(blank(USER, 1), first, event, repeated, none, none, step).states


def test_bytes_of_a_short_history_are_short() -> None:
    states = np.concatenate([after_one_view(), blank(USER, 1)])
    values = to_bytes(states)
    assert len(values[0]) < 200
    assert values[1] == b""
    assert (
        from_bytes([*values, None], USER).tobytes()
        == np.concatenate([states, blank(USER, 1)]).tobytes()
    )


def test_counters_have_as_few_bytes_as_the_largest_needs() -> None:
    states = np.repeat(after_one_view(), 5)
    states["sessions"] = [1, 255, 256, 65_535, 65_536]
    states["left"] = [0, 3, 0, 0, 2**32 - 1]
    values = to_bytes(states)
    counters = 20
    lengths = np.array([len(value) for value in values]) - len(values[0])
    assert lengths.tolist() == [0, 0, counters, counters, 3 * counters]
    assert from_bytes(values, USER).tobytes() == states.tobytes()


def test_a_counter_that_needs_more_bytes_gets_them_wherever_it_stands() -> None:
    """Of users without recent items, so that what is cut off lies within the counters."""
    large = (1, 255, 256, 65_535, 65_536, 2**24, 2**24 + 1)
    pairs = np.array([(a, b) for a in large for b in (0, *large)])
    states = blank(USER, len(pairs))
    for first, last in (("session_events", "left"), ("left", "session_events")):
        states[first], states[last] = pairs.T
        values = to_bytes(states)
        assert from_bytes(values, USER).tobytes() == states.tobytes()
        assert not any(value.endswith(b"\0") for value in values)


def test_a_state_without_a_zero_is_longer_by_its_width() -> None:
    states = np.frombuffer(b"\xff" * (3 * USER.itemsize), USER)
    values = to_bytes(states)
    assert [len(value) for value in values] == [USER.itemsize + 1] * 3
    assert from_bytes(values, USER).tobytes() == states.tobytes()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["step", "sessions", "actions", "left", "recent", "older"]),
            st.binary(min_size=USER.itemsize, max_size=USER.itemsize),
        ),
        max_size=5,
    )
)
def test_any_state_comes_back_from_its_bytes(filled: list[tuple[str, bytes]]) -> None:
    states = blank(USER, len(filled))
    for row, (name, data) in enumerate(filled):
        states[name][row] = np.frombuffer(data, USER)[name][0]
    assert from_bytes(to_bytes(states), USER).tobytes() == states.tobytes()


@pytest.mark.parametrize("dtype", [USER, ITEM], ids=["user", "item"])
@pytest.mark.parametrize("first", [b"x", b"\x01"])
def test_bytes_of_another_layout_are_refused(first: bytes, dtype: np.dtype[Any]) -> None:
    with pytest.raises(LayoutError, match="Rebuild the store"):
        from_bytes([first + b"x" * (dtype.itemsize + 1), None], dtype)
