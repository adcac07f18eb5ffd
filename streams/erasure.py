"""Erasing users from the archive.

A row of an erased user keeps its place and nothing else: it is null but for its partition and
offset, so that positions hold. A row of the journal stays a row of nobody: a number in its
partition, and the stars that the partition's running mean has taken; so recovery and
`verify-replay` still come to what was stored. The files that held the rows are deleted.

The journal tells how far: up to the newest row that erased a user. What came after it is of a user
who has come back, and stays.
"""

import base64
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import CommitFailedError
from deltalake.fs import DeltaStorageHandler
from numpy.typing import NDArray
from pyarrow import fs

from model.events import EVENT, FORGET, blank
from model.features import FEATURE_HASH, INDEX
from model.ids import NONE
from model.state import LAYOUT_HASH
from schemas import archive
from schemas.exceptions import StarcastError
from schemas.journal import TOPICS, Journal, Piece, decode, encode_piece
from schemas.topics import TOPICS as ALL_TOPICS
from streams.compaction import LEASE_SECONDS, WRITER, claimed, look_again, until_committed

OF_USERS = tuple(topic.name for topic in ALL_TOPICS if topic.key == "user_id")
"""Topics whose records each are of one user."""

CLAIM_SECONDS = 1.5 * LEASE_SECONDS  # one who rewrites a table, or was killed in it, is waited for
CLAIM_PAUSE_SECONDS = 1.0
# Whom one question names: delta-rs (1.6) takes a minute for two thousand, and dies of three.
USERS = 100
PLACES = 1_000  # rows that one commit names; delta-rs (1.6) dies of twenty thousand
BEGUN_SECONDS = 600.0  # a file that nothing was written to for so long is nobody's
VALUES = 64  # of the journal, in memory at once: half a megabyte each at most
_KEPT = ("global_mean", "item_bias")  # features by which a partition follows its newcomers


class ErasureError(StarcastError):
    """Something of a user that cannot be erased now."""


@dataclass(frozen=True)
class Erased:
    """A user of the archive, and how far they are erased."""

    user: str
    hash: int
    partition: int
    before: Mapping[str, int]  # by topic: rows before this offset; the journal tells those it has


def erase_rows(url: str, options: Mapping[str, str], topic: str, users: Sequence[Erased]) -> int:
    """Erase users' rows in the table of a topic; how many.

    Raises ErasureError when another rewrites the table, UnreachableError when storage does not
    answer.
    """
    chosen = [f"({_rows_of(topic, each)})" for each in users if topic in each.before]
    if not chosen or archive.open_table(url, topic, options) is None:
        return 0

    count = 0
    with _claimed(url, options, topic) as table:
        # The table's own fields: another release may have made it, with others.
        fields = [each.name for each in table.schema().fields]
        nulls = dict.fromkeys([name for name in fields if name not in archive.PLACE], "NULL")
        # By their places: Delta's log keeps a commit's predicate, which would name the users.
        several = [" OR ".join(chosen[at : at + USERS]) for at in range(0, len(chosen), USERS)]
        places = pa.concat_tables([_places(table, each) for each in several])
        for first in range(0, len(places), PLACES):
            at = _at(places.slice(first, PLACES))
            count += _committed(table, lambda table, at=at: _update(table, at, nulls))
    _delete_files(url, options, topic)  # also those of an erasure that ended before it came here
    return count


def erase_journal(
    url: str, options: Mapping[str, str], users: Sequence[Erased]
) -> tuple[list[Erased], int]:
    """Make users' rows in the journal rows of nobody, up to the newest that erased them.

    Gives the users of whom there is such a row, with what lies before it in each topic, and the
    number of rows. Raises ErasureError for rows of another layout, and as `erase_rows` does.
    """
    found: list[Erased] = []
    count = 0
    if archive.open_table(url, "journal", options) is None:
        return found, count
    for partition in sorted({each.partition for each in users}):
        mine = [each for each in users if each.partition == partition]
        # From the reading on: another erasure between it and the writing would be undone.
        with _claimed(url, options, "journal") as table:
            ends = _ends(url, options, partition, mine)
            for each in mine:
                if each.hash in ends:
                    before = dict(zip(TOPICS, ends[each.hash][1:], strict=True))
                    found.append(replace(each, before={**each.before, **before}))
            last = {user: step for user, (step, *_) in ends.items()}
            for values in _changed(url, options, partition, last):
                rows = pa.table(
                    {
                        "kafka_partition": pa.array([partition] * len(values), pa.int32()),
                        "kafka_offset": pa.array([offset for offset, _, _ in values], pa.int64()),
                        "kafka_value": pa.array([value for _, value, _ in values], pa.binary()),
                    }
                )
                _committed(table, lambda table, rows=rows: _replace(table, rows))
                count += sum(rows for _, _, rows in values)
    _delete_files(url, options, "journal")  # no sooner: they were read until now
    return found, count


