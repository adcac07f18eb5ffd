"""The archive: one Delta table a topic, and reading them.

A table holds every Kafka record as it was (`kafka_…` columns) and, beside it, the record's own
fields in columns, null where the value could not be decoded or deletes. The table of `journal`
tells which steps a value holds instead; `journal()` reads the values themselves.

Tables lie at `{url}/{topic}`, the topic without its prefix. Any engine that reads Delta Lake can
read them; here it is Polars. Rows stand in no order in a table, so readers sort.
"""

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import numpy as np
import polars as pl
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from numpy.typing import NDArray

from schemas.codec import decode
from schemas.columns import Cells, decode_cells
from schemas.exceptions import ContractError, UnreachableError
from schemas.journal import OnTorn, Transaction, decode_all
from schemas.journal import decode as decode_journal
from schemas.records import Record
from schemas.topics import BY_NAME, TOPICS, Topic

JOURNAL_CHUNK = 256  # journal values in memory at once, half a megabyte each at most

_DECORATION = re.compile(r"\x1b\[[0-9;]*m|\N{DOWNWARDS ARROW WITH TIP RIGHTWARDS}")  # of errors
_ODD = re.compile(r"[\[\]^|\\]|%[0-9A-Fa-f]{2}")  # in a path: delta-rs 1.6 panics, or unescapes it
_TIME = pa.timestamp("us", "UTC")  # Delta Lake knows no milliseconds
# Milliseconds to the end of 9999: readers of Delta Lake take none later, and a producer that counts
# in nanoseconds is far later.
_LAST_TIME = 253_402_300_799_999
_KAFKA_FIELDS = [
    pa.field("kafka_partition", pa.int32(), nullable=False),
    pa.field("kafka_offset", pa.int64(), nullable=False),
    pa.field("kafka_timestamp", _TIME),
    pa.field("kafka_key", pa.binary()),
    pa.field("kafka_value", pa.binary()),
    pa.field("kafka_headers", pa.list_(pa.struct({"key": pa.string(), "value": pa.binary()}))),
]
_JOURNAL_FIELDS = [pa.field(name, pa.int64()) for name in ("rows", "first_step", "last_step")]
PLACE = ("kafka_partition", "kafka_offset")
"""Columns that say which record of Kafka a row is."""
_UNREADABLE = (
    DeltaError,
    OSError,
    pa.ArrowException,
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,  # Polars 2.1 panics at a file that is cut short
)


class Row(NamedTuple):
    """A Kafka record to be archived; the timestamp in milliseconds since 1970, or none.

    One that is before 1970 or after 9999 is archived as none.
    """

    partition: int
    offset: int
    timestamp: int | None
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()


@cache
def schema(topic: str) -> pa.Schema:
    """The Arrow schema of a topic's table."""
    record = BY_NAME[topic].record
    if record is None:
        return pa.schema([*_KAFKA_FIELDS, *_JOURNAL_FIELDS])
    fields = record.model_fields.items()
    return pa.schema(
        [*_KAFKA_FIELDS, *(pa.field(name, _arrow_type(info.annotation)) for name, info in fields)]
    )


def table(topic: str, rows: Sequence[Row]) -> pa.Table:
    """The rows of a topic as its table holds them, decoded, sorted by partition and offset."""
    rows = sorted(rows, key=attrgetter("partition", "offset"))
    columns: list[Any] = [
        pa.array([row.partition for row in rows], pa.int32()),
        pa.array([row.offset for row in rows], pa.int64()),
        pa.array([_time(row.timestamp) for row in rows], pa.timestamp("ms", "UTC")).cast(_TIME),
        pa.array([row.key for row in rows], pa.binary()),
        pa.array([row.value for row in rows], pa.binary()),
        _headers(rows, schema(topic).field("kafka_headers").type),
    ]
    decoded = (
        _journal_columns(rows)
        if BY_NAME[topic].record is None
        else _record_columns(BY_NAME[topic], rows)
    )
    return pa.table([*columns, *decoded], schema=schema(topic))


def table_url(url: str, topic: str) -> str:
    """Where the table of a topic lies."""
    return f"{url.rstrip('/')}/{topic}"


