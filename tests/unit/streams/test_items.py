from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
from confluent_kafka import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from model.events import REVIEW, VIEW, Rows
from model.ids import hash_ids, partitions_of
from model.state import ITEM, LAYOUT_HASH, from_bytes
from schemas.codec import encode
from schemas.records import DeadLetter, ItemUpdate, UpdateSource
from streams.config import RedisConfig
from streams.exceptions import FencedError
from streams.items import Items, header_data, header_offset
from streams.metrics import make_metrics
from streams.reader import ITEM_STATE, store_keys
from streams.store import Claim, Store
from tests.unit.streams.messages import PREFIX, message

TIME = datetime(2026, 1, 1, tzinfo=UTC)
PARTITIONS = 4


def make(url: str, prefix: str = "shop") -> Items:
    store = Store(RedisConfig(url=SecretStr(url), key_prefix=prefix), LAYOUT_HASH, PARTITIONS)
    return Items(store, PREFIX, make_metrics(CollectorRegistry()))


def update(item: str, **changes: Any) -> ItemUpdate:
    fields: dict[str, Any] = {
        "item_id": item,
        "source": UpdateSource(topic="reviews", partition=0, first_offset=0, last_offset=3),
        "counts": {"review": 1, "view": 2},
        "rating_count": 1,
        "rating_sum": 4.0,
        "rating_square_sum": 16.0,
        "rating_histogram": [0, 0, 0, 1, 0],
        "first_event_time": TIME,
        "last_event_time": TIME,
    }
    return ItemUpdate.model_validate(fields | changes)


def partition_of(item: str) -> int:
    return int(partitions_of(hash_ids([item]), PARTITIONS)[0])


def messages(updates: Sequence[ItemUpdate | bytes]) -> list[Message]:
    """Each update at the next offset of its item's partition; what is no update, of partition 0."""
    ends = [0] * PARTITIONS
    made: list[Message] = []
    for each in updates:
        partition = partition_of(each.item_id) if isinstance(each, ItemUpdate) else 0
        made.append(message("item-updates", each, partition, ends[partition]))
        ends[partition] += 1
    return made


def work(items: Items, batch: list[Message]) -> None:
    outcome = items.process(batch)
    assert outcome.finish is not None
    outcome.finish({})


def write_in_part(
    write: Callable[..., None], claim: Claim, keys: list[bytes], values: list[bytes], _: bytes
) -> None:
    write(claim, keys[:1], values[:1], b"")


def states(items: Items, *names: str) -> Rows:
    keys = store_keys(items._store, ITEM_STATE, hash_ids(names))
    return from_bytes(items._store.read(keys), ITEM)


def claim_all(items: Items) -> list[int]:
    return [items.claim(each, {})["item-updates"] for each in range(PARTITIONS)]


def test_updates_add_up(store: str) -> None:
    items = make(store)
    assert claim_all(items) == [0] * PARTITIONS
    later = TIME + timedelta(days=1)
    batch = messages(
        [
            update("a"),
            update("b", price_count=2, price_log_sum=5.5, sessions=1),
            update("a", counts={"view": 3}, rating_count=0, rating_sum=-1.0, last_event_time=later),
        ]
    )
    outcome = items.process(batch)
    assert not states(items, "a", "b")["offset"].any()  # nothing changes before the commit
    assert outcome.outputs == []
    assert outcome.finish is not None
    outcome.finish({})
    a, b = states(items, "a", "b")
    assert (a["actions"][REVIEW], a["actions"][VIEW]) == (1, 5)
    assert (a["rating_count"], a["rating_sum"], a["rating_square_sum"]) == (1, 3.0, 32.0)
    assert a["histogram"].tolist() == [0, 0, 0, 2, 0]
    assert a["first_time"] == TIME.timestamp() * 1_000
    assert a["last_time"] == later.timestamp() * 1_000
    assert (b["price_count"], b["price_log_sum"], b["sessions"]) == (2, 5.5, 1)
    starts = claim_all(make(store))
    assert sum(starts) == 3
    assert a["offset"] <= starts[partition_of("a")]


def test_bad_updates_become_dead_letters_and_are_passed(store: str) -> None:
    items = make(store)
    claim_all(items)
    batch = messages([b"{}", update("a"), b"\xff", encode(update("a")).replace(b"4.0", b'"4"')])
    outcome = items.process(batch)
    letters = [DeadLetter.model_validate_json(each.value or b"") for each in outcome.outputs]
    assert [each.source.offset for each in letters] == [
        each.offset() for each in batch if each.value() != encode(update("a"))
    ]
    assert {each.processor for each in letters} == {"items"}
    assert outcome.finish is not None
    outcome.finish({})
    assert states(items, "a")["rating_count"] == 1
    ends = {each.partition(): (each.offset() or 0) + 1 for each in batch}
    starts = claim_all(make(store))
    assert starts == [ends.get(partition, 0) for partition in range(PARTITIONS)]


def test_an_owner_that_was_replaced_changes_nothing(store: str) -> None:
    old, new = make(store), make(store)
    claim_all(old)
    outcome = old.process(messages([update("a")]))
    claim_all(new)
    assert outcome.finish is not None
    with pytest.raises(FencedError):
        outcome.finish({})
    assert not states(new, "a")["offset"].any()
    old.drop(range(PARTITIONS))
    assert old._claims == {}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 5)), max_size=25),
    turns=st.lists(st.tuples(st.integers(0, 25), st.booleans()), max_size=5),
)
def test_crashes_between_batches_and_within_neither_lose_nor_double(
    store: str, rows: list[tuple[str, int]], turns: list[tuple[int, bool]]
) -> None:
    """A batch that crashes has written some states but not its header: it is read again."""
    items = make(store, uuid4().hex)
    batch = messages([update(name, rating_sum=float(stars)) for name, stars in rows])
    for end, crashes in [*turns, (len(batch), False)]:
        starts = claim_all(items)
        left = [
            each for each in batch[:end] if (each.offset() or 0) >= starts[each.partition() or 0]
        ]
        if left and crashes:
            with patch.object(items._store, "write", partial(write_in_part, items._store.write)):
                work(items, left)
        elif left:
            work(items, left)
    found = states(items, *"abcde")
    for name, state in zip("abcde", found, strict=True):
        mine = [stars for item, stars in rows if item == name]
        assert (state["rating_count"], state["rating_sum"]) == (len(mine), sum(mine))


@given(st.integers(0, 2**63))
def test_a_header_is_read_as_it_was_written(offset: int) -> None:
    assert header_offset(header_data(offset)) == offset
    assert header_offset(None) == 0
