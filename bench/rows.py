"""Events and items as rows, for what needs no broker."""

import numpy as np

from bench.events import ACTIONS, ITEM_EXPONENT, REVIEW_SHARE, STEP_MS, USER_EXPONENT, zipf
from model.events import CODES, EVENT, REVIEW, Rows, blank
from model.ids import Hashes, hash_ids
from model.lookups import Table, Vectors, table, vectors_of
from model.state import ITEM_ATTRIBUTES

FIRST_MS = 1_700_000_000_000  # time of the first event


def make_rows(count: int, users: int, items: int, seed: int = 7, first: int = 0) -> Rows:
    """Events in order of time from number `first` on, drawn as `bench.events` draws them."""
    random = np.random.default_rng(seed)
    events = blank(EVENT, count)
    numbers = np.arange(first, first + count)
    events["event_id"] = numbers + 1
    events["time"] = FIRST_MS + STEP_MS * numbers
    events["user"] = ids("user", users)[zipf(random, users, USER_EXPONENT, count)]
    events["item"] = ids("item", items)[zipf(random, items, ITEM_EXPONENT, count)]
    reviewed = random.random(count) < REVIEW_SHARE
    codes = [CODES[name] for name in ACTIONS]
    acted = random.choice(codes, count, p=list(ACTIONS.values()))
    events["action"] = np.where(reviewed, REVIEW, acted)
    events["rating"] = np.where(reviewed, random.integers(1, 6, count), np.nan)
    return events


def make_item_tables(items: int, width: int, seed: int = 7) -> tuple[Table, Vectors]:
    """Attributes of items, each with a text of its own, and unit vectors of those texts."""
    random = np.random.default_rng(seed)
    attributes = blank(ITEM_ATTRIBUTES, items)
    attributes["version"] = 1
    attributes["first_time"] = FIRST_MS
    attributes["text"] = ids("text", items)
    attributes["price"] = random.lognormal(3, 1, items)
    vectors = random.standard_normal((items, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return table(ids("item", items), attributes), vectors_of(ids("text", items), vectors)


def ids(kind: str, count: int) -> Hashes:
    """Hashed ids of `count` users, items or texts."""
    return hash_ids([f"{kind}-{number}" for number in range(count)])
