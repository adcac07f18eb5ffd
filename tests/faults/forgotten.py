"""Who was forgotten, as the topics tell it, and what has to be gone of them.

Nothing here uses the code that erases. Null values are read off the topics of events. When each was
applied says the archived journal, of whose rows an erasure leaves step, topic and offset.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import polars as pl
from confluent_kafka import Message
from numpy.typing import NDArray

from model.events import EVENT
from model.features import NAMES
from model.ids import NONE, hash_ids
from schemas import archive
from schemas.journal import TOPICS, Journal, Piece, decode
from streams.tail import read_topic
from tests.faults.world import PARTITIONS, FaultyShop

# Features that stay of a row of nobody; of the last whether it is 0.
KEPT, FIRST = ("global_mean", "item_bias"), "user_ratings"
VERSIONS = (
    "item_versions",
    "item_attributes_versions",
    "user_attributes_versions",
    "item_vectors",
)

# What has to be left of an archived record: all, its place alone, rows of nobody in it, or either
# of the first two.
WHOLE, ERASED, EMPTIED, EITHER = range(4)


class Null(NamedTuple):
    """A record that erases its user."""

    user: str
    topic: str
    partition: int
    offset: int


@dataclass
class Order:
    """When the records of a partition were applied."""

    codes: NDArray[np.int64]  # topic and offset in one, sorted
    taken: NDArray[np.int64]

    def steps(self, topics: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The steps of records (n); -1 where the journal has none."""
        codes = code(topics, offsets)
        at = np.minimum(np.searchsorted(self.codes, codes), max(len(self.codes) - 1, 0))
        if not len(self.codes):
            return np.full(len(codes), -1)
        return np.where(self.codes[at] == codes, self.taken[at], -1)


