"""From polled messages to decoded records, with dead letters for the rest."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from confluent_kafka import Message
from numpy.typing import NDArray

from schemas.codec import decode
from schemas.topics import BY_NAME
from streams.dead_letters import dead_letter
from streams.loop import Output


@dataclass
class Inputs:
    """The good records of one topic in a batch, in the order of the poll; n of them.

    Tombstones (null values of compacted topics) have None as record and stay in `messages`.
    """

    topic: str
    messages: list[Message]
    records: list[Any]

    def partitions(self) -> NDArray[np.int64]:
        """Each record's partition, (n)."""
        return np.array([message.partition() for message in self.messages], np.int64)

    def offsets(self) -> NDArray[np.int64]:
        """Each record's offset, (n)."""
        return np.array([message.offset() for message in self.messages], np.int64)

    def timestamps(self) -> NDArray[np.int64]:
        """Each record's Kafka timestamp, ms, (n)."""
        return np.array([message.timestamp()[1] for message in self.messages], np.int64)

    def drop(self, rows: Iterable[int]) -> None:
        """Leave these rows out."""
        gone = set(rows)
        kept = [at for at in range(len(self.messages)) if at not in gone]
        self.messages = [self.messages[at] for at in kept]
        self.records = [self.records[at] for at in kept]


def split(
    messages: Sequence[Message], prefix: str, processor: str
) -> tuple[dict[str, Inputs], list[Output]]:
    """Records by topic, and the dead letters of what breaks the contract."""
    by_topic = defaultdict[str, list[Message]](list)
    for message in messages:
        by_topic[message.topic() or ""].append(message)
    good: dict[str, Inputs] = {}
    letters: list[Output] = []
    for name, mine in by_topic.items():
        topic = name.removeprefix(prefix)
        decoded = decode(
            BY_NAME[topic],
            [message.value() for message in mine],
            [(message.partition() or 0, message.offset() or 0) for message in mine],
            name,
        )
        good[topic] = Inputs(topic, mine, decoded.records)
        letters += [
            dead_letter(mine[bad.index], topic, processor, bad.reason, bad.field)
            for bad in decoded.rejections
        ]
        if decoded.rejections:
            good[topic].drop([bad.index for bad in decoded.rejections])
    return good, letters
