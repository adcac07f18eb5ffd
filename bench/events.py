"""A stream of realistic size: behaviour as in REES46's store logs, reviews as in Amazon's.

Users and items are those of the generated shop; who does what with which item is drawn by Zipf's
law (rank to the power of minus the exponent).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from schemas.codec import format_times
from schemas.records import Item, Review, User
from starcast.shop import shop
from streams.producer import Outgoing, outgoing

ITEM_EXPONENT = 1.0
# A log of shoppers is flatter at its head than one of items: a person acts only so fast.
USER_EXPONENT = 0.8
REVIEW_SHARE = 0.25
SHORTEST_TEXT, LONGEST_TEXT = 170, 400  # characters of a review
STEP_MS = 20  # between two events
TEXTS = 2_000  # different review texts
CHUNK = 50_000  # events drawn at once

# Shares of actions in REES46's multi-category store, with a few of the rarer kinds.
ACTIONS = {"view": 0.88, "click": 0.03, "wishlist": 0.01, "cart": 0.05, "purchase": 0.03}
STARS = {1: 0.08, 2: 0.05, 3: 0.09, 4: 0.18, 5: 0.6}  # of Amazon's reviews


@dataclass(frozen=True)
class World:
    """The users and items of a stream."""

    users: Sequence[User]
    items: Sequence[Item]
    texts: Sequence[tuple[str, str]]  # titles and texts of reviews

    @property
    def records(self) -> Iterator[Outgoing]:
        """What is known of users and items."""
        yield from outgoing(("items", item) for item in self.items)
        yield from outgoing(("users", user) for user in self.users)


def make_world(users: int, items: int, seed: int = 7) -> World:
    """Users, items and review texts from the generated shop."""
    random = np.random.default_rng(seed)
    records = [record for _, record in shop(seed, users, items, TEXTS)]
    texts = [each.text for each in records if isinstance(each, Review) and each.text]
    return World(
        [each for each in records if isinstance(each, User)],
        [each for each in records if isinstance(each, Item)],
        [_text(random, texts) for _ in range(TEXTS)],
    )


def make_events(
    world: World, count: int, end: datetime | None = None, seed: int = 7, first: int = 0
) -> Iterator[Outgoing]:
    """Reviews and behaviour in order of time, the last at `end` (now).

    An event's id is its number, from `first` on: parts of one stream need different numbers.
    """
    random = np.random.default_rng(seed)
    begins = (end or datetime.now(UTC)) - timedelta(milliseconds=STEP_MS * (first + count))
    start = int(begins.timestamp() * 1000)
    for begin in range(first, first + count, CHUNK):
        numbers = np.arange(begin, min(begin + CHUNK, first + count))
        yield from _chunk(world, random, numbers, start)


def _chunk(
    world: World, random: np.random.Generator, numbers: NDArray[np.int64], start: int
) -> Iterator[Outgoing]:
    count = len(numbers)
    user = zipf(random, len(world.users), USER_EXPONENT, count)
    item = zipf(random, len(world.items), ITEM_EXPONENT, count)
    columns = zip(
        numbers.tolist(),
        format_times(start + (numbers + 1) * STEP_MS),
        user.tolist(),
        item.tolist(),
        (random.random(count) < REVIEW_SHARE).tolist(),
        random.choice(list(ACTIONS), count, p=list(ACTIONS.values())).tolist(),
        random.choice(list(STARS), count, p=list(STARS.values())).tolist(),
        random.integers(len(world.texts), size=count).tolist(),
        strict=True,
    )
    for number, time, user_at, item_at, reviewed, action, stars, text in columns:
        known: dict[str, Any] = {
            "event_id": f"{number:024x}",
            "user_id": world.users[user_at].user_id,
            "item_id": world.items[item_at].item_id,
            "event_time": time,
        }
        if reviewed:
            title, words = world.texts[text]
            known |= {"rating": stars, "title": title, "text": words}
        else:
            known |= {
                "action": action,
                "price": world.items[item_at].price,
                "session_id": f"{user_at:08x}-5f3b-4c6e-9d2a-{number >> 16:012x}",
            }
        topic = "reviews" if reviewed else "behavior"
        yield Outgoing(topic, known["user_id"].encode(), orjson.dumps(known))


def zipf(random: np.random.Generator, size: int, exponent: float, count: int) -> NDArray[np.intp]:
    """`count` ranks from 0 to `size` - 1, the k-th with probability proportional to k^-exponent."""
    weights = np.arange(1, size + 1) ** -exponent
    return np.searchsorted(np.cumsum(weights) / weights.sum(), random.random(count))


def _text(random: np.random.Generator, texts: Sequence[str]) -> tuple[str, str]:
    """A first sentence, and sentences of several reviews up to a length drawn for this one."""
    length = int(random.integers(SHORTEST_TEXT, LONGEST_TEXT))
    words = ""
    while len(words) < length:
        words += texts[int(random.integers(len(texts)))] + " "
    title, _, text = words[:length].partition(". ")
    return title, text or title