@dataclass
class Forgotten:
    """All that have been forgotten in a shop."""

    shop: FaultyShop
    nulls: list[Null]
    attributes: dict[str, int]  # by user: their newest null value in `users`
    orders: dict[int, Order] = field(default_factory=dict[int, Order])
    last: dict[str, int] = field(default_factory=dict[str, int])  # step of their newest null value
    unapplied: list[Null] = field(default_factory=list[Null])
    expected: int = 0  # records that an erasure came after, as `expect` counts them

    @cached_property
    def by_hash(self) -> dict[int, int]:
        """The same by the users' hashes."""
        return dict(zip(hash_ids(list(self.last)).tolist(), self.last.values(), strict=True))

    def of(self, partition: int) -> tuple[list[Null], NDArray[np.int64]]:
        """The null values of a partition that were applied, and when."""
        mine = [each for each in self.nulls if each.partition == partition]
        steps = self._steps(mine)
        return [each for each, step in zip(mine, steps, strict=True) if step >= 0], steps[
            steps >= 0
        ]

    def _steps(self, nulls: Sequence[Null]) -> NDArray[np.int64]:
        """Of null values of one partition."""
        if not nulls:
            return np.zeros(0, np.int64)
        topics = np.array([TOPICS.index(each.topic) for each in nulls])
        offsets = np.array([each.offset for each in nulls])
        return self.orders[nulls[0].partition].steps(topics, offsets)

    def apply(self) -> None:
        """Find out when each null value was applied."""
        for partition in range(PARTITIONS):
            mine = [each for each in self.nulls if each.partition == partition]
            for null, step in zip(mine, self._steps(mine).tolist(), strict=True):
                if step < 0:
                    self.unapplied.append(null)
                else:
                    self.last[null.user] = max(self.last.get(null.user, -1), step)

    def rows(self, journal: Journal) -> NDArray[np.bool_]:
        """Those of a journal that have to be of nobody, since an erasure came after them."""
        users = journal.events.view(EVENT).reshape(-1)["user"].tolist()
        last = np.array([self.by_hash.get(user, -1) for user in users], np.int64)
        return journal.steps.astype(np.int64) <= last

    def expect(self, users: Sequence[str], steps: NDArray[np.int64]) -> None:
        """Count records of users (n), by when they were applied, that an erasure came after."""
        last = np.array([self.last.get(user, -1) for user in users], np.int64)
        self.expected += int(((steps >= 0) & (steps <= last)).sum())

    def left(self, topic: str, message: Message) -> int:
        """What has to be left of a record in the archive."""
        if not self.nulls:
            return WHOLE
        if topic == "journal":
            emptied = self.rows(decode(message.value() or b"").journal).any()
            return EMPTIED if emptied else WHOLE
        user = _key(message)
        if user not in self.shop.forgotten:
            return WHOLE
        partition, offset = message.partition() or 0, message.offset() or 0
        if topic == "users":
            return ERASED if offset <= self.attributes.get(user, -1) else WHOLE
        if topic in TOPICS:
            return self._before(user, partition, topic, offset)
        if topic == "predicted-ratings":
            record = orjson.loads(message.value() or b"")
            source = record["source"]
            topic, offset = source["topic"], source["offset"]  # an answer goes with its request
            if topic in TOPICS:
                return self._before(user, partition, topic, offset)
        elif topic != "score-requests":
            return WHOLE
        span = self.shop.forgotten[user]
        if span is None or span.before[topic, partition] <= offset < span.after[topic, partition]:
            return EITHER
        return ERASED if offset < span.before[topic, partition] else WHOLE

    def steps(self, partition: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """When a partition's records (n, 2: topic, offset) were applied; -1: never."""
        return self.orders[partition].steps(places[:, 0], places[:, 1])

    def _before(self, user: str, partition: int, topic: str, offset: int) -> int:
        """What has to be left of what came of one record of an event."""
        (step,) = self.steps(partition, np.array([[TOPICS.index(topic), offset]]))
        return ERASED if 0 <= step <= self.last.get(user, -1) else WHOLE


def code(topics: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Topic and offset as one number."""
    return (topics << 48) + offsets


def read_forgotten(shop: FaultyShop) -> Forgotten:
    """Read null values and when they were applied."""
    if not shop.forgotten:
        return Forgotten(shop, [], {})
    nulls = [each for topic in TOPICS for each in _nulls(shop, topic)]
    attributes: dict[str, int] = {}
    for each in _nulls(shop, "users"):
        attributes[each.user] = max(each.offset, attributes.get(each.user, -1))
    found = Forgotten(shop, nulls, attributes)
    found.orders = {partition: _order(shop, partition) for partition in range(PARTITIONS)}
    found.apply()
    return found


def _nulls(shop: FaultyShop, topic: str) -> Iterator[Null]:
    for batch in read_topic(shop.kafka, topic):
        for each in batch:
            if each.value() is None:
                yield Null(_key(each), topic, each.partition() or 0, each.offset() or 0)


def _key(message: Message) -> str:
    key = message.key()
    return key.decode() if isinstance(key, bytes) else key or ""


def archived_pieces(shop: FaultyShop, partition: int) -> Iterator[tuple[int, Piece]]:
    """The archived journal of a partition, with offsets."""
    for offset, value in archive.journal_values(shop.settings.archive.url, partition):
        yield offset, decode(value)


def _order(shop: FaultyShop, partition: int) -> Order:
    codes, steps = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for _, piece in archived_pieces(shop, partition):
        journal = piece.journal
        codes.append(code(journal.topics.astype(np.int64), journal.offsets))
        steps.append(journal.steps.astype(np.int64))
    known, taken = np.concatenate(codes), np.concatenate(steps)
    order = np.argsort(known)
    return Order(known[order], taken[order])


def emptied(before: Piece, after: Piece, rows: NDArray[np.bool_]) -> bool:
    """Whether a journal value is as it was, but that some of its rows (n) are of nobody."""
    old, new = before.journal, after.journal
    whole = ("feature_hash", "layout_hash", "encoder", "partition_state", "ends")
    same = (before.index, before.count) == (after.index, after.count)
    same &= all(getattr(old, name) == getattr(new, name) for name in whole)
    for name in ("topics", "offsets", "steps", "seqs", "duplicates"):
        same &= np.array_equal(getattr(old, name), getattr(new, name))
    if not same:
        return False
    same &= np.array_equal(old.events[~rows], new.events[~rows])
    same &= np.array_equal(old.features[~rows], new.features[~rows], equal_nan=True)
    for name in VERSIONS:
        same &= np.array_equal(getattr(old, name)[~rows], getattr(new, name)[~rows])
        same &= not getattr(new, name)[rows].any()
    was = old.events.view(EVENT).reshape(-1)[rows]
    left = new.events.view(EVENT).reshape(-1)[rows]
    for name in EVENT.names or ():
        if name in ("action", "rating"):
            same &= np.array_equal(was[name], left[name], equal_nan=True)
        else:  # zero, or no number where that is how nothing is said
            same &= not np.nan_to_num(left[name]).any()
    for at, name in enumerate(NAMES):
        had, has = old.features[rows, at], new.features[rows, at]
        if name in KEPT:
            same &= np.array_equal(had, has, equal_nan=True)
        elif name == FIRST:
            same &= bool((np.isnan(has) | (has == 0)).all())
            same &= np.array_equal(had == 0, has == 0)
        else:
            same &= bool(np.isnan(has).all())
    alone = bool(rows.all()) and before.count == 1
    return same and np.array_equal(old.recents[: 0 if alone else None], new.recents)


def nobodys_in(journal: Journal) -> int:
    """How many rows of an archived journal are of nobody."""
    return int((journal.events.view(EVENT).reshape(-1)["user"] == NONE).sum())


def files_left(url: str, topic: str) -> list[Path]:
    """Files of a table that its newest version does not name."""
    found = archive.open_table(url, topic)
    if found is None:
        return []
    named = {Path(each.removeprefix("file://")) for each in found.file_uris()}
    folder = Path(archive.table_url(url, topic))
    there = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in there if "_delta_log" not in path.parts and path not in named]


def rows_in(path: Path) -> pl.DataFrame:
    """Place, key and value of the rows of a file."""
    return pl.read_parquet(path, columns=[*archive.PLACE, "kafka_key", "kafka_value"])


def blank_rows(url: str, topic: str) -> pl.DataFrame:
    """Places of archived rows that hold nothing else."""
    rows = archive.read(url, topic).filter(pl.col("kafka_value").is_null())
    others = pl.all().exclude(*archive.PLACE)
    found = rows.filter(pl.all_horizontal(others.is_null())).select(archive.PLACE)
    return found.with_columns(blank=True).collect()
