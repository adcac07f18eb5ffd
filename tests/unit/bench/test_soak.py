"""A soak that is stopped, whose load ends, whose archive changes while it looks."""

import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any, cast

import pytest

from bench import soak
from bench.soak import Load, Soak, size_of
from streams.config import KafkaConfig


def test_a_load_that_ends_is_no_soak() -> None:
    load = Load(KafkaConfig(), [])  # nothing to send, so that sending fails at once
    with pytest.raises(RuntimeError), load.steady(1_000.0) as sending:
        wait([sending], 30.0)


def test_a_peak_that_is_stopped_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Idle:
        events = 0

        def send(self, count: int) -> None:
            stop.set()  # Ctrl-C while it sends

        def finish(self) -> None:
            pass

    monkeypatch.setattr(soak, "PEAK_SECONDS", 600.0)
    stop = threading.Event()
    none: Any = None
    Soak({}, cast(Load, Idle()), none, none, tmp_path, stop).peak()


def test_files_that_go_while_they_are_counted_count_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a").write_bytes(b"abc")
    (tmp_path / "table" / "b").write_bytes(b"abcd")
    is_file = Path.is_file

    def vacuumed(self: Path) -> bool:
        there = is_file(self)
        if self.name == "a":
            self.unlink()
        return there

    monkeypatch.setattr(Path, "is_file", vacuumed)
    assert size_of(tmp_path) == 4
