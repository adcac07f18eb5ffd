"""What every processor promises, checked on each: the list is `streams.run.LOOPS`.

A processor gets its contracts by being listed there and here: `CONTRACTS` says what differs, and
`inputs.py` makes records for the topics that it reads. A worker on which something goes wrong must
end where one ends on which nothing did ("undisturbed").
"""

import base64
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jsonschema
import orjson
import pytest
from confluent_kafka import KafkaError, Message

from schemas.export import json_schema
from schemas.topics import BY_NAME
from streams.exceptions import StoreError
from streams.processor import Outcome, Position
from streams.run import LOOPS
from tests.contracts.inputs import bad, good
from tests.contracts.scripted_shop import BATCH, PREFIX, STOP_SECONDS, ScriptedShop, scripted_shop
from tests.unit.model.bundles import serve_reader
from tests.unit.model.encoders import bert
from tests.unit.streams.scripted_kafka import failure

RECORDS = 40  # of each topic


@dataclass(frozen=True)
class Contract:
    """What one processor makes of its inputs."""

    letters: frozenset[str] = frozenset()  # topics whose bad records it makes dead letters
    early: bool = False  # what it keeps never changes, and is written before the commit
    told: frozenset[str] = frozenset()  # topics it writes for good records


CONTRACTS = {
    "scorer": Contract(
        letters=frozenset({"reviews", "behavior", "text-features"}),
        told=frozenset({"predicted-ratings", "item-updates", "journal"}),
    ),
    "answers": Contract(
        letters=frozenset({"score-requests"}), told=frozenset({"predicted-ratings"})
    ),
    "items": Contract(letters=frozenset({"item-updates"})),
    "catalog": Contract(letters=frozenset({"items", "users"})),
    "texts": Contract(early=True, told=frozenset({"predicted-ratings", "text-features"})),
    "archiver": Contract(),
}

Open = Callable[[], AbstractContextManager[ScriptedShop]]
each_processor = pytest.mark.parametrize("name", LOOPS)


def test_every_processor_has_a_contract() -> None:
    assert CONTRACTS.keys() == set(LOOPS), "say in CONTRACTS what the new processor promises"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder whose stable bundle has a tiny encoder and a star head."""
    folder, url = tmp_path_factory.mktemp("encoder"), tmp_path_factory.mktemp("models")
    bert(folder)
    serve_reader(str(url), folder)
    return url


@pytest.fixture
def opened(name: str, store_server: str, models: Path, tmp_path: Path) -> Open:
    """Opens shops of the processor, each with the same records and nothing else in common."""
    return partial(scripted_shop, name, store_server, models, tmp_path)


@pytest.fixture
def shop(opened: Open) -> Iterator[ScriptedShop]:
    with opened() as made:
        fill(made)
        yield made


@dataclass(frozen=True)
class Undisturbed:
    """What there is after a worker on which nothing went wrong."""

    outputs: list[tuple[str, Any]]
    kept: dict[bytes | str, Any]


@pytest.fixture(scope="module")
def known() -> dict[str, Undisturbed]:
    """By processor: made once, as it never changes."""
    return {}


@pytest.fixture
def undisturbed(name: str, opened: Open, known: dict[str, Undisturbed]) -> Undisturbed:
    if name not in known:
        with opened() as made:
            fill(made)
            made.work()
            known[name] = Undisturbed(made.outputs(), made.kept())
    return known[name]


def fill(shop: ScriptedShop) -> None:
    for topic in shop.processor().topics:
        shop.kafka.send(good(topic, RECORDS))


def check(shop: ScriptedShop, undisturbed: Undisturbed) -> None:
    assert shop.outputs() == undisturbed.outputs
    assert shop.kept() == undisturbed.kept


@each_processor
def test_good_records_are_used_and_make_no_dead_letters(
    name: str, undisturbed: Undisturbed
) -> None:
    """So that the other tests compare something."""
    assert {topic for topic, _ in undisturbed.outputs} == CONTRACTS[name].told
    assert undisturbed.kept or name == "answers"


@each_processor
def test_work_that_was_not_committed_is_done_again(
    name: str, shop: ScriptedShop, undisturbed: Undisturbed
) -> None:
    """Each batch is dropped, claimed and done again from the committed position."""
    processor = shop.processor()
    loop = shop.loop(processor)
    shop.member.rebalance(new=shop.places(processor))
    step = "commit_transaction" if processor.transactional else "flush"
    error = failure(KafkaError._INCONSISTENT, txn_requires_abort=True)
    for _ in range(RECORDS):
        shop.kafka.fail(step, error)
        shop.turns(loop, 2)
        shop.kafka.failures.clear()
    shop.drain(loop)
    processor.close()
    check(shop, undisturbed)


@each_processor
@pytest.mark.parametrize("lost", ["the write", "its answer"])
def test_what_was_committed_and_not_written_is_made_up_for(
    name: str, shop: ScriptedShop, undisturbed: Undisturbed, lost: str
) -> None:
    """The store is gone after some commits: before it has written, or before it answers."""
    processor = shop.processor()
    loop = shop.loop(processor)
    shop.member.rebalance(new=shop.places(processor))
    process, batches = processor.process, count()

    def failing(messages: list[Message]) -> Outcome:
        outcome = process(messages)
        step = "write" if outcome.write else "finish"
        done = outcome.write or outcome.finish

        def gone(delivered: dict[Position, int]) -> None:
            if lost == "its answer" and done:
                done(delivered)
            raise StoreError("gone")

        failing_now: dict[str, Any] = {step: gone} if next(batches) in (1, 3, 5) else {}
        return replace(outcome, **failing_now)

    with patch.object(processor, "process", failing):
        shop.drain(loop)
        processor.close()
    assert next(batches) >= 4
    check(shop, undisturbed)


@each_processor
def test_a_batch_done_twice_leaves_what_it_left_once(
    name: str, shop: ScriptedShop, undisturbed: Undisturbed
) -> None:
    """As after a crash between an at-least-once worker's outputs and its offsets."""
    shop.work()
    if shop.processor().transactional:
        shop.work()  # a new worker finds nothing left to do
        check(shop, undisturbed)
        return
    shop.kafka.committed.clear()
    shop.work()
    assert shop.kept() == undisturbed.kept