def open_table(url: str, topic: str, options: Mapping[str, str] | None = None) -> DeltaTable | None:
    """The newest version of a topic's table; none when nothing of it is archived yet.

    Raises UnreachableError where it cannot be read, or no table can be at this path.
    """
    where = table_url(url, topic)
    if "://" not in where and (odd := _ODD.search(str(Path(where).resolve()))):
        raise UnreachableError(
            f"the archive at {where} cannot be used: delta-rs takes no folder with {odd[0]} in its "
            "path; set STARCAST_ARCHIVE__URL to another"
        )
    with reached(where):
        storage = dict(options or {})
        if not DeltaTable.is_deltatable(where, storage_options=storage):
            return None
        return DeltaTable(where, storage_options=storage)


def tables(url: str, options: Mapping[str, str] | None = None) -> list[str]:
    """The topics that have a table, in the order of the contract."""
    return [topic.name for topic in TOPICS if open_table(url, topic.name, options) is not None]


def read(
    url: str,
    topic: str,
    options: Mapping[str, str] | None = None,
    *,
    columns: Sequence[str] | None = None,
    partitions: Sequence[int] | None = None,
    since: datetime | None = None,
) -> pl.LazyFrame:
    """The archived rows of a topic by (partition, offset), no rows when nothing is archived.

    `since` keeps rows with a Kafka timestamp from then on; filters reach the files' statistics.
    Files are read by `collect`.
    """
    found = open_table(url, topic, options)
    if found is None:
        frame = cast(pl.DataFrame, pl.from_arrow(schema(topic).empty_table())).lazy()
    else:
        with reached(table_url(url, topic)):
            frame = _scan(found)
    if partitions is not None:
        frame = frame.filter(pl.col("kafka_partition").is_in(list(partitions)))
    if since is not None:
        frame = frame.filter(pl.col("kafka_timestamp") >= since)
    frame = frame.sort(PLACE)
    return frame if columns is None else frame.select(columns)


def _scan(found: DeltaTable) -> pl.LazyFrame:
    if "%" in found.table_uri:  # Polars 2.1 looks for local files under their escaped names
        return pl.scan_pyarrow_dataset(found.to_pyarrow_dataset())
    return pl.scan_delta(found)


def collect(frame: pl.LazyFrame, where: str) -> pl.DataFrame:
    """The rows of what was made of a table at `where` by `read`, whose files are read only now.

    Raises UnreachableError when one of them cannot be read.
    """
    with reached(where):
        return frame.collect()


def positions(url: str, topic: str, options: Mapping[str, str] | None = None) -> dict[int, int]:
    """The offset after the last archived row of each partition that has one."""
    last = read(url, topic, options).group_by("kafka_partition").agg(pl.col("kafka_offset").max())
    rows = collect(last, table_url(url, topic)).iter_rows()
    return {partition: offset + 1 for partition, offset in rows}


def journal(
    url: str,
    partition: int,
    options: Mapping[str, str] | None = None,
    *,
    start: int = 0,
    on_torn: OnTorn | None = None,
) -> Iterator[Transaction]:
    """The archived journal of a user partition, from offset `start`, which begins a transaction.

    An archiver may commit between two pieces; a last transaction that is not there in whole is left
    out. Raises TornError when part of another is missing, or tells it to `on_torn` and goes on;
    UnreachableError when a file of the table cannot be read.
    """
    values = journal_values(url, partition, options, start=start)
    return decode_all(values, growing=True, on_torn=on_torn)


def journal_values(
    url: str, partition: int, options: Mapping[str, str] | None = None, *, start: int = 0
) -> Iterator[tuple[int, bytes]]:
    """The values of the archived journal of a user partition, each with its offset, in order.

    Raises UnreachableError when a file of the table cannot be read.
    """
    frame = read(url, "journal", options, partitions=[partition])
    frame = frame.filter(pl.col("kafka_offset") >= start).select("kafka_offset", "kafka_value")
    return (
        row
        for chunk in chunks(frame, JOURNAL_CHUNK, table_url(url, "journal"))
        for row in chunk.iter_rows()
    )


def chunks(frame: pl.LazyFrame, size: int, where: str) -> Iterator[pl.DataFrame]:
    """The rows of one partition of a table at `where`, `size` of them in memory at once, in order.

    Raises UnreachableError when a file of the table cannot be read.
    """
    offset = pl.col("kafka_offset")
    offsets = collect(frame.select(offset), where)["kafka_offset"]
    spans = (offsets[at : at + size] for at in range(0, len(offsets), size))
    return (collect(frame.filter(offset.is_between(each[0], each[-1])), where) for each in spans)


