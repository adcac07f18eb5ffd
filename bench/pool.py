"""Records that are sent again and again, each time under another id and at another time."""

from dataclasses import dataclass

import numpy as np
import orjson

from bench.events import World, make_events

EVENTS_A_REQUEST = 1_000  # so seldom, each answer is a transaction of its own
ITEMS_A_REQUEST = 20


@dataclass(frozen=True)
class Template:
    """A record to be sent again and again under another id and at another time."""

    topic: str
    key: bytes
    head: bytes  # of the value, up to the id's 24 digits
    middle: bytes
    tail: bytes

    def value(self, number: int, now: bytes) -> bytes:
        """The record's bytes."""
        return b"%b%024x%b%b%b" % (self.head, number, self.middle, now, self.tail)


def make_pool(world: World, count: int) -> list[Template]:
    """So many events, and among them requests to rank items."""
    random = np.random.default_rng(11)
    pool: list[Template] = []
    for number, event in enumerate(make_events(world, count)):
        pool.append(_template(event.topic, event.key or b"", event.value or b"", "event_id"))
        if number % EVENTS_A_REQUEST == 0:
            chosen = random.choice(len(world.items), ITEMS_A_REQUEST, replace=False)
            value = {
                "request_id": f"{number:024x}",
                "user_id": (event.key or b"").decode(),
                "item_ids": [world.items[at].item_id for at in chosen.tolist()],
                "event_time": orjson.loads(event.value or b"")["event_time"],
            }
            pool.append(
                _template("score-requests", event.key or b"", orjson.dumps(value), "request_id")
            )
    return pool


def _template(topic: str, key: bytes, value: bytes, id: str) -> Template:
    head = b'{"%b":"' % id.encode()
    mark = b'"event_time":"'
    start = value.index(mark) + len(mark)
    end = value.index(b'"', start)
    return Template(topic, key, head, value[len(head) + 24 : start], value[end:])
