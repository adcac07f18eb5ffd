"""Record files: `{"topic": "reviews", "value": {...}}` a line, in event order.

JSON lines, plain or packed by gzip or Zstandard, or Parquet with the columns `topic` and `value`
(JSON text, or a struct). Which of these a file is shows in its first bytes. Files are read as
streams.
"""

import gzip
import io
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.codec import GOT, decode, encode
from schemas.exceptions import ContractError
from schemas.records import Record
from schemas.topics import BY_NAME

BATCH = 2_000  # lines validated, or rows read, at once

_PARQUET = pa.schema([("topic", pa.string()), ("value", pa.string())])
_LINE = 'a line such as {"topic": "reviews", "value": {...}}'


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with a line (of Parquet: a row, counted from 1); as a string, the message."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path} line {self.line}: {self.reason}"

    @property
    def kind(self) -> str:
        """The reason without what was found on this line: that of others like it."""
        return self.reason.partition(GOT)[0]

    @property
    def found(self) -> str:
        """What was found on this line, as `, got '5'`."""
        _, got, found = self.reason.partition(GOT)
        return f", {got.lstrip(' (')}{found.removesuffix(')')}" if got else ""


@dataclass(frozen=True, slots=True)
class FileValue:
    """A line as it would be produced: the value is JSON, but perhaps not a good record."""

    line: int
    topic: str
    key: bytes | None  # none where the value has no key field
    value: bytes


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A line that keeps the contract."""

    line: int
    topic: str
    record: Record


def read_values(
    path: Path, on_error: Callable[[LineError], None] | None = None
) -> Iterator[FileValue]:
    """The lines of a record file, values not validated.

    A line that names no topic of the contract, or is no JSON, goes to `on_error`, or raises
    ContractError where there is none; so does a file that cannot be read.
    """
    report = on_error or _fail
    for line, topic, value in _entries(path, report):
        key = value.get(BY_NAME[topic].key) if isinstance(value, dict) else None
        try:
            written = orjson.dumps(value)
        except orjson.JSONEncodeError as error:  # a struct of Parquet may hold anything
            report(LineError(path, line, f"no JSON can be made of its value: {error}"))
            continue
        yield FileValue(line, topic, key.encode() if isinstance(key, str) else None, written)


def read_records(
    path: Path, on_error: Callable[[LineError], None] | None = None
) -> Iterator[FileRecord]:
    """The records of a record file. Bad lines as in `read_values`, bad records too."""
    report = on_error or _fail
    values = read_values(path, report)
    while batch := list(islice(values, BATCH)):
        for topic, group in groupby(batch, attrgetter("topic")):
            lines = list(group)
            decoded = decode(
                BY_NAME[topic],
                [found.value for found in lines],
                [(0, found.line) for found in lines],
            )
            for rejection in decoded.rejections:
                where = f"{rejection.field}: " if rejection.field else ""
                reason = f"not a good record of {topic}: {where}{rejection.reason}"
                report(LineError(path, rejection.offset, reason))
            for found, record in zip(lines, decoded.records, strict=True):
                if record is not None:
                    yield FileRecord(found.line, topic, record)


def write_records(
    path: Path, records: Iterable[tuple[str, Record | Mapping[str, Any] | bytes]]
) -> Counter[str]:
    """Writes a record file of (topic, value) and counts its topics.

    The suffix tells the format: `.parquet`, `.gz` (gzipped JSON lines), any other JSON lines. The
    file appears when it is complete. A value may be a record, plain JSON, or encoded JSON.
    """
    counts: Counter[str] = Counter()
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _writer(partial, path.suffix) as write:
            for topic, value in records:
                if isinstance(value, Record):
                    value = encode(value)
                write(topic, value if isinstance(value, bytes) else orjson.dumps(value))
                counts[topic] += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _fail(error: LineError) -> None:
    raise ContractError(str(error))


def _entries(path: Path, report: Callable[[LineError], None]) -> Iterator[tuple[int, str, object]]:
    """Line, topic and parsed value of each good line."""
    for line, text in enumerate(_lines(path), 1):
        if isinstance(text, bytes):
            if line == 1:
                text = text.removeprefix(BOM_UTF8)  # as Windows begins files
            if not text.strip():
                continue
        try:
            entry: Any = orjson.loads(text) if isinstance(text, bytes) else text
        except orjson.JSONDecodeError as error:
            report(LineError(path, line, f"not JSON in UTF-8; expected {_LINE}{GOT}{error})"))
            continue
        if not isinstance(entry, dict) or not {"topic", "value"} <= entry.keys():
            report(LineError(path, line, f"expected {_LINE}"))
        elif not isinstance(entry["topic"], str) or (
            (topic := BY_NAME.get(entry["topic"])) is None or topic.record is None
        ):
            name = str(entry["topic"])[:60]
            known = ", ".join(topic.name for topic in BY_NAME.values() if topic.record)
            report(LineError(path, line, f"unknown topic {name!a}; one of {known}"))
        else:
            yield line, entry["topic"], entry["value"]


def _lines(path: Path) -> Iterator[bytes | dict[str, Any]]:
    """Raw lines of JSON; of Parquet, whole entries."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == b"PAR1":
                yield from _parquet_entries(path)
            elif start[:2] == b"\x1f\x8b":
                with gzip.open(file) as unzipped:
                    yield from unzipped
            elif start == b"\x28\xb5\x2f\xfd":  # Zstandard
                with pa.CompressedInputStream(pa.PythonFile(file), "zstd") as unpacked:
                    yield from io.BufferedReader(unpacked)
            else:
                yield from file
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ContractError(f"{path} cannot be read: {error}") from error


