"""Rows from a record file and from an archive."""

import gzip
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import features
from model.events import EVENT, FORGET, REVIEW, TEXT, VIEW, blank
from model.ids import hash_ids, partitions_of
from model.replay import History
from model.state import LAYOUT_HASH, PARTITION
from schemas import archive as archives
from schemas import codec, journal
from schemas.archive import Row
from schemas.exceptions import UnreachableError
from schemas.files import write_records
from schemas.journal import Journal
from schemas.records import Record, TextFeatures, User
from streams.archiver import Archive
from tests.unit.trainer.shop import ITEMS, REVIEWS, START, USERS, item, review, shop
from trainer import data
from trainer.data import (
    Examples,
    Log,
    from_archive,
    from_file,
    item_texts,
    replay,
    sorted_by_time,
)
from trainer.exceptions import TrainerError

PARTITIONS = 3


def from_journal(path: Path) -> list[Journal]:
    return [each.journal for each in archives.journal(str(path), 0)]


def examples(log: Log, encoder: str = "") -> Examples:
    return replay(log, None, encoder, 0, lambda done, total: None)


def test_a_file_gives_its_events_in_order_with_what_is_known_beside_them(shop_file: Path) -> None:
    log = from_file(shop_file)
    assert len(log) == 2 * REVIEWS
    assert (log.rated, len(log.items), len(log.users)) == (REVIEWS, ITEMS, USERS)
    assert log.events["action"][:4].tolist() == [VIEW, REVIEW, VIEW, REVIEW]
    assert log.reviews["row"].to_list() == list(range(1, 2 * REVIEWS, 2))
    assert log.reviews["event_id"][0] == "r0"
    assert hash_ids(["r0"])[0] == log.events["event_id"][1]
    assert len(item_texts(log)) == ITEMS


def test_what_was_read_off_texts_is_an_event_of_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    stars: dict[str, Any] = {"distribution": [0, 0, 0, 0.5, 0.5], "encoder": "e"}
    rated = review(1, 2, 3, START, 5)
    names = {name: getattr(rated, name) for name in ("event_id", "user_id", "item_id")}
    text = TextFeatures(**names, event_time=rated.event_time, **stars)
    write_records(path, [("reviews", rated), ("text-features", text), ("reviews", rated)])
    log = from_file(path)
    assert log.events["action"].tolist() == [REVIEW, TEXT, REVIEW]
    assert log.events["text_stars"][1] == 4.5
    assert log.events["user"].tolist() == hash_ids(["u2"] * 3).tolist()
    assert log.reviews["row"].to_list() == [0, 2]


def test_a_file_without_events_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    write_records(path, [("items", item(1))])
    with pytest.raises(TrainerError, match="no reviews, behavior or text-features"):
        from_file(path)


