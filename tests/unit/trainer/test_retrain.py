"""The schedule of retraining."""

import threading
from datetime import timedelta

import pytest

from schemas.exceptions import StarcastError
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


@pytest.mark.parametrize("text", ["", "6", "h", "0h", "-1h", "6 weeks"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(TrainerError, match="no interval"):
        parse_every(text)


def test_it_runs_at_once_and_again_after_an_error_until_it_is_stopped() -> None:
    stop, runs, errors = threading.Event(), [0], list[str]()

    def once() -> None:
        runs[0] += 1
        if runs[0] == 1:
            raise StarcastError("not yet")
        stop.set()

    thread = threading.Thread(
        target=retrain_every,
        args=(timedelta(seconds=0.05), once, stop, lambda error: errors.append(str(error))),
    )
    thread.start()
    assert stop.wait(10)
    thread.join(10)
    assert not thread.is_alive()
    assert runs[0] >= 2
    assert errors == ["not yet"]
