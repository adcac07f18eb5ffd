"""Decoding of whole batches into columns: for hot paths, which need no record of each event.

`msgspec` reads each value by what `schemas.records` says of its fields, four times as fast as
pydantic, and what it does not check is checked a column at a time. It takes nothing that
`schemas.codec` refuses. What it does not take, such as a field that nobody knows, need not be bad:
then pydantic has the batch, and it alone says what is wrong.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from operator import attrgetter
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta
from msgspec.structs import astuple
from numpy.typing import NDArray

from schemas.records import EARLIEST_TIME, EPOCH, LATEST_TIME, NO_NUL, RFC3339, Record, Time

Columns = Mapping[str, Any]
"""By field, of n records: a list of strings (None: absent), or an array: numbers (n; nan: absent),
times (n) in milliseconds since 1970, lists of numbers (n, length)."""

_EARLIEST, _LATEST = ((each - EPOCH).total_seconds() * 1e6 for each in (EARLIEST_TIME, LATEST_TIME))
_LONGEST_TIME = len("2026-11-24T10:15:00.123456789+01:00")
_UTC_TIMES = re.compile(r"(?:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?Z\n)*+", re.ASCII)
_TIMES = re.compile(rf"(?:{RFC3339}\n)*+", re.ASCII)

_CHECKED = ("ge", "gt", "le", "lt", "min_length", "max_length")  # limits that msgspec has too
_KEPT = ("strict", "allow_inf_nan", "pattern")  # it is strict, JSON has no nan; patterns by `_bare`


@dataclass(frozen=True)
class _Field:
    """How a field becomes a column."""

    type: Any  # as msgspec has it, with all limits that it checks
    read: Callable[[list[Any]], Any]  # the column of what msgspec made; None: ask pydantic
    held: Callable[[list[Any]], Any]  # the column of what records hold


def decode_columns(record: type[Record], values: Sequence[bytes | None]) -> Columns | None:
    """The columns of a batch's values; None where pydantic has to look at any of them."""
    try:
        rows = list(map(astuple, map(_decoder(record), values)))
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError):  # the last of a null value
        return None
    fields = _fields(record)
    given = map(list, zip(*rows, strict=True)) if rows else ([] for _ in fields)
    columns: dict[str, Any] = {}
    for (name, field), each in zip(fields.items(), given, strict=True):
        columns[name] = field.read(each)
        if columns[name] is None:
            return None
    return columns


def columns_of(record: type[Record], records: Sequence[Record]) -> Columns:
    """The columns of records."""
    return {
        name: field.held(list(map(attrgetter(name), records)))
        for name, field in _fields(record).items()
    }


def milliseconds(times: Sequence[datetime]) -> NDArray[np.int64]:
    """Aware times as milliseconds since 1970, UTC, rounded down; shape (n,)."""
    return _microseconds(times) // 1000


def _microseconds(times: Sequence[datetime]) -> NDArray[np.int64]:
    # Decoded times share one time zone of fixed offset, and so are subtracted without asking it.
    zone = times[0].tzinfo if times else None
    fixed = zone is not None and zone.utcoffset(None) is not None
    start = EPOCH.astimezone(zone) if fixed else EPOCH
    seconds = np.array([(time - start).total_seconds() for time in times], np.float64)
    return np.rint(seconds * 1e6).astype(np.int64)


@cache
def _decoder(record: type[Record]) -> Callable[[Any], Any]:
    """One value to an object with the record's fields; raises DecodeError."""
    fields: list[Any] = []
    for name, field in _fields(record).items():
        optional = NoneType in get_args(field.type)
        fields.append((name, field.type, None) if optional else (name, field.type))
    options: Any = {"frozen": True, "gc": False, "kw_only": True, "forbid_unknown_fields": True}
    return msgspec.json.Decoder(msgspec.defstruct(record.__name__, fields, **options)).decode


@cache
def _fields(record: type[Record]) -> Mapping[str, _Field]:
    """Raises TypeError where a field is of a kind that no column is made of."""
    hints = get_type_hints(record, include_extras=True)
    return {name: _field(hints[name]) for name in record.model_fields}


def _field(hint: Any) -> _Field:
    if NoneType in get_args(hint):
        (needed,) = (each for each in get_args(hint) if each is not NoneType)
        field = _field(needed)
        return _Field(field.type | None, field.read, field.held)
    if hint == Time:
        return _Field(Annotated[str, Meta(max_length=_LONGEST_TIME)], _times, milliseconds)
    if get_origin(hint) is Literal:
        return _Field(hint, list, list)
    kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    limits: list[Any] = [limit for one in about for limit in one.metadata]
    if not all(any(hasattr(limit, name) for name in (*_CHECKED, *_KEPT)) for limit in limits):
        raise TypeError(f"no column is made of {hint}: nobody would check all of its limits")
    checked = {
        name: getattr(limit, name) for limit in limits for name in _CHECKED if hasattr(limit, name)
    }
    patterns = {limit.pattern for limit in limits if hasattr(limit, "pattern")}
    if kind is str and patterns <= {NO_NUL}:
        return _Field(Annotated[str, Meta(**checked)], _bare if patterns else list, list)
    if kind is float:
        column = partial(np.array, dtype=np.float64)
        return _Field(Annotated[float, Meta(**checked)], column, column)
    if get_origin(kind) is list and checked["min_length"] == checked["max_length"]:
        (number,) = get_args(kind)
        table = partial(_table, length=checked["max_length"])
        return _Field(Annotated[list[_field(number).type], Meta(**checked)], table, table)
    raise TypeError(f"no column is made of {hint}")


def _bare(values: list[str | None]) -> list[str | None] | None:
    return None if "\0" in "".join(filter(None, values)) else values


def _table(values: list[list[float]], length: int) -> NDArray[np.float64]:
    return np.array(values, np.float64).reshape(len(values), length)


def _times(values: list[str]) -> NDArray[np.int64] | None:
    # None is as long as two, so what is a line is one value.
    lines = "\n".join([*values, ""])
    try:
        if _UTC_TIMES.fullmatch(lines):
            times = np.array(lines.replace("Z", "").split(), "M8[us]").astype(np.int64)
        elif _TIMES.fullmatch(lines):
            times = _microseconds(list(map(datetime.fromisoformat, values)))
        else:
            return None
    except ValueError:  # no such day
        return None
    return times // 1000 if ((times >= _EARLIEST) & (times <= _LATEST)).all() else None
