"""What a batch reads from the store beside its users' states, with short-lived copies at hand."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.events import Rows
from model.ids import NONE, Hashes, partitions_of
from model.lookups import VECTOR_DTYPE, Lookups, Source, Table, Vectors, distinct, table
from model.lookups import Store as Rowstore
from model.state import ITEM, ITEM_ATTRIBUTES, USER_ATTRIBUTES
from model.state_bytes import from_bytes
from streams.store import Store

USER_STATE, ITEM_STATE, ITEM_KIND, USER_KIND = b"u", b"i", b"a", b"b"

ATTRIBUTES_SECONDS = 10.0  # a new price or title reaches predictions within this
FOUND_VECTOR_SECONDS = 3_600.0  # a vector never changes under its key; this only renews memory
MISSING_SECONDS = 2.0  # a text that has just been encoded reaches predictions within this
MOST_ROWS = 500_000  # rows a copy keeps; then it starts anew


def store_keys(store: Store, kind: bytes, hashes: Hashes) -> list[bytes]:
    """The keys of hashed ids: the hash says the partition, and the partition the tag."""
    partitions = partitions_of(hashes, store.partitions).tolist()
    data = hashes.astype("<u8").tobytes()
    prefixes = [store.prefix(kind, partition) for partition in range(store.partitions)]
    return [
        prefixes[partition] + data[at : at + 8]
        for partition, at in zip(partitions, range(0, len(data), 8), strict=True)
    ]


def partition_keys(store: Store, kind: bytes, partition: int, hashes: Hashes) -> list[bytes]:
    """The keys of hashed ids that lie in one partition, whatever their hash says of it."""
    prefix, data = store.prefix(kind, partition), hashes.astype("<u8").tobytes()
    return [prefix + data[at : at + 8] for at in range(0, len(data), 8)]


def hashes_of(keys: Iterable[bytes]) -> Hashes:
    """The hashed ids (n) of such keys."""
    return np.frombuffer(b"".join(key[-8:] for key in keys), "<u8").astype(np.uint64)


def vector_keys(store: Store, encoder: str, texts: Hashes) -> list[bytes]:
    """The keys of the vectors of hashed texts under one encoder."""
    prefix, data = store.plain_key(f"v:{encoder}:"), texts.astype("<u8").tobytes()
    return [prefix + data[at : at + 8] for at in range(0, len(data), 8)]


@dataclass(frozen=True)
class Fetched:
    """What was read of n hashes; rows that were not there are blank."""

    rows: NDArray[Any]  # (n, ...)
    found: NDArray[np.bool_]  # (n)


class Copy:
    """Rows read from the store, kept for `seconds`; where none was found, for `missing_seconds`."""

    def __init__(self, dtype: np.dtype[Any], seconds: float, missing_seconds: float) -> None:
        self._dtype = np.dtype([("until", "<f8"), ("found", "?"), ("row", dtype)])
        self._seconds = seconds
        self._missing = missing_seconds
        self._rows = Rowstore(self._dtype)

    def stale(self, hashes: Hashes, early: bool = False) -> Hashes:
        """Those of distinct hashes that are to be read, and `put`, before they are taken.

        With `early` from half of their time on.
        """
        if len(self._rows.rows) > MOST_ROWS:
            self._rows = Rowstore(self._dtype)
        places = self._rows.place(hashes)
        until = self._rows.rows["until"][places]
        if early:
            found = self._rows.rows["found"][places]
            until -= np.where(found, self._seconds, self._missing) / 2
        return hashes[until < time.monotonic()]

    def put(self, hashes: Hashes, read: Fetched) -> None:
        """Keep what was read of distinct hashes (n)."""
        places = self._rows.place(hashes)
        rows = self._rows.rows
        rows["row"][places] = read.rows
        rows["found"][places] = read.found
        kept = np.where(read.found, self._seconds, self._missing)
        rows["until"][places] = time.monotonic() + kept

    def take(self, hashes: Hashes) -> Rows:
        """For distinct hashes (n), their `row` and whether it was `found`."""
        places = self._rows.place(hashes)
        return self._rows.rows.take(places)


class VectorCopy:
    """Vectors read from the store, each kept in one place as long as there is room."""

    def __init__(self, width: int, fetch: Callable[[Hashes], Fetched]) -> None:
        self._width = width
        self._fetch = fetch
        self._begin()

    def take(self, texts: Hashes) -> Vectors:
        """Those of distinct texts, in order, that have one."""
        if len(self._rows.rows) > MOST_ROWS:
            self._begin()
        new = self._places.stale(texts)
        if len(new):
            self._places.put(new, self._keep(new))
        read = self._places.take(texts)
        places = np.append(read["row"][read["found"]], 0)
        return Vectors(Table(texts[read["found"]], places), self._rows.rows["vector"], self._source)

    def _begin(self) -> None:
        self._source = Source()
        self._rows = Rowstore(np.dtype([("vector", np.float32, (self._width,))]))
        none = self._rows.place(np.array([NONE], np.uint64))  # row 0: no vector
        self._rows.rows["vector"][none] = 0
        self._places = Copy(np.dtype(np.intp), FOUND_VECTOR_SECONDS, MISSING_SECONDS)

    def _keep(self, texts: Hashes) -> Fetched:
        read = self._fetch(texts)
        places = np.zeros(len(texts), np.intp)
        places[read.found] = self._rows.place(texts[read.found])
        self._rows.rows["vector"][places[read.found]] = read.rows[read.found]
        return Fetched(places, read.found)


@dataclass(frozen=True)
class Asked:
    """What a batch is to read before more is known of it."""

    items: Hashes  # distinct
    users: Hashes
    attributes: Hashes  # items whose attributes are read
    user_attributes: Hashes
    keys: list[list[bytes]]  # of item states, of both attributes


class Reader:
    """Reads lookups for batches. `encoder`: hash of the encoder whose vectors are wanted."""

    def __init__(self, store: Store, seconds: float = ATTRIBUTES_SECONDS) -> None:
        self._store = store
        self._encoder = ""
        self._vectors: VectorCopy | None = None
        self._item_attributes = Copy(ITEM_ATTRIBUTES, seconds, MISSING_SECONDS)
        self._user_attributes = Copy(USER_ATTRIBUTES, seconds, seconds)
        self._in_use = np.empty(0, np.uint64)  # items whose attributes the last batch took

    def use_encoder(self, encoder: str) -> None:
        """Read vectors of this encoder; "" for none."""
        if encoder != self._encoder:
            self._encoder, self._vectors = encoder, None

    def states(self, kind: bytes, hashes: Hashes, dtype: np.dtype[Any]) -> Rows:
        """State rows (n) of hashed ids, blank where there is none."""
        return from_bytes(self._store.read(store_keys(self._store, kind, hashes)), dtype)

    def lookups(self, events: Rows, states: Rows) -> Lookups:
        """What EVENT rows (n) of users with USER rows (u) are predicted from."""
        asked = self.ask(events)
        return self.answer(asked, self._store.read_each(asked.keys), states)

    def ask(self, events: Rows) -> Asked:
        """What is to be read for EVENT rows (n), whatever the states of their users tell."""
        items, _ = distinct(events["item"])
        users, _ = distinct(events["user"])
        # What is in steady use is renewed here, so that `answer` need not wait for it.
        aging = self._item_attributes.stale(self._in_use, early=True)
        old, _ = distinct(np.concatenate([self._item_attributes.stale(items), aging]))
        old_users = self._user_attributes.stale(users)
        wanted = ((ITEM_STATE, items), (ITEM_KIND, old), (USER_KIND, old_users))
        keys = [store_keys(self._store, kind, hashes) for kind, hashes in wanted]
        return Asked(items, users, old, old_users, keys)

    def answer(
        self, asked: Asked, values: Sequence[Sequence[bytes | None]], states: Rows
    ) -> Lookups:
        """The lookups of what was asked for, once the values of its keys and USER rows are read."""
        item_states, of_items, of_users = values
        self._item_attributes.put(asked.attributes, _fetched(of_items, ITEM_ATTRIBUTES))
        self._user_attributes.put(asked.user_attributes, _fetched(of_users, USER_ATTRIBUTES))
        known, _ = distinct(np.concatenate([asked.items, states["recent"]["item"].ravel()]))
        known = known[known != NONE]
        old = self._item_attributes.stale(known)
        if len(old):
            read = self._store.read(store_keys(self._store, ITEM_KIND, old))
            self._item_attributes.put(old, _fetched(read, ITEM_ATTRIBUTES))
        self._in_use = known
        attributes = self._item_attributes.take(known)["row"]
        return Lookups(
            items=table(asked.items, from_bytes(item_states, ITEM)),
            item_attributes=table(known, attributes),
            user_attributes=table(asked.users, self._user_attributes.take(asked.users)["row"]),
            vectors=self._vector_table(attributes["text"]),
        )

    def _vector_table(self, texts: Hashes) -> Vectors | None:
        wanted = np.unique(texts[texts != NONE])  # in order: a table's
        if not self._encoder or not len(wanted):
            return None
        if self._vectors is None and (width := self._width(wanted)):
            self._vectors = VectorCopy(width, lambda texts: self._fetch_vectors(texts, width))
        return None if self._vectors is None else self._vectors.take(wanted)

    def _width(self, texts: Hashes) -> int:
        """The width of the encoder's vectors, as the first one found has it; 0: none was."""
        values = self._store.read(vector_keys(self._store, self._encoder, texts))
        lengths = (len(value) for value in values if value is not None)
        return next(lengths, 0) // np.dtype(VECTOR_DTYPE).itemsize

    def _fetch_vectors(self, texts: Hashes, width: int) -> Fetched:
        values = self._store.read(vector_keys(self._store, self._encoder, texts))
        missing = bytes(np.dtype(VECTOR_DTYPE).itemsize * width)
        data = b"".join(missing if each is None else each for each in values)
        return Fetched(
            np.frombuffer(data, VECTOR_DTYPE).reshape(len(values), width).astype(np.float32),
            np.array([each is not None for each in values], bool),
        )


def _fetched(values: Sequence[bytes | None], dtype: np.dtype[Any]) -> Fetched:
    """Attribute rows; the name that stands behind some is cut off."""
    size = dtype.itemsize
    rows = from_bytes([None if each is None else each[:size] for each in values], dtype)
    return Fetched(rows, np.array([each is not None for each in values], bool))