def rows_elsewhere(
    url: str, options: Mapping[str, str], topic: str, users: Sequence[Erased]
) -> int:
    """Users' rows in partitions that are not theirs: their producer took another partitioner."""
    names = defaultdict[int, list[str]](list)
    for each in users:
        names[each.partition].append(each.user)
    elsewhere = [
        (pl.col("kafka_partition") != partition)
        & (
            pl.col("kafka_key").is_in([each.encode() for each in mine])
            | pl.col("user_id").is_in(mine)
        )
        for partition, mine in names.items()
    ]
    rows = archive.read(url, topic, options).filter(pl.any_horizontal(pl.lit(False), *elsewhere))
    return archive.collect(rows.select(pl.len()), archive.table_url(url, topic)).item()


def nobody(journal: Journal, rows: NDArray[np.bool_]) -> Journal:
    """The same journal, in which some of its rows (n) are of nobody."""
    events = journal.events.view(EVENT).reshape(-1).copy()
    theirs = blank(EVENT, int(rows.sum()))
    for name in ("action", "rating"):
        theirs[name] = events[name][rows]
    events[rows] = theirs
    features = np.full_like(journal.features, np.nan)
    for name in _KEPT:
        features[:, INDEX[name]] = journal.features[:, INDEX[name]]
    ratings = journal.features[:, INDEX["user_ratings"]]
    features[:, INDEX["user_ratings"]] = np.where(ratings == 0, 0, np.nan)  # a first rating, or not
    features[~rows] = journal.features[~rows]
    versions = {
        name: np.where(rows, NONE, getattr(journal, name)).astype(np.uint64)
        for name in (
            "item_versions",
            "item_attributes_versions",
            "user_attributes_versions",
            "item_vectors",
        )
    }
    return replace(journal, events=events.view(f"V{EVENT.itemsize}"), features=features, **versions)


def _rows_of(topic: str, user: Erased) -> str:
    """A user's rows in a topic's table, for DataFusion."""
    key, end = user.user.encode(), user.before[topic]
    if topic == "dead-letters":
        letter = base64.b64encode(key).decode()
        sources = ", ".join(f"'{name}'" for name in OF_USERS)
        return f"key = '{letter}' AND source['topic'] IN ({sources}) AND kafka_offset < {end}"
    name = user.user.replace("'", "''")
    found = (
        f"kafka_partition = {user.partition} AND kafka_offset < {end}"
        f" AND (kafka_key = X'{key.hex()}' OR user_id = '{name}')"
    )
    if topic != "predicted-ratings":
        return found
    sources = " OR ".join(
        f"(source['topic'] = '{source}' AND source['offset'] < {user.before[source]})"
        for source in TOPICS
        if source in user.before
    )
    return f"{found} AND (kind IS NULL OR kind <> 'interaction' OR {sources})"


def _places(table: DeltaTable, rows: str) -> pa.Table:
    """Where rows of a table are."""
    asked = f"SELECT {', '.join(archive.PLACE)} FROM archived WHERE {rows}"  # noqa: S608 - quoted
    return pa.table(QueryBuilder().register("archived", table).execute(asked).read_all())


def _at(places: pa.Table, of: str = "") -> str:
    """Rows of a table by their places, for DataFusion."""
    by_partition: dict[int, list[str]] = {}
    for place in places.to_pylist():
        by_partition.setdefault(place["kafka_partition"], []).append(str(place["kafka_offset"]))
    return " OR ".join(
        f"({of}kafka_partition = {partition} AND {of}kafka_offset IN ({', '.join(offsets)}))"
        for partition, offsets in by_partition.items()
    )


@contextmanager
def _claimed(url: str, options: Mapping[str, str], topic: str) -> Generator[DeltaTable]:
    """A table that is there, and that nobody else rewrites meanwhile."""
    until, where = time.monotonic() + CLAIM_SECONDS, archive.table_url(url, topic)
    while True:
        with archive.reached(where), claimed(url, topic, options) as table:
            if table is not None:
                try:
                    yield table
                    return
                except CommitFailedError as error:
                    raise ErasureError(
                        f"The table at {where} was written to again and again meanwhile: {error}. "
                        "Run the command again."
                    ) from error
        if time.monotonic() > until:
            raise ErasureError(
                f"The table at {where} is being compacted, or erased from by another command. Run "
                "the command again in some minutes."
            )
        time.sleep(CLAIM_PAUSE_SECONDS)


def _delete_files(url: str, options: Mapping[str, str], topic: str) -> None:
    """Delete files that the newest version does not name, not those that an archiver is writing.

    Delta's vacuum knows those that a version named. A writer that was killed, or whose commit was
    refused, leaves others (a full vacuum would take those that are being written with them).
    """
    with _claimed(url, options, topic) as table:
        table.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
        where = archive.table_url(url, topic)
        storage = fs.PyFileSystem(DeltaStorageHandler(where, dict(options)))
        # First what is committed, then what lies there, then what is named: so what is committed
        # meanwhile is named, and what is committed later holds no row that is committed by now.
        ends = archive.positions(url, topic, options)
        there = [each.base_name for each in storage.get_file_info(fs.FileSelector(""))]
        table.update_incremental()
        named = {uri.rpartition("/")[2] for uri in table.file_uris()}
        for name in there:
            if name.endswith(".parquet") and name not in named and _dead(storage, name, ends):
                storage.delete_file(name)
        for path in _begun(table.table_uri):
            path.unlink(missing_ok=True)


