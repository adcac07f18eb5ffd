"""Events as rows of an array: the one form in which reviews, behaviour and texts meet a state."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.ids import Hashes, hash_ids
from schemas.records import Behavior, Review, TextFeatures

Rows = NDArray[np.void]  # an array of one of the structured dtypes of this package

ACTIONS = (
    "review",
    "view",
    "click",
    "wishlist",
    "share",
    "cart",
    "remove_from_cart",
    "purchase",
    "text",
)
CODES = {name: code for code, name in enumerate(ACTIONS)}
REVIEW, VIEW, CLICK, WISHLIST, SHARE, CART, REMOVE, PURCHASE, TEXT = range(len(ACTIONS))
COUNTED = len(ACTIONS) - 1  # actions that states count: all but a text's features

EVENT = np.dtype(
    [
        ("user", "<u8"),
        ("item", "<u8"),
        ("event_id", "<u8"),
        ("time", "<i8"),  # milliseconds since 1970, UTC
        ("session", "<u8"),  # 0: none
        ("rating", "<f4"),  # nan: none
        ("price", "<f4"),  # nan: none
        ("quantity", "<f4"),  # nan: none
        ("text_stars", "<f4"),  # expected stars of a review's text; nan unless the action is text
        ("action", "u1"),  # its position in ACTIONS
    ]
)

# A text's features carry the event_id of their review. Another seed keeps the two apart, so that
# the one is never taken for a repetition of the other.
TEXT_SEED = 1

_START = datetime(1970, 1, 1, tzinfo=UTC)


def blank(dtype: np.dtype[Any], shape: int | tuple[int, ...]) -> Rows:
    """Rows in which nothing is known: zeros, and nan in every `f4` field.

    In the dtypes of this package `f4` fields are values that may be absent, `f8` fields are sums.
    """
    rows = np.zeros(shape, dtype)
    for name in dtype.names or ():
        if dtype[name].base == np.float32:
            rows[name] = np.nan
    return rows


def opaque(rows: Rows) -> Rows:
    """The same rows as opaque bytes.

    NumPy copies and indexes structured rows field by field, some thirty times slower than their
    bytes; `rows.take` does not.
    """
    return rows.view(np.dtype((np.void, rows.dtype.itemsize)))


def duplicated(rows: Rows) -> Rows:
    """A copy of the rows."""
    return opaque(rows).copy().view(rows.dtype)


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of one dtype, one part after another."""
    if len(parts) == 1 or not parts[0].dtype.names:
        return np.concatenate(parts) if len(parts) > 1 else parts[0]
    return np.concatenate([opaque(part) for part in parts]).view(parts[0].dtype)


def milliseconds(times: Sequence[datetime]) -> NDArray[np.int64]:
    """Aware times as milliseconds since 1970, UTC, rounded down; shape (n,)."""
    # Decoded times share one time zone of fixed offset, and so are subtracted without asking it.
    zone = times[0].tzinfo if times else None
    fixed = zone is not None and zone.utcoffset(None) is not None
    start = _START.astimezone(zone) if fixed else _START
    seconds = np.array([(time - start).total_seconds() for time in times], np.float64)
    return np.rint(seconds * 1e6).astype(np.int64) // 1000


def from_reviews(reviews: Sequence[Review]) -> Rows:
    """EVENT rows of reviews, shape (n,)."""
    rows = _identified(reviews)
    rows["rating"] = [review.rating for review in reviews]
    return rows


def from_behavior(behavior: Sequence[Behavior]) -> Rows:
    """EVENT rows of shoppers' actions, shape (n,)."""
    rows = _identified(behavior)
    rows["action"] = [CODES[event.action] for event in behavior]
    rows["price"] = [event.price for event in behavior]
    rows["quantity"] = [event.quantity for event in behavior]
    rows["session"] = hash_ids([event.session_id for event in behavior])
    return rows


def from_text_features(features: Sequence[TextFeatures]) -> Rows:
    """EVENT rows of what texts say of their stars, shape (n,)."""
    rows = _identified(features, TEXT_SEED)
    rows["action"] = TEXT
    distribution = np.array([text.distribution for text in features], np.float64).reshape(-1, 5)
    rows["text_stars"] = distribution @ np.arange(1.0, 6.0)
    return rows


def from_request(user: int, items: Hashes, time: int) -> Rows:
    """EVENT rows, shape (n,), that ask: what would this user (a hash) rate these items now (ms)?"""
    rows = blank(EVENT, len(items))
    rows["user"], rows["item"], rows["time"] = user, items, time
    return rows


def _identified(
    records: Sequence[Review] | Sequence[Behavior] | Sequence[TextFeatures], seed: int = 0
) -> Rows:
    rows = blank(EVENT, len(records))
    rows["user"] = hash_ids([record.user_id for record in records])
    rows["item"] = hash_ids([record.item_id for record in records])
    rows["event_id"] = hash_ids([record.event_id for record in records], seed)
    rows["time"] = milliseconds([record.event_time for record in records])
    return rows
