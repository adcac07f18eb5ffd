"""Public data sets to record files: Amazon reviews, the REES46 store log, MovieLens.

A file may be plain, gzipped, or a zip; which part of a set it is shows in its first line (for
`u.data` and its like in its name). Events are written in the order of their time, whatever the
size of the set: sorted runs go to a temporary file beside the output, and are merged. Items and
users stand before their first event. An event without an id gets a hash of its source's fields
and line number, so that a second import gives the same ids.
"""

import ast
import csv
import gzip
import heapq
import html
import io
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from itertools import islice, zip_longest
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, cast

import orjson
import xxhash

from schemas.codec import decode
from schemas.exceptions import ContractError
from schemas.files import write_records
from schemas.records import LONGEST_ID, LONGEST_TEXT
from schemas.topics import BY_NAME

RUN = 500_000  # entries sorted in memory at once, about a gigabyte of long reviews
LONGEST_LINE = 1 << 24  # bytes of a first line that are looked at
BATCH = 2_000  # records validated at once

# In u.item a movie has a flag for each of these.
MOVIELENS_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_FIRST, _THEN = 0, 1  # at the same time, items and users go before events


@dataclass(frozen=True)
class ImportReport:
    """How many records of each topic were written, and what was left out and why."""

    counts: Mapping[str, int]
    skipped: Mapping[str, tuple[int, str]]  # by reason: how many, and where the first stands


@dataclass(frozen=True, slots=True)
class _Part:
    """A text file, or one inside a zip; `opened` gives it decompressed."""

    name: str  # for messages
    base: str  # the file's own name
    opened: Callable[[], IO[bytes]]

    def lines(self, encoding: str = "utf-8-sig") -> Iterator[str]:
        with _readable(self.name):
            file = io.TextIOWrapper(self.opened(), encoding, errors="replace", newline="")
            with file as text:
                yield from text

    def first_line(self) -> str:
        with _readable(self.name), self.opened() as file:
            return file.readline(LONGEST_LINE).decode("utf-8-sig", errors="replace").rstrip("\r\n")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A record to be written, and where it came from."""

    order: tuple[str, int]  # RFC 3339 time, all of one format; then items and users first
    topic: str
    value: Mapping[str, Any]
    place: str


@dataclass
class _Skips:
    """What is left out: by reason, how many and where the first stands."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])

    def add(self, reason: str, place: str) -> None:
        count, first = self.reasons.get(reason, (0, place))
        self.reasons[reason] = (count + 1, first)


_Rows = Iterator[tuple[int, dict[str, Any]]]
_Reader = Callable[[_Part, _Skips], _Rows]
"""The rows of a file by column name, each with the number of its line."""


def import_amazon(files: Sequence[Path], out: Path) -> ImportReport:
    """Amazon product data (McAuley): of 2014, 2018 or 2023, as CSV or JSON lines.

    Metadata files of the same set give the items. Raises ContractError for a file that is
    neither, and when there is no review.
    """
    skips = _Skips()
    kinds: dict[str, list[tuple[_Part, _Reader]]] = {"reviews": [], "items": []}
    for part in _parts(files):
        kind, table = _amazon_kind(part)
        kinds[kind].append((part, table))
    reviews, metadata = kinds["reviews"], kinds["items"]
    if not reviews:
        raise ContractError("no file holds reviews; give a review file beside the metadata")

    first_use: dict[str, str] = {}

    def entries() -> Iterator[_Entry]:
        for part, table in reviews:
            for entry in _amazon_reviews(part, table(part, skips), skips):
                item, when = entry.value["item_id"], entry.order[0]
                if when < first_use.setdefault(item, when):
                    first_use[item] = when
                yield entry
        start = min(first_use.values(), default="")
        seen: set[str] = set()
        for part, table in metadata:
            for line, row in table(part, skips):
                item = str(row.get("asin", ""))
                if item in seen:
                    skips.add("item described twice", f"{part.name} line {line}")
                    continue
                seen.add(item)
                when = first_use.get(item, start)
                value = {"item_id": item, "event_time": when, **_amazon_item(row)}
                yield _Entry((when, _FIRST), "items", value, f"{part.name} line {line}")

    return _write(_in_order(entries(), out), out, skips)


