from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Message
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas import archive
from schemas.archive import Row
from schemas.exceptions import UnreachableError
from streams import tail
from streams.config import ArchiveConfig, KafkaConfig
from streams.tail import archived_end, read_archived, read_log
from tests.unit.streams.messages import PREFIX, message

KAFKA = KafkaConfig(topic_prefix=PREFIX)


def archived(folder: Path, topic: str, offsets: Sequence[int]) -> ArchiveConfig:
    """An archive whose partition 1 has these offsets, among rows of another partition."""
    rows = [Row(1, at, 0, b"k", b"archived") for at in offsets]
    rows += [Row(0, at, 0, b"k", b"other") for at in range(5)]
    write_deltalake(str(folder / topic), archive.table(topic, rows))
    return ArchiveConfig(url=str(folder))


def keep(monkeypatch: pytest.MonkeyPatch, topic: str, offsets: Sequence[int], low: int = 0) -> None:
    """A Kafka whose partition 1 has these offsets and begins at `low`."""

    def read(_: KafkaConfig, name: str, **how: Any) -> Any:
        assert (name, how["partitions"]) == (topic, [1])
        start = how.get("start", {1: 0})[1]
        held = [message(topic, b"kept", 1, at) for at in offsets if at >= start]
        return iter([held[:2], held[2:]])

    monkeypatch.setattr(tail, "read_topic", read)
    monkeypatch.setattr(tail, "bounds", lambda *_: {1: (low, 99)})


def seen(batches: Any) -> list[tuple[int | None, bytes | str | None]]:
    return [(each.offset(), each.value()) for batch in batches for each in batch]


def test_archived_rows_come_as_messages_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "ARCHIVED_ROWS", 2)
    where = archived(tmp_path, "item-updates", [9, 2, 3, 5, 7])
    batches: list[list[Message]] = list(read_archived(KAFKA, where, "item-updates", 1, 3, 9))
    assert [[each.offset() for each in batch] for batch in batches] == [[3, 5], [7]]
    first = batches[0][0]
    assert (first.topic(), first.partition()) == (f"{PREFIX}item-updates", 1)
    assert (first.key(), first.value()) == (b"k", b"archived")
    assert archived_end(where, "item-updates", 1) == 10
    assert archived_end(where, "item-updates", 2) == 0
    assert list(read_archived(KAFKA, where, "users", 1)) == []


def test_archived_rows_that_cannot_be_read_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "ARCHIVED_ROWS", 2)
    where = archived(tmp_path, "item-updates", range(4))
    batches = read_archived(KAFKA, where, "item-updates", 1)
    next(batches)
    for each in (tmp_path / "item-updates").glob("*.parquet"):
        each.unlink()
    for unread in (batches, read_archived(KAFKA, where, "item-updates", 1)):
        with pytest.raises(UnreachableError, match="item-updates cannot be used"):
            next(unread)


def test_a_log_is_the_archive_and_then_what_retention_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = archived(tmp_path, "item-updates", [0, 1, 3, 4])
    keep(monkeypatch, "item-updates", [3, 4, 6], low=3)
    assert seen(read_log(KAFKA, where, "item-updates", 1)) == [
        (0, b"archived"),
        (1, b"archived"),
        (3, b"kept"),
        (4, b"kept"),
        (6, b"kept"),
    ]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.integers(1, 7))
def test_a_compacted_log_is_all_that_either_has(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    old: set[int],
    kept: set[int],
    size: int,
) -> None:
    where = archived(tmp_path_factory.mktemp("log"), "items", sorted(old))
    keep(monkeypatch, "items", sorted(kept))
    monkeypatch.setattr(tail, "BATCH", size)
    batches = list(read_log(KAFKA, where, "items", 1))
    assert [offset for offset, _ in seen(batches)] == sorted(old | kept)
    assert all(0 < len(batch) <= size for batch in batches)