def test_what_breaks_the_contract_is_left_out_as_the_stream_does(
    shop_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = gzip.decompress(shop_file.read_bytes())
    path = tmp_path / "some.jsonl"
    bad = b'{"topic": "reviews", "value": {"event_id": "r"}}\n{\n[\n'
    path.write_bytes(bad + good)
    assert from_file(path).events.tobytes() == from_file(shop_file).events.tobytes()
    lines = good.count(b"\n")
    assert f"3 of {lines + 3:,} lines of {path} break the contract" in caplog.text
    assert "2 not JSON in UTF-8" in caplog.text
    assert "1 not a good record of reviews: user_id: missing (the first: line 1)" in caplog.text
    path.write_bytes(bad)
    with pytest.raises(TrainerError, match=r"3 of 3 lines .*line 2, .*\n.*starcast schema"):
        from_file(path)


def test_ratings_of_another_scale_are_refused(shop_file: Path, tmp_path: Path) -> None:
    """Though most lines, of items and views, are good; a slip or two is left out."""
    review = (
        '{"topic": "reviews", "value": {"event_id": "%d", "user_id": "u", "item_id": "i", '
        '"event_time": "2026-11-24T10:15:00Z", "rating": %d}}\n'
    )
    good = gzip.decompress(shop_file.read_bytes()).decode()  # 700 reviews
    path = tmp_path / "some.jsonl"
    path.write_text(good + "".join(review % (number, 10) for number in range(36)))
    assert from_file(path).rated == 700
    path.write_text(good + "".join(review % (number, 10) for number in range(38)))
    with pytest.raises(TrainerError, match=r"38 of .*\nIts ratings are of another scale.*4 / 9"):
        from_file(path)


def test_a_file_of_which_most_breaks_the_contract_is_refused(
    shop_file: Path, tmp_path: Path
) -> None:
    """As one of stars from 1 to 10: what is left would be measured as if it were all."""
    review = (
        '{"topic": "reviews", "value": {"event_id": "%d", "user_id": "u", "item_id": "i", '
        '"event_time": "2026-11-24T10:15:00Z", "rating": %d}}\n'
    )
    path = tmp_path / "ten.jsonl"
    path.write_text("".join(review % (stars, stars) for stars in range(11)))
    with pytest.raises(
        TrainerError, match=r"6 of 11 .*5 not .*rating: .*to 5 \(the first: line 7, got 6\)"
    ):
        from_file(path)


def test_lines_out_of_place_are_told(
    shop_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = gzip.decompress(shop_file.read_bytes()).splitlines(keepends=True)
    from_file(shop_file)
    assert caplog.text == ""
    path = tmp_path / "turned.jsonl"
    path.write_bytes(b"".join(reversed(lines)))
    from_file(path)
    assert f"{path} is not in the order of time: " in caplog.text
    assert f"{ITEMS} of {ITEMS} items of {path} stand behind all events" in caplog.text


def test_examples_are_the_rated_reviews_and_see_nothing_of_their_own_stars(shop_file: Path) -> None:
    log = from_file(shop_file)
    found = examples(log)
    assert len(found) == REVIEWS
    assert found.rating.tolist() == log.reviews["rating"].to_list()
    assert found.history[0] == 0
    other = log.events.copy()
    last = found.row[-1]
    other["rating"][last] = 1.0 if log.events["rating"][last] != 1 else 5.0
    changed = examples(replace(log, events=other))
    np.testing.assert_array_equal(found.inputs.features, changed.inputs.features)
    assert changed.rating[-1] != found.rating[-1]


def test_attributes_are_not_known_before_they_are_said(tmp_path: Path) -> None:
    def events(first: int, count: int) -> list[tuple[str, Record]]:
        times = [START + timedelta(hours=number) for number in range(first, first + count)]
        return [("reviews", review(first + n, n, 1, time, 4)) for n, time in enumerate(times)]

    path = tmp_path / "late.jsonl"
    write_records(path, [*events(0, 100), ("items", item(1)), *events(100, 100)])
    known = examples(from_file(path)).inputs.features[:, features.INDEX["item_known"]]
    assert not np.nan_to_num(known[:100]).any()
    assert (known[128:] == 1).all()  # from the next batch of the replay on


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
    assert data._kept(events).tolist() == [False, True, False, False, True, False, True, False]


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
    monkeypatch.setattr(data, "_DECODED", 5)
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


def test_rows_of_one_instant_see_nothing_of_each_other(tmp_path: Path) -> None:
    """Two days: on the second, three reviews of one item by three users."""
    first = [review(n, n, 1, START, 5) for n in range(2)]
    second = [review(2 + n, 2 + n, 1, START + timedelta(days=1), 1) for n in range(3)]
    path = tmp_path / "days.jsonl"
    write_records(path, [("reviews", each) for each in [*first, *second]])
    log = from_file(path)
    counts = features.INDEX["item_ratings"]

    def known(**options: Any) -> list[float]:
        found = replay(log, None, "", 0, lambda done, total: None, **options)
        return np.rint(np.expm1(found.inputs.features[:, counts])).tolist()

    assert known(ties="instant") == [0, 0, 2, 2, 2]
    assert known(ties="instant", still=0) == [0] * 5
    assert known(ties="instant", still=2) == [0, 0, 2, 2, 2]
    # In one batch item states stand still, as they do live; the partition's mean does not.
    assert known() == [0] * 5


def test_each_instant_of_its_own_gives_what_arrival_one_by_one_gives(
    shop_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = from_file(shop_file)
    assert len(np.unique(log.events["time"])) == len(log)
    monkeypatch.setattr(data, "_BATCH_EVENTS", 1)
    monkeypatch.setattr(data, "_LARGEST_BATCH", 1)
    one = examples(log)
    other = replay(log, None, "", 0, lambda done, total: None, ties="instant")
    np.testing.assert_array_equal(one.inputs.features, other.inputs.features)
    np.testing.assert_array_equal(one.inputs.recents, other.inputs.recents)


def test_a_history_is_put_in_the_order_of_time(tmp_path: Path) -> None:
    times = [START + timedelta(hours=hour) for hour in (3, 1, 2)]
    path = tmp_path / "mixed.jsonl"
    write_records(
        path,
        [
            ("reviews", review(0, 0, 1, times[0], 5)),
            ("items", item(1)),
            *(("reviews", review(n, n, 1, times[n], 4)) for n in (1, 2)),
        ],
    )
    log = sorted_by_time(from_file(path))
    assert log.reviews["event_id"].to_list() == ["r1", "r2", "r0"]
    assert log.reviews["row"].to_list() == [0, 1, 2]
    assert (np.diff(log.events["time"]) > 0).all()
    # It was known after r0, which now comes last: to none of these.
    assert [count for count, _ in log.items] == [3]
    known = replay(log, None, "", 0, lambda done, total: None, ties="instant")
    assert not np.nan_to_num(known.inputs.features[:, features.INDEX["item_known"]]).any()


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
