"""An archive's history, written anew."""

import json
from datetime import UTC, datetime, timedelta
from heapq import merge
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from deltalake import write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import archive, history
from schemas.archive import Row
from schemas.examples import EXAMPLES
from schemas.exceptions import UnreachableError

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def at(minutes: float) -> int:
    """Minutes after noon in milliseconds, as Kafka tells a time."""
    return round((NOON + timedelta(minutes=minutes)).timestamp() * 1_000)


def row(topic: str, offset: int, minutes: float, partition: int = 0, **changes: Any) -> Row:
    """A record that happened when Kafka took it, unless it says otherwise."""
    time = (NOON + timedelta(minutes=minutes)).isoformat()
    value = {**EXAMPLES[topic], "event_time": time, **changes}
    key = value["item_id" if topic == "items" else "user_id"].encode()
    # As a person writes it, on several lines.
    return Row(partition, offset, at(minutes), key, json.dumps(value, indent=1).encode())


def write(url: Path, topic: str, *rows: Row) -> None:
    table = archive.table(topic, rows)
    write_deltalake(archive.table_url(str(url), topic), table, mode="append")


def told(url: Path, **bounds: Any) -> list[tuple[str, str]]:
    """Of each record the topic, and the id of its event, item or user."""
    found = [(topic, json.loads(value)) for topic, value in history.history(str(url), **bounds)]
    ids = {"items": "item_id", "users": "user_id"}
    return [(topic, value[ids.get(topic, "event_id")]) for topic, value in found]


def test_partitions_and_topics_are_merged_by_time_each_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_CHUNK", 2)
    early = (NOON - timedelta(days=9)).isoformat()
    future = (NOON + timedelta(days=9)).isoformat()
    write(
        tmp_path,
        "reviews",
        row("reviews", 4, 1, event_id="a"),
        row("reviews", 5, 3, event_id="b", event_time=future),
        row("reviews", 9, 5, event_id="c", event_time=early),  # late: it stands where it came
        row("reviews", 0, 4, 1, event_id="d"),
    )
    write(tmp_path, "behavior", row("behavior", 0, 1, event_id="e"), row("behavior", 1, 6))
    write(tmp_path, "items", row("items", 0, 1))
    write(tmp_path, "users", row("users", 0, 2))
    known = [("items", EXAMPLES["items"]["item_id"]), ("users", EXAMPLES["users"]["user_id"])]
    last = ("behavior", EXAMPLES["behavior"]["event_id"])
    events = [("reviews", each) for each in "abcd"]
    expected = [known[0], events[0], ("behavior", "e"), known[1], *events[1:], last]
    assert told(tmp_path) == expected
    bounds = {"since": NOON + timedelta(minutes=2), "before": NOON + timedelta(minutes=4)}
    assert told(tmp_path, **bounds) == [*known, events[1]]  # their Kafka time is a producer's
    assert all(b"\n" not in value for _, value in history.history(str(tmp_path)))


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.sampled_from(["reviews", "behavior"]), st.integers(0, 2), st.integers(0, 9)),
        min_size=1,
        max_size=12,
    ),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
)
def test_any_partitions_are_merged_in_whatever_order_their_rows_lie(
    drawn: list[tuple[str, int, int]], chance: Any, chunk: int
) -> None:
    """As a merge of sorted partitions, that takes of what is first in each the earliest."""
    parts: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    rows: list[tuple[str, Row]] = []
    for number, (topic, partition, minute) in enumerate(drawn):
        place = history.HISTORY.index(topic)
        part = parts.setdefault((place, partition), [])
        rows.append((topic, row(topic, len(part), minute, partition, event_id=str(number))))
        part.append((minute, place, str(number)))
    merged = merge(*(parts[each] for each in sorted(parts)), key=itemgetter(0, 1))
    expected = [(history.HISTORY[place], name) for _, place, name in merged]
    chance.shuffle(rows)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(history, "_CHUNK", chunk)
        for at in range(0, len(rows), 5):
            for topic in ("reviews", "behavior"):
                write(Path(folder), topic, *(each for of, each in rows[at : at + 5] if of == topic))
        assert told(Path(folder)) == expected


def test_what_is_bad_or_erased_is_left_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        "reviews",
        row("reviews", 0, 0, user_id="ann", event_id="before"),
        row("reviews", 1, 0, user_id="ann", event_id="bad", rating=9),
        Row(0, 2, at(0), b"ann", b"{"),
        Row(0, 3, at(0), None, None),  # as `forget` leaves it
        Row(0, 4, at(2), b"ann", None),
        row("reviews", 5, 3, user_id="ann", event_id="after"),
    )
    write(
        tmp_path,
        "behavior",
        row("behavior", 0, 1, user_id="ann", event_id="viewed"),
        row("behavior", 1, 1, user_id="bob", event_id="other"),
        Row(0, 2, at(2), b"\xff", None),  # whose key is nobody's id: a dead letter
    )
    write(
        tmp_path,
        "users",
        row("users", 0, 0, user_id="ann"),
        row("users", 1, 0, user_id="bob"),
        Row(0, 2, at(1), b"bob", None),
    )
    write(
        tmp_path,
        "items",
        row("items", 0, 3, item_id="deleted"),  # by its producer's time, after it was deleted
        row("items", 1, 0, item_id="back"),
        Row(0, 2, at(1), b"deleted", None),
        Row(0, 3, at(1), b"back", None),
        row("items", 4, 0, item_id="back"),
    )
    assert told(tmp_path) == [
        ("items", "back"),
        ("users", "ann"),
        ("behavior", "other"),
        ("reviews", "after"),
    ]


def test_events_that_were_dead_letters_of_the_future_are_left_out(tmp_path: Path) -> None:
    ahead = [(NOON + timedelta(seconds=seconds)).isoformat() for seconds in (60, 61)]
    reviews = [
        row("reviews", at, 0, event_id=str(at), event_time=each) for at, each in enumerate(ahead)
    ]
    write(tmp_path, "reviews", *reviews)
    write(tmp_path, "items", row("items", 0, 0, event_time=ahead[1]))
    item = ("items", EXAMPLES["items"]["item_id"])
    assert told(tmp_path, longest_future_seconds=60) == [item, ("reviews", "0")]
    assert len(told(tmp_path)) == 3


def test_an_unknown_field_too_deep_to_be_written_is_left_out(tmp_path: Path) -> None:
    plain = row("reviews", 0, 0, event_id="deep")
    value = (plain.value or b"")[:-1] + b', "more": %b%b}' % (b"[" * 300, b"]" * 300)
    write(tmp_path, "reviews", plain._replace(value=value), row("reviews", 1, 0, event_id="last"))
    assert told(tmp_path) == [("reviews", "deep"), ("reviews", "last")]
    ((_, deep), _) = history.history(str(tmp_path))
    assert json.loads(deep).keys() == json.loads(plain.value or b"").keys()


def test_an_archive_that_is_empty_or_damaged(tmp_path: Path) -> None:
    assert told(tmp_path) == []
    write(tmp_path, "items", row("items", 0, 0))
    for file in (tmp_path / "items").glob("*.parquet"):
        file.unlink()
    with pytest.raises(UnreachableError, match="items cannot be used"):
        told(tmp_path)
