"""Rows from an archive."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from model import features
from model.events import EVENT, FORGET, blank
from model.ids import hash_ids, partitions_of
from model.replay import History
from model.state import LAYOUT_HASH, PARTITION
from schemas import archive as archives
from schemas import codec, journal
from schemas.archive import Row
from schemas.exceptions import UnreachableError
from schemas.files import write_records
from schemas.journal import Journal
from schemas.records import Record, User
from streams.archiver import Archive
from tests.unit.trainer.shop import ITEMS, REVIEWS, START, USERS, item, shop
from tests.unit.trainer.test_data import examples
from trainer import archived
from trainer.archived import from_archive
from trainer.data import from_file, replay
from trainer.exceptions import TrainerError

PARTITIONS = 3


def from_journal(path: Path) -> list[Journal]:
    return [each.journal for each in archives.journal(str(path), 0)]


def write_archive(url: str, entries: list[tuple[str, Record]]) -> None:
    """What scorer and archiver leave of a shop: records, and a journal for each user partition."""
    archive = Archive(url)
    for topic in ("items", "users"):
        rows = [record for name, record in entries if name == topic]
        archive.append(topic, [row(0, n, record) for n, record in enumerate(rows)])
    for partition in range(PARTITIONS):
        mine = [
            (topic, record)
            for topic, record in entries
            if topic in journal.TOPICS
            and partitions_of(hash_ids([record.model_dump()["user_id"]]), PARTITIONS)[0]
            == partition
        ]
        offsets = Counter[str]()
        codes: list[int] = []
        places: list[int] = []
        for topic, record in mine:
            codes.append(journal.TOPICS.index(topic))
            places.append(offsets[topic])
            archive.append(topic, [row(partition, offsets[topic], record)])
            offsets[topic] += 1
        path = Path(url) / f"{partition}.jsonl"
        write_records(path, mine)
        log = from_file(path)
        path.unlink()
        history = History(batch_events=100)
        values: list[bytes] = []
        for batch in history.run(log.events):
            count = len(batch.result.step)
            zeros = np.zeros(count, np.uint64)
            entry = Journal(
                topics=np.array(codes[batch.rows], np.uint8),
                offsets=np.array(places[batch.rows], np.int64),
                steps=batch.result.step,
                seqs=batch.result.seq,
                events=log.events[batch.rows].view(f"V{EVENT.itemsize}"),
                duplicates=batch.result.duplicate,
                features=batch.result.observation.features,
                item_versions=zeros,
                item_attributes_versions=zeros,
                user_attributes_versions=zeros,
                item_vectors=zeros,
                recents=np.zeros((0, 3), np.uint64),
                feature_hash=features.FEATURE_HASH,
                layout_hash=LAYOUT_HASH,
                encoder="",
                partition_state=np.zeros((), PARTITION).tobytes(),
                ends=(-1, -1, -1),
            )
            values += journal.encode(entry)
        archive.append(
            "journal", [Row(partition, n, 0, b"", value) for n, value in enumerate(values)]
        )
    archive.commit()


def row(partition: int, offset: int, record: Record) -> Row:
    return Row(partition, offset, 0, b"key", codec.encode(record))


def test_an_archive_gives_the_same_events_with_the_features_that_were_journalled(
    tmp_path: Path, shop_file: Path
) -> None:
    write_archive(str(tmp_path), shop())
    log, same = from_archive(str(tmp_path)), from_file(shop_file)
    assert len(log) == len(same)
    assert (log.rated, len(log.items), len(log.users)) == (REVIEWS, ITEMS, USERS)
    assert log.journalled is not None
    assert len(log.journalled.features) == REVIEWS  # those of views would not fit into memory
    np.testing.assert_array_equal(log.events["event_id"], same.events["event_id"])
    assert log.reviews.drop("row").equals(same.reviews.drop("row"))
    found, replayed = examples(log), examples(same)
    np.testing.assert_array_equal(found.inputs.recents, replayed.inputs.recents)
    # The scorer of this journal knew no attributes and kept a mean for each partition.
    known = features.INDEX["item_known"]
    assert not np.nan_to_num(found.inputs.features[:, known]).any()
    assert (replayed.inputs.features[:, known] == 1).all()
    some = replay(log, None, "", 0, lambda done, total: None, rows=found.row[50::3])
    np.testing.assert_array_equal(some.row, found.row[50::3])
    np.testing.assert_array_equal(some.inputs.features, found.inputs.features[50::3])


def test_a_transaction_that_has_lost_a_part_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_archive(str(tmp_path), shop())
    archive = Archive(str(tmp_path))
    there = archive.positions("journal", [0])[0] or 0
    [*_, last], whole = from_journal(tmp_path), len(from_archive(str(tmp_path)))
    long = journal.encode(journal.join([last] * 200))
    assert len(long) > 2
    del long[1]
    values = [*long, *journal.encode(last)]
    archive.append("journal", [Row(0, there + at, 0, b"", each) for at, each in enumerate(values)])
    archive.commit()
    assert len(from_archive(str(tmp_path))) == whole + len(last)
    assert "are left out" in caplog.text
    assert "part of a transaction is missing" in caplog.text


def test_reviews_that_the_archive_lacks_are_told_but_for_those_to_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_archive(str(tmp_path), shop())
    table = DeltaTable(tmp_path / "reviews")
    table.delete("kafka_partition = 0 and kafka_offset > 50")  # not there yet
    assert from_archive(str(tmp_path)).rated < REVIEWS
    assert not caplog.text
    table.delete("kafka_partition = 1 and kafka_offset between 10 and 29")
    from_archive(str(tmp_path))
    assert "20 of " in caplog.text
    assert "reviews with stars are missing in the archive" in caplog.text


def test_what_another_layout_journalled_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_archive(str(tmp_path), shop())
    archive = Archive(str(tmp_path))
    there = archive.positions("journal", [0])[0] or 0
    [*_, last], whole = from_journal(tmp_path), len(from_archive(str(tmp_path)))
    assert not caplog.records
    [value] = journal.encode(replace(last, layout_hash="of another release"))
    archive.append("journal", [Row(0, there, 0, b"", value)])
    archive.commit()
    assert len(from_archive(str(tmp_path))) == whole
    assert f"{len(last)} events of the archive are left out" in caplog.text
    assert "starcast export" in caplog.text


def test_what_users_did_before_they_were_erased_is_left_out() -> None:
    events = blank(EVENT, 8)
    events["user"] = [1, 2, 1, 1, 1, 0, 2, 3]  # 0: erased from the archive
    events["action"][[3, 7]] = FORGET
    assert archived._kept(events).tolist() == [False, True, False, False, True, False, True, False]


def test_an_archive_whose_users_were_all_erased_is_told(tmp_path: Path) -> None:
    url = str(tmp_path)
    write_archive(url, shop())
    archive = Archive(url)
    for partition, end in archives.positions(url, "journal").items():
        done = [each.journal for each in archives.journal(url, partition)]
        users = np.concatenate([each.events.view(EVENT)["user"] for each in done])
        gone = blank(EVENT, len(done[0]))
        gone["user"], gone["action"] = np.resize(np.unique(users), len(gone)), FORGET
        (value,) = journal.encode(replace(done[0], events=gone.view(f"V{EVENT.itemsize}")))
        archive.append("journal", [Row(partition, end, 0, b"", value)])
    archive.commit()
    with pytest.raises(TrainerError, match=r"all users .* were erased"):
        from_archive(url)


def test_a_deleted_user_is_known_only_by_what_came_after(tmp_path: Path) -> None:
    write_archive(str(tmp_path), shop())
    archive = Archive(str(tmp_path))
    first = archive.positions("users", [0])[0] or 0
    one, two, three = (User(user_id="u1", event_time=START, age=age) for age in (20, 30, 40))
    rows: list[Record | None] = [one, two, None, three]
    keys = [b"1", b"2", b"1", b"1"]
    archive.append(
        "users",
        [
            Row(0, first + at, 0, key, each and codec.encode(each))
            for at, (each, key) in enumerate(zip(rows, keys, strict=True))
        ],
    )
    archive.commit()
    log = from_archive(str(tmp_path))
    assert [each for _, each in log.users][-2:] == [two, three]


def test_of_an_item_the_archive_gives_what_was_said_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a year of prices all that was said of each day does not fit into memory."""
    monkeypatch.setattr(archived, "_DECODED", 5)
    write_archive(str(tmp_path), shop())
    archive = Archive(str(tmp_path))
    first = archive.positions("items", [0])[0] or 0
    prices = [item(number % 3).model_copy(update={"price": float(number)}) for number in range(12)]
    archive.append("items", [row(0, first + at, each) for at, each in enumerate(prices)])
    archive.append(
        "items", [Row(0, first + 12, 0, b"key", b"{"), Row(0, first + 13, 0, b"key", None)]
    )
    archive.commit()
    told: list[tuple[int, int]] = []
    known = from_archive(str(tmp_path), None, lambda *done: told.append(done)).items
    assert told == [(done, PARTITIONS) for done in range(PARTITIONS + 1)]
    assert len(known) == ITEMS
    assert [each for _, each in known[-3:]] == prices[-3:]
    assert known[0] == (0, item(3))


def test_features_of_another_encoder_or_table_are_replayed(tmp_path: Path) -> None:
    write_archive(str(tmp_path), shop())
    log = from_archive(str(tmp_path))
    assert log.journalled is not None
    known = features.INDEX["item_known"]
    assert (examples(log, "another encoder").inputs.features[:, known] == 1).all()
    foreign = replace(log.journalled, usable=np.zeros(REVIEWS, bool))
    again = examples(replace(log, journalled=foreign))
    assert (again.inputs.features[:, known] == 1).all()


@pytest.mark.parametrize("topic", ["reviews", "items"])
def test_a_file_of_an_archive_that_cannot_be_read_is_told(tmp_path: Path, topic: str) -> None:
    write_archive(str(tmp_path), shop())
    for file in (tmp_path / topic).glob("*.parquet"):
        file.unlink()
    with pytest.raises(UnreachableError, match=f"{topic} cannot be used"):
        from_archive(str(tmp_path))


def test_an_empty_archive_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="run the scorer and the archiver"):
        from_archive(str(tmp_path))
