from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from model.events import Rows
from model.ids import hash_ids, partitions_of
from model.lookups import Table, empty
from model.state import CATEGORY, ITEM_ATTRIBUTES, LAYOUT_HASH, USER_ATTRIBUTES
from model.state_bytes import from_bytes
from schemas.records import DeadLetter, Item, User
from streams.catalog import BATCH, Catalog, Entry, attributes_of, describe_log, title_of
from streams.config import RedisConfig
from streams.exceptions import FencedError
from streams.metrics import make_metrics
from streams.reader import ITEM_KIND, USER_KIND, partition_keys
from streams.store import WRITE_KEYS, Call, Keys, Store
from tests.unit.streams.messages import PREFIX, message

TIME = datetime(2026, 1, 1, tzinfo=UTC)


def make(url: str) -> Catalog:
    store = Store(RedisConfig(url=SecretStr(url)), LAYOUT_HASH, 2)
    return Catalog(store, PREFIX, make_metrics(CollectorRegistry()))


def item(name: str, price: float | None = 10.0, **changes: Any) -> Item:
    fields: dict[str, Any] = {
        "item_id": name,
        "event_time": TIME,
        "title": f"the {name}",
        "category": ["Instruments", "Guitars"],
        "price": price,
    }
    return Item.model_validate(fields | changes)


def items_log(records: Sequence[Item | bytes | tuple[str, None]], start: int = 0) -> list[Message]:
    """Messages of one partition; a pair of a name and None deletes."""
    made: list[Message] = []
    for offset, each in enumerate(records, start):
        if isinstance(each, tuple):
            made.append(message("items", None, offset=offset, key=each[0].encode()))
        else:
            key = each.item_id.encode() if isinstance(each, Item) else b"?"
            made.append(message("items", each, offset=offset, key=key))
    return made


def work(catalog: Catalog, batch: list[Message]) -> list[DeadLetter]:
    outcome = catalog.process(batch)
    assert outcome.finish is not None
    outcome.finish({})
    return [DeadLetter.model_validate_json(each.value or b"") for each in outcome.outputs]


def stored(catalog: Catalog, *names: str, kind: bytes = ITEM_KIND) -> list[bytes | None]:
    return catalog._store.read(partition_keys(catalog._store, kind, 0, hash_ids(names)))


def test_items_get_attributes_and_keep_their_titles(store: str) -> None:
    catalog = make(store)
    assert catalog.claim({0: {}})[0] == {"items": 0, "users": 0}
    outcome = catalog.process(items_log([item("a"), item("b", title="ü" * 200), item("c")]))
    assert stored(catalog, "a") == [None]
    assert outcome.finish is not None
    outcome.finish({})
    values = stored(catalog, "a", "b", "missing")
    assert [title_of(value) for value in values] == ["the a", "ü" * 120, ""]
    rows = attributes_of(values)
    assert rows["version"].tolist() == [1, 2, 0]
    assert rows["price"][0] == np.float32(10)
    assert catalog.claim({0: {}})[0] == {"items": 3, "users": 0}
    assert catalog.claim({1: {}})[1] == {"items": 0, "users": 0}


def test_a_title_is_told_as_it_is_read() -> None:
    value = bytes(ITEM_ATTRIBUTES.itemsize) + b"Rock &amp; Roll <i>Deluxe</i>"
    assert title_of(value) == "Rock & Roll Deluxe"


def test_the_newest_record_counts_and_a_tombstone_deletes(store: str) -> None:
    catalog = make(store)
    catalog.claim({0: {}})
    work(catalog, items_log([item("a", 10), item("b"), item("a", 20), item("c"), ("c", None)]))
    assert attributes_of(stored(catalog, "a"))["version"].tolist() == [3]
    assert attributes_of(stored(catalog, "a"))["price"].tolist() == [20]
    assert stored(catalog, "c") == [None]
    work(catalog, items_log([("a", None), item("c", 5), ("never there", None)], start=5))
    assert stored(catalog, "a") == [None]
    assert attributes_of(stored(catalog, "c"))["version"].tolist() == [7]


def test_records_elsewhere_than_their_items_partition_are_counted(store: str) -> None:
    catalog = make(store)
    catalog.claim({0: {}})
    names = [f"i-{number}" for number in range(20)]
    away = int(partitions_of(hash_ids(names), 2).sum())  # in partition 1 of two; all come in 0
    work(catalog, items_log([item(name) for name in [*names, *names]]))
    misplaced = catalog._metrics.registry.get_sample_value
    assert misplaced("starcast_misplaced_total", {"processor": "catalog"}) == 2 * away > 0


def test_users_get_attributes(store: str) -> None:
    catalog = make(store)
    catalog.claim({0: {}})
    ann, bob = (User(user_id=name, event_time=TIME, gender="f", age=30) for name in ("ann", "bob"))
    batch = [
        message("users", each, offset=offset, key=key)
        for offset, (each, key) in enumerate(
            [(ann, b"ann"), (bob, b"bob"), (ann.model_copy(update={"age": 31}), b"ann")]
        )
    ]
    assert work(catalog, [*batch, *items_log([item("a")])]) == []
    rows = from_bytes(stored(catalog, "ann", "bob", kind=USER_KIND), USER_ATTRIBUTES)
    assert rows["age"].tolist() == [31, 30]
    assert rows["version"].tolist() == [3, 2]
    assert catalog.claim({0: {}})[0] == {"items": 1, "users": 3}
    work(catalog, [message("users", None, offset=3, key=b"ann")])
    assert stored(catalog, "ann", kind=USER_KIND) == [None]