def _parquet_entries(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        if not {"topic", "value"} <= set(file.schema_arrow.names):
            raise ContractError(
                f"{path} has the columns {', '.join(file.schema_arrow.names)[:200]}; a record file "
                "in Parquet has the columns topic and value (JSON text, or a struct)"
            )
        for batch in file.iter_batches(BATCH, columns=["topic", "value"]):
            try:
                rows = batch.to_pylist()
            except (ValueError, OverflowError, LookupError) as error:  # as text that is not UTF-8
                raise ContractError(
                    f"{path} holds what Python has no value for: {error}"
                ) from error
            for row in rows:
                value = row["value"]
                if isinstance(value, str | bytes):
                    try:
                        value = orjson.loads(value)
                    except orjson.JSONDecodeError:
                        value = str(value)  # produced as it is, a bad record
                else:
                    value = _present(value)
                yield {"topic": row["topic"], "value": value}


def _present(value: Any) -> Any:
    """A struct without its null fields: all topics share one struct, so most of them are null.

    Decimals become floats, times and binary text strings, for which JSON has no types.
    """
    if isinstance(value, dict):
        return {name: _present(cell) for name, cell in value.items() if cell is not None}
    if isinstance(value, list):
        return [_present(cell) for cell in value]
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, datetime):  # of nanoseconds as pandas has it, which orjson does not take
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # told as a bad line
    return value


@contextmanager
def _writer(path: Path, suffix: str) -> Generator[Callable[[str, bytes], None]]:
    if suffix == ".parquet":
        rows: list[tuple[str, str]] = []
        with pq.ParquetWriter(path, _PARQUET, compression="zstd") as parquet:

            def flush() -> None:
                columns = [list(column) for column in zip(*rows, strict=True)] or [[], []]
                parquet.write_batch(pa.record_batch(columns, schema=_PARQUET))
                rows.clear()

            def collect(topic: str, value: bytes) -> None:
                rows.append((topic, value.decode()))
                if len(rows) == 25 * BATCH:
                    flush()

            yield collect
            flush()
    else:
        with gzip.open(path, "wb", compresslevel=6) if suffix == ".gz" else path.open("wb") as file:

            def write(topic: str, value: bytes) -> None:
                file.write(b'{"topic":"%s","value":%s}\n' % (topic.encode(), value))

            yield write