def import_rees46(files: Sequence[Path], out: Path) -> ImportReport:
    """The REES46 multi-category store log: CSV of views, carts and purchases.

    An item is written when it is first seen and whenever its brand, category or price changes.
    """
    skips = _Skips()
    wanted = {"event_time", "event_type", "product_id", "price", "user_id"}
    parts = _parts(files)
    for part in parts:
        if not wanted <= set(_cells(part.first_line())):
            raise _unknown(part, f"a CSV with the columns {', '.join(sorted(wanted))}")

    def entries() -> Iterator[_Entry]:
        for part in parts:
            for line, row in _csv_rows(part, skips):
                when = row["event_time"].removesuffix(" UTC").replace(" ", "T") + "Z"
                value = _present(
                    event_id=_event_id(row, line),
                    user_id=row["user_id"],
                    item_id=row["product_id"],
                    event_time=when,
                    action=row["event_type"],
                    price=_number(row["price"]),
                    session_id=row.get("user_session"),
                    # Not of the record: taken off again when the item is compared.
                    brand=row.get("brand"),
                    category=[name for name in (row.get("category_code") or "").split(".") if name],
                )
                yield _Entry((when, _THEN), "behavior", value, f"{part.name} line {line}")

    def with_items(ordered: Iterable[_Entry]) -> Iterator[_Entry]:
        known: dict[str, tuple[Any, ...]] = {}
        for entry in ordered:
            value = dict(entry.value)
            brand, category = value.pop("brand", None), value.pop("category", None)
            attributes = (brand, tuple(category or ()), value.get("price"))
            item_id = value.get("item_id")
            if item_id and known.get(item_id) != attributes:
                known[item_id] = attributes
                item = _present(
                    item_id=item_id,
                    event_time=value["event_time"],
                    brand=brand,
                    category=category,
                    price=value.get("price"),
                )
                yield _Entry(entry.order, "items", item, entry.place)
            yield _Entry(entry.order, "behavior", value, entry.place)

    return _write(with_items(_in_order(entries(), out)), out, skips)


def import_movielens(files: Sequence[Path], out: Path) -> ImportReport:
    """MovieLens as `u.data`, `u.item`, `u.user`; `.dat`; `.csv`; or RecBole's atomic files.

    Ratings become reviews without text, genres the category of an item.
    """
    skips = _Skips()
    kinds: dict[str, list[tuple[_Part, _Reader]]] = {"ratings": [], "items": [], "users": []}
    for part in _parts(files):
        if (found := _movielens_kind(part)) is not None:
            kinds[found[0]].append((part, found[1]))
    if not kinds["ratings"]:
        raise ContractError(
            "no file holds ratings; give u.data, ratings.dat, ratings.csv or a RecBole .inter file"
        )
    first_use: dict[tuple[str, str], str] = {}

    def entries() -> Iterator[_Entry]:
        for part, reader in kinds["ratings"]:
            for line, row in reader(part, skips):
                when = _unix_time(row["timestamp"])
                if when is None:
                    skips.add("no time", f"{part.name} line {line}")
                    continue
                value = {
                    "event_id": _event_id(row, line),
                    "user_id": row["user_id"],
                    "item_id": row["item_id"],
                    "event_time": when,
                    "rating": _number(row["rating"]),
                }
                for name in ("user_id", "item_id"):
                    if when < first_use.setdefault((name, row[name]), when):
                        first_use[name, row[name]] = when
                yield _Entry((when, _THEN), "reviews", value, f"{part.name} line {line}")
        start = min(first_use.values(), default="")
        for topic, key in (("items", "item_id"), ("users", "user_id")):
            for part, reader in kinds[topic]:
                for line, row in reader(part, skips):
                    when = first_use.get((key, row[key]), start)
                    value = {
                        key: row[key],
                        "event_time": when,
                        **_present(**_MOVIELENS[topic](row)),
                    }
                    yield _Entry((when, _FIRST), topic, value, f"{part.name} line {line}")

    return _write(_in_order(entries(), out), out, skips)


# Amazon ------------------------------------------------------------------------------------------

# The set of 2023 by the names of that of 2018. A review's own asin is of a variant; the item is its
# parent. An item's average_rating is not read: ratings yet to come are in it.
_REVIEW_OF_2023 = {
    "user_id": "reviewerID",
    "asin": "variant",
    "parent_asin": "asin",
    "rating": "overall",
    "title": "summary",
    "text": "reviewText",
}
_ITEM_OF_2023 = {"parent_asin": "asin", "store": "brand", "categories": "category"}


