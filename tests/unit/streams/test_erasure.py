"""Erasing users from Delta tables, in folders."""

import base64
import os
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError

from model.events import EVENT
from model.features import INDEX
from model.ids import hash_ids
from model.replay import recover
from model.state import PARTITION, USER
from model.state_bytes import from_bytes
from schemas import archive, journal
from schemas.archive import Row
from schemas.codec import encode
from schemas.records import DeadLetter, PredictedRating, Record, Review, Source
from streams import compaction, erasure
from streams.archiver import Archive
from streams.compaction import LEASE_SECONDS, claimed
from streams.erasure import Erased, ErasureError, erase_journal, erase_rows, nobody, rows_elsewhere
from tests.unit.streams.journals import USERS, Partition, events

TIME = datetime(2026, 11, 1, tzinfo=UTC)
ODD = 'o\'hara "é"; --'


def erased(user: str, partition: int = 0, **before: int) -> Erased:
    return Erased(user, int(hash_ids([user])[0]), partition, before)


def review(user: str, number: int) -> Review:
    return Review(event_id=f"r{number}", user_id=user, item_id="cup", event_time=TIME, rating=4)


def erase_beside_an_archiver(
    url: str, options: dict[str, str], users: list[str], count: int, compact_every: int
) -> None:
    """Rows of the users in turn come while the first is erased again and again: all is right."""
    written = Archive(url, options, compact_every=compact_every)
    failed: list[BaseException] = []

    def write_on() -> None:
        try:
            for offset in range(count):
                user = users[offset % len(users)]
                row = Row(0, offset, 0, user.encode(), encode(review(user, offset)))
                written.append("reviews", [row])
                written.commit()
        except BaseException as error:  # noqa: BLE001  told below
            failed.append(error)

    writer = threading.Thread(target=write_on)
    writer.start()
    first = [erased(users[0], reviews=count)]
    done = 0
    while writer.is_alive():
        done += erase_rows(url, options, "reviews", first)
    writer.join()
    done += erase_rows(url, options, "reviews", first)
    assert not failed
    turns = count // len(users)
    assert done == turns
    rows = archive.read(url, "reviews", options).collect()
    assert rows["kafka_offset"].to_list() == list(range(count))
    assert rows["user_id"].to_list() == [None, *users[1:]] * turns


def write(url: Path, topic: str, *rows: tuple[int, str, Record | bytes | None]) -> None:
    """Rows of (partition, key, value), at the offsets of their places among all."""
    written = Archive(str(url))
    written.append(
        topic,
        [
            Row(
                partition,
                offset,
                1_795_000_000_000,
                key.encode(),
                encode(value) if isinstance(value, Record) else value,
                [("h", b"x")],
            )
            for offset, (partition, key, value) in enumerate(rows)
        ],
    )
    written.commit()


def left(url: Path, topic: str) -> list[int]:
    """Offsets of rows that say anything; the others say nothing at all."""
    rows = archive.read(str(url), topic).collect()
    known = pl.any_horizontal(pl.exclude(*archive.PLACE).is_not_null())
    return rows.filter(known)["kafka_offset"].to_list()


def test_rows_of_a_user_are_emptied_and_positions_stay(tmp_path: Path) -> None:
    rows = [
        (0, "ann", review("ann", 0)),
        (0, ODD, review(ODD, 1)),
        (0, "bob", review("bob", 2)),
        (0, ODD, b"broken"),
        (0, "another key", review(ODD, 4)),
        (0, ODD, None),
        (0, ODD, review(ODD, 6)),  # they have come back
    ]
    write(tmp_path, "reviews", *rows)
    before = archive.positions(str(tmp_path), "reviews")
    assert erase_rows(str(tmp_path), {}, "reviews", [erased(ODD, reviews=6)]) == 4
    assert left(tmp_path, "reviews") == [0, 2, 6]
    assert erase_rows(str(tmp_path), {}, "reviews", [erased(ODD, reviews=6)]) == 0
    assert erase_rows(str(tmp_path), {}, "reviews", [erased(ODD, reviews=9)]) == 1
    assert archive.positions(str(tmp_path), "reviews") == before == {0: 7}
    # No file has them any more; an archiver goes on where it was.
    for path in (tmp_path / "reviews").glob("*.parquet"):
        assert ODD not in pl.read_parquet(path)["user_id"].to_list()
    # Nor does the table's log say who was erased.
    for path in (tmp_path / "reviews" / "_delta_log").glob("*.json"):
        commit = path.read_text().partition('"commitInfo"')[2].splitlines() or [""]
        assert "hara" not in commit[0]
        assert ODD.encode().hex() not in commit[0]
    later = Archive(str(tmp_path))
    assert later.append("reviews", [Row(0, 6, None, b"k", None), Row(0, 7, None, b"k", None)]) == 1


