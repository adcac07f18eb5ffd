"""Messages as a processor gets them from a poll."""

from collections.abc import Mapping
from typing import Any

from confluent_kafka import Message

from schemas.codec import encode
from schemas.records import Record

PREFIX = "eu."
NOW_MS = 1_795_000_000_000


def message(
    topic: str, value: Record | bytes | None, partition: int = 0, offset: int = 0, **changes: Any
) -> Message:
    """A message of `topic`, which stands without its prefix."""
    fields: Mapping[str, Any] = {"key": b"k", "timestamp": (2, NOW_MS), **changes}
    return Message(
        topic=PREFIX + topic,
        partition=partition,
        offset=offset,
        value=encode(value) if isinstance(value, Record) else value,
        **fields,
    )
