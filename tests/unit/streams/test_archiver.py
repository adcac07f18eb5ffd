import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
from confluent_kafka import Message
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from schemas import archive
from schemas.archive import Row
from schemas.examples import EXAMPLES
from schemas.exceptions import ContractError, UnreachableError
from streams import archiver
from streams.archiver import Archive, Archiver
from streams.config import ArchiveConfig
from streams.exceptions import StoreError
from streams.metrics import make_metrics
from streams.processor import Offsets
from tests.unit.streams.looped import Clock

VALUE = json.dumps(EXAMPLES["behavior"]).encode()


def rows(partition: int, *offsets: int) -> list[Row]:
    return [Row(partition, offset, 1_795_521_600_000, b"k", VALUE) for offset in offsets]


def archived(url: Path, topic: str = "behavior") -> list[tuple[int, int]]:
    frame = archive.read(str(url), topic, columns=["kafka_partition", "kafka_offset"])
    return frame.collect().rows()


def message(topic: str, partition: int, offset: int, **changes: Any) -> Message:
    fields: Mapping[str, Any] = {"key": b"u-204", "value": VALUE, "timestamp": (1, 1700), **changes}
    return Message(topic=topic, partition=partition, offset=offset, **fields)


def test_rows_and_their_position_are_committed_together(tmp_path: Path) -> None:
    written = Archive(str(tmp_path))
    assert written.positions("behavior", [0]) == {0: None}
    assert written.append("behavior", rows(0, 4, 5, 9)) == 3
    assert written.append("behavior", rows(1, 0)) == 1
    assert archived(tmp_path) == []
    assert Archive(str(tmp_path)).positions("behavior", [0]) == {0: None}
    assert written.commit() == 4
    assert written.commit() == 0
    assert not any(written._pending.values())  # held no longer
    assert archived(tmp_path) == [(0, 4), (0, 5), (0, 9), (1, 0)]
    assert Archive(str(tmp_path)).positions("behavior", [0, 1, 2]) == {0: 10, 1: 1, 2: None}


