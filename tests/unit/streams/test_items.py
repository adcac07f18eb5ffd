import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
from confluent_kafka import Message
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from model.events import REVIEW, VIEW, Rows
from model.ids import hash_ids, partitions_of
from model.state import ITEM, LAYOUT_HASH
from model.state_bytes import from_bytes
from schemas import archive
from schemas.archive import Row
from schemas.codec import encode
from schemas.records import DeadLetter, ItemUpdate, UpdateSource
from streams.claims import header_data, header_offset
from streams.config import ArchiveConfig, KafkaConfig, RedisConfig
from streams.exceptions import FencedError
from streams.items import Items
from streams.metrics import make_metrics
from streams.reader import ITEM_STATE, store_keys
from streams.store import Claim, Store
from tests.unit.streams.messages import PREFIX, message

TIME = datetime(2026, 1, 1, tzinfo=UTC)
PARTITIONS = 4


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """Where partitions begin and end in Kafka; at 0 and 99 those that are not in it."""
    bounds: dict[int, tuple[int, int]] = {}

    def found(_: KafkaConfig, __: str, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        return {partition: bounds.get(partition, (0, 99)) for partition in partitions}

    monkeypatch.setattr("streams.items.bounds", found)
    return bounds


def make(
    url: str, prefix: str = "shop", archived_at: str = "nowhere", exactly_once: bool = True
) -> Items:
    store = Store(RedisConfig(url=SecretStr(url), key_prefix=prefix), LAYOUT_HASH, PARTITIONS)
    kafka = KafkaConfig(topic_prefix=PREFIX, exactly_once=exactly_once)
    archived = ArchiveConfig(url=archived_at)
    return Items(store, kafka, archived, make_metrics(CollectorRegistry()))


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
    return [items.claim({each: {}})[each]["item-updates"] for each in range(PARTITIONS)]


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
    good = encode(update("a"))
    strange = [good.replace(b"4.0", b'"4"'), good.replace(b'"view":2', b'"view":2147483648')]
    batch = messages([b"{}", update("a"), b"\xff", *strange])
    outcome = items.process(batch)
    letters = [DeadLetter.model_validate_json(each.value or b"") for each in outcome.outputs]
    assert [each.source.offset for each in letters] == [
        each.offset() for each in batch if each.value() != good
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
    assert old._claims._held == {}


def archived(folder: Path, updates: Sequence[ItemUpdate], first: int = 0) -> str:
    """An archive whose partition 0 has these updates from an offset on."""
    rows = [Row(0, first + at, 0, b"k", encode(each)) for at, each in enumerate(updates)]
    write_deltalake(str(folder / "item-updates"), archive.table("item-updates", rows))
    return str(folder)


def of_partition_0(count: int) -> list[str]:
    names = (f"item {number}" for number in range(1_000))
    return [name for name in names if partition_of(name) == 0][:count]


@pytest.mark.parametrize("exactly_once", [True, False])
def test_what_retention_has_taken_comes_from_the_archive(
    store: str, kept: dict[int, tuple[int, int]], tmp_path: Path, exactly_once: bool
) -> None:
    a, b = of_partition_0(2)
    log = [update(a), update(b), update(a), update(a)]
    items = make(store, archived_at=archived(tmp_path, log), exactly_once=exactly_once)
    items.claim({0: {}})
    work(items, [message("item-updates", log[0], 0, 0)])
    kept[0] = 3, 99
    assert items.claim({0: {}})[0] == {"item-updates": 3}  # 1 and 2 are applied, 3 is in Kafka
    assert states(items, a, b)["rating_count"].tolist() == [2, 1]
    kept[0] = 4, 99
    assert items.claim({0: {}})[0] == {"item-updates": 4}
    assert states(items, a, b)["rating_count"].tolist() == [3, 1]


def test_an_archive_that_takes_long_is_applied_some_at_a_time(
    store: str,
    kept: dict[int, tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who does not poll for minutes leaves the group."""
    (a,) = of_partition_0(1)
    monkeypatch.setattr("streams.items.CLAIM_SECONDS", 0.05)
    monkeypatch.setattr("streams.tail.ARCHIVED_ROWS", 1)
    items = make(store, archived_at=archived(tmp_path, [update(a)] * 3))
    process = items.process

    def slowly(messages: list[Message]) -> Any:
        time.sleep(0.06)
        return process(messages)

    monkeypatch.setattr(items, "process", slowly)
    kept[0] = 3, 99
    for applied in (1, 2, 3):
        assert items.claim({0: {}}) == {}
        assert states(items, a)["rating_count"] == applied
    assert items.claim({0: {}}) == {0: {"item-updates": 3}}


def test_what_the_archive_lacks_too_is_left_for_the_loop_to_count(
    store: str, kept: dict[int, tuple[int, int]], tmp_path: Path
) -> None:
    (a,) = of_partition_0(1)
    items = make(store, archived_at=archived(tmp_path, [update(a)] * 3))
    kept[0] = 5, 99
    assert items.claim({0: {}})[0] == {"item-updates": 3}
    assert states(items, a)["rating_count"] == 3
    kept[0] = 9, 99
    assert make(store, "other", str(tmp_path / "none")).claim({0: {}})[0] == {"item-updates": 0}


def test_an_end_of_a_transaction_is_no_loss(
    store: str, kept: dict[int, tuple[int, int]], tmp_path: Path
) -> None:
    """It has an offset, 0 here, but no row."""
    (a,) = of_partition_0(1)
    items = make(store, archived_at=archived(tmp_path, [update(a)] * 2, first=1))
    kept[0] = 1, 99
    assert items.claim({0: {}})[0] == {"item-updates": 1}
    kept[0] = 4, 4  # all is gone; 3 was the end of the last transaction
    assert items.claim({0: {}})[0] == {"item-updates": 4}
    assert states(items, a)["rating_count"] == 2
    kept[0] = 5, 5
    assert items.claim({0: {}})[0] == {"item-updates": 3}


def test_a_store_that_was_emptied_is_noticed_though_nothing_comes(store: str) -> None:
    items = make(store)
    claim_all(items)
    assert items.idle() is None
    items._store.client.flushall()
    items._claims._check_at = 0
    with pytest.raises(FencedError):
        items.idle()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