@each_processor
def test_a_stop_in_mid_stream_loses_nothing(
    name: str, shop: ScriptedShop, undisturbed: Undisturbed
) -> None:
    processor = shop.processor()
    loop = shop.loop(processor)  # `run` subscribes again, as if it had not
    member = shop.member
    member.between.append(lambda: member.rebalance(new=shop.places(processor)))
    member.between.extend([lambda: None] * 4)
    member.between.append(shop.stop.set)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    thread.join(STOP_SECONDS)
    assert not thread.is_alive()
    left = shop.left(loop)
    assert 0 < left < sum(map(len, shop.kafka.logs.values()))
    shop.stop.clear()
    shop.work()
    check(shop, undisturbed)


@each_processor
def test_a_new_worker_goes_on_where_the_old_one_ended(
    name: str, shop: ScriptedShop, undisturbed: Undisturbed
) -> None:
    """Each lives for three turns, the last of them for all that is left, and none ends well."""
    for _ in range(3):
        processor = shop.processor()
        loop = shop.loop(processor)
        shop.member.rebalance(new=shop.places(processor))
        shop.turns(loop, 3)
    shop.work()
    check(shop, undisturbed)


@each_processor
def test_a_partition_lost_in_mid_batch_leaves_nothing_behind(
    name: str, shop: ScriptedShop, undisturbed: Undisturbed
) -> None:
    """Dropped between `process` and `finish`, which is then never called."""
    processor = shop.processor()
    loop = shop.loop(processor)
    shop.member.rebalance(new=shop.places(processor))
    shop.turns(loop, 2)
    before = shop.kept()
    batch = shop.member.consume(BATCH, 0.0)
    assert batch
    processor.process(batch)
    loop._ownership.restart(ValueError("lost"))
    after = shop.kept()
    if CONTRACTS[name].early:  # such as vectors: they are the same whoever writes them
        assert before.keys() <= after.keys()
    else:
        assert after == before
    shop.drain(loop)
    processor.close()
    check(shop, undisturbed)


