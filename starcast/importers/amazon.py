"""Amazon reviews with their items, of the sets of 2014, 2018 and 2023."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from model.texts import unescaped
from schemas.exceptions import ContractError
from schemas.records import LONGEST_ID
from starcast.importers.reading import (
    Part,
    Reader,
    Skips,
    cells,
    csv_of,
    csv_rows,
    json_object,
    json_rows,
    not_of_set,
    open_parts,
    renamed,
)
from starcast.importers.values import event_id, number, present, stripped, unix_time
from starcast.importers.writing import FIRST, THEN, Entry, ImportReport, in_order, write

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
# Files of ratings alone have no header: of 2014 the user comes first, of 2018 the item.
_RATINGS_OF_2014 = ("reviewerID", "asin", "overall", "unixReviewTime")
_RATINGS_OF_2018 = ("asin", "reviewerID", "overall", "unixReviewTime")
_ASIN = re.compile("[0-9A-Z]{10}")  # ids of reviewers are longer
_ITEM_OF_2023 = {"parent_asin": "asin", "store": "brand", "categories": "category"}


def import_amazon(files: Sequence[Path], out: Path) -> ImportReport:
    """Amazon product data (McAuley): of 2014, 2018 or 2023, as CSV or JSON lines.

    Metadata files of the same set give the items. Raises ContractError for a file that is
    neither, and when there is no review.
    """
    skips = Skips()
    kinds: dict[str, list[tuple[Part, Reader]]] = {"reviews": [], "items": []}
    for part in open_parts(files):
        kind, table = _kind(part)
        kinds[kind].append((part, table))
    reviews, metadata = kinds["reviews"], kinds["items"]
    if not reviews:
        raise ContractError("no file holds reviews; give a review file beside the metadata")

    first_use: dict[str, str] = {}

    def entries() -> Iterator[Entry]:
        for part, table in reviews:
            for entry in _reviews(part, table(part, skips), skips):
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
                    skips.add("item described twice", part.place(line))
                    continue
                seen.add(item)
                when = first_use.get(item, start)
                value = {"item_id": item, "event_time": when, **_item(row)}
                yield Entry((when, FIRST), "items", value, part.place(line))

    return write(in_order(entries(), out), out, skips)


def _kind(part: Part) -> tuple[str, Reader]:
    """Whether a file holds reviews or items, and how it is read."""
    first = part.first_line()
    lines = first.startswith("{")
    rows: Reader = json_rows if lines else csv_rows
    if not lines and (header := _header_of_ratings(cells(first))):
        return "reviews", csv_of(header)
    names = set((json_object(first) or ()) if lines else cells(first))
    if {"user_id", "parent_asin", "rating", "timestamp"} <= names:
        return "reviews", renamed(rows, _REVIEW_OF_2023)
    if {"reviewerID", "asin", *(() if lines else ("overall", "unixReviewTime"))} <= names:
        return "reviews", rows
    if lines and "parent_asin" in names:
        return "items", renamed(rows, _ITEM_OF_2023)
    if lines and "asin" in names:
        return "items", rows
    raise not_of_set(
        part,
        "a CSV with the columns reviewerID, asin, overall and unixReviewTime (of 2023: user_id, "
        "parent_asin, rating and timestamp), or JSON lines of reviews (reviewerID, asin, …; of "
        "2023: user_id, parent_asin, …) or of items (asin or parent_asin, title, …)",
    )


def _header_of_ratings(row: Sequence[str]) -> Sequence[str] | None:
    """What the cells of a first line without names are; none where it has names, or none fits."""
    if len(row) != 4 or number(row[2]) is None or unix_time(row[3]) is None:
        return None
    first, second = (bool(_ASIN.fullmatch(cell)) for cell in row[:2])
    if first == second:
        return None
    return _RATINGS_OF_2018 if first else _RATINGS_OF_2014


def _reviews(
    part: Part, rows: Iterable[tuple[int, Mapping[str, Any]]], skips: Skips
) -> Iterator[Entry]:
    for line, row in rows:
        place = part.place(line)
        name, per_second = ("timestamp", 1_000) if "timestamp" in row else ("unixReviewTime", 1)
        when = unix_time(row.get(name), per_second)
        if when is None:
            skips.add(f"no time ({name})", place)
            continue
        stars = row.get("overall")
        rating = number(stars)
        if rating is None and stars not in (None, ""):
            skips.add("stars that are no number, such as 4.5", place)
            continue
        value = present(
            event_id=event_id(row, line),
            user_id=str(row.get("reviewerID") or ""),
            item_id=str(row.get("asin") or ""),
            event_time=when,
            rating=rating,
            title=stripped(row.get("summary")),
            text=stripped(row.get("reviewText")),
        )
        yield Entry((when, THEN), "reviews", {"user_id": "", "item_id": "", **value}, place)


def _item(row: Mapping[str, Any]) -> dict[str, Any]:
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
    return present(
        title=title,
        brand=_markup_free(row.get("brand"))[:LONGEST_ID],
        category=path,
        price=_dollars(row.get("price")),
        description=_markup_free(description),
    )


def _markup_free(value: Any) -> str:
    """Text without HTML's tags and character references."""
    text = unescaped(re.sub(r"<[^<>]{1,2000}>", " ", stripped(value) or ""))
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _dollars(price: Any) -> float | None:
    """`$1,025.00`, or the lower of a range, or a number; anything else is no price."""
    found = re.match(r"\s*\$?\s*(\d[\d,]*(?:\.\d+)?)(?!\w)", str(price or ""))
    return float(found[1].replace(",", "")) if found else None
