"""Records that break the contract, from a seed; and which ones do, without the code that decodes.

Some come from good records that are cut, overwritten or given fields of other types, some from
hypothesis. A few stay good by accident.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.topics import BY_NAME

LONGEST_FUTURE = timedelta(days=1)
# What Kafka takes of a value: a batch and a record have some 100 bytes of their own, keys apart.
LARGEST_VALUE = BY_NAME["reviews"].largest_message - 400

WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, 6, -1, 4.5, 2**63, 10**30, 1e308, math.inf, math.nan),
    *("", "4", "x" * 300, "\x00", "a\x00b", "\ud800", "🎸", "null", [], [4], {}, {"rating": 4}),
    *("2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z", "9999-01-01T00:00:00Z"),
    *("1026-01-01T00:00:00Z", "2098-01-01T00:00:00Z", 1_767_225_600_000, "view", "stare"),
)

Value = bytes | None


def accepted(topic: str, value: Value, appended_ms: float) -> bool:
    """Whether a record keeps the contract: JSON of Python's own reading, one pydantic call."""
    record = BY_NAME[topic].record
    assert record is not None
    if value is None:
        return False
    try:
        parsed = json.loads(
            value.decode(), parse_constant=_refuse, parse_int=_integer, parse_float=_finite
        )
        json.dumps(parsed, ensure_ascii=False).encode()  # refuses half a character
        found: Any = record.model_validate(parsed)
    except (ValidationError, ValueError, RecursionError):
        return False
    return found.event_time.timestamp() * 1_000 <= appended_ms + LONGEST_FUTURE / timedelta(
        milliseconds=1
    )


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(found := float(text)):
        raise ValueError("larger than any number")
    return found


def _integer(text: str) -> int | float:
    number = _finite(text)
    return int(text) if abs(number) < 2**64 else number


def spoilt(good: Sequence[bytes], count: int, number: int) -> Iterator[tuple[str, Value]]:
    """So many bad records and how each was made, from the values of good ones."""
    source = random.Random(number)
    drawn = strange(max(count // 50, 20), number)
    makers: dict[str, tuple[float, Callable[[bytes], Value]]] = {
        "null": (0.01, lambda _: None),
        "random": (0.25, lambda _: source.randbytes(source.randrange(300))),
        "truncated": (0.25, lambda value: value[: source.randrange(len(value))]),
        "overwritten": (0.15, lambda value: _overwritten(value, source)),
        "confused": (0.25, lambda value: _confused(value, source)),
        "strange": (0.0895, lambda _: source.choice(drawn)),
        "large": (0.0005, lambda value: _large(value, source)),
    }
    kinds = source.choices(list(makers), [weight for weight, _ in makers.values()], k=count)
    kinds[: len(makers)] = list(makers)[:count]  # one of each at least
    for kind in kinds:
        yield kind, makers[kind][1](source.choice(good))


def _overwritten(value: bytes, source: random.Random) -> bytes:
    changed = bytearray(value)
    for _ in range(source.randint(1, 3)):
        changed[source.randrange(len(changed))] = source.randrange(256)
    return bytes(changed)


def _confused(value: bytes, source: random.Random) -> bytes:
    record: dict[str, Any] = json.loads(value)
    for field in source.sample(sorted(record), source.randint(1, 2)):
        if source.random() < 0.2:
            del record[field]
        else:
            record[field] = source.choice(WRONG)
    return json.dumps(record).encode()


def _large(value: bytes, source: random.Random) -> bytes:
    """A record of 66 kB up to all that Kafka takes, most of it one field."""
    size = LARGEST_VALUE if source.random() < 0.2 else source.randint(66_000, LARGEST_VALUE)
    record: dict[str, Any] = json.loads(value)
    field = source.choice(["event_id", "item_id", "text", "rating", "unknown"])
    record[field] = ""
    room = size - len(json.dumps(record))
    record[field] = "x" * room if source.random() < 0.5 else [4] * (room // 3)
    return json.dumps(record).encode()[:LARGEST_VALUE]


def strange(count: int, number: int) -> list[bytes]:
    """Values that hypothesis draws: any JSON, records with fields of any type, any bytes."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    )
    name = st.text(min_size=1, max_size=12)
    fields = {
        "event_id": name,
        "user_id": name,
        "item_id": name,
        "event_time": st.datetimes().map(lambda time: f"{time.isoformat()}Z"),
        "rating": st.floats(0, 6) | st.integers(0, 6),
        "text": st.text(max_size=40),
        "action": st.sampled_from(["view", "cart", "Purchase"]),
        "price": st.floats(),
    }
    records = st.fixed_dictionaries(
        {}, optional={field: values | anything for field, values in fields.items()}
    )
    values = (
        st.binary(max_size=200)
        | (anything | records).map(lambda value: json.dumps(value).encode())
        | records.map(lambda value: json.dumps(value).encode("utf-16"))
    )
    found: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(values)
    def draw(value: bytes) -> None:
        found.append(value)

    draw()
    return found
