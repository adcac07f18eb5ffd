"""Numbered events of many users, and what they must add up to, counted here in plain NumPy.

Event k is known by its number alone: whose it is, what it says, and how often it is sent. Users
have the same number of events each, but for a few that are hot. Every `REPEATED`th event is sent
twice, unless its user is hot: a backlog would bring a hot user's next sixteen events of the other
topic between the two, and then, by rule, the second counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

ACTIONS = ("view", "click", "wishlist", "share", "cart", "remove_from_cart", "purchase")
ITEMS = 1_009  # a prime, so that strides visit all of them before one comes again
HOT = 5  # users that have a fifth of all events
REPEATED = 97
ASKED = 200  # events to a score request
CANDIDATES = 5


@dataclass(frozen=True)
class Numbered:
    """`count` events of `users` users from `start` on (ms since 1970), a millisecond apart."""

    count: int
    users: int
    start: int

    def columns(self) -> dict[str, NDArray[Any]]:
        """Of each event (count): user, nth of its user, item, action (0: review), rating, price."""
        number = np.arange(self.count)
        hot = number % 5 == 0
        normal = number - number // 5 - 1  # how many that are not hot came before
        user = np.where(hot, self.users + number // 5 % HOT, normal % self.users)
        nth = np.where(hot, number // 5 // HOT, normal // self.users)
        item = (user * 31 + nth * 7) % ITEMS
        review = (user + nth) % 3 == 0
        action = np.where(review, 0, 1 + (user + 2 * nth) % len(ACTIONS))
        rating = 1 + (user * 7 + nth * 3) % 9 / 2
        price = np.where((user + nth) % 4 == 1, np.nan, 1 + item % 50 + 0.5)
        return {
            "number": number,
            "user": user,
            "nth": nth,
            "item": item,
            "action": action,
            "rating": np.where(review, rating, np.nan),
            "price": np.where(review, np.nan, price),
            "sent": 1 + ((number % REPEATED == 0) & ~hot),
        }

    def messages(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Topic, key and value of each record, in order, repetitions too."""
        columns = {name: values.tolist() for name, values in self.columns().items()}
        for number, user, item, action, rating, price, sent in zip(
            *(
                columns[name]
                for name in ("number", "user", "item", "action", "rating", "price", "sent")
            ),
            strict=True,
        ):
            name, time = f"u{user}", stamp(self.start + number)
            record: dict[str, Any] = {
                "event_id": f"e{number}",
                "user_id": name,
                "item_id": f"i{item}",
                "event_time": time,
            }
            if action == 0:
                topic = "reviews"
                record["rating"] = rating
            else:
                topic = "behavior"
                record["action"] = ACTIONS[action - 1]
                if price == price:
                    record["price"] = price
            value = orjson.dumps(record)
            for _ in range(sent):
                yield topic, name.encode(), value
            if number % ASKED == 1:  # of a user that is not hot
                yield "score-requests", name.encode(), self.request(number, user, item)

    def request(self, number: int, user: int, item: int) -> bytes:
        """A question for some items."""
        return orjson.dumps(
            {
                "request_id": f"q{number}",
                "user_id": f"u{user}",
                "item_ids": [f"i{(item + at) % ITEMS}" for at in range(CANDIDATES)],
                "event_time": stamp(self.start + number),
            }
        )

    def requests(self) -> int:
        """How many questions there are."""
        return len(range(1, self.count, ASKED))

    def records(self) -> int:
        """How many events are sent, repetitions too."""
        return int(self.columns()["sent"].sum())


def recount(
    columns: dict[str, NDArray[Any]], whose: str, names: NDArray[Any], times: NDArray[np.int64]
) -> dict[str, Any]:
    """Counts and sums of `names` users or items (m), where event k counts `times[k]` times."""
    index = np.searchsorted(names, columns[whose])
    count = len(names)

    def add(weights: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(index, np.nan_to_num(weights) * times, count).astype(np.float64)

    rating, price = columns["rating"], columns["price"]
    rated, priced = ~np.isnan(rating), ~np.isnan(price)
    logs = np.rint(np.log1p(np.float32(np.nan_to_num(price)).astype(np.float64)) * 256) / 256
    paid = priced & (columns["action"] == 1 + ACTIONS.index("purchase"))
    stars = np.floor(np.nan_to_num(rating) + 0.5)
    return {
        "actions": np.stack([add(columns["action"] == code) for code in range(8)], axis=1),
        "rating_count": add(rated),
        "rating_sum": add(rating),
        "rating_square_sum": add(rating * rating),
        "histogram": np.stack([add(rated & (stars == star)) for star in range(1, 6)], axis=1),
        "price_count": add(priced),
        "price_log_sum": add(np.where(priced, logs, 0)),
        "paid_count": add(paid),
        "paid_log_sum": add(np.where(paid, logs, 0)),
    }


def stamp(ms: int) -> str:
    """RFC 3339, UTC, with milliseconds."""
    time = datetime.fromtimestamp(ms / 1000, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
