"""Catalog: records of items and users to attributes in the store; a tombstone deletes.

An item's attributes carry its title after the fixed row, for whoever shows predictions.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from confluent_kafka import Message

from model.catalog import describe_items, describe_users, forget_items
from model.events import Rows, blank
from model.ids import hash_ids, partitions_of
from model.lookups import Table, table
from model.state import CATEGORY, ITEM_ATTRIBUTES
from model.state_bytes import from_bytes, to_bytes
from model.texts import plain
from schemas.records import Item, User
from streams.claims import Claims, ends
from streams.inputs import Inputs, split
from streams.metrics import Metrics
from streams.processor import Offsets, Outcome, Position
from streams.reader import ITEM_KIND, USER_KIND, partition_keys
from streams.store import WRITE_KEYS, Store

# Rows and running prices of a batch are one guarded write: a part of it would count prices twice.
BATCH = WRITE_KEYS - 1  # records in one turn
LINGER_SECONDS = 0.05
KINDS = {"items": ITEM_KIND, "users": USER_KIND}  # of attributes, by topic
PRICES = b"c"  # kind of the running prices of a partition's categories, all under one key
PRICE_ROW = np.dtype([("category", "<u8"), ("prices", CATEGORY)])
LONGEST_TITLE = 120  # characters kept beside an item's attributes


Entry = tuple[str, Any, int]  # id, record (None deletes), version


class Catalog:
    """One worker's share of the catalogue, a processor of `streams.loop`."""

    name = "catalog"
    topics = ("items", "users")
    together = True
    transactional = False
    batch_size = BATCH
    linger_seconds = LINGER_SECONDS

    def __init__(self, store: Store, prefix: str, metrics: Metrics) -> None:
        self._store = store
        self._prefix = prefix
        self._metrics = metrics
        self._claims = Claims(store, metrics, self.name)
        self.lag = 0

    def claim(self, committed: Offsets) -> Offsets:
        """Claim both kinds of attributes and read on where their headers stand."""
        starts = {topic: self._claims.claim(kind, committed) for topic, kind in KINDS.items()}
        return {
            partition: {topic: found[partition] for topic, found in starts.items()}
            for partition in committed
        }

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget partitions."""
        self._claims.drop(partitions)

    def idle(self) -> Outcome | None:
        """Now and then, a look at the claims."""
        self._claims.check()
        return None

    def close(self) -> None:
        """Nothing waits."""

    def process(self, messages: list[Message]) -> Outcome:
        """Describe the items and users of one batch; only the newest record of each counts."""
        inputs, letters = split(messages, self._prefix, self.name)
        writes: list[tuple[bytes, int, list[bytes], list[bytes], int]] = []
        for topic, each in inputs.items():
            kind = KINDS[topic]
            for partition, end in ends(messages, self._prefix + topic).items():
                writes.append((kind, partition, *self._describe(each, kind, partition), end))
            self._metrics.events.labels(self.name, topic).inc(len(each.messages))

        def finish(_: dict[Position, int]) -> None:
            self._metrics.dead_letters.labels(self.name, "contract").inc(len(letters))
            for each in writes:
                self._claims.write(*each)

        return Outcome(outputs=letters, finish=finish)

    def _describe(
        self, inputs: Inputs[list[Any]], kind: bytes, partition: int
    ) -> tuple[list[bytes], list[bytes]]:
        """Keys and values to write for one partition; an empty value deletes."""
        entries = entries_of(inputs, partition)
        hashes = hash_ids([name for name, _, _ in entries])
        misplaced = partitions_of(hashes, self._store.partitions) != partition
        self._metrics.misplaced.labels(self.name).inc(int(misplaced.sum()))
        names = list(dict.fromkeys(name for name, _, _ in entries))
        keys = partition_keys(self._store, kind, partition, hash_ids(names))
        if kind == USER_KIND:
            newest = {name: (record, version) for name, record, version in entries}
            return keys, [user_value(*newest[name]) for name in names]
        price_key = prices_key(self._store, partition)
        known = dict(zip(names, attributes_of(self._store.read(keys))[:, None], strict=True))
        prices = price_table(self._store.read([price_key])[0])
        rows, prices = describe_log(entries, known, prices)
        values = {
            name: item_value(row, record)
            for (name, record, _), row in zip(entries, rows, strict=True)
        }
        return [*keys, price_key], [values[name] for name in names] + [_price_data(prices)]


def describe_log(
    entries: Sequence[Entry], known: dict[str, Rows], prices: Table
) -> tuple[list[Rows], Table]:
    """The attributes after each entry of one partition's `items`, blank where it deletes.

    `known` has the items' ITEM_ATTRIBUTES rows, shape (1), so far, and is brought up to date.
    Entries may be cut into batches anywhere: the rows are the same.
    """
    rows: list[Rows] = []
    for run in _runs(entries):
        new = blank(ITEM_ATTRIBUTES, 1)
        previous = np.concatenate([known.get(name, new) for name, _, _ in run])
        if run[0][1] is None:
            described, prices = blank(ITEM_ATTRIBUTES, len(run)), forget_items(previous, prices)
        else:
            described, prices = describe_items(
                [record for _, record, _ in run],
                [version for _, _, version in run],
                previous,
                prices,
            )
        known |= {name: described[at : at + 1] for at, (name, _, _) in enumerate(run)}
        rows += list(described)
    return rows, prices


def _runs(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Consecutive entries of distinct ids that either all describe or all delete."""
    run: list[Entry] = []
    seen: set[str] = set()
    for entry in entries:
        deletes = entry[1] is None
        if run and (deletes != (run[0][1] is None) or entry[0] in seen):
            yield run
            run, seen = [], set()
        run.append(entry)
        seen.add(entry[0])
    if run:
        yield run


