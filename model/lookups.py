"""Tables keyed by hashes: what a batch reads of items, attributes and vectors."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.events import Rows, blank
from model.ids import Hashes


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
        shift, starts = self._buckets
        found = starts[wanted >> shift]
        rest = np.arange(len(wanted))  # those that may stand further on
        while len(rest):
            rest = rest[self.hashes[found[rest]] < wanted[rest]]
            found[rest] += 1
            rest = rest[found[rest] < size]
        missing = self.hashes[np.minimum(found, size - 1)] != wanted
        return np.where(missing, size, found).reshape(hashes.shape)

    def take(self, hashes: Hashes) -> NDArray[Any]:
        """The rows of these hashes, shape (*hashes.shape, ...)."""
        return self.rows.take(self.find(hashes), axis=0)

    @cached_property
    def _buckets(self) -> tuple[np.uint64, NDArray[np.intp]]:
        """How far to shift a hash to get its bucket, and where each bucket begins in `hashes`.

        High bits of hashes are evenly spread, so a bucket holds half a hash on average: a look
        costs one or two steps, where a binary search of a large table takes many.
        """
        bits = len(self.hashes).bit_length() + 1
        shift = np.uint64(64 - bits)
        sizes = np.bincount((self.hashes >> shift).astype(np.intp), minlength=1 << bits)
        return shift, np.minimum(np.cumsum(sizes) - sizes, len(self.hashes) - 1)


def table(hashes: Hashes, rows: NDArray[Any]) -> Table:
    """A table of m distinct hashes and their rows, in any order.

    A missing hash gets a blank row: zeros, and nan in optional fields.
    """
    order = np.argsort(hashes)
    default = blank(rows.dtype, (1, *rows.shape[1:]))
    return Table(hashes[order], np.concatenate([rows.take(order, axis=0), default]))


def empty(dtype: np.dtype[Any]) -> Table:
    """A table without rows of this dtype."""
    return Table(np.empty(0, np.uint64), blank(dtype, 1))


class Store:
    """Rows by hash in a table that grows, for replays in one process."""

    def __init__(self, dtype: np.dtype[Any], size: int = 1024) -> None:
        self._positions: dict[int, int] = {}
        self._rows = blank(dtype, size)

    @property
    def rows(self) -> Rows:
        """A view of the rows in use, in the order in which their hashes came.

        Writing to it writes to the store; it is stale after the next `place`.
        """
        return self._rows[: len(self._positions)]

    @property
    def hashes(self) -> Hashes:
        """The hashes of `rows`."""
        return np.fromiter(self._positions, np.uint64, len(self._positions))

    def place(self, hashes: Hashes) -> NDArray[np.intp]:
        """The position in `rows` of each hash (n); one that is new gets a blank row."""
        known = self._positions
        found = np.array([known.setdefault(key, len(known)) for key in hashes.tolist()], np.intp)
        if len(known) > len(self._rows):
            more = blank(self._rows.dtype, max(len(known), 2 * len(self._rows)) - len(self._rows))
            self._rows = np.concatenate([self._rows, more])
        return found


@dataclass(frozen=True)
class Lookups:
    """What a batch reads beside its users' states, as of the batch's begin.

    `vectors` are keyed by text hash (`ITEM_ATTRIBUTES["text"]`), unit length, and a function of the
    encoder alone (never of a bundle), so that features mean the same under every model.
    """

    items: Table  # ITEM rows of the events' items
    item_attributes: Table  # ITEM_ATTRIBUTES of the events' items and of their users' recent items
    user_attributes: Table  # USER_ATTRIBUTES of the events' users
    vectors: Table | None = None  # float32 (m + 1, d) by text hash; the last row is zero
