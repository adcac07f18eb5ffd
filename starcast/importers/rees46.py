"""The store log of REES46: views, carts and purchases."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from starcast.importers.reading import Skips, cells, csv_rows, not_of_set, open_parts
from starcast.importers.values import event_id, number, present
from starcast.importers.writing import THEN, Entry, ImportReport, in_order, write


def import_rees46(files: Sequence[Path], out: Path) -> ImportReport:
    """The REES46 multi-category store log: CSV of views, carts and purchases.

    An item is written when it is first seen and whenever its brand, category or price changes.
    """
    skips = Skips()
    wanted = {"event_time", "event_type", "product_id", "price", "user_id"}
    parts = open_parts(files)
    for part in parts:
        if not wanted <= set(cells(part.first_line())):
            raise not_of_set(part, f"a CSV with the columns {', '.join(sorted(wanted))}")

    def entries() -> Iterator[Entry]:
        for part in parts:
            for line, row in csv_rows(part, skips):
                when = row["event_time"].removesuffix(" UTC").replace(" ", "T") + "Z"
                value = present(
                    event_id=event_id(row, line),
                    user_id=row["user_id"],
                    item_id=row["product_id"],
                    event_time=when,
                    action=row["event_type"],
                    price=number(row["price"]),
                    session_id=row.get("user_session"),
                    # Not of the record: taken off again when the item is compared.
                    brand=row.get("brand"),
                    category=[name for name in (row.get("category_code") or "").split(".") if name],
                )
                yield Entry((when, THEN), "behavior", value, part.place(line))

    def with_items(ordered: Iterable[Entry]) -> Iterator[Entry]:
        known: dict[str, tuple[Any, ...]] = {}
        for entry in ordered:
            value = dict(entry.value)
            brand, category = value.pop("brand", None), value.pop("category", None)
            attributes = (brand, tuple(category or ()), value.get("price"))
            item_id = value.get("item_id")
            if item_id and known.get(item_id) != attributes:
                known[item_id] = attributes
                item = present(
                    item_id=item_id,
                    event_time=value["event_time"],
                    brand=brand,
                    category=category,
                    price=value.get("price"),
                )
                yield Entry(entry.order, "items", item, entry.place)
            yield Entry(entry.order, "behavior", value, entry.place)

    return write(with_items(in_order(entries(), out)), out, skips)
