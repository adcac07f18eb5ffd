"""Cells of a data set as values of records."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
import xxhash

from schemas.records import EARLIEST_TIME, LATEST_TIME, LONGEST_TEXT


def event_id(row: Mapping[str, Any], line: int) -> str:
    """An id for a row without one: a second import gives the same, lines tell equal rows apart."""
    return xxhash.xxh3_128_hexdigest(orjson.dumps([list(row.values()), line]))


def unix_time(value: Any, per_second: int = 1) -> str | None:
    """RFC 3339 of seconds since 1970, or of parts of them; none for what is no time of a record."""
    found = number(value)
    try:
        time = datetime.fromtimestamp(found // per_second, UTC) if found is not None else None
    except (OverflowError, ValueError, OSError):
        return None
    if time is None or not EARLIEST_TIME <= time <= LATEST_TIME:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def number(value: Any) -> float | None:
    """A number, also where it is written as text; none for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def stripped(value: Any) -> str | None:
    """Text without space around it, cut to what a record takes; none for what is no text."""
    return value.strip()[:LONGEST_TEXT] if isinstance(value, str) else None


def present(**fields: Any) -> dict[str, Any]:
    """The fields that have a value: neither none nor empty."""
    return {name: value for name, value in fields.items() if value not in (None, "", [])}
