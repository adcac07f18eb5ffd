"""A backfill whose processors end before it does."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from starcast import backfill as module
from starcast.backfill import backfill
from starcast.settings import Settings
from streams.exceptions import StoreAheadError
from streams.producer import Outgoing, Sent


def test_what_was_sent_before_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{{"topic": "users", "value": {{"user_id": "{}"}}}}\n'
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file, users in zip(files, ("uv", "wx"), strict=True):
        file.write_text("".join(map(line.format, users)))
    taken: list[bytes | None] = []

    def play(records: Iterable[Outgoing], *_: Any, **__: Any) -> Sent:
        taken.extend(record.key for record in records)
        return Sent()

    monkeypatch.setattr(module, "apply_topics", lambda _: None)
    monkeypatch.setattr(module, "run_processors", lambda _, __, done: done.wait())
    monkeypatch.setattr(module, "play", play)
    monkeypatch.setattr(module, "_has_work", lambda _, __: False)
    backfill(Settings(), files, threading.Event(), skip=3)
    assert taken == [b"x"]


def test_no_more_is_sent_when_a_processor_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says would else be told after the last of a million records."""
    file = tmp_path / "history.jsonl"
    line = '{"topic": "users", "value": {"user_id": "u", "event_time": "2026-11-24T10:15:00Z"}}\n'
    file.write_text(line * 100)
    failed = threading.Event()
    taken: list[Outgoing] = []

    def run(_: Any, __: Any, done: threading.Event) -> None:
        failed.wait()
        raise StoreAheadError("the topic was made anew")

    def play(records: Iterable[Outgoing], *_: Any, stop: threading.Event, **__: Any) -> Sent:
        for record in records:
            taken.append(record)
            if len(taken) == 10:
                failed.set()
                (worker,) = [each for each in threading.enumerate() if each.name == "backfill"]
                worker.join()
        return Sent()

    monkeypatch.setattr(module, "apply_topics", lambda _: None)
    monkeypatch.setattr(module, "run_processors", run)
    monkeypatch.setattr(module, "play", play)
    with pytest.raises(StoreAheadError, match="made anew"):
        backfill(Settings(), [file], threading.Event())
    assert len(taken) == 10
