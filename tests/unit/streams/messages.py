"""Messages as a processor gets them from a poll, and dead letters of them."""

from collections.abc import Mapping
from typing import Any

from confluent_kafka import Message

from schemas.codec import encode
from schemas.records import DeadLetter, Record
from streams.dead_letters import dead_letter

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


def letter_of(letter_message: Message, **changes: Any) -> DeadLetter:
    fields: dict[str, Any] = {
        "topic": "reviews",
        "processor": "scorer",
        "reason": "not JSON",
        **changes,
    }
    output = dead_letter(letter_message, **fields)
    assert (output.topic, output.key) == ("dead-letters", fields["topic"].encode())
    found = DeadLetter.model_validate_json(output.value or b"")
    assert output.value == encode(found)
    return found
