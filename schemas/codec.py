"""Decoding and encoding of whole batches of records.

`orjson` parses each value and pydantic validates all of them in one call. Only a batch that holds
a bad value is taken apart. See `docs/decisions/0002-contract.md`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from itertools import compress
from typing import Any, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from schemas.exceptions import ContractError
from schemas.records import EPOCH, Record
from schemas.topics import Topic

GOT = " (got "  # what follows it in a reason is what was found
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
    prefix, for messages. A null value is a tombstone where the topic takes one, else a rejection.
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
                if topic.takes_null:
                    tombstones.append(index)
                else:
                    faults[index] = (None, "null value, which says nothing in this topic")
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


Column: TypeAlias = "str | Sequence[Any] | NDArray[Any] | Mapping[str, Column]"


def encode_columns(columns: Mapping[str, Column]) -> list[bytes]:
    """JSON objects from columns, one value a row, without validation.

    A column is a sequence of plain values (bytes are JSON already), an array of numbers or of times
    (`M8[ms]`, UTC), or, for objects inside the rows, columns again; one string is the same in all
    rows. For hot paths: each column is written as one JSON array and cut, and no row is ever a map.
    Raises ValueError when columns differ in length.
    """
    template, cells = _template(columns)
    return list(map(template.__mod__, zip(*cells, strict=True)))


def _template(columns: Mapping[str, Column]) -> tuple[bytes, list[list[bytes]]]:
    """What rows have in common, with a %b for each of the lists of JSON that follow."""
    fields: list[bytes] = []
    cells: list[list[bytes]] = []
    for name, column in columns.items():
        if isinstance(column, str):
            written, mine = orjson.dumps(column).replace(b"%", b"%%"), []
        elif isinstance(column, Mapping):
            written, mine = _template(column)
        else:
            written, one = _cells(column)
            mine = [one]
        fields.append(orjson.dumps(name).replace(b"%", b"%%") + b":" + written)
        cells += mine
    return b"{" + b",".join(fields) + b"}", cells


def _cells(column: Sequence[Any] | NDArray[Any]) -> tuple[bytes, list[bytes]]:
    """Each cell's JSON, and what stands around it.

    Where a cut is not one between two cells, the number of pieces tells: a comma within a cell is
    one piece too many. With a quote within a string it need not, so such cells are written alone.
    """
    count = len(column)
    if not count or isinstance(column[0], bytes):
        return b"%b", list(column)
    if isinstance(column, np.ndarray):
        column = np.ascontiguousarray(column)
    whole = orjson.dumps(column, option=_ARRAYS)[1:-1]
    if isinstance(column[0], np.datetime64):
        whole = whole.replace(b'000Z"', b'Z"')  # microseconds that there are not
    if isinstance(column[0], str | np.datetime64):
        around, pieces = b'"%b"', whole[1:-1].split(b'","')
    elif isinstance(column, np.ndarray) and column.ndim > 1:
        around, pieces = b"[%b]", whole[1:-1].split(b"],[")
    else:
        around, pieces = b"%b", whole.split(b",")
    if len(pieces) != count or b'\\"' in whole:
        return b"%b", [orjson.dumps(cell) for cell in column]
    return around, pieces


_ARRAYS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z


def format_times(times: NDArray[np.int64]) -> list[str]:
    """RFC 3339 in UTC of milliseconds since 1970."""
    return np.datetime_as_string(times.astype("M8[ms]"), timezone="UTC").tolist()


def time_ms(time: datetime) -> int:
    """Milliseconds since 1970 of an aware time, cut downwards."""
    return (time - EPOCH) // timedelta(milliseconds=1)


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
        return f"{details['msg']}{GOT}{_cut(found, LONGEST_ECHO)!a}, {len(found)} characters)"
    if found is None or isinstance(found, int | float):
        return f"{details['msg']}{GOT}{orjson.dumps(found).decode()})"
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
