"""The events of a batch, in the order in which they are applied.

Of a partition all topics' events are merged by the time at which Kafka took each, and each topic's
own order is kept. It is the order of the journal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from confluent_kafka import Message
from numpy.typing import NDArray

from model.events import EVENT, Rows, behavior_rows, blank, forget_rows, review_rows, text_rows
from schemas import journal
from schemas.columns import Columns
from streams.claims import ends
from streams.inputs import Inputs, user_of

_ROWS: dict[str, Callable[[Columns], Rows]] = {
    "reviews": review_rows,
    "behavior": behavior_rows,
    "text-features": text_rows,
}
_IDS = ("event_id", "user_id", "item_id")


@dataclass(frozen=True)
class Arrivals:
    """n events in the order of their journal: by partition, then by arrival."""

    events: Rows  # EVENT (n)
    topics: NDArray[np.uint8]  # (n): positions in journal.TOPICS
    partitions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    timestamps: NDArray[np.int64]  # ms
    ids: Mapping[str, list[str]]  # by field
    messages: list[Message]

    def take(self, rows: NDArray[np.intp]) -> "Arrivals":
        """These rows, in this order."""
        order = rows.tolist()
        return Arrivals(
            self.events.take(rows),
            self.topics[rows],
            self.partitions[rows],
            self.offsets[rows],
            self.timestamps[rows],
            taken(self.ids, order),
            list(map(self.messages.__getitem__, order)),
        )


def taken(ids: Mapping[str, list[str]], order: list[int]) -> Mapping[str, list[str]]:
    """The ids (n) of these rows, in this order, by field."""
    return {name: list(map(each.__getitem__, order)) for name, each in ids.items()}


def arrange(inputs: Mapping[str, Inputs[Columns]]) -> Arrivals:
    """All good events of a batch by partition, topics merged by the time of their append."""
    used = [inputs[topic] for topic in journal.TOPICS if topic in inputs]
    none = np.zeros(0, np.int64)
    events = [_ROWS[each.topic](each.records) for each in used]
    ids = [each.records for each in used]
    for each in [each for each in used if each.tombstones]:
        users = [user_of(message.key()) or "" for message in each.tombstones]
        nothing = [""] * len(users)
        used.append(Inputs(each.topic, each.tombstones, {}))
        events.append(forget_rows(users))
        ids.append({"event_id": nothing, "user_id": users, "item_id": nothing})
    arrivals = Arrivals(
        events=np.concatenate([blank(EVENT, 0), *events]),
        topics=np.repeat(
            np.array([journal.TOPICS.index(each.topic) for each in used], np.uint8),
            [len(each.messages) for each in used],
        ),
        partitions=np.concatenate([none, *(each.partitions() for each in used)]),
        offsets=np.concatenate([none, *(each.offsets() for each in used)]),
        timestamps=np.concatenate([none, *(each.timestamps() for each in used)]),
        ids={name: [one for each in ids for one in each[name]] for name in _IDS},
        messages=[message for each in used for message in each.messages],
    )
    return arrivals.take(_order(arrivals))


def _order(arrivals: Arrivals) -> NDArray[np.intp]:
    """The order of the journal: in it each topic partition's own order is kept."""
    partition, topic, offset = arrivals.partitions, arrivals.topics, arrivals.offsets
    # A topic's own order comes before the clock: its append times are made to never fall.
    by_log = np.lexsort((offset, topic, partition))
    log = partition[by_log] * len(journal.TOPICS) + topic[by_log]
    arrival = arrivals.timestamps.copy()
    for rows in np.split(by_log, np.flatnonzero(np.diff(log)) + 1):
        arrival[rows] = np.maximum.accumulate(arrival[rows])
    return np.lexsort((offset, topic, arrival, partition))


def input_ends(messages: Sequence[Message], prefix: str) -> dict[int, list[int]]:
    """By partition, the next offset of each input topic after these messages; -1: none of it."""
    found: dict[int, list[int]] = {}
    for at, topic in enumerate(journal.TOPICS):
        for partition, end in ends(messages, prefix + topic).items():
            found.setdefault(partition, [-1] * len(journal.TOPICS))[at] = end
    return found
