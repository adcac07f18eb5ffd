"""Decoding and encoding of whole batches of records.

`orjson` parses each value and pydantic validates all of them in one call. Only a batch that holds
a bad value is taken apart. See `docs/decisions/0002-contract.md`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from itertools import compress
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from schemas.exceptions import ContractError
from schemas.records import Record
from schemas.topics import Topic

LONGEST_ECHO = 60  # characters of a bad value that a reason repeats
LONGEST_FIELD = 80  # characters of a field's path; a map's key comes from outside


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why the value at `index` of a batch breaks the contract; as a string, the whole message."""

    index: int
    topic: str
    partition: int
    offset: int
    field: str | None  # a path such as "source.offset"; none when the value as a whole is bad
    reason: str

    def __str__(self) -> str:
        where = f"{self.topic} partition {self.partition} offset {self.offset}"
        return f"{where}: {f'{self.field}: ' if self.field else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded batch. `records` has one entry a value: none where it was rejected or deletes."""

    records: list[Record | None]
    rejections: list[Rejection] = field(default_factory=list[Rejection])  # by index
    tombstones: list[int] = field(default_factory=list[int])  # indices of null values that delete


def decode(
    topic: Topic,
    values: Sequence[bytes | None],
    positions: Sequence[tuple[int, int]],
    name: str = "",
) -> Decoded:
    """The records of a batch of one topic.

    `positions` holds partition and offset of each value; `name` is the topic's name with its
    prefix, for messages. A null value is a tombstone in a compacted topic, a rejection elsewhere.
    Raises ContractError for the journal, whose values are Arrow (`schemas.journal`).
    """
    validate = _adapter(_record_type(topic)).validate_python
    loads = orjson.loads
    faults: dict[int, tuple[str | None, str]] = {}
    tombstones: list[int] = []
    indices: Sequence[int] = range(len(values))
    try:
        parsed: list[Any] = [loads(value) for value in values]  # type: ignore[arg-type]
    except orjson.JSONDecodeError:
        indices, parsed = [], []
        for index, value in enumerate(values):
            if value is None:
                if topic.cleanup == "compact":
                    tombstones.append(index)
                else:
                    faults[index] = (None, "null value; only a compacted topic takes one")
                continue
            try:
                parsed.append(loads(value))
            except orjson.JSONDecodeError as error:
                faults[index] = (None, f"not JSON in UTF-8: {error.msg} at byte {error.pos}")
            else:
                indices.append(index)

    try:
        good = validate(parsed)
    except ValidationError as error:
        details = _first_faults(error)
        faults |= {indices[at]: (_path(found), _reason(found)) for at, found in details.items()}
        fine = [at not in details for at in range(len(indices))]
        indices = list(compress(indices, fine))
        good = validate(list(compress(parsed, fine)))
    if len(good) == len(values):
        return Decoded(good)
    records: list[Record | None] = [None] * len(values)
    for index, record in zip(indices, good, strict=True):
        records[index] = record

    called = name or topic.name
    rejections = [
        Rejection(index, called, *positions[index], *faults[index]) for index in sorted(faults)
    ]
    return Decoded(records, rejections, tombstones)


def encode(record: Record) -> bytes:
    """The JSON value of a record; absent fields are left out."""
    return encode_many((record,))[0]


def encode_many(records: Iterable[Record]) -> list[bytes]:
    """The JSON value of each record; absent fields are left out."""
    return [record.__pydantic_serializer__.to_json(record, exclude_none=True) for record in records]


def encode_columns(columns: Mapping[str, Sequence[Any]], drop_none: bool = False) -> list[bytes]:
    """JSON values from columns of plain Python values, one value a row, without validation.

    For hot paths that hold arrays (`array.tolist()`, `format_times`): eight times as fast as
    building records. `drop_none` leaves out the fields of a row that are None; the first column
    has none.
    """
    names = tuple(columns)
    rows = zip(*columns.values(), strict=True)
    if drop_none:
        return encode_rows(
            [
                {name: cell for name, cell in zip(names, row, strict=True) if cell is not None}
                for row in rows
            ]
        )
    return encode_rows([dict(zip(names, row, strict=True)) for row in rows])


def encode_rows(rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The JSON value of each of these maps of plain values.

    All begin with the same name, and no map inside them does. One call for all, since a call costs
    more than a row. A row begins where that name does: within a string no quote stands without a
    backslash before it.
    """
    if not rows:
        return []
    begin = b'{"' + next(iter(rows[0])).encode() + b'":'
    first, *others = orjson.dumps(rows)[1:-1].split(b"," + begin)
    return [first, *(begin + other for other in others)]


def format_times(times: NDArray[np.int64]) -> list[str]:
    """RFC 3339 in UTC of milliseconds since 1970."""
    return np.datetime_as_string(times.astype("M8[ms]"), timezone="UTC").tolist()


def time_ms(time: datetime) -> int:
    """Milliseconds since 1970 of an aware time, cut downwards."""
    return int(time.timestamp() * 1000 // 1)


def _record_type(topic: Topic) -> type[Record]:
    if topic.record is None:
        raise ContractError(
            f"values of topic {topic.name} are Arrow, not JSON: read them with schemas.journal"
        )
    return topic.record


@cache
def _adapter(record: type[Record]) -> TypeAdapter[list[Any]]:
    return TypeAdapter(list[record])  # pyright: ignore[reportInvalidTypeForm]


def _first_faults(error: ValidationError) -> dict[int, ErrorDetails]:
    """The first fault of each bad entry of a validated list."""
    first: dict[int, ErrorDetails] = {}
    for details in error.errors(include_url=False, include_context=False):
        first.setdefault(int(details["loc"][0]), details)
    return first


def _path(details: ErrorDetails) -> str | None:
    return _cut(".".join(str(part) for part in details["loc"][1:]), LONGEST_FIELD) or None


def _reason(details: ErrorDetails) -> str:
    found = details["input"]
    if details["type"] == "missing":
        return "missing"
    if details["type"] == "model_type":
        return f"Input should be a JSON object, not {_JSON_TYPES[type(found)]}"
    if isinstance(found, str):
        return f"{details['msg']} (got {_cut(found, LONGEST_ECHO)!a}, {len(found)} characters)"
    if found is None or isinstance(found, int | float):
        return f"{details['msg']} (got {orjson.dumps(found).decode()})"
    return details["msg"]


_JSON_TYPES: Mapping[Any, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
