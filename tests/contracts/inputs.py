"""Records for every topic that a processor reads, made from the contract's examples."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from schemas import journal
from schemas.examples import EXAMPLES
from schemas.topics import BY_NAME
from tests.unit.streams.journals import Partition, events

PARTITIONS = 2
USERS, ITEMS = 6, 5
ERASED = 11  # each so many records of users
START = datetime(2026, 10, 1, tzinfo=UTC)
TOO_DEEP = b'{"a":' * 5_000


@dataclass(frozen=True)
class Sent:
    """One record of an input topic, before Kafka gives it an offset."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None


def good(topic: str, count: int) -> list[Sent]:
    """`count` good records of a topic; what is of one key lies in one partition."""
    if topic == "journal":
        return _journal(count)
    records = [_record(topic, at) for at in range(count)]
    if BY_NAME[topic].forgets:  # now and then a user is erased
        records[ERASED::ERASED] = [replace(each, value=None) for each in records[ERASED::ERASED]]
    return records


def bad(topic: str) -> list[Sent]:
    """Records that break the contract of a topic, each in its own way."""
    (example,) = (each.value or b"" for each in good(topic, 1))
    values: list[bytes | None] = [
        bytes(range(256)),
        b"",
        example[: len(example) // 2],
        b"null",
        b"7",
        b'["a list"]',
        b"{}",
        TOO_DEEP,
        *(_of_wrong_type(example, name) for name in _required(topic)),
    ]
    if not BY_NAME[topic].takes_null:
        values.append(None)
    return [Sent(topic, at % PARTITIONS, b"?", value) for at, value in enumerate(values)]


def _record(topic: str, at: int) -> Sent:
    value: dict[str, Any] = copy.deepcopy(dict(EXAMPLES[topic]))
    changes: Mapping[str, Callable[[], Any]] = {
        "event_id": lambda: f"{topic}-{at}",
        "request_id": lambda: f"q-{at}",
        "user_id": lambda: f"u-{at % USERS}",
        "item_id": lambda: f"i-{at % ITEMS}",
        "item_ids": lambda: [f"i-{each}" for each in range(1 + at % ITEMS)],
        "event_time": lambda: _time(at),
        "first_event_time": lambda: _time(at),
        "last_event_time": lambda: _time(at + 1),
        "rating": lambda: 1 + at % 5,
        "price": lambda: 10.0 + at % 7,
        "title": lambda: f"a good guitar {at % 4}",
        "text": lambda: f"the drum is very good {at % 3}",
        "source": lambda: (
            {"topic": "reviews", "partition": 0, "first_offset": at, "last_offset": at}
            if topic == "item-updates"
            else value["source"]
        ),
    }
    for name in value.keys() & changes.keys():
        value[name] = changes[name]()
    value.pop("deadline_ms", None)  # what is late depends on the clock
    key = str(value.get(BY_NAME[topic].key, at)).encode()
    partition = key[-1] % PARTITIONS if BY_NAME[topic].keyed else 0
    return Sent(topic, partition, key, orjson.dumps(value))


def _journal(count: int) -> list[Sent]:
    partition = Partition()
    for at in range(count):
        partition.apply(events([(at % USERS, at % ITEMS, at % 3, at)]))
    return [
        Sent("journal", 0, b"0", value)
        for step in partition.steps
        for value in journal.encode(step.transaction.journal)
    ]


def _required(topic: str) -> list[str]:
    record = BY_NAME[topic].record
    fields = record.model_fields.items() if record else ()
    return [name for name, field in fields if field.is_required()]


def _of_wrong_type(example: bytes, name: str) -> bytes:
    return orjson.dumps(orjson.loads(example) | {name: {"not": ["this"]}})


def _time(at: int) -> str:
    return (START + timedelta(minutes=at)).isoformat().replace("+00:00", "Z")
