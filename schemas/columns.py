"""Decoding of whole batches into columns: for hot paths, which need no record of each event.

What scores has columns that features are computed from, the archive each record's fields as cells.

`msgspec` reads each value by what `schemas.records` says of its fields, four times as fast as
pydantic, and what it does not check is checked a column at a time. It takes nothing that
`schemas.codec` refuses. What it does not take, such as a field that nobody knows, need not be bad:
then pydantic has the batch, and it alone says what is wrong.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from inspect import isclass
from itertools import chain
from operator import attrgetter
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta
from msgspec.structs import astuple
from numpy.typing import NDArray
from pydantic.fields import FieldInfo

from schemas.records import EARLIEST_TIME, EPOCH, LATEST_TIME, NO_NUL, RFC3339, Record, Time

Columns = Mapping[str, Any]
"""By field, of n records: a list of strings (None: absent), or an array: numbers (n; nan: absent),
times (n) in milliseconds since 1970, lists of numbers (n, length)."""
Cells = Mapping[str, Any]
"""By field, of n records: a list of values (None: absent), an array of times (n) in microseconds
since 1970, or the cells of the records within."""

_EARLIEST, _LATEST = ((each - EPOCH).total_seconds() * 1e6 for each in (EARLIEST_TIME, LATEST_TIME))
_LONGEST_TIME = len("2026-11-24T10:15:00.123456789+01:00")
_UTC_TIMES = re.compile(r"(?:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?Z\n)*+", re.ASCII)
_TIMES = re.compile(rf"(?:{RFC3339}\n)*+", re.ASCII)

_CHECKED = ("ge", "gt", "le", "lt", "min_length", "max_length")  # limits that msgspec has too
_KEPT = ("strict", "allow_inf_nan", "pattern")  # it is strict, JSON has no nan; patterns by `_bare`


@dataclass(frozen=True)
class _Field:
    """How a field becomes cells, and these a column."""

    type: Any  # as msgspec has it, with all limits that it checks
    take: Callable[[list[Any]], Any]  # the cells of what msgspec made; None: ask pydantic
    read: Callable[[Any], Any] | None = None  # the column of cells; None: there is none
    held: Callable[[list[Any]], Any] | None = None  # the column of what records hold


def decode_columns(record: type[Record], values: Sequence[bytes | None]) -> Columns | None:
    """The columns of a batch's values; None where pydantic has to look at any of them.

    Raises TypeError where a field is of a kind that no column is made of.
    """
    cells = decode_cells(record, values)
    if cells is None:
        return None
    return {name: read(cells[name]) for name, read in _each(record, "read")}


def decode_cells(record: type[Record], values: Sequence[bytes | None]) -> Cells | None:
    """The cells of a batch's values; None where pydantic has to look at any of them.

    It has to at all values of a record with a field of a kind that no cells are made of.
    """
    try:
        rows = list(map(_decoder(record), values))
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError):  # the last of a null value, too
        return None
    return _cells(record, rows)


def _cells(record: type[Record], rows: list[Any]) -> Cells | None:
    """Of what msgspec has made."""
    fields = _fields(record)
    given = map(list, zip(*map(astuple, rows), strict=True)) if rows else ([] for _ in fields)
    cells: dict[str, Any] = {}
    for (name, field), each in zip(fields.items(), given, strict=True):
        cells[name] = field.take(each)
        if cells[name] is None:
            return None
    return cells


def columns_of(record: type[Record], records: Sequence[Record]) -> Columns:
    """The columns of records. Raises TypeError where a field has none."""
    return {
        name: held(list(map(attrgetter(name), records))) for name, held in _each(record, "held")
    }


def _each(record: type[Record], way: str) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    for name, field in _fields(record).items():
        if (column := getattr(field, way)) is None:
            raise TypeError(f"no column is made of {record.__name__}.{name}")
        yield name, column


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
    return msgspec.json.Decoder(_struct(record)).decode


@cache
def _struct(record: type[Record]) -> type[msgspec.Struct]:
    fields: list[Any] = []
    for name, field in _fields(record).items():
        about = record.model_fields[name]
        if about.is_required():
            fields.append((name, field.type))
        else:
            fields.append((name, field.type, _default(about)))
    options: Any = {"frozen": True, "gc": False, "kw_only": True, "forbid_unknown_fields": True}
    return msgspec.defstruct(record.__name__, fields, **options)


def _default(about: FieldInfo) -> Any:
    made = about.get_default(call_default_factory=True)
    return msgspec.field(default_factory=made.copy) if isinstance(made, list) else made


@cache
def _fields(record: type[Record]) -> Mapping[str, _Field]:
    """Raises TypeError where a field is of a kind that no cells are made of."""
    hints = get_type_hints(record, include_extras=True)
    return {name: _field(hints[name]) for name in record.model_fields}


def _field(hint: Any, optional: bool = False) -> _Field:
    if NoneType in get_args(hint):
        (needed,) = (each for each in get_args(hint) if each is not NoneType)
        field = _field(needed, optional=True)
        return replace(field, type=field.type | None)
    if isclass(hint) and issubclass(hint, Record) and not optional:
        return _Field(_struct(hint), partial(_cells, hint))
    if hint == Time and not optional:
        text = Annotated[str, Meta(max_length=_LONGEST_TIME)]
        return _Field(text, _times, lambda times: times // 1000, milliseconds)
    if get_origin(hint) is Literal:
        return _Field(hint, list, list, list)
    kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if kind is int:
        (whole,) = about
        return _Field(Annotated[int, Meta(ge=whole.least, le=whole.most)], list)
    limits: list[Any] = [limit for one in about for limit in getattr(one, "metadata", [one])]
    if not all(any(hasattr(limit, name) for name in (*_CHECKED, *_KEPT)) for limit in limits):
        raise TypeError(f"no cells are made of {hint}: nobody would check all of its limits")
    checked = {
        name: getattr(limit, name) for limit in limits for name in _CHECKED if hasattr(limit, name)
    }
    patterns = {limit.pattern for limit in limits if hasattr(limit, "pattern")}
    if kind is str and patterns <= {NO_NUL}:
        return _Field(Annotated[str, Meta(**checked)], _bare if patterns else list, list, list)
    if kind is float:
        column = partial(np.array, dtype=np.float64)
        return _Field(Annotated[float, Meta(**checked)], list, column, column)
    parts = [_field(each) for each in get_args(kind)]
    if get_origin(kind) is list and parts[0].take in (list, _bare):
        listed = Annotated[list[parts[0].type], Meta(**checked)]
        take = list if parts[0].take is list else _bare_lists
        if optional or checked.get("min_length") != checked.get("max_length", "any"):
            return _Field(listed, take)
        table = partial(_table, length=checked["max_length"])
        return _Field(listed, take, table, table)
    if get_origin(kind) is dict and [each.take for each in parts] == [list, list]:
        return _Field(dict[str, parts[1].type], list)
    raise TypeError(f"no cells are made of {hint}")


def _bare(values: Sequence[str | None]) -> Sequence[str | None] | None:
    return None if "\0" in "".join(filter(None, values)) else values


def _bare_lists(values: list[list[str] | None]) -> list[list[str] | None] | None:
    every = list(chain.from_iterable(each for each in values if each is not None))
    return None if _bare(every) is None else values


def _table(values: list[list[float]], length: int) -> NDArray[np.float64]:
    return np.array(values, np.float64).reshape(len(values), length)


def _times(values: list[str]) -> NDArray[np.int64] | None:
    """Microseconds since 1970; None where one is no time of the contract."""
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
    return times if ((times >= _EARLIEST) & (times <= _LATEST)).all() else None
