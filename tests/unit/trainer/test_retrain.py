"""The schedule of retraining."""

import threading
import time
from datetime import datetime, timedelta, tzinfo
from itertools import pairwise
from typing import Self

import pytest

from schemas.exceptions import StarcastError
from trainer import retrain
from trainer.exceptions import TrainerError
from trainer.retrain import parse_every, retrain_every


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("45s", timedelta(seconds=45)),
        ("30m", timedelta(minutes=30)),
        ("6h", timedelta(hours=6)),
        (" 1.5 d ", timedelta(hours=36)),
    ],
)
def test_intervals(text: str, expected: timedelta) -> None:
    assert parse_every(text) == expected


@pytest.mark.parametrize("text", ["", "6", "h", "0h", "-1h", "6 weeks", "36526d", "9" * 400 + "s"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(TrainerError, match="no interval"):
        parse_every(text)


@pytest.mark.parametrize("error", [StarcastError("not yet"), OSError("not yet")])
def test_it_runs_at_once_and_again_after_an_error_until_it_is_stopped(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    stop, runs = threading.Event(), [0]

    def once() -> None:
        runs[0] += 1
        if runs[0] == 1:
            raise error
        stop.set()

    thread = threading.Thread(target=retrain_every, args=(timedelta(seconds=0.05), once, stop))
    thread.start()
    assert stop.wait(10)
    thread.join(10)
    assert not thread.is_alive()
    assert runs[0] >= 2
    failed = [each for each in caplog.messages if "failed" in each]
    assert failed == ["retraining failed: not yet"]


def test_it_tries_again_soon_while_nothing_is_served_and_later_after_each_model_refused() -> None:
    stop, served, times = threading.Event(), threading.Event(), list[float]()

    def once() -> None:
        times.append(time.monotonic())
        if len(times) < 3:
            raise StarcastError("the archive is empty")
        if len(times) == 5:
            served.set()

    thread = threading.Thread(
        target=retrain_every,
        args=(timedelta(hours=6), once, stop, served.is_set),
        kwargs={"first_retry": timedelta(seconds=0.02)},
    )
    thread.start()
    assert served.wait(20)
    time.sleep(0.6)  # another, due after 0.16 s, would have come by now
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(times) == 5
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert waits[0] >= 0.02
    assert waits[2] >= 0.04
    assert waits[3] >= 0.08


def test_a_stop_ends_the_wait_for_another_try(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stop, ran = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=retrain_every, args=(timedelta(hours=6), ran.set, stop, lambda: False)
    )
    thread.start()
    assert ran.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert "under way is waited for" in caplog.text


def test_a_run_that_comes_late_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the machine slept, or its clock was put right."""

    class Late(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) - timedelta(hours=1)

    monkeypatch.setattr(retrain, "datetime", Late)
    stop, ran = threading.Event(), threading.Event()
    thread = threading.Thread(target=retrain_every, args=(timedelta(hours=6), ran.set, stop))
    thread.start()
    came = ran.wait(10)
    stop.set()
    thread.join(10)
    assert came
