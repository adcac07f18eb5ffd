"""The files of a data set as rows: plain, gzipped or in a zip; CSV, JSON lines, or separated."""

import ast
import codecs
import csv
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, cast

import orjson

from schemas.exceptions import ContractError

LONGEST_LINE = 1 << 24  # bytes of a first line that are looked at
DEEPEST = (
    250  # brackets that a row may open; where it has more, orjson is asked whether it writes it
)
_ENCODING = "utf-8-sig"
_OR_LATIN = "starcast.latin-1"
_DAMAGED = (zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def _as_latin(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


@dataclass(frozen=True, slots=True)
class Part:
    """A text file, or one inside a zip; `opened` gives it decompressed."""

    name: str  # for messages
    base: str  # the file's own name
    opened: Callable[[], IO[bytes]]

    def place(self, line: int) -> str:
        """Where a line stands, for messages."""
        return f"{self.name} line {line}"

    def lines(self) -> Iterator[str]:
        """Its lines, with their ends: UTF-8, and Latin-1 where it is none.

        Raises ContractError when it cannot be read.
        """
        with _readable(self.name):
            file = io.TextIOWrapper(self.opened(), _ENCODING, _OR_LATIN, newline="")
            with file as text:
                yield from text

    def first_line(self) -> str:
        """The first line without its end. Raises ContractError when it cannot be read."""
        with _readable(self.name), self.opened() as file:
            return file.readline(LONGEST_LINE).decode(_ENCODING, _OR_LATIN).rstrip("\r\n")


@dataclass
class Skips:
    """What is left out or changed: by reason, how many and where the first stands."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])

    def add(self, reason: str, place: str) -> None:
        """Count one more."""
        count, first = self.reasons.get(reason, (0, place))
        self.reasons[reason] = (count + 1, first)


Rows = Iterator[tuple[int, dict[str, Any]]]
Reader = Callable[[Part, Skips], Rows]
"""The rows of a file by column name, each with the number of its line."""


def open_parts(files: Sequence[Path]) -> list[Part]:
    """The text files in the files, zips opened. Raises ContractError for what cannot be read."""
    parts: list[Part] = []
    for path in files:
        try:
            with path.open("rb") as file:
                start = file.read(4)
            if start[:2] == b"\x1f\x8b":
                parts.append(Part(str(path), path.name.removesuffix(".gz"), _gzip(path)))
            elif start == b"PK\x03\x04":
                with zipfile.ZipFile(path) as archive:
                    names = [
                        member.filename
                        for member in archive.infolist()
                        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
                    ]
                parts += [
                    Part(f"{path}/{name}", Path(name).name, _zip(path, name)) for name in names
                ]
            else:
                parts.append(Part(str(path), path.name, _plain(path)))
        except (OSError, zipfile.BadZipFile) as error:
            raise ContractError(f"{path} cannot be read: {error}") from error
    return parts


def _plain(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _gzip(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: cast(IO[bytes], gzip.open(path))


def _zip(path: Path, name: str) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        with zipfile.ZipFile(path) as archive:  # the member keeps the file open
            return archive.open(name)

    return opened


@contextmanager
def _readable(name: str) -> Generator[None]:
    codecs.register_error(_OR_LATIN, _as_latin)  # MovieLens is either, by its release
    try:
        yield
    # Of a zip that is encrypted, or packed in another way than Python knows, it is a RuntimeError.
    except (OSError, EOFError, RuntimeError, *_DAMAGED) as error:
        raise ContractError(f"{name} cannot be read: {error}") from error


def not_of_set(part: Part, expected: str) -> ContractError:
    """What to raise of a file that is not of a data set; `expected` says what would be."""
    first = part.first_line()
    return ContractError(
        f"{part.place(1)}: not a file of this data set; expected {expected}; "
        f"it begins {first[:60]!a}. Of other data write a record file: docs/produce.md, A file of "
        "your own"
    )


def cells(line: str) -> list[str]:
    """The cells of a line of CSV; none where it is no CSV."""
    try:
        return next(csv.reader([line]), list[str]())
    except csv.Error:
        return []


def renamed(rows: Reader, names: Mapping[str, str]) -> Reader:
    """The same rows, columns by other names."""

    def renamed(part: Part, skips: Skips) -> Rows:
        for line, row in rows(part, skips):
            yield line, {names.get(name, name): cell for name, cell in row.items()}

    return renamed


def csv_rows(part: Part, skips: Skips) -> Rows:
    """Rows by column name, each with the number of its first line; a missing cell is empty."""
    return csv_of(None)(part, skips)


def csv_of(names: Sequence[str] | None) -> Reader:
    """Rows of a CSV whose columns have these names; without any, those of its first line."""
    return lambda part, _: _csv(part, names)


def _csv(part: Part, names: Sequence[str] | None) -> Rows:
    reader = csv.reader(part.lines())
    header = next(reader) if names is None else names
    line = reader.line_num + 1
    try:
        for cells in reader:
            if cells:
                yield line, dict(zip_longest(header, cells[: len(header)], fillvalue=""))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ContractError(
            f"{part.place(line)}: expected a CSV row with {len(header)} cells; {error} "
            "(a quote that is not closed?)"
        ) from error


def json_rows(part: Part, skips: Skips) -> Rows:
    """Rows of JSON lines; a line that is no object is left out."""
    for line, text in enumerate(part.lines(), 1):
        row = json_object(text)
        if row is not None:
            yield line, row
        elif text.strip():
            skips.add("expected one JSON object a line", part.place(line))


def json_object(text: str) -> dict[str, Any] | None:
    """The object that a line holds; none where it holds none, or one that is nested too deep."""
    try:
        # Amazon's items of 2014 are Python's dictionaries, which may hold what JSON cannot.
        written = orjson.dumps(ast.literal_eval(text)) if text.startswith("{'") else text
        found = orjson.loads(written)
        if text.count("[") + text.count("{") > DEEPEST:
            orjson.dumps([[found]])  # as it is written for its id
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return cast(dict[str, Any], found) if isinstance(found, dict) else None


def separated(separator: str, header: Sequence[str], skip: int = 0) -> Reader:
    """Rows of lines whose cells, named by `header`, stand apart by a separator, without quotes.

    The first `skip` lines are no rows; one of another width is left out.
    """

    def rows(part: Part, skips: Skips) -> Rows:
        for line, text in enumerate(part.lines(), 1):
            cells = text.rstrip("\r\n").split(separator)
            if line <= skip or cells == [""]:
                continue
            if len(cells) == len(header):
                yield line, dict(zip(header, cells, strict=True))
            else:
                reason = f"expected {len(header)} fields separated by {separator!r}"
                skips.add(reason, part.place(line))

    return rows
