"""A shop's history from its archive: what the journal says was applied, joined with its records.

The journal holds each event in the order it was applied, with the feature row that the scorer saw.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from model import features
from model.events import EVENT, FORGET, Rows
from model.ids import NONE
from model.state import LAYOUT_HASH
from schemas import archive, codec
from schemas.journal import TOPICS, Journal, TornError
from schemas.records import Item, User
from schemas.topics import BY_NAME
from trainer.clean import REVIEW_COLUMNS
from trainer.data import Journalled, Log, labelled
from trainer.exceptions import TrainerError
from trainer.progress import OnProgress, unseen

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", Item, User)

_DECODED = 10_000  # records of attributes at once


@dataclass(frozen=True)
class _Applied:
    """What is learnt from of a transaction of n events; of views, which are many, no features."""

    partition: int
    events: Rows  # EVENT (n)
    topics: NDArray[np.uint8]  # (n)
    offsets: NDArray[np.int64]  # (n)
    rated: Journalled


def from_archive(
    url: str, options: Mapping[str, str] | None = None, on_progress: OnProgress = unseen
) -> Log:
    """The history in an archive: its journal, joined with its reviews, items and users.

    Partitions are merged by event time (a late event as of its arrival), each in its journal's
    order. Items and users count as known from the start, as they are known now. What a user did
    before they were erased is left out. So is, with a warning, what was journalled under another
    layout of states, and a transaction of which the archive lacks a part, or a review that it
    lacks: an archiver was down for longer than Kafka kept it.

    `on_progress` is called with partitions of the journal read and partitions in all.

    Raises:
        TrainerError: the journal is empty, or of another layout of events.
    """
    parts = _read_journal(url, options, on_progress)
    events = np.concatenate([part.events for part in parts])
    partition = np.concatenate([np.full(len(part.events), part.partition) for part in parts])
    kept = _kept(events)
    if not kept.any():
        raise TrainerError(f"all users in the archive at {url} were erased; nothing is left to fit")
    order = _merge(partition, events["time"])
    order = order[kept[order]]
    place = np.full(len(events), -1)
    place[order] = np.arange(len(order))
    applied = pl.DataFrame(
        {
            "row": place,
            "topic": np.concatenate([part.topics for part in parts]),
            "kafka_partition": partition.astype(np.int32),
            "kafka_offset": np.concatenate([part.offsets for part in parts]),
            "rated": labelled(events),
        }
    ).filter((pl.col("topic") == TOPICS.index("reviews")) & (pl.col("row") >= 0))
    return Log(
        events[order],
        _reviews(url, options, applied),
        [(0, item) for item in _records(url, "items", options, Item)],
        [(0, user) for user in _records(url, "users", options, User)],
        _journalled(parts, labelled(events), order),
    )


def _read_journal(
    url: str, options: Mapping[str, str] | None, on_progress: OnProgress
) -> list[_Applied]:
    """What was applied, at least one transaction; what is left out is logged.

    Raises TrainerError where nothing is left.
    """
    torn: list[TornError] = []
    parts: list[_Applied] = []
    others = 0  # events under another layout of states
    partitions = sorted(archive.positions(url, "journal", options))
    for done, number in enumerate(partitions):
        on_progress(done, len(partitions))
        for transaction in archive.journal(url, number, options, on_torn=torn.append):
            journal = transaction.journal
            if journal.layout_hash != LAYOUT_HASH:
                others += len(journal)
            elif len(journal):
                parts.append(_applied(number, journal))
    on_progress(len(partitions), len(partitions))
    if others:
        logger.warning(
            "%s events of the archive are left out: their journal is of another release's states. "
            "`starcast export` writes a record file of all events, for `starcast train FILE`",
            f"{others:,}",
        )
    if torn:
        logger.warning(
            "%d transactions or parts of them are missing in the archive and are left out (its "
            "archiver was down for longer than Kafka's retention): %s",
            len(torn),
            torn[0],
        )
    if not parts:
        raise TrainerError(
            f"the archive at {url} holds no journal rows of layout {LAYOUT_HASH}; "
            "run the scorer and the archiver, or `starcast backfill` a record file"
        )
    return parts


def _reviews(url: str, options: Mapping[str, str] | None, applied: pl.DataFrame) -> pl.DataFrame:
    """The archived reviews among what was `applied` (row, kafka_partition, kafka_offset, rated).

    How many of the rated ones are missing is logged, but for those that are yet to be archived.
    """
    reached = archive.positions(url, "reviews", options)
    reviews = archive.collect(
        archive.read(url, "reviews", options)
        .with_columns(pl.col("event_time").alias("time"))
        .join(applied.lazy(), on=["kafka_partition", "kafka_offset"])
        .sort("row")
        .select(pl.col(name).cast(kind) for name, kind in REVIEW_COLUMNS.items()),
        archive.table_url(url, "reviews"),
    )
    ends = pl.DataFrame(
        {"kafka_partition": [*reached], "end": [*reached.values()]},
        {"kafka_partition": pl.Int32, "end": pl.Int64},
    )
    due = applied.join(ends, on="kafka_partition").filter(
        "rated", pl.col("kafka_offset") < pl.col("end")
    )
    if lost := due.join(reviews, on="row", how="anti").height:
        logger.warning(
            "%s of %s reviews with stars are missing in the archive and are not learnt from (its "
            "archiver was down for longer than Kafka's retention)",
            f"{lost:,}",
            f"{due.height:,}",
        )
    return reviews


def _applied(partition: int, journal: Journal) -> _Applied:
    events = journal.events.view(EVENT).reshape(-1).copy()
    rated = labelled(events)
    same = journal.feature_hash == features.FEATURE_HASH
    rows = (
        journal.features[rated]
        if same
        else np.full((rated.sum(), len(features.NAMES)), np.nan, "f4")
    )
    return _Applied(
        partition,
        events,
        journal.topics.copy(),
        journal.offsets.copy(),
        Journalled(rows, np.full(len(rows), same), np.full(len(rows), journal.encoder)),
    )


def _kept(events: Rows) -> NDArray[np.bool_]:
    """Which events (n), in the order of their journals, no erasure has made undone."""
    users, index = np.unique(events["user"], return_inverse=True)
    erased = np.full(len(users), -1)  # where each user was erased last
    forgets = np.flatnonzero(events["action"] == FORGET)
    np.maximum.at(erased, index[forgets], forgets)
    return (np.arange(len(events)) > erased[index]) & (events["user"] != NONE)


def _merge(partition: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.intp]:
    """An order by time that leaves the rows of each partition in theirs."""
    reached = time.copy()
    for number in np.unique(partition):
        rows = partition == number
        reached[rows] = np.maximum.accumulate(time[rows])
    return np.argsort(reached, kind="stable")


def _journalled(
    parts: Sequence[_Applied], rated: NDArray[np.bool_], order: NDArray[np.intp]
) -> Journalled:
    """The rows of the rated among these events, as `order` has them."""
    rows = (np.cumsum(rated) - 1)[order[rated[order]]]
    return Journalled(
        np.concatenate([part.rated.features for part in parts])[rows],
        np.concatenate([part.rated.usable for part in parts])[rows],
        np.concatenate([part.rated.encoder for part in parts])[rows],
    )


def _records(
    url: str, topic: str, options: Mapping[str, str] | None, kind: type[Kind]
) -> list[Kind]:
    """The newest record of each id of a compacted topic; none of a user who was deleted after it.

    A deleted item is still what was known when its events came. The archive has all that ever was
    said, such as each price of each day, so no more than a slice of a partition is decoded at once.
    """
    contract, columns = BY_NAME[topic], ["kafka_offset", "kafka_key", "kafka_value"]
    found: list[Kind] = []
    for partition in sorted(archive.positions(url, topic, options)):
        frame = archive.read(url, topic, options, columns=columns, partitions=[partition])
        newest: dict[tuple[bytes, str], Kind] = {}
        for rows in archive.collect(frame, archive.table_url(url, topic)).iter_slices(_DECODED):
            places = [(partition, offset) for offset in rows["kafka_offset"]]
            decoded = codec.decode(contract, rows["kafka_value"].to_list(), places)
            keys = rows["kafka_key"].to_list()
            deleted = {keys[at]: at for at in decoded.tombstones} if kind is User else {}
            if deleted:
                newest = {name: each for name, each in newest.items() if name[0] not in deleted}
            for at, record in enumerate(decoded.records):
                if isinstance(record, kind) and at > deleted.get(keys[at], -1):
                    name = (keys[at], getattr(record, contract.key))
                    newest.pop(name, None)  # so that the newest comes last
                    newest[name] = record
        found += newest.values()
    return found
