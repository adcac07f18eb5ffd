"""Records of a small shop, and messages that bring them."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from confluent_kafka import Message

from schemas.records import (
    Behavior,
    Record,
    Review,
    TextFeatures,
)
from tests.unit.streams.messages import message

PARTITIONS = 3
START = datetime(2026, 11, 1, tzinfo=UTC)
KINDS: tuple[str, ...] = ("reviews", "behavior", "text-features")


def record(kind: str, number: int, user: str = "ann", item: str = "cup", **more: Any) -> Record:
    fields = {
        "event_id": f"{kind}-{number}",
        "user_id": user,
        "item_id": item,
        "event_time": START + timedelta(minutes=number),
    }
    if kind == "reviews":
        return Review.model_validate({**fields, "rating": 1 + number % 5, **more})
    if kind == "behavior":
        return Behavior.model_validate({**fields, "action": "view", "price": 9.5, **more})
    distribution = [0.1, 0.1, 0.2, 0.3, 0.3]
    return TextFeatures.model_validate(
        {**fields, "distribution": distribution, "encoder": "e", **more}
    )


def log(
    kind: str, partition: int, records: Sequence[Record | bytes], start: int = 0
) -> list[Message]:
    """Consecutive messages of one topic partition."""
    return [message(kind, each, partition, start + at) for at, each in enumerate(records)]