def _amazon_kind(part: _Part) -> tuple[str, _Reader]:
    """Whether a file holds reviews or items, and how it is read."""
    first = part.first_line()
    lines = first.startswith("{")
    rows: _Reader = _json_rows if lines else _csv_rows
    names = set((_json_object(first) or ()) if lines else _cells(first))
    if {"user_id", "parent_asin", "rating", "timestamp"} <= names:
        return "reviews", _renamed(rows, _REVIEW_OF_2023)
    if {"reviewerID", "asin", *(() if lines else ("overall", "unixReviewTime"))} <= names:
        return "reviews", rows
    if lines and "parent_asin" in names:
        return "items", _renamed(rows, _ITEM_OF_2023)
    if lines and "asin" in names:
        return "items", rows
    raise _unknown(
        part,
        "a CSV with the columns reviewerID, asin, overall and unixReviewTime (of 2023: user_id, "
        "parent_asin, rating and timestamp), or JSON lines of reviews (reviewerID, asin, …; of "
        "2023: user_id, parent_asin, …) or of items (asin or parent_asin, title, …)",
    )


def _amazon_reviews(
    part: _Part, rows: Iterable[tuple[int, Mapping[str, Any]]], skips: _Skips
) -> Iterator[_Entry]:
    for line, row in rows:
        place = f"{part.name} line {line}"
        name, per_second = ("timestamp", 1_000) if "timestamp" in row else ("unixReviewTime", 1)
        when = _unix_time(row.get(name), per_second)
        if when is None:
            skips.add(f"no time ({name})", place)
            continue
        value = _present(
            event_id=_event_id(row, line),
            user_id=str(row.get("reviewerID") or ""),
            item_id=str(row.get("asin") or ""),
            event_time=when,
            rating=_number(row.get("overall")),
            title=_text(row.get("summary")),
            text=_text(row.get("reviewText")),
        )
        yield _Entry((when, _THEN), "reviews", {"user_id": "", "item_id": "", **value}, place)


def _amazon_item(row: Mapping[str, Any]) -> dict[str, Any]:
    title = _markup_free(row.get("title"))
    if "getTime" in title:  # a page's script that the set holds in place of some titles
        title = ""
    description: Any = row.get("description")
    if isinstance(description, list):
        description = "\n".join(str(part) for part in cast(list[Any], description))
    paths: Any = row.get("categories")
    category = row.get("category") or (paths[0] if isinstance(paths, list) and paths else None)
    parts = cast(list[Any], category) if isinstance(category, list) else []
    names = [_markup_free(name) for name in parts]
    # Below the real path stand whole sentences of features.
    path = [name for name in names if name and len(name) <= LONGEST_ID][:16]
    return _present(
        title=title,
        brand=_markup_free(row.get("brand"))[:LONGEST_ID],
        category=path,
        price=_dollars(row.get("price")),
        description=_markup_free(description),
    )


def _markup_free(value: Any) -> str:
    """Text without HTML's tags and character references."""
    text = html.unescape(re.sub(r"<[^<>]{1,2000}>", " ", _text(value) or ""))
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _dollars(price: Any) -> float | None:
    """`$1,025.00`, or the lower of a range, or a number; anything else is no price."""
    found = re.match(r"\s*\$?\s*(\d[\d,]*(?:\.\d+)?)(?!\w)", str(price or ""))
    return float(found[1].replace(",", "")) if found else None


# MovieLens ---------------------------------------------------------------------------------------

_MOVIELENS_CSV = {"userId": "user_id", "movieId": "item_id"}


