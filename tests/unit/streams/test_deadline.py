"""Calls that come back, fail, or hang."""

import threading

import pytest

from streams.deadline import within


def test_what_a_call_gives_or_raises_is_passed_on() -> None:
    assert within(5, lambda: 7) == 7
    assert within(5, lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_a_call_that_hangs_is_left_behind_under_its_caller_s_name() -> None:
    released = threading.Event()
    names: list[str] = []

    def hang() -> None:
        names.append(threading.current_thread().name)
        released.wait()

    with pytest.raises(TimeoutError, match=r"no answer in 0\.05 s"):
        within(0.05, hang)
    released.set()
    assert names == [threading.current_thread().name]