def test_bad_records_become_dead_letters_and_are_passed(store: str) -> None:
    catalog = make(store)
    catalog.claim({0: {}})
    odd = message("users", None, offset=0, key=b"\xff\xfe")  # deletes nobody we know
    letters = work(catalog, [odd, *items_log([b"[]", item("a"), b"\xff"])])
    assert [(each.source.topic, each.source.offset) for each in letters] == [
        ("items", 0),
        ("items", 2),
    ]
    assert attributes_of(stored(catalog, "a"))["version"].tolist() == [2]
    assert catalog.claim({0: {}})[0] == {"items": 3, "users": 1}
    counted = {"processor": "catalog", "reason": "contract"}
    registry = catalog._metrics.registry
    assert registry.get_sample_value("starcast_dead_letters_total", counted) == 2


def test_a_batch_is_one_write(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a write in parts a crash could leave rows without their prices, to be counted twice."""
    catalog = make(store)
    catalog.claim({0: {}})
    calls: list[int] = []
    round_trip = catalog._store._round_trip

    def counted(several: Sequence[Call], parts: Keys) -> list[Any]:
        calls.extend(len(call.keys) for call in several)
        return round_trip(several, parts)

    monkeypatch.setattr(catalog._store, "_round_trip", counted)
    work(catalog, items_log([item(f"item {number}") for number in range(catalog.batch_size)]))
    assert calls == [1 + BATCH + 1]  # the header, the items and the prices
    assert calls[0] == 1 + WRITE_KEYS


def test_an_owner_that_was_replaced_changes_nothing(store: str) -> None:
    old, new = make(store), make(store)
    old.claim({0: {}})
    outcome = old.process(items_log([item("a")]))
    new.claim({0: {}})
    assert outcome.finish is not None
    with pytest.raises(FencedError):
        outcome.finish({})
    assert stored(new, "a") == [None]
    old.drop([0])
    assert old._claims._held == {}


entries = st.lists(
    st.tuples(
        st.sampled_from("abcde"),
        st.none() | st.floats(0, 1e4, width=32),
        st.sampled_from([["x"], ["x", "y"], ["z"], None]),
        st.integers(0, 9),  # below 2: deletes
    ),
    max_size=40,
)


def described(made: Sequence[Entry], cuts: Sequence[int]) -> tuple[list[Rows], Table]:
    known: dict[str, Rows] = {}
    prices, rows = empty(CATEGORY), list[Rows]()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(made)), len(made)]
    for first, last in pairwise(bounds):
        more, prices = describe_log(made[first:last], known, prices)
        rows += more
    return rows, prices


@given(entries, st.lists(st.integers(0, 40), max_size=6))
def test_a_log_may_be_cut_anywhere(
    log: list[tuple[str, float | None, list[str] | None, int]], cuts: list[int]
) -> None:
    made: list[Entry] = [
        (
            name,
            None
            if kind < 2
            else item(name, price, category=path, event_time=TIME + timedelta(days=at % 3)),
            at + 1,
        )
        for at, (name, price, path, kind) in enumerate(log)
    ]
    whole, prices = described(made, [])
    rows, same_prices = described(made, cuts)
    alone, _ = described(made, range(len(made)))
    assert [row.tobytes() for row in rows] == [row.tobytes() for row in whole]
    assert [row.tobytes() for row in alone] == [row.tobytes() for row in whole]
    assert same_prices.hashes.tolist() == prices.hashes.tolist()
    assert same_prices.rows.tobytes() == prices.rows.tobytes()
    assert len(whole) == len(made)
    for (_, record, version), row in zip(made, whole, strict=True):
        assert row["version"] == (0 if record is None else version)
    there = {name: record for name, record, _ in made}
    counts = sum(record is not None and record.price is not None for record in there.values())
    assert prices.take(np.array([1], np.uint64))["count"].tolist() == [counts]


@settings(max_examples=25)
@given(entries, st.lists(st.integers(0, 40), max_size=4))
def test_batches_of_any_size_store_the_same(
    log: list[tuple[str, float | None, list[str] | None, int]], cuts: list[int]
) -> None:
    records: list[Item | bytes | tuple[str, None]] = [
        (name, None) if kind < 2 else item(name, price, category=path)
        for name, price, path, kind in log
    ]
    batch = items_log(records)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(batch)), len(batch)]
    found: list[dict[bytes, bytes]] = []
    for spans in ([(0, len(batch))], list(pairwise(bounds))):
        catalog = make("redis://127.0.0.1:1")
        held: dict[bytes, bytes] = {}
        _keep_in(catalog, held)
        catalog.claim({0: {}})
        for first, last in spans:
            if last > first:
                work(catalog, batch[first:last])
        found.append(held)
    assert found[0] == found[1]


def _keep_in(catalog: Catalog, held: dict[bytes, bytes]) -> None:
    """Has a catalog keep its keys in a dictionary."""
    store = catalog._store

    def answer(call: Call) -> Any:
        if call.function == "starcast_claim":
            return [1, held.get(call.keys[0]), 0]
        for key, value in zip(call.keys, call.arguments[2:], strict=True):
            if value:
                held[key] = value
            else:
                held.pop(key, None)
        return 1

    store._round_trip = lambda calls, parts=(): [answer(call) for call in calls]
    store.read = lambda keys: [held.get(key) for key in keys]


def test_attributes_of_nothing() -> None:
    assert attributes_of([]).dtype == ITEM_ATTRIBUTES
    assert len(attributes_of([])) == 0