@contextmanager
def reached(where: str) -> Generator[None]:
    """Turns what is raised when storage does not answer, or holds no good file, into one error."""
    try:
        yield
    except _UNREADABLE as error:
        reason = " ".join(_DECORATION.sub("", str(error)).split())[:300]
        raise UnreachableError(
            f"the archive at {where} cannot be used: {reason}; "
            "check STARCAST_ARCHIVE__URL, its rights and files, and STARCAST_ARCHIVE__OPTIONS__…"
        ) from error


def _headers(rows: Sequence[Row], kind: pa.DataType) -> pa.Array:
    if not any(row.headers for row in rows):
        return pa.nulls(len(rows), kind)
    held = [[{"key": key, "value": value} for key, value in row.headers] or None for row in rows]
    return pa.array(held, kind)


def _time(timestamp: int | None) -> int | None:
    return timestamp if timestamp is not None and 0 <= timestamp <= _LAST_TIME else None


def _arrow_type(annotation: Any) -> pa.DataType:
    """The Arrow type of a field of a record."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _arrow_type(arguments[0])
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return _arrow_type(inner)
    if origin is Literal:
        return pa.string()
    if origin is list:
        return pa.list_(_arrow_type(arguments[0]))
    if origin is dict:
        return pa.map_(pa.string(), _arrow_type(arguments[1]))
    if issubclass(annotation, Record):
        fields = annotation.model_fields.items()
        return pa.struct({name: _arrow_type(info.annotation) for name, info in fields})
    return {
        str: pa.string(),
        int: pa.int64(),
        float: pa.float64(),
        bool: pa.bool_(),
        datetime: _TIME,
    }[annotation]


def _record_columns(topic: Topic, rows: Sequence[Row]) -> list[pa.Array]:
    values = [row.value for row in rows]
    fields = [each for each in schema(topic.name) if not each.name.startswith("kafka_")]
    assert topic.record is not None  # the journal has columns of its own
    cells = decode_cells(topic.record, values)
    if cells is not None:
        return _columns(cells, fields)
    records = decode(topic, values, [(row.partition, row.offset) for row in rows]).records
    return _columns(_held(records, fields), fields)


def _columns(cells: Cells, fields: Sequence[pa.Field]) -> list[pa.Array]:
    """A column for each field."""
    return [_column(cells[field.name], field.type) for field in fields]


def _held(records: Sequence[Record | None], fields: Sequence[pa.Field]) -> Cells:
    """The cells of records; None where there is no record."""
    nothing = {each.name: None for each in fields}
    held = [nothing if record is None else vars(record) for record in records]
    return {field.name: [values[field.name] for values in held] for field in fields}


def _column(cells: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(cells, np.ndarray):  # times
        return pa.array(cells, kind)
    if pa.types.is_struct(kind):  # by column: pyarrow takes a dictionary a cell, three times slower
        fields, mask = list(kind), None
        if not isinstance(cells, dict):
            mask = pa.array([cell is None for cell in cells], pa.bool_())
            cells = _held(cells, fields)
        return pa.StructArray.from_arrays(_columns(cells, fields), fields=fields, mask=mask)
    # pyarrow takes scalars, and lists of them, as they are.
    simple = not pa.types.is_nested(kind) or (
        pa.types.is_list(kind) and not pa.types.is_nested(kind.value_type)
    )
    return pa.array(cells if simple else [_plain(cell) for cell in cells], kind)


def _plain(value: Any) -> Any:
    """What pyarrow takes for a list, map or struct."""
    if isinstance(value, Record):
        return {name: _plain(cell) for name, cell in vars(value).items()}
    if isinstance(value, dict):
        return [(key, _plain(cell)) for key, cell in cast(dict[str, Any], value).items()]
    if isinstance(value, list):
        return [_plain(cell) for cell in cast(list[Any], value)]
    return value


def _journal_columns(rows: Sequence[Row]) -> list[pa.Array]:
    steps: list[NDArray[np.uint64] | None] = []
    for row in rows:
        try:
            steps.append(decode_journal(row.value or b"").journal.steps)
        except ContractError:
            steps.append(None)
    return [
        pa.array([None if found is None else len(found) for found in steps], pa.int64()),
        pa.array([int(found[0]) if found is not None and len(found) else None for found in steps]),
        pa.array([int(found[-1]) if found is not None and len(found) else None for found in steps]),
    ]
