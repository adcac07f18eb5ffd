"""MovieLens as GroupLens and RecBole publish it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from schemas.exceptions import ContractError
from starcast.importers.reading import (
    Part,
    Reader,
    Skips,
    cells,
    csv_rows,
    not_of_set,
    open_parts,
    renamed,
    separated,
)
from starcast.importers.values import event_id, number, present, stripped, unix_time
from starcast.importers.writing import FIRST, THEN, Entry, ImportReport, in_order, write

# In u.item a movie has a flag for each of these.
GENRES = (
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
_RATING = ("user_id", "item_id", "rating", "timestamp")
_FILES: Mapping[str, tuple[str, Reader]] = {
    "u.data": ("ratings", separated("\t", _RATING)),
    "u.user": ("users", separated("|", ("user_id", "age", "gender", "occupation", "zip"))),
    "u.item": ("items", separated("|", ("item_id", "title", "released", "video", "url", *GENRES))),
    "ratings.dat": ("ratings", separated("::", _RATING)),
    "users.dat": ("users", separated("::", ("user_id", "gender", "age", "occupation", "zip"))),
    "movies.dat": ("items", separated("::", ("item_id", "title", "genres"))),
}
_TYPED_NAMES = {"movie_title": "title", "class": "genre_words", "genre": "genre_words"}
_CSV_NAMES = {"userId": "user_id", "movieId": "item_id"}
_UNUSED = ("tags.csv", "tags.dat", "links.csv", "genome-scores.csv", "genome-tags.csv")
_HALF = 0.5  # the least rating of sets with half stars; the contract's is 1


def import_movielens(files: Sequence[Path], out: Path) -> ImportReport:
    """MovieLens as `u.data`, `u.item`, `u.user`; `.dat`; `.csv`; or RecBole's atomic files.

    Ratings become reviews without text, genres the category of an item. Half stars stay as they
    are, but for half a star alone, which becomes one: the contract's scale begins there.
    """
    skips, changes = Skips(), Skips()
    kinds: dict[str, list[tuple[Part, Reader]]] = {"ratings": [], "items": [], "users": []}
    for part in open_parts(files):
        if (found := _kind(part)) is not None:
            kinds[found[0]].append((part, found[1]))
    if not kinds["ratings"]:
        raise ContractError(
            "no file holds ratings with their times; give u.data, ratings.dat, ratings.csv or a "
            "RecBole .inter file"
        )
    first_use: dict[tuple[str, str], str] = {}

    def entries() -> Iterator[Entry]:
        for part, reader in kinds["ratings"]:
            for entry in _ratings(part, reader, skips, changes):
                for name in ("user_id", "item_id"):
                    key, when = (name, entry.value[name]), entry.order[0]
                    if when < first_use.setdefault(key, when):
                        first_use[key] = when
                yield entry
        start = min(first_use.values(), default="")
        for topic, key in (("items", "item_id"), ("users", "user_id")):
            for part, reader in kinds[topic]:
                for line, row in reader(part, skips):
                    when = first_use.get((key, row[key]), start)
                    value = {
                        key: row[key],
                        "event_time": when,
                        **present(**_VALUES[topic](row)),
                    }
                    yield Entry((when, FIRST), topic, value, part.place(line))

    return write(in_order(entries(), out), out, skips, changes)


def _kind(part: Part) -> tuple[str, Reader] | None:
    """Which table a file holds and how it is read; none for a file of the set that is not used."""
    first, base = part.first_line(), part.base
    if ":token" in first:
        header = [name.partition(":")[0] for name in first.split("\t")]
        if set(_RATING) <= set(header):
            return "ratings", separated("\t", header, skip=1)
        if header[0] == "user_id":
            return "users", separated("\t", header, skip=1)
        if header[0] == "item_id" and len(header) > 2:
            names = [_TYPED_NAMES.get(name, name) for name in header]
            return "items", separated("\t", names, skip=1)
    elif base in _FILES:
        return _FILES[base]
    elif {"userId", "movieId", "rating", "timestamp"} <= set(cells(first)):
        return "ratings", renamed(csv_rows, _CSV_NAMES)
    elif {"movieId", "title", "genres"} <= set(cells(first)):
        return "items", renamed(csv_rows, _CSV_NAMES)
    elif ".zip/" in part.name or base in _UNUSED:
        return None  # as READMEs and splits, which lie in the published archives too
    raise not_of_set(
        part,
        "u.data, u.item, u.user, ratings.dat, movies.dat, users.dat, ratings.csv, movies.csv, or "
        "RecBole's .inter, .item, .user with typed headers",
    )


def _ratings(part: Part, reader: Reader, skips: Skips, changes: Skips) -> Iterator[Entry]:
    for line, row in reader(part, skips):
        when, place = unix_time(row["timestamp"]), part.place(line)
        if when is None:
            skips.add("no time", place)
            continue
        rating = number(row["rating"])
        if rating is None:
            skips.add("stars that are no number, such as 4.5", place)
            continue
        if rating == _HALF:
            rating = 1.0
            changes.add("1, which were half a star", place)
        value = {
            "event_id": event_id(row, line),
            "user_id": row["user_id"],
            "item_id": row["item_id"],
            "event_time": when,
            "rating": rating,
        }
        yield Entry((when, THEN), "reviews", value, place)


def _item(row: Mapping[str, str]) -> dict[str, Any]:
    if "genres" in row:
        genres = row["genres"].split("|")
    elif "genre_words" in row:
        genres = row["genre_words"].split()
    else:
        genres = [name for name in GENRES if row.get(name) == "1"]
    none = ("", "unknown", "(no genres listed)")
    return {
        "title": stripped(row.get("title")),
        "category": [name for name in genres if name not in none][:16],
    }


def _user(row: Mapping[str, str]) -> dict[str, Any]:
    return {"gender": row.get("gender", "").strip(), "age": number(row.get("age"))}


_VALUES: Mapping[str, Callable[[Mapping[str, str]], dict[str, Any]]] = {
    "items": _item,
    "users": _user,
}