def _movielens_kind(part: _Part) -> tuple[str, _Reader] | None:
    """Which table a file holds and how it is read; none for a file of the set that is not used."""
    first, base = part.first_line(), part.base
    if ":token" in first:
        header = [name.partition(":")[0] for name in first.split("\t")]
        if {"user_id", "item_id", "rating", "timestamp"} <= set(header):
            return "ratings", _separated("\t", header, skip=1)
        if header[0] == "user_id":
            return "users", _separated("\t", header, skip=1)
        if header[0] == "item_id" and len(header) > 2:
            names = {"movie_title": "title", "class": "genre_words", "genre": "genre_words"}
            return "items", _separated("\t", [names.get(name, name) for name in header], skip=1)
    elif base == "u.data":
        return "ratings", _separated("\t", ["user_id", "item_id", "rating", "timestamp"])
    elif base == "u.user":
        return "users", _separated("|", ["user_id", "age", "gender", "occupation", "zip"])
    elif base == "u.item":
        header = ["item_id", "title", "released", "video", "url", *MOVIELENS_GENRES]
        return "items", _separated("|", header, encoding="latin-1")
    elif base == "ratings.dat":
        return "ratings", _separated("::", ["user_id", "item_id", "rating", "timestamp"])
    elif base == "users.dat":
        return "users", _separated("::", ["user_id", "gender", "age", "occupation", "zip"])
    elif base == "movies.dat":
        return "items", _separated("::", ["item_id", "title", "genres"], encoding="latin-1")
    elif {"userId", "movieId", "rating", "timestamp"} <= set(_cells(first)):
        return "ratings", _renamed(_csv_rows, _MOVIELENS_CSV)
    elif {"movieId", "title", "genres"} <= set(_cells(first)):
        return "items", _renamed(_csv_rows, _MOVIELENS_CSV)
    elif ".zip/" in part.name:
        return None  # READMEs, splits and the like that lie in the published archives
    raise _unknown(
        part,
        "u.data, u.item, u.user, ratings.dat, movies.dat, users.dat, ratings.csv, movies.csv, or "
        "RecBole's .inter, .item, .user with typed headers",
    )


def _separated(
    separator: str, header: Sequence[str], skip: int = 0, encoding: str = "utf-8-sig"
) -> _Reader:
    def rows(part: _Part, skips: _Skips) -> _Rows:
        for line, text in enumerate(part.lines(encoding), 1):
            cells = text.rstrip("\r\n").split(separator)
            if line <= skip or cells == [""]:
                continue
            if len(cells) == len(header):
                yield line, dict(zip(header, cells, strict=True))
            else:
                reason = f"expected {len(header)} fields separated by {separator!r}"
                skips.add(reason, f"{part.name} line {line}")

    return rows


def _movielens_item(row: Mapping[str, str]) -> dict[str, Any]:
    if "genres" in row:
        genres = row["genres"].split("|")
    elif "genre_words" in row:
        genres = row["genre_words"].split()
    else:
        genres = [name for name in MOVIELENS_GENRES if row.get(name) == "1"]
    none = ("", "unknown", "(no genres listed)")
    return {
        "title": _text(row.get("title")),
        "category": [name for name in genres if name not in none][:16],
    }


def _movielens_user(row: Mapping[str, str]) -> dict[str, Any]:
    return {"gender": row.get("gender", "").strip(), "age": _number(row.get("age"))}


_MOVIELENS: Mapping[str, Callable[[Mapping[str, str]], dict[str, Any]]] = {
    "items": _movielens_item,
    "users": _movielens_user,
}

# Reading -----------------------------------------------------------------------------------------


def _parts(files: Sequence[Path]) -> list[_Part]:
    """The text files in the files, zips opened. Raises ContractError for what cannot be read."""
    parts: list[_Part] = []
    for path in files:
        try:
            with path.open("rb") as file:
                start = file.read(4)
            if start[:2] == b"\x1f\x8b":
                parts.append(_Part(str(path), path.name.removesuffix(".gz"), _gzip(path)))
            elif start == b"PK\x03\x04":
                with zipfile.ZipFile(path) as archive:
                    names = [
                        member.filename
                        for member in archive.infolist()
                        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
                    ]
                parts += [
                    _Part(f"{path}/{name}", Path(name).name, _zip(path, name)) for name in names
                ]
            else:
                parts.append(_Part(str(path), path.name, _plain(path)))
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
    try:
        yield
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ContractError(f"{name} cannot be read: {error}") from error


def _unknown(part: _Part, expected: str) -> ContractError:
    first = part.first_line()
    return ContractError(
        f"{part.name} line 1: not a file of this data set; expected {expected}; "
        f"it begins {first[:60]!a}"
    )


def _cells(line: str) -> list[str]:
    return next(csv.reader([line]), list[str]())


def _renamed(rows: _Reader, names: Mapping[str, str]) -> _Reader:
    """The same rows, columns by other names."""

    def renamed(part: _Part, skips: _Skips) -> _Rows:
        for line, row in rows(part, skips):
            yield line, {names.get(name, name): cell for name, cell in row.items()}

    return renamed


