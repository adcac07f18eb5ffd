"""From polled messages to decoded records, with dead letters for the rest."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Generic, TypeVar

import numpy as np
from confluent_kafka import Message
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from schemas.codec import Decoded, decode
from schemas.columns import Columns, columns_of, decode_columns
from schemas.records import Identifier, Record
from schemas.topics import BY_NAME
from streams.dead_letters import dead_letter
from streams.processor import Output

_IDENTIFIER = TypeAdapter[str](Identifier)

Held = TypeVar("Held", list[Any], Columns)


@dataclass
class Inputs(Generic[Held]):
    """The good records of one topic in a batch, in the order of the poll; n of them.

    Tombstones (null values) have None as record and stay in `messages`; columns have no place for
    them, there they stand apart.
    """

    topic: str
    messages: list[Message]
    records: Held
    tombstones: list[Message] = field(default_factory=list[Message])

    def partitions(self) -> NDArray[np.int64]:
        """Each record's partition, (n)."""
        return np.array(list(map(Message.partition, self.messages)), np.int64)

    def offsets(self) -> NDArray[np.int64]:
        """Each record's offset, (n)."""
        return np.array(list(map(Message.offset, self.messages)), np.int64)

    def timestamps(self) -> NDArray[np.int64]:
        """Each record's Kafka timestamp, ms, (n)."""
        return np.array([message.timestamp()[1] for message in self.messages], np.int64)


def split(
    messages: Sequence[Message], prefix: str, processor: str
) -> tuple[dict[str, Inputs[list[Any]]], list[Output]]:
    """Records by topic, and the dead letters of what breaks the contract."""
    good: dict[str, Inputs[list[Any]]] = {}
    letters: list[Output] = []
    for name, mine in _by_topic(messages).items():
        topic = name.removeprefix(prefix)
        values = [message.value() for message in mine]
        good[topic], bad = _by_pydantic(topic, name, mine, values, processor)
        letters += bad
    return good, letters


def split_columns(
    messages: Sequence[Message], prefix: str, processor: str
) -> tuple[dict[str, Inputs[Columns]], list[Output]]:
    """Columns by topic, and dead letters, as `split`."""
    good: dict[str, Inputs[Columns]] = {}
    letters: list[Output] = []
    for name, mine in _by_topic(messages).items():
        topic = name.removeprefix(prefix)
        record = BY_NAME[topic].record
        assert record is not None  # of a topic whose values are JSON
        values = list(map(Message.value, mine))
        columns = decode_columns(record, values)
        if columns is None:
            inputs, bad = _by_pydantic(topic, name, mine, values, processor)
            letters += bad
            good[topic] = _apart(inputs, record)
        else:
            good[topic] = Inputs(topic, mine, columns)
    return good, letters


def user_of(key: str | bytes | None) -> str | None:
    """The user whom a null value with this key erases; None where the key is no user's id."""
    try:
        return _IDENTIFIER.validate_python(key.decode() if isinstance(key, bytes) else key)
    except (UnicodeDecodeError, ValidationError):
        return None


def _apart(inputs: Inputs[list[Any]], record: type[Record]) -> Inputs[Columns]:
    """Records as columns, tombstones beside them."""
    kinds: tuple[list[Message], list[Message]] = [], []
    for message, each in zip(inputs.messages, inputs.records, strict=True):
        kinds[each is None].append(message)
    columns = columns_of(record, [each for each in inputs.records if each is not None])
    return Inputs(inputs.topic, kinds[0], columns, kinds[1])


def _by_topic(messages: Sequence[Message]) -> dict[str, list[Message]]:
    by_topic = defaultdict[str, list[Message]](list)
    for topic, run in groupby(messages, Message.topic):
        by_topic[topic or ""].extend(run)
    return by_topic


def _by_pydantic(
    topic: str,
    name: str,
    messages: list[Message],
    values: Sequence[bytes | None],
    processor: str,
) -> tuple[Inputs[list[Any]], list[Output]]:
    positions = [(message.partition() or 0, message.offset() or 0) for message in messages]
    decoded = decode(BY_NAME[topic], values, positions, name)
    letters = [
        dead_letter(messages[bad.index], topic, processor, bad.reason, bad.field)
        for bad in decoded.rejections
    ]
    records = decoded.records
    nobody = [at for at in _erasures(topic, decoded) if user_of(messages[at].key()) is None]
    reason = "null value, which erases a user, but the key is no user's id"
    letters += [dead_letter(messages[at], topic, processor, reason) for at in nobody]
    if gone := {bad.index for bad in decoded.rejections}.union(nobody):
        kept = [at for at in range(len(messages)) if at not in gone]
        messages = [messages[at] for at in kept]
        records = [records[at] for at in kept]
    return Inputs(topic, messages, records), letters


def _erasures(topic: str, decoded: Decoded) -> Sequence[int]:
    return decoded.tombstones if BY_NAME[topic].forgets else ()
