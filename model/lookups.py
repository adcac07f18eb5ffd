"""Tables keyed by hashes: what a batch reads of items, attributes and vectors."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled
from model.events import Rows, blank, joined, opaque
from model.ids import Hashes

VECTOR_DTYPE = "<f2"  # as vectors are kept: halves memory and wire, moves a cosine by under 0.001


@dataclass(frozen=True)
class Table:
    """Rows by hash, never changed. The last row is what a hash that is not in it gets."""

    hashes: Hashes  # (m), sorted, distinct
    rows: NDArray[Any]  # (m + 1, ...): structured rows, or vectors float32 (m + 1, d)

    def find(self, hashes: Hashes) -> NDArray[np.intp]:
        """The position in `rows` of each hash, in the shape of `hashes`; m when it is missing."""
        size, wanted = len(self.hashes), hashes.ravel()
        if not size:
            return np.zeros(hashes.shape, np.intp)
        found = np.empty(len(wanted), np.intp)
        _find(self.hashes, *self._buckets, wanted, found)
        return found.reshape(hashes.shape)

    def take(self, hashes: Hashes) -> NDArray[Any]:
        """The rows of these hashes, shape (*hashes.shape, ...)."""
        return self.rows.take(self.find(hashes), axis=0)

    @cached_property
    def _buckets(self) -> tuple[np.uint64, NDArray[np.intp]]:
        """How far to shift a hash to get its bucket, and where each bucket begins in `hashes`.

        High bits of hashes are evenly spread, be they of 64 bits or, of names, of 32: so a bucket
        holds half a hash on average, and a look costs one or two steps, where a binary search of a
        large table takes many.
        """
        bits = len(self.hashes).bit_length() + 1
        shift = np.uint64(max(int(self.hashes[-1]).bit_length() - bits, 0))
        sizes = np.bincount((self.hashes >> shift).astype(np.intp), minlength=1 << bits)
        return shift, np.minimum(np.cumsum(sizes) - sizes, len(self.hashes) - 1)


def table(hashes: Hashes, rows: NDArray[Any]) -> Table:
    """A table of m distinct hashes and their rows, in any order.

    A missing hash gets a blank row: zeros, and nan in optional fields.
    """
    order = np.argsort(hashes)
    default = blank(rows.dtype, (1, *rows.shape[1:]))
    return Table(hashes[order], joined([rows.take(order, axis=0), default]))


def distinct(hashes: Hashes) -> tuple[Hashes, NDArray[np.intp]]:
    """Distinct hashes (m), in the order of their first, and which of them each one is (n)."""
    known, index = np.empty(len(hashes), np.uint64), np.empty(len(hashes), np.intp)
    count = _place(_slots(len(hashes)), known, 0, hashes, index)
    return known[:count], index


def empty(dtype: np.dtype[Any]) -> Table:
    """A table without rows of this dtype."""
    return Table(np.empty(0, np.uint64), blank(dtype, 1))


@dataclass(frozen=True)
class Dated:
    """Rows by hash of which each is known from an event on, until another of its hash is."""

    hashes: Hashes  # (v), sorted
    since: NDArray[np.int64]  # (v): events before it is known; of one hash, in this order
    rows: Rows  # (v + 1): the last is what a hash gets of which nothing is known

    def at(self, event: int) -> Table:
        """What an event of this number finds."""
        known = np.flatnonzero(self.since <= event)
        newest = np.r_[self.hashes[known][1:] != self.hashes[known][:-1], True][: len(known)]
        chosen = known[newest]
        return Table(self.hashes[chosen], self.rows.take(np.append(chosen, len(self.hashes))))

    def take(self, hashes: Hashes, event: NDArray[np.int64]) -> Rows:
        """The rows of these hashes that events of these numbers find, in the shape of `hashes`."""
        if not len(self.hashes):
            return self.rows.take(np.zeros(hashes.shape, np.intp))
        names, keys = self._keys
        last = self.since.max()
        key = names.find(hashes) * (last + 1) + np.minimum(event, last)
        found = np.searchsorted(keys, key, "right") - 1
        known = (found >= 0) & (self.hashes[found] == hashes)
        return self.rows.take(np.where(known, found, len(self.hashes)))

    @cached_property
    def _keys(self) -> tuple[Table, NDArray[np.int64]]:
        """The distinct hashes, and numbers (v) in the order of hash and event."""
        names, place = np.unique(self.hashes, return_inverse=True)
        keys = place * (self.since.max() + 1) + self.since
        return Table(names, np.empty(len(names) + 1, np.bool_)), keys


def dated(hashes: Hashes, since: NDArray[np.int64], rows: Rows) -> Dated:
    """Rows (v) that are known since events (v), of one hash and event the last alone."""
    order = np.lexsort((since, hashes))
    default = blank(rows.dtype, 1)
    return Dated(hashes[order], since[order], joined([rows.take(order), default]))


class Store:
    """Rows by hash in a table that grows, for replays in one process."""

    def __init__(self, dtype: np.dtype[Any], size: int = 1024) -> None:
        self._count = 0
        self._hashes = np.zeros(size, np.uint64)
        self._rows = blank(dtype, size)
        self._slots = np.full(2, -1, np.int64)

    @property
    def rows(self) -> Rows:
        """A view of the rows in use, in the order in which their hashes came.

        Writing to it writes to the store; it is stale after the next `place`.
        """
        return self._rows[: self._count]

    @property
    def hashes(self) -> Hashes:
        """The hashes of `rows`."""
        return self._hashes[: self._count]

    def place(self, hashes: Hashes) -> NDArray[np.intp]:
        """The position in `rows` of each hash (n); one that is new gets a blank row."""
        self._reserve(self._count + len(hashes))
        found = np.empty(len(hashes), np.intp)
        self._count = _place(self._slots, self._hashes, self._count, hashes, found)
        if self._count > len(self._rows):
            more = blank(self._rows.dtype, max(self._count, 2 * len(self._rows)))
            opaque(more)[: len(self._rows)] = opaque(self._rows)
            self._rows = more
        return found

    def distinct(self, hashes: Hashes) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Distinct positions in `rows` (k) of hashes (n), and which of them each hash has (n)."""
        return np.unique(self.place(hashes), return_inverse=True)

    def _reserve(self, size: int) -> None:
        """Have room for as many hashes, and twice as many slots."""
        if size > len(self._hashes):
            more = np.zeros(max(size, 2 * len(self._hashes)) - len(self._hashes), np.uint64)
            self._hashes = np.concatenate([self._hashes, more])
        if 2 * size > len(self._slots):
            self._slots = _slots(2 * size)
            _place(self._slots, self._hashes, 0, self.hashes, np.empty(self._count, np.intp))


