"""Records that wait for those of another topic, of which they tell.

`texts` writes what it has read off reviews to `text-features`. Behind a backlog Kafka's client
hands over each partition as it has fetched it, and a megabyte of these short records is of more
reviews than a megabyte of reviews: a review would be predicted from a state that has its own text.
So each waits until the other topic's partition has been read up to the time at which Kafka took it,
or to its end. Brokers' clocks may differ by no more than `texts` takes, some ten milliseconds.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import inf

from confluent_kafka import Message

from schemas.topics import BY_NAME
from streams.processor import Position


class Precedence:
    """How far topics have been read that others come after. One thread uses it."""

    def __init__(self, topics: Sequence[str]) -> None:
        """Of topics that are worked on together."""
        given = ((topic, BY_NAME[topic].after) for topic in topics)
        self._after = {
            topic: first for topic, first in given if first is not None and first in topics
        }
        self._firsts = frozenset(self._after.values())
        self._read: dict[Position, Message] = {}  # the last record of those that come first
        self._ends: dict[Position, int] = {}  # of partitions, as Kafka told them last
        self._polled = defaultdict[Position, list[Message]](list)  # of those that come after
        self._waiting: dict[Position, int] = {}  # the time of the first that waits, ms

    def __bool__(self) -> bool:
        """Whether any topic comes after another."""
        return bool(self._after)

    def ended(self, position: Position, end: int) -> None:
        """Kafka has told that all before an offset has come, and nothing is there yet."""
        self._ends[position] = end

    def read(self, position: Position, messages: Sequence[Message]) -> None:
        """These came of a partition, in their order."""
        if position[0] in self._firsts:
            self._read[position] = messages[-1]
        elif position[0] in self._after:
            self._polled[position] += messages

    def early(self) -> dict[Position, Message]:
        """Of what has come since the last call, by partition, the first that has to wait."""
        found: dict[Position, Message] = {}
        for position, messages in self._polled.items():
            until = self._until(position)
            first = next((each for each in messages if each.timestamp()[1] > until), None)
            if first is not None:
                found[position] = first
                self._waiting[position] = first.timestamp()[1]
        self._polled.clear()
        return found

    def due(self) -> list[Position]:
        """Partitions that have waited long enough; they wait no more."""
        due = [each for each, time in self._waiting.items() if time <= self._until(each)]
        for position in due:
            del self._waiting[position]
        return due

    def drop(self, positions: Iterable[Position]) -> None:
        """Forget partitions."""
        for position in positions:
            for known in (self._read, self._ends, self._polled, self._waiting):
                known.pop(position, None)

    def _until(self, position: Position) -> float:
        """The time up to which the topic that comes first has been read, ms."""
        first = self._after[position[0]], position[1]
        last = self._read.get(first)
        if self._ends.get(first, -1) > (-1 if last is None else last.offset() or 0):
            return inf
        return -inf if last is None else last.timestamp()[1]
