"""Events as rows of an array: the one form in which reviews, behaviour and texts meet a state."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.ids import Hashes, hash_ids
from schemas.columns import Columns, columns_of
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
# No action: the user is erased, as if never seen. Codes below TEXT are what users do.
FORGET = len(ACTIONS)
DAY_MS = 86_400_000  # of event times
LATE_MS = DAY_MS  # an event that came so long after it happened counts as late

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
        ("action", "u1"),  # its position in ACTIONS, or FORGET
    ]
)

# A text's features carry the event_id of their review. Another seed keeps the two apart, so that
# the one is never taken for a repetition of the other.
TEXT_SEED = 1


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


def from_reviews(reviews: Sequence[Review]) -> Rows:
    """EVENT rows of reviews, shape (n,)."""
    return review_rows(columns_of(Review, reviews))


def from_behavior(behavior: Sequence[Behavior]) -> Rows:
    """EVENT rows of shoppers' actions, shape (n,)."""
    return behavior_rows(columns_of(Behavior, behavior))


def from_text_features(features: Sequence[TextFeatures]) -> Rows:
    """EVENT rows of what texts say of their stars, shape (n,)."""
    return text_rows(columns_of(TextFeatures, features))


def review_rows(columns: Columns) -> Rows:
    """EVENT rows, shape (n,), of the columns of n reviews."""
    rows = _identified(columns)
    rows["rating"] = columns["rating"]
    return rows


def behavior_rows(columns: Columns) -> Rows:
    """EVENT rows, shape (n,), of the columns of n actions."""
    rows = _identified(columns)
    rows["action"] = list(map(CODES.__getitem__, columns["action"]))
    rows["price"] = columns["price"]
    rows["quantity"] = columns["quantity"]
    rows["session"] = hash_ids(columns["session_id"])
    return rows


def text_rows(columns: Columns) -> Rows:
    """EVENT rows, shape (n,), of the columns of n texts' features."""
    rows = _identified(columns, TEXT_SEED)
    rows["action"] = TEXT
    rows["text_stars"] = columns["distribution"] @ np.arange(1.0, 6.0)
    return rows


def forget_rows(users: Sequence[str]) -> Rows:
    """EVENT rows, shape (n,), that erase these users."""
    rows = blank(EVENT, len(users))
    rows["user"] = hash_ids(users)
    rows["action"] = FORGET
    return rows


def from_request(users: Hashes, items: Hashes, times: NDArray[np.int64]) -> Rows:
    """EVENT rows (n) that ask: what would these users (n) rate these items (n) now (n, ms)?"""
    rows = blank(EVENT, len(items))
    rows["user"], rows["item"], rows["time"] = users, items, times
    return rows


def _identified(columns: Columns, seed: int = 0) -> Rows:
    rows = blank(EVENT, len(columns["event_time"]))
    rows["user"] = hash_ids(columns["user_id"])
    rows["item"] = hash_ids(columns["item_id"])
    rows["event_id"] = hash_ids(columns["event_id"], seed)
    rows["time"] = columns["event_time"]
    return rows