def _slots(size: int) -> NDArray[np.int64]:
    """Free slots for `_place`, twice as many as `size` at least."""
    return np.full(1 << max(2 * size - 1, 1).bit_length(), -1, np.int64)


@compiled
def _find(hashes: Any, shift: Any, starts: Any, wanted: Any, found: Any) -> None:
    size = len(hashes)
    for row in range(len(wanted)):
        found[row] = size
        if wanted[row] > hashes[size - 1]:
            continue
        at = starts[wanted[row] >> shift]
        while hashes[at] < wanted[row]:
            at += 1
        if hashes[at] == wanted[row]:
            found[row] = at


@compiled
def _place(slots: Any, known: Any, count: int, wanted: Any, found: Any) -> int:
    """Find each wanted hash among the first `count` known ones, or add it; gives the new count.

    An open table (Knuth, volume 3, section 6.4, algorithm L): `slots`, a power of two of them, hold
    positions in `known`, -1 for none; a hash stands in the first free one from its own on.
    """
    last = np.uint64(len(slots) - 1)
    for row in range(len(wanted)):
        slot = (wanted[row] ^ (wanted[row] >> np.uint64(32))) & last
        while slots[slot] >= 0 and known[slots[slot]] != wanted[row]:
            slot = (slot + np.uint64(1)) & last
        if slots[slot] < 0:
            slots[slot] = count
            known[count] = wanted[row]
            count += 1
        found[row] = slots[slot]
    return count


class Source:
    """Stands for one table of vectors: rows of the same number under the same source are equal."""


@dataclass(frozen=True)
class Vectors:
    """Vectors by text hash. Row 0 is zero, and what a hash gets that has no vector."""

    places: Table  # intp: positions in `rows`
    rows: NDArray[np.float32]  # (m + 1, d), or the first of a table that grows
    source: Source

    def find(self, hashes: Hashes) -> NDArray[np.intp]:
        """The position in `rows` of each hash, in the shape of `hashes`; 0 when it is missing."""
        return self.places.take(hashes)


def vectors_of(hashes: Hashes, rows: NDArray[np.float32]) -> Vectors:
    """Vectors (m, d) of distinct hashes (m)."""
    none = np.zeros((1, rows.shape[1]), np.float32)
    return Vectors(
        table(hashes, np.arange(1, len(rows) + 1)), np.concatenate([none, rows]), Source()
    )


@dataclass(frozen=True)
class Lookups:
    """What a batch reads beside its users' states, as of the batch's begin.

    `vectors` are keyed by text hash (`ITEM_ATTRIBUTES["text"]`), unit length, and a function of the
    encoder alone (never of a bundle), so that features mean the same under every model.
    """

    items: Table  # ITEM rows of the events' items
    item_attributes: Table  # ITEM_ATTRIBUTES of the events' items and of their users' recent items
    user_attributes: Table  # USER_ATTRIBUTES of the events' users
    vectors: Vectors | None = None