def test_rows_below_the_position_are_left_out(tmp_path: Path) -> None:
    first = Archive(str(tmp_path))
    first.append("behavior", rows(0, 0, 1, 2))
    first.commit()
    again = Archive(str(tmp_path))
    assert again.append("behavior", rows(0, 1, 2, 3)) == 1
    assert again.append("behavior", rows(0, 3)) == 0
    assert again.commit() == 1
    assert archived(tmp_path) == [(0, 0), (0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize("lacks", ["now", "then"])
def test_a_table_may_be_of_a_release_with_other_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    """One field was not in the contract then, or is not in it now; rows without it have none."""
    whole, topic = archive.schema("score-digests"), "score-digests"
    shorter = whole.remove(whole.get_field_index("role"))
    value = json.dumps({**EXAMPLES[topic], "role": "shadow"}).encode()
    schemas = {"now": (whole, shorter), "then": (shorter, whole)}[lacks]
    for offsets, schema in zip(((0, 1), (2, 3)), schemas, strict=True):
        monkeypatch.setattr(archive, "schema", lambda _, schema=schema: schema)
        written = Archive(str(tmp_path))
        for offset in offsets:  # the second commit is one on a table that is known by then
            written.append(topic, [Row(0, offset, 1_795_521_600_000, b"k", value)])
            written.commit()
    monkeypatch.undo()
    frame = archive.read(str(tmp_path), topic, columns=["kafka_offset", "role", "lag"]).collect()
    roles = ["shadow"] * 2 + [None] * 2 if lacks == "now" else [None] * 2 + ["shadow"] * 2
    assert frame.rows() == [(offset, role, 12) for offset, role in enumerate(roles)]


@pytest.mark.parametrize("lacks", ["now", "then"])
def test_a_field_within_a_field_may_be_of_another_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    whole, topic = archive.schema("score-digests"), "score-digests"
    at = whole.get_field_index("errors")
    errors = [each for each in whole.field(at).type if each.name != "predicted"]
    shorter = whole.set(at, pa.field("errors", pa.struct(errors)))
    value = json.dumps(EXAMPLES[topic]).encode()
    for offset, schema in enumerate((whole, shorter) if lacks == "now" else (shorter, whole)):
        monkeypatch.setattr(archive, "schema", lambda _, schema=schema: schema)
        written = Archive(str(tmp_path))
        written.append(topic, [Row(0, offset, 1_795_521_600_000, b"k", value)])
        written.commit()
    monkeypatch.undo()
    frame = archive.read(str(tmp_path), topic, columns=["errors"]).collect()
    found = [each["predicted"] for each in frame["errors"].to_list()]
    assert found == ([622.4, None] if lacks == "now" else [None, 622.4])


def test_an_archiver_that_wakes_late_doubles_nothing(tmp_path: Path) -> None:
    late, owner = Archive(str(tmp_path)), Archive(str(tmp_path))
    late.append("behavior", rows(0, 0, 1, 2, 3))
    owner.append("behavior", rows(0, 0, 1, 2))
    owner.commit()
    assert late.commit() == 1
    owner.append("behavior", rows(0, 3, 4))
    assert owner.commit() == 1
    assert archived(tmp_path) == [(0, offset) for offset in range(5)]


def test_dropped_rows_are_not_written(tmp_path: Path) -> None:
    written = Archive(str(tmp_path))
    written.append("behavior", [*rows(0, 0, 1), *rows(1, 0)])
    written.drop("behavior", 0)
    assert written.commit() == 1
    assert archived(tmp_path) == [(1, 0)]
    assert written.append("behavior", rows(0, 0)) == 1


def test_a_new_look_at_a_position_drops_what_was_taken_after_it(tmp_path: Path) -> None:
    written = Archive(str(tmp_path))
    for _ in range(2):
        assert written.positions("behavior", [0]) == {0: None}
        assert written.append("behavior", rows(0, 0, 1)) == 2
    assert written.commit() == 2
    assert archived(tmp_path) == [(0, 0), (0, 1)]


def test_a_table_that_went_back_is_an_error(tmp_path: Path) -> None:
    written = Archive(str(tmp_path))
    written.append("behavior", rows(0, 0, 1))
    written.commit()
    table = DeltaTable(str(tmp_path / "behavior"))
    table.restore(0)
    written.append("behavior", rows(0, 2))
    # Delta keeps application transactions over a restore, so only losing the table shows.
    written.commit()
    for path in sorted((tmp_path / "behavior").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    written.append("behavior", rows(0, 3))
    with pytest.raises(ContractError, match="went back: partition 0 stood at offset 3"):
        written.commit()


def count_opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The topic of each table that is opened from now on."""
    opened: list[str] = []
    open_table = archive.open_table

    def counted(url: str, topic: str, *options: Any) -> DeltaTable | None:
        opened.append(topic)
        return open_table(url, topic, *options)

    monkeypatch.setattr(archive, "open_table", counted)
    return opened


def test_a_table_is_kept_open_for_some_commits_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver, "HELD_COMMITS", 4)
    opened = count_opens(monkeypatch)
    written = Archive(str(tmp_path))
    for offset in range(9):
        written.append("behavior", rows(0, offset))
        written.commit()
    assert len(opened) == 4  # for the position, the first commit, the fifth and the ninth
    assert archived(tmp_path) == [(0, offset) for offset in range(9)]


def test_topics_outside_the_contract_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="'rewiews' is not in the contract"):
        Archive(str(tmp_path)).append("rewiews", rows(0, 0))


def test_rows_are_held_while_storage_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Archive(str(tmp_path))
    written.append("behavior", rows(0, 0))

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(archiver, "write_deltalake", broken)
        with pytest.raises(UnreachableError, match="no route"):
            written.commit()
    assert written.commit() == 1


def test_small_files_are_merged_and_nothing_else_changes(tmp_path: Path) -> None:
    written = Archive(str(tmp_path), compact_every=4)
    for offset in range(8):
        written.append("behavior", [*rows(0, offset), *rows(1, offset)])
        written.commit()
    table = DeltaTable(str(tmp_path / "behavior"))
    assert len(table.file_uris()) == 1
    table.create_checkpoint()
    table.cleanup_metadata()
    assert archived(tmp_path) == [(part, offset) for part in (0, 1) for offset in range(8)]
    assert Archive(str(tmp_path)).positions("behavior", [1]) == {1: 8}


def test_archivers_side_by_side_write_each_row_once(tmp_path: Path) -> None:
    """Two for each partition, all compacting: commits and compactions conflict all the time."""
    errors: list[BaseException] = []

    def work(partition: int) -> None:
        try:
            written = Archive(str(tmp_path), compact_every=3)
            for start in range(0, 60, 5):
                written.append("behavior", rows(partition, *range(start, start + 5)))
                written.commit()
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number // 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert archived(tmp_path) == [(part, offset) for part in (0, 1) for offset in range(60)]


@settings(max_examples=15)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 1), st.integers(1, 4)),
            st.tuples(st.sampled_from(["commit", "crash"]), st.just(0), st.just(0)),
        ),
        max_size=14,
    )
)
def test_crashes_neither_lose_nor_double(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """A consumer that starts where the archive says ends with every row once."""
    url = tmp_path_factory.mktemp("archive")
    written = Archive(str(url))
    read = {0: 0, 1: 0}  # the consumer's position
    furthest = {0: 0, 1: 0}
    for step, partition, count in steps:
        if step == "append":
            offsets = range(read[partition], read[partition] + count)
            written.append("behavior", rows(partition, *offsets))
            read[partition] = offsets.stop
            furthest[partition] = max(furthest[partition], offsets.stop)
        elif step == "commit":
            written.commit()
        else:
            written = Archive(str(url))
            read = {part: at or 0 for part, at in written.positions("behavior", read).items()}
    for partition, end in furthest.items():
        written.append("behavior", rows(partition, *range(read[partition], end)))
    written.commit()
    assert archived(url) == [(part, at) for part, end in furthest.items() for at in range(end)]


def taking(url: Path, **config: Any) -> Archiver:
    settings = ArchiveConfig.model_validate({"url": str(url), "flush_seconds": 60, **config})
    return Archiver(settings, "eu.", make_metrics(CollectorRegistry()))


def test_messages_of_a_poll_go_to_their_tables(tmp_path: Path) -> None:
    first = taking(tmp_path, flush_rows=3)
    assert first.claim({2: {"behavior": 5, "items": 0}})[2] == {"behavior": -1, "items": -1}
    first.process([message("eu.behavior", 2, 7, headers=[("trace", b"1"), ("trace", None)])])
    first.idle()
    assert archived(tmp_path) == []
    first.process(
        [
            message("eu.items", 2, 3, key=None, value=None),
            message("eu.behavior", 2, 8, timestamp=(0, -1)),
        ]
    )
    first.idle()
    behavior = archive.read(str(tmp_path), "behavior").collect()
    assert behavior["kafka_offset"].to_list() == [7, 8]
    assert behavior["kafka_key"].to_list() == [b"u-204"] * 2
    assert behavior["kafka_timestamp"].dt.epoch("ms").to_list() == [1700, None]
    assert behavior["kafka_headers"].to_list()[0] == [
        {"key": "trace", "value": b"1"},
        {"key": "trace", "value": None},
    ]
    assert archive.read(str(tmp_path), "items").collect()["kafka_value"].to_list() == [None]
    assert taking(tmp_path).claim({2: {"behavior": 0, "items": 0}})[2] == {
        "behavior": 9,
        "items": 4,
    }


def test_a_claim_opens_each_table_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Archive(str(tmp_path))
    written.append("behavior", [*rows(0, 3), *rows(5, 7)])
    written.commit()
    opened = count_opens(monkeypatch)
    starts = taking(tmp_path).claim({each: {"behavior": -1, "items": -1} for each in range(8)})
    assert opened == ["behavior", "items"]
    ends = {0: 4, 5: 8}
    assert starts == {each: {"behavior": ends.get(each, -1), "items": -1} for each in range(8)}


def test_a_claim_that_takes_long_leaves_out_what_it_has_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop polls and asks for the rest again, so each claim has to do something."""
    monkeypatch.setattr(archiver, "CLAIM_SECONDS", -1)
    slow = taking(tmp_path, flush_rows=1)
    left = {(topic, partition) for topic in ("behavior", "items") for partition in range(2)}
    for _ in range(4):
        wanted: Offsets = {}
        for topic, partition in left:
            wanted.setdefault(partition, {})[topic] = -1
        ((partition, topics),) = slow.claim(wanted).items()
        assert [*topics.values()] == [-1]
        left -= {(topic, partition) for topic in topics}
    assert not left
    slow.process([message("eu.behavior", 1, 0)])
    slow.idle()
    assert archived(tmp_path) == [(1, 0)]


def test_a_log_that_cannot_be_read_pauses_the_loop(tmp_path: Path) -> None:
    written = Archive(str(tmp_path))
    written.append("behavior", rows(0, 3))
    written.commit()

    def vanish(url: str, topic: str, *_: Any) -> DeltaTable | None:
        table = open_table(url, topic)
        shutil.rmtree(tmp_path / "behavior")
        return table

    open_table = archive.open_table
    with (
        patch.object(archive, "open_table", vanish),
        pytest.raises(StoreError, match="behavior cannot be used"),
    ):
        taking(tmp_path).claim({0: {"behavior": -1}})


def test_a_commit_is_due_after_a_while_or_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = taking(tmp_path)
    patient.process([message("eu.behavior", 0, 0)])
    patient.idle()
    assert archived(tmp_path) == []
    monkeypatch.setattr(archiver, "FLUSH_BYTES", 2 * len(VALUE))
    patient.process([message("eu.behavior", 0, 1)])
    patient.idle()
    assert archived(tmp_path) == [(0, 0), (0, 1)]
    hasty = taking(tmp_path, flush_seconds=1e-9)
    hasty.process([message("eu.behavior", 1, 0)])
    hasty.idle()
    assert archived(tmp_path)[-1] == (1, 0)


def test_rows_that_wait_are_committed_though_others_keep_coming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(archiver, "time", clock)
    steady = taking(tmp_path, flush_seconds=3)
    for offset in range(2):
        steady.process([message("eu.behavior", 0, offset)])
        clock.now += 2
        steady.idle()
    assert archived(tmp_path) == [(0, 0), (0, 1)]


def test_lost_partitions_are_dropped(tmp_path: Path) -> None:
    losing = taking(tmp_path, flush_rows=2)
    for partition in (0, 1):
        losing.claim({partition: {"behavior": 0}})
        losing.process([message("eu.behavior", partition, 0)])
    losing.drop([0])
    losing.idle()
    assert archived(tmp_path) == [(1, 0)]


def test_an_archiver_that_ends_commits_what_waits(tmp_path: Path) -> None:
    ending = taking(tmp_path)
    ending.process([message("eu.behavior", 0, 0)])
    ending.close()
    assert archived(tmp_path) == [(0, 0)]


def test_an_archiver_has_its_tables_compacted(tmp_path: Path) -> None:
    archiving = taking(tmp_path, flush_rows=1, compact_every=2)
    for offset in range(2):
        for topic in ("eu.behavior", "eu.items"):
            archiving.process([message(topic, 0, offset)])
        archiving.idle()
    deadline = time.monotonic() + 60
    while archiving._compactor._running is not None:  # a stop waits for a few seconds only
        assert time.monotonic() < deadline
        time.sleep(0.05)
        archiving.idle()
    archiving.close()
    for topic in ("behavior", "items"):
        assert len(DeltaTable(str(tmp_path / topic)).file_uris()) == 1


def test_an_archive_that_does_not_answer_pauses_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = taking(tmp_path, flush_rows=1)
    waiting.process([message("eu.behavior", 0, 0)])

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(archiver, "write_deltalake", broken)
    with pytest.raises(StoreError, match="no route"):
        waiting.idle()
