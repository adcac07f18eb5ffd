from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, Message
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas import archive
from schemas.archive import Row
from schemas.exceptions import UnreachableError
from streams import tail
from streams.config import ArchiveConfig, KafkaConfig
from streams.exceptions import JournalGapError
from streams.tail import archived_end, read_archived, read_log, read_topic
from tests.unit.streams.messages import PREFIX, message

KAFKA = KafkaConfig(topic_prefix=PREFIX)


def archived(folder: Path, topic: str, offsets: Sequence[int]) -> ArchiveConfig:
    """An archive whose partition 1 has these offsets, among rows of another partition."""
    rows = [Row(1, at, 0, b"k", b"archived") for at in offsets]
    rows += [Row(0, at, 0, b"k", b"other") for at in range(5)]
    write_deltalake(str(folder / topic), archive.table(topic, rows))
    return ArchiveConfig(url=str(folder))


def keep(
    monkeypatch: pytest.MonkeyPatch,
    topic: str,
    offsets: Sequence[int],
    low: int = 0,
    high: int = 99,
) -> None:
    """A Kafka whose partition 1 has these offsets, from `low` to before `high`."""

    def read(_: KafkaConfig, name: str, **how: Any) -> Any:
        assert (name, how["partitions"]) == (topic, [1])
        assert how.get("strict", False) == (topic == "item-updates")  # compaction leaves gaps
        start = how.get("start", {1: 0})[1]
        held = [message(topic, b"kept", 1, at) for at in offsets if at >= start]
        return iter([held[:2], held[2:]])

    monkeypatch.setattr(tail, "read_topic", read)
    monkeypatch.setattr(tail, "bounds", lambda *_: {1: (low, high)})


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


@pytest.mark.parametrize(("low", "high", "whole"), [(3, 9, True), (4, 4, True), (4, 9, False)])
def test_a_log_of_which_neither_has_a_part_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: int, high: int, whole: bool
) -> None:
    """The end of a transaction, at 3, is no row; where nothing follows it nothing is missing."""
    where = archived(tmp_path, "item-updates", [0, 1, 2])
    keep(monkeypatch, "item-updates", [], low, high)
    if whole:
        assert [at for at, _ in seen(read_log(KAFKA, where, "item-updates", 1))] == [0, 1, 2]
        return
    with pytest.raises(JournalGapError, match=r"begins at offset 4, .* ends at 3"):
        seen(read_log(KAFKA, where, "item-updates", 1))


@pytest.mark.parametrize("strict", [True, False])
def test_retention_that_passes_what_is_read_next_is_an_error_where_nothing_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    codes = [KafkaError._AUTO_OFFSET_RESET, KafkaError._PARTITION_EOF]
    script = [
        message("item-updates", b"kept", 1, 5),
        *[Message(topic="t", partition=1, error=KafkaError(code)) for code in codes[not strict :]],
    ]
    options: dict[str, Any] = {}

    def reader(_: KafkaConfig, **given: Any) -> Any:
        options.update(given)
        consumer = SimpleNamespace(
            list_topics=lambda *_: None,
            assign=lambda _: None,
            consume=lambda most, _: [script.pop(0)] if most == 1 else [],
        )
        return nullcontext(consumer)

    name = f"{PREFIX}item-updates"
    topics = {name: SimpleNamespace(partitions=[1])}
    cluster = SimpleNamespace(list_topics=lambda timeout: SimpleNamespace(topics=topics))
    monkeypatch.setattr(tail, "reach", lambda _: cluster)
    monkeypatch.setattr(tail, "existing_topic", lambda *_: name)
    monkeypatch.setattr(tail, "reader", reader)
    batches = read_topic(KAFKA, "item-updates", start={1: 5}, strict=strict)
    assert seen([next(batches)]) == [(5, b"kept")]
    assert options["auto_offset_reset"] == ("error" if strict else "earliest")
    if not strict:
        assert list(batches) == []
        return
    with pytest.raises(JournalGapError, match=rf"next of {name} partition 1\..* again"):
        next(batches)


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