@each_processor
def test_a_partition_that_comes_and_goes_is_worked_on_exactly(
    name: str, shop: ScriptedShop, undisturbed: Undisturbed
) -> None:
    """Lost within a poll, whose messages are then of no use, and given back two turns later."""
    processor = shop.processor()
    loop = shop.loop(processor)
    member, all_places, first = shop.member, shop.places(processor), shop.places(processor, 0)
    member.rebalance(new=all_places)
    shop.turns(loop, 2)
    member.between.extend([lambda: None, lambda: member.rebalance(gone=all_places, new=first)])
    shop.turns(loop, 3)
    assert {partition for _, partition in loop.live} == {0}
    member.between.extend([lambda: None, lambda: member.rebalance(gone=first, new=all_places)])
    shop.turns(loop, 1)
    shop.drain(loop)
    processor.close()
    assert told(shop.outputs()) == told(undisturbed.outputs)
    assert shop.kept().keys() == undisturbed.kept.keys()


@each_processor
def test_bad_records_stop_nothing(name: str, opened: Open, undisturbed: Undisturbed) -> None:
    """The good ones around them are used, and what the processor owns becomes dead letters."""
    contract = CONTRACTS[name]
    with opened() as shop:
        expected = Counter[tuple[str, bytes | None]]()
        for topic in shop.processor().topics:
            worse = bad(topic) if BY_NAME[topic].record else []
            for at, each in enumerate(good(topic, RECORDS)):
                shop.kafka.send([*worse[at : at + 1], each])
            assert len(worse) <= RECORDS
            if topic in contract.letters:
                expected.update((topic, each.value) for each in worse)
        shop.work()
        assert letters(shop.outputs()) == expected
        assert_exported(shop.kafka.outputs)
        assert told(shop.outputs()) == told(undisturbed.outputs)
        assert shop.kept().keys() >= undisturbed.kept.keys()


@each_processor
def test_a_batch_of_bad_records_alone_is_worked_on(name: str, opened: Open) -> None:
    contract = CONTRACTS[name]
    with opened() as shop:
        topics = [topic for topic in shop.processor().topics if BY_NAME[topic].record]
        for topic in topics:
            shop.kafka.send(bad(topic))
        shop.work()
        found = letters(shop.outputs())
        assert {topic for topic, _ in found} == contract.letters
        assert found.total() == sum(len(bad(topic)) for topic in contract.letters)
        assert not told(shop.outputs())


@each_processor
def test_a_poll_without_messages_does_nothing(name: str, opened: Open) -> None:
    with opened() as shop:
        processor = shop.processor()
        fill(shop)
        loop = shop.loop(processor)
        shop.turns(loop, 2)  # before the group has given it anything
        assert (shop.outputs(), shop.kept()) == ([], {})
        shop.member.rebalance(new=shop.places(processor))
        shop.drain(loop)
        before = shop.outputs(), shop.kept()
        shop.turns(loop, 5)
        processor.idle()
        assert (shop.outputs(), shop.kept()) == before


def assert_exported(outputs: list[tuple[str, bytes | None]]) -> None:
    """What is sent keeps the schemas that others make their consumers from."""
    for called, value in outputs:
        topic = BY_NAME[called.removeprefix(PREFIX)]
        if topic.record and (value or not topic.takes_null):
            jsonschema.validate(orjson.loads(bytes(value or b"")), json_schema(topic.name))


def told(outputs: list[tuple[str, Any]]) -> Counter[tuple[str, ...]]:
    """What was said of whom: topics and ids, but of journals and updates, whose cut may differ."""
    return Counter(
        (topic, *(str(value.get(each)) for each in ("event_id", "request_id", "item_id")))
        for topic, value in outputs
        if topic not in ("journal", "dead-letters", "item-updates")
    )


def letters(outputs: list[tuple[str, Any]]) -> Counter[tuple[str, bytes | None]]:
    """The dead letters' topics and values."""
    found = [value for topic, value in outputs if topic == "dead-letters"]
    return Counter(
        (
            each["source"]["topic"],
            None if each.get("value") is None else base64.b64decode(each["value"]),
        )
        for each in found
    )
