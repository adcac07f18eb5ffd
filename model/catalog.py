"""From records of items and users to rows of attributes."""

from collections.abc import Sequence
from math import erf, sqrt

import numpy as np
from numpy.typing import NDArray

from model.events import Rows, blank
from model.ids import hash_ids, hash_names
from model.lookups import Table, table
from model.state import CATEGORY, ITEM_ATTRIBUTES, LEVELS, LOG_STEPS, USER_ATTRIBUTES
from schemas.columns import milliseconds
from schemas.records import Item, User

EVERYTHING = 1  # the category that holds all items
LEAST_PRICES = 5  # a category with fewer prices leaves the rank to a wider one


def item_text(item: Item) -> str:
    """The text of an item that the encoder reads: title, brand, category path and description."""
    parts = (item.title, item.brand, " > ".join(item.category or ()), item.description)
    return "\n".join(part for part in parts if part)


def describe_items(
    items: Sequence[Item], versions: Sequence[int], previous: Rows, categories: Table
) -> tuple[Rows, Table]:
    """Attributes of n distinct items, and the categories' prices with them taken in, one by one.

    `versions` (n): 1 + offset of each record; `previous` ITEM_ATTRIBUTES (n): the items' rows so
    far, blank when new: their prices are taken out again; `categories`: `state.CATEGORY` rows by
    hash. Returns ITEM_ATTRIBUTES (n) and the new table. `forget_items` takes a deleted item out.

    The rank of a price is the normal distribution's share below its logarithm, with the running
    mean and variance of the narrowest category of at least `LEAST_PRICES` prices. Each item meets
    the prices of those before it, so that batches of any size give the same rows.
    """
    rows = blank(ITEM_ATTRIBUTES, len(items))
    rows["version"] = versions
    time = milliseconds([item.event_time for item in items])
    known = previous["first_time"] > 0
    rows["first_time"] = np.where(known, np.minimum(previous["first_time"], time), time)
    rows["text"] = hash_ids([item_text(item) for item in items])
    rows["brand"] = hash_names([item.brand for item in items])
    for level in range(LEVELS):
        rows["category"][:, level] = hash_names(
            [_prefix(item.category or (), level + 1) for item in items]
        )
    rows["price"] = np.array([item.price for item in items], np.float32)
    met, categories = _take_in(previous, rows, categories)
    rows["price_rank"] = _price_ranks(rows, met)
    return rows, categories


def forget_items(previous: Rows, categories: Table) -> Table:
    """The categories' prices without those of deleted items, `previous` ITEM_ATTRIBUTES (n)."""
    return _take_in(previous, blank(ITEM_ATTRIBUTES, len(previous)), categories)[1]


def describe_users(users: Sequence[User], versions: Sequence[int]) -> Rows:
    """USER_ATTRIBUTES rows of n users; `versions` (n): 1 + offset of each record."""
    rows = blank(USER_ATTRIBUTES, len(users))
    rows["version"] = versions
    rows["gender"] = hash_names([user.gender for user in users])
    rows["region"] = hash_names([user.region for user in users])
    rows["age"] = np.array([user.age for user in users], np.float32)
    return rows


def _prefix(path: Sequence[str], length: int) -> str | None:
    return "\x1f".join(path[:length]) if len(path) >= length else None


def _log_prices(rows: Rows) -> NDArray[np.float64]:
    return np.rint(np.log1p(rows["price"].astype(np.float64)) * LOG_STEPS) / LOG_STEPS


def _ancestors(rows: Rows) -> NDArray[np.uint64]:
    """The categories of each item, widest first, (n, 1 + LEVELS); 0: none."""
    everything = np.full((len(rows), 1), EVERYTHING, np.uint64)
    return np.concatenate([everything, rows["category"].astype(np.uint64)], axis=1)


def _take_in(previous: Rows, rows: Rows, categories: Table) -> tuple[Rows, Table]:
    """Take the previous prices out and the new ones in, item after item.

    Returns CATEGORY (n, 1 + LEVELS), each item's categories just after it, and the table after all.
    """
    shape = (len(rows), 1 + LEVELS)
    members = np.stack([_ancestors(previous), _ancestors(rows)])  # (2, n, levels): out, in
    price = np.stack([_log_prices(previous), _log_prices(rows)])[:, :, None]
    price = np.broadcast_to(price, members.shape)
    counted = np.flatnonzero((members != 0) & ~np.isnan(price))
    side, item, level = np.unravel_index(counted, members.shape)
    member, price = members.ravel()[counted], price.ravel()[counted]
    order = np.lexsort((side, item, member))
    member, price, sign = member[order], price[order], np.where(side[order], 1, -1)
    first = np.searchsorted(member, member)  # where each category's prices begin
    after = categories.take(member)
    changes = {"count": sign, "log_sum": sign * price, "log_square_sum": sign * price**2}
    for name, value in changes.items():
        total = np.cumsum(value)  # exact: prices are binary fractions
        after[name] += total - (total - value)[first]
    met = blank(CATEGORY, shape)
    added = side[order] == 1
    met[item[order][added], level[order][added]] = after[added]
    last = np.flatnonzero(np.r_[member[1:] != member[:-1], True][: len(member)])
    hashes = np.union1d(categories.hashes, member)
    statistics = categories.take(hashes)
    statistics[np.searchsorted(hashes, member[last])] = after[last]
    left = statistics["count"] > 0
    return met, table(hashes[left], statistics[left])


def _price_ranks(rows: Rows, statistics: Rows) -> NDArray[np.float64]:
    """Each item's rank among the CATEGORY rows (n, 1 + LEVELS) that it meets."""
    enough = statistics["count"] >= LEAST_PRICES
    narrowest = LEVELS - enough[:, ::-1].argmax(1)
    chosen = statistics[np.arange(len(rows)), narrowest]
    count = np.maximum(chosen["count"], 1)
    mean = chosen["log_sum"] / count
    spread = np.sqrt(np.maximum(chosen["log_square_sum"] / count - mean * mean, 0))
    scaled = (_log_prices(rows) - mean) / np.where(spread > 0, spread, 1)
    ranks = np.array([0.5 * (1 + erf(value / sqrt(2))) for value in scaled.tolist()])
    return np.where(enough.any(1), ranks, np.nan)