def entries_of(inputs: Inputs[list[Any]], partition: int) -> list[Entry]:
    """The good records of one partition in a batch, in order."""
    return [
        (id_of(message.key(), record), record, (message.offset() or 0) + 1)
        for message, record in zip(inputs.messages, inputs.records, strict=True)
        if message.partition() == partition
    ]


def prices_key(store: Store, partition: int) -> bytes:
    """The key of the running prices of a partition's categories."""
    return store.key(PRICES, partition, b"")


def user_value(user: User | None, version: int) -> bytes:
    """What the store has of a user; empty for one that is deleted."""
    return b"" if user is None else to_bytes(describe_users([user], [version]))[0]


def item_value(row: Rows, item: Item | None) -> bytes:
    """What the store has of an item; empty for one that is deleted."""
    return b"" if item is None else row.tobytes() + (item.title or "")[:LONGEST_TITLE].encode()


def id_of(key: bytes | str | None, record: Item | User | None) -> str:
    """Whom a record is about; a tombstone has only its key."""
    if record is not None:
        return record.item_id if isinstance(record, Item) else record.user_id
    return key if isinstance(key, str) else (key or b"").decode(errors="replace")


def price_table(data: bytes | None) -> Table:
    """Running prices as the store has them."""
    rows = np.frombuffer(data or b"", PRICE_ROW)
    return table(rows["category"].copy(), rows["prices"].copy())


def _price_data(prices: Table) -> bytes:
    rows = np.zeros(len(prices.hashes), PRICE_ROW)
    rows["category"], rows["prices"] = prices.hashes, prices.rows[:-1]
    return rows.tobytes()


def title_of(value: bytes | None) -> str:
    """The title in a stored item's attributes, as it is read; empty when there is none."""
    return plain((value or b"")[ITEM_ATTRIBUTES.itemsize :].decode(errors="replace"))


def attributes_of(values: Sequence[bytes | None]) -> Rows:
    """ITEM_ATTRIBUTES rows (n) of stored values."""
    size = ITEM_ATTRIBUTES.itemsize
    return from_bytes([each and each[:size] for each in values], ITEM_ATTRIBUTES)