def _csv_rows(part: _Part, _: _Skips) -> _Rows:
    """Rows by column name, each with the number of its first line; a missing cell is empty."""
    reader = csv.reader(part.lines())
    header = next(reader)
    line = reader.line_num + 1
    try:
        for cells in reader:
            if cells:
                yield line, dict(zip_longest(header, cells[: len(header)], fillvalue=""))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ContractError(
            f"{part.name} line {line}: expected a CSV row with {len(header)} cells; {error} "
            "(a quote that is not closed?)"
        ) from error


def _json_rows(part: _Part, skips: _Skips) -> _Rows:
    for line, text in enumerate(part.lines(), 1):
        row = _json_object(text)
        if row is not None:
            yield line, row
        elif text.strip():
            skips.add("expected one JSON object a line", f"{part.name} line {line}")


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        # Amazon's items of 2014 are written as Python's dictionaries.
        found = ast.literal_eval(text) if text.startswith("{'") else orjson.loads(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return cast(dict[str, Any], found) if isinstance(found, dict) else None


# Values ------------------------------------------------------------------------------------------


def _event_id(row: Mapping[str, Any], line: int) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps([list(row.values()), line]))


def _unix_time(value: Any, per_second: int = 1) -> str | None:
    """RFC 3339 of seconds since 1970, or of parts of them; none for what is no time."""
    found = _number(value)
    try:
        time = datetime.fromtimestamp(found // per_second, UTC) if found is not None else None
    except (OverflowError, ValueError, OSError):
        return None
    return None if time is None else time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _text(value: Any) -> str | None:
    return value.strip()[:LONGEST_TEXT] if isinstance(value, str) else None


def _present(**fields: Any) -> dict[str, Any]:
    """The fields that have a value: neither none nor empty."""
    return {name: value for name, value in fields.items() if value not in (None, "", [])}


# Writing -----------------------------------------------------------------------------------------


def _in_order(entries: Iterator[_Entry], out: Path) -> Iterator[_Entry]:
    """The entries by time; those of one time in the order given, items and users first."""
    key = attrgetter("order")
    run = sorted(islice(entries, RUN), key=key)
    if len(run) < RUN:
        yield from run
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=out.parent) as folder:
        runs: list[Path] = []
        while run:
            runs.append(Path(folder, str(len(runs))))
            with runs[-1].open("wb") as file:
                for entry in run:
                    file.write(orjson.dumps(astuple(entry)) + b"\n")
            run = sorted(islice(entries, RUN), key=key)
        yield from heapq.merge(*map(_read_run, runs), key=key)


def _read_run(path: Path) -> Iterator[_Entry]:
    with path.open("rb") as file:
        for line in file:
            (when, rank), topic, value, place = orjson.loads(line)
            yield _Entry((when, rank), topic, value, place)


def _write(entries: Iterator[_Entry], out: Path, skips: _Skips) -> ImportReport:
    counts = write_records(out, _good(entries, skips))
    return ImportReport(dict(counts), skips.reasons)


def _good(entries: Iterator[_Entry], skips: _Skips) -> Iterator[tuple[str, bytes]]:
    """The values that keep the contract. Raises ContractError when none does."""
    any_good = False
    while batch := list(islice(entries, BATCH)):
        values = [orjson.dumps(entry.value) for entry in batch]
        bad: set[int] = set()
        for topic in {entry.topic for entry in batch}:
            of_topic = [index for index, entry in enumerate(batch) if entry.topic == topic]
            decoded = decode(
                BY_NAME[topic], [values[at] for at in of_topic], [(0, at) for at in of_topic]
            )
            for rejection in decoded.rejections:
                bad.add(rejection.offset)
                reason, _, _ = rejection.reason.partition(" (got ")
                place = batch[rejection.offset].place
                skips.add(f"{topic} {rejection.field or ''}: {reason}", place)
        for index, entry in enumerate(batch):
            if index not in bad:
                any_good = True
                yield entry.topic, values[index]
    if not any_good:
        reasons = "; ".join(f"{place}: {why}" for why, (_, place) in skips.reasons.items())
        raise ContractError(f"no line gave a record ({reasons[:500] or 'the files are empty'})")