def _dead(storage: fs.FileSystem, name: str, ends: Mapping[int, int]) -> bool:
    """Whether nobody can commit a file: another file with a row of it was committed.

    Archivers alone write while the table is claimed, and a commit of theirs is then refused.
    """
    try:
        with storage.open_input_file(name) as file:
            rows = pq.read_table(file, columns=list(archive.PLACE))
    except pa.ArrowInvalid:  # cut short: it has no rows
        return False
    low = rows.group_by("kafka_partition").aggregate([("kafka_offset", "min")]).to_pylist()
    return any(row["kafka_offset_min"] < ends.get(row["kafka_partition"], 0) for row in low)


def _begun(table_uri: str) -> Iterator[Path]:
    """Files that were begun in a local folder, and not put in place since.

    A writer that was killed leaves them, under names that delta-rs (1.6) lists nowhere.
    """
    uri = urlsplit(table_uri)
    if uri.scheme != "file":
        return
    for path in Path(url2pathname(uri.path)).glob("*.parquet#*"):
        with suppress(FileNotFoundError):  # it is in its place now
            if path.stat().st_mtime < time.time() - BEGUN_SECONDS:
                yield path


@until_committed
def _committed(table: DeltaTable, rewrite: Callable[[DeltaTable], int]) -> int:
    look_again(table)
    return rewrite(table)


def _update(table: DeltaTable, rows: str, updates: dict[str, str]) -> int:
    done = table.update(predicate=rows, updates=updates, writer_properties=WRITER)
    return int(done["num_updated_rows"])


def _replace(table: DeltaTable, rows: pa.Table) -> int:
    """New values for rows of the journal.

    Their places are named too: delta-rs (1.6) would read the whole table for them, and take each
    commit of an archiver meanwhile for one that it had to read.
    """
    same = " AND ".join(f"old.{name} = new.{name}" for name in archive.PLACE)
    at = _at(rows.select(archive.PLACE), "old.")
    done = (
        table.merge(rows, f"{same} AND ({at})", "new", "old", writer_properties=WRITER)
        .when_matched_update({"kafka_value": "new.kafka_value"})
        .execute()
    )
    return int(done["num_target_rows_updated"])


def _ends(
    url: str, options: Mapping[str, str], partition: int, users: Sequence[Erased]
) -> dict[int, tuple[int, ...]]:
    """By hash of those of the users that a row erased: the newest such step, and by topic the
    offset after what that has erased."""
    hashes = np.array([each.hash for each in users], np.uint64)
    seen = {each.hash: [0] * len(TOPICS) for each in users}
    ends: dict[int, tuple[int, ...]] = {}
    for _, piece in _pieces(url, options, partition):
        events = piece.journal.events.view(EVENT).reshape(-1)
        for row in np.flatnonzero(np.isin(events["user"], hashes)).tolist():
            user, topic = int(events["user"][row]), int(piece.journal.topics[row])
            seen[user][topic] = max(seen[user][topic], int(piece.journal.offsets[row]) + 1)
            if events["action"][row] == FORGET:
                ends[user] = int(piece.journal.steps[row]), *seen[user]
    return ends


def _changed(
    url: str, options: Mapping[str, str], partition: int, last: Mapping[int, int]
) -> Iterator[list[tuple[int, bytes, int]]]:
    """Journal values, some at a time, without the rows of users (by hash) up to their last step.

    Each with its offset and the number of rows that were theirs.
    """
    several: list[tuple[int, bytes, int]] = []
    for offset, piece in _pieces(url, options, partition):
        events = piece.journal.events.view(EVENT).reshape(-1)
        rows = np.zeros(len(events), np.bool_)
        for user, step in last.items():
            rows |= (events["user"] == np.uint64(user)) & (piece.journal.steps <= np.uint64(step))
        if not rows.any():
            continue
        changed = nobody(piece.journal, rows)
        if rows.all() and piece.count == 1:  # what was read for nobody else
            changed = replace(changed, recents=changed.recents[:0])
        several.append((offset, encode_piece(replace(piece, journal=changed)), int(rows.sum())))
        if len(several) == VALUES:
            yield several
            several = []
    if several:
        yield several


def _pieces(url: str, options: Mapping[str, str], partition: int) -> Iterator[tuple[int, Piece]]:
    """All archived values of a partition's journal, with their offsets."""
    for offset, value in archive.journal_values(url, partition, options):
        piece = decode(value)
        found = piece.journal.layout_hash, piece.journal.feature_hash
        if found != (LAYOUT_HASH, FEATURE_HASH):
            raise ErasureError(
                f"The archived journal of partition {partition} has rows of layout {found[0]} and "
                f"features {found[1]}; this version reads {LAYOUT_HASH} and {FEATURE_HASH} and "
                "cannot tell whose they are. Erase with the version that wrote them."
            )
        yield offset, piece