def test_a_table_of_another_release_is_emptied_too(tmp_path: Path) -> None:
    """It has a field that this one does not know, and lacks one."""
    rows = archive.table("reviews", [Row(0, 0, 0, b"ann", encode(review("ann", 0)))])
    other = rows.drop(["title"]).append_column("colour", pa.array(["red"]))
    write_deltalake(str(tmp_path / "reviews"), other)
    assert erase_rows(str(tmp_path), {}, "reviews", [erased("ann", reviews=1)]) == 1
    found = DeltaTable(str(tmp_path / "reviews")).to_pyarrow_table().to_pylist()
    assert {name for name, value in found[0].items() if value is not None} == set(archive.PLACE)


def test_several_users_are_erased_at_once_each_as_far_as_they_were_told(tmp_path: Path) -> None:
    write(tmp_path, "users", *[(0, user, None) for user in ("a", "b", "c", "a", "b", "c")])
    users = [erased("a", users=4), erased("b", users=2), erased("c")]
    assert erase_rows(str(tmp_path), {}, "users", users) == 3
    assert left(tmp_path, "users") == [2, 4, 5]
    assert erase_rows(str(tmp_path), {}, "behavior", users) == 0  # there is no such table


def test_files_that_an_erasure_left_behind_are_deleted_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed between its commit and their end."""
    write(tmp_path, "score-requests", (0, "ann", None), (0, "bob", None))
    archived(tmp_path)
    user = Erased("ann", int(USERS[0]), 1, {})
    with monkeypatch.context() as patch:
        patch.setattr(erasure, "_delete_files", lambda *_: None)
        erase_rows(str(tmp_path), {}, "score-requests", [erased("ann", **{"score-requests": 1})])
        erase_journal(str(tmp_path), {}, [user])
    files = [
        len(list((tmp_path / topic).glob("*.parquet"))) for topic in ("score-requests", "journal")
    ]
    assert files == [2, 2]
    erase_rows(str(tmp_path), {}, "score-requests", [erased("ann", **{"score-requests": 1})])
    erase_journal(str(tmp_path), {}, [user])
    files = [
        len(list((tmp_path / topic).glob("*.parquet"))) for topic in ("score-requests", "journal")
    ]
    assert files == [1, 1]


def test_files_of_commits_that_never_came_are_deleted_with_what_is_erased(tmp_path: Path) -> None:
    """Of a killed writer, and of one whose commit was refused: vacuum knows nothing of them."""
    users = [(0, "ann", None), (0, "bob", None)]
    write(tmp_path, "users", *users)
    folder = tmp_path / "users"
    (path,) = folder.glob("*.parquet")
    (folder / "part-00000-of-a-killed-compaction.zstd.parquet").write_bytes(path.read_bytes())
    first = Archive(str(tmp_path))
    first.append("users", [Row(0, 2, None, b"ann", None)])
    table = archive.open_table(str(tmp_path), "users")
    assert table is not None
    first.commit()
    with pytest.raises(CommitFailedError):
        write_deltalake(
            table,
            archive.table("users", [Row(0, 2, None, b"ann", None)]),
            mode="append",
            commit_properties=CommitProperties(app_transactions=[Transaction("users/0", 3)]),
        )
    # One that an archiver is writing: nobody has committed its rows.
    ours = archive.table("users", [Row(0, 3, None, b"ann", None)])
    pq.write_table(ours, folder / "part-00000-being-written.zstd.parquet")
    assert len(list(folder.glob("*.parquet"))) == 5
    assert erase_rows(str(tmp_path), {}, "users", [erased("ann", users=3)]) == 2
    found = {path.name: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}
    assert found.pop("part-00000-being-written.zstd.parquet")[0]["kafka_key"] == b"ann"
    assert {row["kafka_key"] for rows in found.values() for row in rows} == {None, b"bob"}
    assert left(tmp_path, "users") == [1]


def test_a_file_that_an_archiver_commits_while_others_are_deleted_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "reviews", (0, "ann", review("ann", 0)), (0, "bob", review("bob", 1)))
    archiver, positions = Archive(str(tmp_path)), archive.positions

    def committed(*where: Any) -> dict[int, int]:
        monkeypatch.setattr(archive, "positions", positions)
        archiver.append("reviews", [Row(0, 2, 0, b"bob", encode(review("bob", 2)))])
        archiver.commit()
        return positions(*where)

    monkeypatch.setattr(archive, "positions", committed)
    assert erase_rows(str(tmp_path), {}, "reviews", [erased("ann", reviews=2)]) == 1
    assert left(tmp_path, "reviews") == [1, 2]


def test_files_that_a_killed_writer_had_begun_are_deleted_with_what_is_erased(
    tmp_path: Path,
) -> None:
    """They are put in place under another name; delta-rs lists none of them."""
    write(tmp_path / "a folder", "users", (0, "ann", None), (0, "bob", None))
    folder = tmp_path / "a folder" / "users"
    (path,) = folder.glob("*.parquet")
    begun, new = (folder / f"part-00000-{name}.zstd.parquet#1" for name in ("begun", "new"))
    for each in (begun, new):
        each.write_bytes(path.read_bytes()[:-20])
    old = time.time() - erasure.BEGUN_SECONDS - 1
    os.utime(begun, (old, old))
    assert erase_rows(str(tmp_path / "a folder"), {}, "users", [erased("ann", users=3)]) == 1
    assert not begun.exists()
    assert new.exists()  # somebody may be writing it
    assert left(tmp_path / "a folder", "users") == [1]


def test_more_rows_than_one_commit_names_are_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "users", *[(at % 2, "a" if at % 3 else "b", None) for at in range(20)])
    monkeypatch.setattr(erasure, "PLACES", 2)
    users = [erased("a", 0, users=20), erased("a", 1, users=20)]
    assert erase_rows(str(tmp_path), {}, "users", users) == 13
    assert left(tmp_path, "users") == [0, 6, 12, 18, 3, 9, 15]


def test_more_users_than_one_question_names_are_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """delta-rs took a minute for two thousand, and died of three."""
    names = [f"user {at}" for at in range(7)]
    write(tmp_path, "users", *[(0, name, None) for name in names])
    asked: list[str] = []
    places = erasure._places

    def counted(table: DeltaTable, rows: str) -> pa.Table:
        asked.append(rows)
        return places(table, rows)

    monkeypatch.setattr(erasure, "_places", counted)
    monkeypatch.setattr(erasure, "USERS", 3)
    assert erase_rows(str(tmp_path), {}, "users", [erased(name, users=9) for name in names]) == 7
    assert [rows.count("user_id = ") for rows in asked] == [3, 3, 1]


def test_predictions_go_with_the_events_that_they_are_of(tmp_path: Path) -> None:
    def predicted(topic: str, offset: int, kind: Any = "interaction") -> PredictedRating:
        return PredictedRating(
            user_id="ann",
            item_id="cup",
            event_time=TIME,
            predicted_at=TIME,
            kind=kind,
            model_version="v",
            source=Source(topic=topic, partition=0, offset=offset),
        )

    write(
        tmp_path,
        "predicted-ratings",
        (0, "ann", predicted("reviews", 4)),
        (0, "ann", predicted("reviews", 5)),
        (0, "ann", predicted("behavior", 5)),
        (0, "ann", predicted("reviews", 9, "review")),
        (0, "ann", predicted("score-requests", 9, "request")),
        (0, "ann", predicted("score-requests", 10, "request")),
    )
    bounds = {"reviews": 5, "behavior": 6, "predicted-ratings": 5}
    assert erase_rows(str(tmp_path), {}, "predicted-ratings", [erased("ann", **bounds)]) == 4
    assert left(tmp_path, "predicted-ratings") == [1, 5]


def test_dead_letters_of_a_users_records_go(tmp_path: Path) -> None:
    def letter(key: str, topic: str) -> DeadLetter:
        return DeadLetter(
            key=base64.b64encode(key.encode()).decode(),
            source=Source(topic=topic, partition=1, offset=0),
            processor="scorer",
            reason="bad",
            first_failed_at=TIME,
        )

    letters = [letter("ann", "reviews"), letter("ann", "items"), letter("bob", "reviews")]
    write(tmp_path, "dead-letters", *[(0, "reviews", each) for each in letters])
    user = erased("ann", 1, **{"dead-letters": 9})
    assert erase_rows(str(tmp_path), {}, "dead-letters", [user]) == 1
    assert left(tmp_path, "dead-letters") == [1, 2]


def test_rows_in_another_partition_are_told(tmp_path: Path) -> None:
    write(tmp_path, "reviews", (0, "ann", review("ann", 0)), (1, "ann", review("ann", 1)))
    ann, bob, other = erased("ann", 1), erased("bob", 1), erased("ann", 0)
    for users, count in (([ann], 1), ([bob], 0), ([], 0), ([bob, ann], 1), ([ann, other], 2)):
        assert rows_elsewhere(str(tmp_path), {}, "reviews", users) == count


def test_a_table_that_another_rewrites_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "reviews", (0, "ann", review("ann", 0)))
    monkeypatch.setattr(erasure, "CLAIM_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(erasure, "CLAIM_SECONDS", 0.1)
    with claimed(str(tmp_path), "reviews", {}) as table:
        assert table is not None
        with pytest.raises(ErasureError, match=r"is being compacted.* in some minutes"):
            erase_rows(str(tmp_path), {}, "reviews", [erased("ann", reviews=1)])
    began = time.monotonic()
    assert erase_rows(str(tmp_path), {}, "reviews", [erased("ann", reviews=1)]) == 1
    assert time.monotonic() - began < 30


def test_a_table_is_taken_when_the_other_is_through_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "reviews", (0, "ann", review("ann", 0)))
    with ExitStack() as other:
        other.enter_context(claimed(str(tmp_path), "reviews", {}))
        clock = {"monotonic": time.monotonic, "time": time.time, "sleep": lambda _: other.close()}
        monkeypatch.setattr("streams.erasure.time", SimpleNamespace(**clock))
        assert erase_rows(str(tmp_path), {}, "reviews", [erased("ann", reviews=1)]) == 1


def test_of_tables_that_are_not_there_and_of_users_without_rows_nothing_is_erased(
    tmp_path: Path,
) -> None:
    ann = erased("ann", reviews=1)
    assert erase_rows(str(tmp_path), {}, "reviews", [ann]) == 0
    assert erase_journal(str(tmp_path), {}, [ann]) == ([], 0)
    write(tmp_path, "reviews", (0, "ann", review("ann", 0)))
    assert erase_rows(str(tmp_path), {}, "reviews", [erased("ann", behavior=1)]) == 0
    assert left(tmp_path, "reviews") == [0]


# A partition in which user 0 rates, views and writes, is forgotten, and comes back.
HISTORY = [
    [(0, 0, 0, 0), (1, 1, 0, 1), (0, 2, 1, 2), (2, 0, 0, 9)],
    [(0, 3, 0, 3), (0, 0, 2, 0)],
    [(1, 2, 0, 4), (0, 0, 3, 0), (0, 1, 0, 5), (3, 1, 0, 6)],
    [(0, 2, 0, 7), (1, 0, 1, 8)],
]


def archived(url: Path) -> Partition:
    partition = Partition()
    written = Archive(str(url))
    for rows in HISTORY:
        transaction = partition.apply(events(rows)).transaction
        (value,) = journal.encode(transaction.journal)
        written.append("journal", [Row(1, transaction.first_offset, 0, b"1", value)])
    written.commit()
    return partition


def replayed(url: Path) -> tuple[dict[int, bytes], bytes]:
    """States by user, and that of the partition, as a recovery from the archive has them."""
    journals = [each.journal for each in archive.journal(str(url), 1)]
    rows = np.concatenate([each.events for each in journals]).view(EVENT)
    users, index = np.unique(rows["user"], return_inverse=True)
    states, after = recover(
        from_bytes([None] * len(users), USER),
        index,
        from_bytes([None], PARTITION)[0].copy(),
        rows,
        np.concatenate([each.features for each in journals]),
        np.concatenate([each.duplicates for each in journals]),
        np.concatenate([each.steps for each in journals]),
    )
    found = {int(user): state.tobytes() for user, state in zip(users, states, strict=True)}
    return found, after.tobytes()


def test_rows_of_the_journal_are_of_nobody_and_recovery_comes_to_the_same(tmp_path: Path) -> None:
    partition = archived(tmp_path)
    states, after = replayed(tmp_path)
    assert after == partition.steps[-1].header["partition"].tobytes()
    user = Erased("u", int(USERS[0]), 1, {"users": 3})
    unknown = Erased("v", int(USERS[5]), 1, {"users": 4})
    found, count = erase_journal(str(tmp_path), {}, [user, unknown])
    assert count == 5  # until the row that erased them, this too
    # The offsets after what they did in each topic, in which they have come back since.
    assert found == [Erased("u", int(USERS[0]), 1, found[0].before)]
    assert found[0].before == {"users": 3, "reviews": 4, "behavior": 2, "text-features": 1}
    again, same = replayed(tmp_path)
    assert same == after
    assert again.pop(0) == bytes(USER.itemsize)
    assert again == states
    journals = [each.journal for each in archive.journal(str(tmp_path), 1)]
    whose = np.concatenate([each.events for each in journals]).view(EVENT)["user"]
    assert (whose == USERS[0]).nonzero()[0].tolist() == [8, 10]
    assert (whose == 0).nonzero()[0].tolist() == [0, 2, 4, 5, 7]
    assert erase_journal(str(tmp_path), {}, [user]) == ([], 0)  # nothing of before is left


def test_two_erasures_at_once_undo_nothing_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that one has read and not yet written has rows of the other's user."""
    archived(tmp_path)
    one, other = (Erased(name, int(USERS[at]), 1, {}) for at, name in ((0, "u"), (2, "v")))
    write_down = Archive(str(tmp_path))
    forgets = Partition()
    for rows in HISTORY:
        forgets.apply(events(rows))
    last = forgets.apply(events([(2, 0, 3, 0)])).transaction
    (value,) = journal.encode(last.journal)
    write_down.append("journal", [Row(1, last.first_offset, 0, b"1", value)])
    write_down.commit()
    monkeypatch.setattr(erasure, "CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(erasure, "CLAIM_PAUSE_SECONDS", 0.01)
    encode_piece, between = erasure.encode_piece, [other]

    def slowly(piece: journal.Piece) -> bytes:
        while between:
            try:
                erase_journal(str(tmp_path), {}, [between.pop()])
            except ErasureError as error:
                assert "is being compacted" in str(error)  # noqa: PT017 - or it is through
        return encode_piece(piece)

    def left_of(user: Erased) -> int:
        journals = [each.journal for each in archive.journal(str(tmp_path), 1)]
        whose = np.concatenate([each.events for each in journals]).view(EVENT)["user"]
        return int((whose == user.hash).sum())

    monkeypatch.setattr(erasure, "encode_piece", slowly)
    before = left_of(other)
    erase_journal(str(tmp_path), {}, [one])
    assert left_of(one) == 2  # what they have done since they came back
    assert left_of(other) in (0, before)
    ((found,), _) = erase_journal(str(tmp_path), {}, [other])
    assert found.user == "v"
    assert left_of(other) == 0


def test_an_archiver_of_the_journal_is_never_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It commits every few seconds; each rewrite here falls between two of its commits."""
    archived(tmp_path)
    written = Archive(str(tmp_path))
    value = next(iter(archive.journal_values(str(tmp_path), 1)))[1]
    replace_rows, offsets = erasure._replace, iter(range(50, 100))

    def overtaken(table: DeltaTable, rows: pa.Table) -> int:
        written.append("journal", [Row(0, next(offsets), 0, b"0", value)])
        written.commit()
        return replace_rows(table, rows)

    monkeypatch.setattr(erasure, "_replace", overtaken)
    assert erase_journal(str(tmp_path), {}, [Erased("u", int(USERS[0]), 1, {})])[1] == 5
    assert next(offsets) == 51


def test_an_erasure_that_takes_hours_keeps_its_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that rewrite the same files would both succeed, and double their rows."""
    write(tmp_path, "users", *[(0, "ann", None) for _ in range(6)])
    where = str(tmp_path / "users")
    clock, update = [time.time()], erasure._update
    monkeypatch.setattr(compaction.time, "time", lambda: clock[0])
    monkeypatch.setattr(compaction, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(erasure, "PLACES", 2)

    def slowly(table: DeltaTable, *what: Any) -> int:
        done = update(table, *what)
        clock[0] += 0.6 * LEASE_SECONDS
        deadline = time.monotonic() + 60
        while (DeltaTable(where).transaction_version("compaction") or 0) <= clock[0] + 60:
            assert time.monotonic() < deadline  # until it is renewed
        with claimed(str(tmp_path), "users", {}) as other:
            assert other is None
        return done

    monkeypatch.setattr(erasure, "_update", slowly)
    assert erase_rows(str(tmp_path), {}, "users", [erased("ann", users=6)]) == 6


def test_an_erasure_that_lost_its_claim_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived(tmp_path)
    clock, encode_piece = [time.time()], erasure.encode_piece
    monkeypatch.setattr(compaction.time, "time", lambda: clock[0])

    def slowly(piece: journal.Piece) -> bytes:
        clock[0] += 2 * LEASE_SECONDS
        with claimed(str(tmp_path), "journal", {}) as other:
            assert other is not None
        return encode_piece(piece)

    monkeypatch.setattr(erasure, "encode_piece", slowly)
    with pytest.raises(compaction.ClaimLostError, match="Run the command again"):
        erase_journal(str(tmp_path), {}, [Erased("u", int(USERS[0]), 1, {})])


def test_a_row_of_nobody_keeps_what_the_partition_took_of_it() -> None:
    whole = Partition().apply(events(HISTORY[0])).transaction.journal
    some = nobody(whole, np.array([True, False, True, False]))
    kept = some.events.view(EVENT)
    assert (
        kept["rating"][[0, 1, 3]].tolist() == whole.events.view(EVENT)["rating"][[0, 1, 3]].tolist()
    )
    assert kept["action"].tolist() == whole.events.view(EVENT)["action"].tolist()
    for name in ("user", "item", "event_id", "time", "session"):
        assert kept[name][[0, 2]].tolist() == [0, 0]
    assert np.isnan(kept["price"][[0, 2]]).all()
    told = {name for name, at in INDEX.items() if not np.isnan(some.features[0, at])}
    assert told == {"global_mean", "item_bias", "user_ratings"}
    assert np.isnan(some.features[2, INDEX["user_ratings"]])  # not their first: no more is told
    for name in ("events", "features"):
        assert getattr(some, name)[1].tobytes() == getattr(whole, name)[1].tobytes()
    for name in ("topics", "offsets", "steps", "seqs", "duplicates"):
        assert getattr(some, name).tolist() == getattr(whole, name).tolist()


def test_a_journal_of_another_layout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived(tmp_path)
    monkeypatch.setattr(erasure, "LAYOUT_HASH", "other")
    with pytest.raises(ErasureError, match="Erase with the version that wrote them"):
        erase_journal(str(tmp_path), {}, [Erased("u", int(USERS[0]), 1, {})])


def test_an_archiver_that_writes_meanwhile_loses_and_doubles_nothing(tmp_path: Path) -> None:
    erase_beside_an_archiver(str(tmp_path), {}, ["ann", "bob", "cem"], count=60, compact_every=7)
