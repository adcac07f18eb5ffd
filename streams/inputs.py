"""From polled messages to decoded records, with dead letters for the rest."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    messages: list[Message] = field(default_factory=list[Message])
    records: list[Any] = field(default_factory=list[Any])

    def partitions(self) -> NDArray[np.int64]:
        """Each record's partition, (n)."""
        return np.array([message.partition() for message in self.messages], np.int64)

    def offsets(self) -> NDArray[np.int64]:
        """Each record's offset, (n)."""
        return np.array([message.offset() for message in self.messages], np.int64)

    def timestamps(self) -> NDArray[np.int64]:
        """Each record's Kafka timestamp, ms, (n)."""
        return np.array([message.timestamp()[1] for message in self.messages], np.int64)

    def keep(self, good: NDArray[np.bool_]) -> None:
        """Leave only the records where `good`, (n)."""
        self.messages = [each for each, keep in zip(self.messages, good, strict=True) if keep]
        self.records = [each for each, keep in zip(self.records, good, strict=True) if keep]


def split(
    messages: Sequence[Message], prefix: str, processor: str
) -> tuple[dict[str, Inputs], list[Output]]:
    """Records by topic, and the dead letters of what breaks the contract."""
    by_topic: dict[str, Inputs] = {}
    for message in messages:
        topic = str(message.topic()).removeprefix(prefix)
        by_topic.setdefault(topic, Inputs(topic)).messages.append(message)
    letters: list[Output] = []
    for topic, inputs in by_topic.items():
        decoded = decode(
            BY_NAME[topic],
            [message.value() for message in inputs.messages],
            [(message.partition() or 0, message.offset() or 0) for message in inputs.messages],
            prefix + topic,
        )
        inputs.records = decoded.records
        if decoded.rejections:
            good = np.ones(len(inputs.messages), bool)
            for bad in decoded.rejections:
                good[bad.index] = False
                letters.append(
                    dead_letter(inputs.messages[bad.index], topic, processor, bad.reason, bad.field)
                )
            inputs.keep(good)
    return by_topic, letters
