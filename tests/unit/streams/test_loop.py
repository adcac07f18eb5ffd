"""The loop against a scripted Kafka; `tests/integration/test_pipeline.py` has it on a real one."""

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
from confluent_kafka import KafkaError, Message
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from structlog.testing import capture_logs

from streams import loop as loops
from streams.exceptions import (
    FencedError,
    StoreError,
)
from streams.loop import Loop
from streams.processor import Offsets, Outcome, Output, Position
from tests.unit.streams.looped import (
    ABORTS,
    TOPICS,
    Counting,
    World,
    answered,
    fenced,
    fill,
    places,
    scripted,
)
from tests.unit.streams.scripted_kafka import failure

# -- generations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rejoined", [False, True])
def test_a_batch_of_an_older_generation_is_dropped(world: World, rejoined: bool) -> None:
    """A worker that slept over a batch: the group has gone on, and it has not been told yet."""
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 3, 0)
    world.consumer.rebalance(new=places(0))
    ask = world.consumer.consumer_group_metadata

    def sleep() -> bytes:
        found = ask()
        world.broker.generation += 1
        if rejoined:
            world.consumer.generation = world.broker.generation
        return found

    with patch.object(world.consumer, "consumer_group_metadata", sleep):
        world.turn(loop)
    assert processor.batches
    assert (answered(world), processor.finished) == ([], [])
    assert processor.drops[-1] == {0}
    world.broker.committed = dict.fromkeys(places(0), 2)  # another worker's
    world.consumer.rebalance(gone=places(0), new=places(0), lost=True)
    world.turn(loop)
    assert len(answered(world)) == 2


@pytest.mark.parametrize("generation", [0, -1])
def test_outside_a_generation_nothing_is_committed(world: World, generation: int) -> None:
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 3, 0)
    world.consumer.rebalance(new=places(0))
    world.consumer.generation = world.broker.generation = generation
    world.turn(loop)
    assert not processor.batches
    assert not world.broker.outputs
    assert not world.broker.committed
    assert not world.broker.producers[0].begun
    assert loop.live == frozenset()


# -- stores that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["process", "finish", "idle"])
@pytest.mark.parametrize("error", [StoreError("gone"), FencedError("claimed")])
def test_a_store_that_fails_drops_nothing(world: World, method: str, error: Exception) -> None:
    processor = Counting(errors={method: [error]})
    loop = world.loop(processor)
    fill(world, 3, 0, 1)
    world.consumer.rebalance(new=places(0, 1))
    world.turn(loop)
    assert loop.live == frozenset()
    assert processor.drops[-1] == {0, 1}
    assert not world.broker.producers[0].begun
    fill(world, 1, 0)
    world.turn(loop)
    assert len(answered(world)) == len(set(answered(world))) == 14


@pytest.mark.parametrize("step", ["begin_transaction", "send_offsets_to_transaction"])
def test_a_store_and_a_transaction_that_fail_together_drop_nothing(world: World, step: str) -> None:
    loop = world.loop(Counting(errors={"process": [StoreError("gone")]}))
    fill(world, 3, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.fail(step, *ABORTS[step])
    world.turn(loop)
    assert not world.broker.producers[0].begun
    world.turn(loop)
    assert len(answered(world)) == len(set(answered(world))) == 6


def test_any_other_error_of_a_processor_ends_the_worker(world: World) -> None:
    loop = world.loop(Counting(errors={"process": [ZeroDivisionError()]}))
    fill(world, 1, 0)
    world.consumer.rebalance(new=places(0))
    with pytest.raises(ZeroDivisionError):
        world.turn(loop)


# -- at least once -------------------------------------------------------------------------------


def test_without_transactions_offsets_come_last(world: World) -> None:
    processor = Counting(errors={"finish": [StoreError("gone")]})
    loop = world.loop(processor, exactly_once=False)
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    assert len(answered(world)) == 4
    assert world.broker.committed == {}
    world.turn(loop)
    assert len(answered(world)) == 8  # again: at least once
    assert len(set(answered(world))) == 4
    assert processor.finished == [{("journal", 0): 2}]
    world.turn(loop)
    assert world.broker.committed == {("eu.reviews", 0): 2, ("eu.behavior", 0): 2}


def test_without_transactions_states_are_written_too(world: World) -> None:
    processor, loop = ahead(world, exactly_once=False)
    processor.writing.set()
    world.turn(loop)
    assert (len(processor.written), len(answered(world))) == (1, 3)


# -- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome"), [(StoreError("gone"), "failed"), (FencedError("claimed"), "fenced")]
)
def test_writes_that_the_store_did_not_take_are_counted(
    world: World, error: StoreError, outcome: str
) -> None:
    loop = world.loop(Counting(errors={"finish": [error]}))
    fill(world, 1, 0)
    world.consumer.rebalance(new=places(0))
    world.turn(loop, 2)
    assert world.value("state_writes_total", processor="counting", outcome=outcome) == 1


@pytest.mark.parametrize("exactly_once", [True, False])
def test_what_timed_work_tells_is_sent_though_nothing_comes(
    world: World, exactly_once: bool
) -> None:
    class Telling(Counting):
        def idle(self) -> Outcome:
            return Outcome(outputs=[Output("score-digests", None, b"told")])

    world.turn(world.loop(Telling(), exactly_once=exactly_once))
    assert world.broker.outputs == [("eu.score-digests", b"told")]


def test_dead_letters_are_counted_from_zero(world: World) -> None:
    """Or Prometheus' `increase` would not see the first of them."""
    world.loop(Counting())
    assert world.value("dead_letters_total", processor="counting", reason="contract") == 0


def test_a_run_ends_with_its_batch(world: World) -> None:
    processor = Counting(errors={"close": [StoreError("the archive is gone")]})
    loop = world.loop(processor)
    fill(world, 3, 0)
    consumer = world.consumer
    del consumer.on_assign, consumer.on_revoke, consumer.on_lost  # it subscribes itself
    world.broker.producers[0].ready = False
    consumer.between.extend(
        [lambda: consumer.rebalance(new=places(0)), lambda: None, world.stop.set]
    )
    with capture_logs() as logs:
        loop.run()
    assert len(answered(world)) == 6
    assert (processor.closes, consumer.closed) == (1, True)
    assert processor.drops[-1] == {0}
    assert logs[-1]["reason"] == "the archive is gone"


def test_a_group_that_does_not_answer_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "LEAVE_SECONDS", 0.1)
    loop = world.loop(Counting())
    fill(world, 3, 0)
    consumer, answered_at_last = world.consumer, threading.Event()
    consumer.between.extend(
        [lambda: consumer.rebalance(new=places(0)), lambda: None, world.stop.set]
    )
    monkeypatch.setattr(consumer, "close", answered_at_last.wait)
    with capture_logs() as logs:
        loop.run()
    answered_at_last.set()
    assert len(answered(world)) == 6
    assert logs[-1]["event"] == "left the group without its answer"


def test_a_run_that_fails_writes_nothing_more(world: World) -> None:
    processor = Counting(errors={"process": [ZeroDivisionError()]})
    loop = world.loop(processor)
    fill(world, 3, 0)
    world.consumer.between.append(lambda: world.consumer.rebalance(new=places(0)))
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert (processor.closes, world.consumer.closed) == (0, True)
    assert processor.drops[-1] == {0}


# -- any order of events -------------------------------------------------------------------------

PARTITIONS = 3
partitions_ = st.sets(st.integers(0, PARTITIONS - 1))


class Group(RuleBasedStateMachine):
    """One worker of a group, in any order of rebalances, failures and naps.

    Other workers take what is not this one's: they answer some of it, in order. Whatever happens,
    no position is answered twice or out of order, and in the end none is missing.
    """

    protocol = "classic"

    def __init__(self) -> None:
        super().__init__()
        self.patches = ExitStack()
        self.world = self.patches.enter_context(scripted())
        self.broker, self.clock = self.world.broker, self.world.clock
        self.processor = Counting(batch_size=5)
        self.loop = self.world.loop(self.processor, group_protocol=self.protocol)
        self.owned: set[int] = set()

    def teardown(self) -> None:
        self.patches.close()

    @initialize(counts=st.lists(st.integers(0, 9), min_size=6, max_size=6))
    def fill(self, counts: list[int]) -> None:
        for place, count in zip(places(*range(PARTITIONS)), counts, strict=True):
            self.broker.append(*place, *[b"v"] * count)

    @rule(partition=st.integers(0, PARTITIONS - 1), topic=st.sampled_from(TOPICS))
    def produce(self, partition: int, topic: str) -> None:
        self.broker.append(f"eu.{topic}", partition, b"v")

    @rule(owned=partitions_, lost=st.booleans())
    def rebalance(self, owned: set[int], lost: bool) -> None:
        self.world.consumer.between.clear()
        self._become(owned, lost)

    @rule(owned=partitions_, calls=st.integers(0, 1), others=st.integers(0, 3))
    def rebalance_in_a_poll(self, owned: set[int], calls: int, others: int) -> None:
        def happen() -> None:
            self._become(owned, False)
            self._others_work(others)

        self.world.consumer.between.extend([lambda: None] * calls + [happen])

    @rule(others=st.integers(0, 3), owned=partitions_)
    def fall_asleep(self, others: int, owned: set[int]) -> None:
        """The session times out; others take over, and the worker hears of it after its batch."""
        mine, self.owned = self.owned, set()
        self.broker.generation += 1
        self._others_work(others)
        self.owned = mine
        self.world.consumer.between.clear()
        self.world.consumer.between.extend(
            [lambda: None, lambda: None, lambda: self._become(owned, True)]
        )

    @rule(place=st.sampled_from(places(*range(PARTITIONS))), calls=st.integers(0, 1))
    def go_back(self, place: tuple[str, int], calls: int) -> None:
        """As librdkafka does when the answer to its first query comes after a seek."""
        consumer = self.world.consumer

        def happen() -> None:
            if place in consumer.positions:
                consumer.positions[place] = 0

        self.world.consumer.between.extend([lambda: None] * calls + [happen])

    @rule(
        method=st.sampled_from([*ABORTS, "abort_transaction", "committed", "seek"]),
        fatal=st.booleans(),
    )
    def kafka_fails(self, method: str, fatal: bool) -> None:
        self.clock.now += 100  # so that a worker that was fenced is not fenced again at once
        self.broker.failures.clear()
        retriable = failure(KafkaError._TIMED_OUT, retriable=True)
        error = fenced() if fatal and "transaction" in method else ABORTS.get(method, [retriable])
        self.broker.fail(method, *(error if isinstance(error, list) else [error]))

    @rule(method=st.sampled_from(["claim", "process", "finish", "idle"]))
    def store_fails(self, method: str) -> None:
        self.processor.errors = {method: [StoreError("gone")]}

    @rule(count=st.integers(1, 4))
    def others_work(self, count: int) -> None:
        self._others_work(count)

    @rule(count=st.integers(1, 3))
    def turn(self, count: int) -> None:
        self.world.turn(self.loop, count)

    @invariant()
    def answers_are_in_order(self) -> None:
        answers = answered(self.world)
        expected = [
            b"%b/%d/%d" % (topic.encode(), partition, offset)
            for (topic, partition), end in self.broker.committed.items()
            for offset in range(end)
        ]
        assert sorted(map(bytes, filter(None, answers))) == sorted(expected)

    @invariant()
    def what_is_not_worked_on_waits_at_the_broker(self) -> None:
        live = {(f"eu.{topic}", partition) for topic, partition in self.loop.live}
        assert self.world.consumer.paused == self.world.consumer.positions.keys() - live

    @rule()
    def all_is_well_again(self) -> None:
        self.broker.failures.clear()
        self.processor.errors = {}
        self.world.consumer.between.clear()
        self._become(set(range(PARTITIONS)), True)
        left = sum(map(len, self.broker.logs.values()))
        self.world.turn(self.loop, left + 5)
        assert self.broker.committed == {
            place: len(values) for place, values in self.broker.logs.items() if values
        }

    def _become(self, owned: set[int], lost: bool) -> None:
        """The group's next generation, in which the worker has these partitions."""
        gone, new = self.owned, owned
        if self.protocol == "consumer" and not lost:
            gone, new = self.owned - owned, owned - self.owned
        self.owned = owned
        self.world.consumer.rebalance(places(*gone), places(*new), lost)

    def _others_work(self, count: int) -> None:
        """Other workers answer the next records of what this one does not have."""
        for topic, partition in places(*set(range(PARTITIONS)) - self.owned):
            start = self.broker.committed.get((topic, partition), 0)
            end = min(start + count, len(self.broker.logs.get((topic, partition), [])))
            self.broker.outputs += [
                ("eu.predicted-ratings", b"%b/%d/%d" % (topic.encode(), partition, offset))
                for offset in range(start, end)
            ]
            if end > start:
                self.broker.committed[topic, partition] = end


class NewGroup(Group):
    """The same under KIP-848, where partitions that stay are not revoked."""

    protocol = "consumer"


@pytest.mark.parametrize("machine", [Group, NewGroup])
def test_each_record_is_answered_once_whatever_happens(machine: type[Group]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30))


# -- one batch ahead -----------------------------------------------------------------------------


@dataclass
class Ahead(Counting):
    """Lets the next batch be processed before this one is committed."""

    batch_size: int = 3
    committed: threading.Event = field(default_factory=threading.Event)
    writing: threading.Event = field(default_factory=threading.Event)
    written: list[str] = field(default_factory=list[str])  # by which thread

    def process(self, messages: list[Message]) -> Outcome:
        def write(_: dict[Position, int]) -> None:
            self.committed.set()
            assert self.writing.wait(10)
            self._may_fail("write")
            self.written.append(threading.current_thread().name)

        return replace(super().process(messages), write=write)


def ahead(world: World, exactly_once: bool = True) -> tuple[Ahead, Loop]:
    processor = Ahead()
    loop = world.loop(processor, group_protocol="consumer", exactly_once=exactly_once)
    loop._idle_at = world.clock.now + loops.TIMED_SECONDS
    world.broker.append("eu.reviews", 0, *[b"v"] * 9)
    world.consumer.rebalance(new=places(0))
    return processor, loop


def test_the_next_batch_is_processed_while_one_is_written(world: World) -> None:
    processor, loop = ahead(world)
    loop._turn()
    processed: list[int] = []

    def process(messages: list[Message]) -> Outcome:
        processed.append(len(processor.written))
        processor.writing.set()
        return Ahead.process(processor, messages)

    with patch.object(processor, "process", process):
        loop._turn()
    assert processed == [0]  # nothing had been written by then
    assert processor.finished == [{("journal", 0): 1}]  # one; that of the second is under way
    loop._settle()
    assert processor.finished == [{("journal", 0): 1}, {("journal", 0): 2}]
    assert all(name.startswith("counting" + loops.COMMITS) for name in processor.written)
    assert len(answered(world)) == 6
    assert world.broker.committed["eu.reviews", 0] == 6


def test_offsets_are_noted_while_a_batch_is_processed(world: World) -> None:
    processor, loop = ahead(world)
    processor.writing.set()
    producer, noted = world.broker.producers[0], threading.Event()
    note = producer.send_offsets_to_transaction

    def send(*arguments: Any) -> None:
        note(*arguments)
        noted.set()

    def process(messages: list[Message]) -> Outcome:
        assert noted.wait(10)
        assert producer.begun
        noted.clear()
        return Ahead.process(processor, messages)

    with (
        patch.object(producer, "send_offsets_to_transaction", send),
        patch.object(processor, "process", process),
    ):
        loop._turn()
        loop._turn()
    loop._settle()
    assert len(answered(world)) == 6


def test_who_waits_for_a_commit_anyway_gathers_until_then(world: World) -> None:
    processor, loop = ahead(world)
    processor.linger_seconds = 0.25
    loop._turn()
    assert world.consumer.waits[-1] == 0.125  # nothing is under way; a broker has waited as long
    loop._overlap.ended(0.25)  # a mean of 0.05
    world.consumer.between += [lambda: None, processor.writing.set]  # once it has been asked
    loop._turn()
    assert world.consumer.waits[-1] == pytest.approx(0.05)


def test_what_stands_on_an_aborted_transaction_is_not_sent(world: World) -> None:
    processor, loop = ahead(world)
    processor.writing.set()
    world.broker.fail(
        "commit_transaction", failure(KafkaError._INCONSISTENT, txn_requires_abort=True)
    )
    loop._turn()
    loop._turn()
    assert (answered(world), loop.live) == ([], frozenset())
    assert (processor.written, processor.finished) == ([], [])
    world.turn(loop, 4)
    assert len(answered(world)) == len(set(answered(world))) == 9
    assert world.broker.committed["eu.reviews", 0] == 9


def test_what_stands_on_states_that_were_not_written_is_done_again(world: World) -> None:
    processor, loop = ahead(world)
    processor.writing.set()
    processor.errors["write"] = [StoreError("gone")]
    loop._turn()
    loop._turn()
    assert len(answered(world)) == 3  # committed, and the journal has it
    assert (loop.live, world.broker.producers[0].begun) == (frozenset(), False)
    world.turn(loop, 4)
    assert processor.claims[-1] == (0, {"reviews": 3, "behavior": -1})
    assert len(answered(world)) == len(set(answered(world))) == 9


def test_a_revoked_partition_goes_once_it_is_written(world: World) -> None:
    processor, loop = ahead(world)
    loop._turn()
    assert processor.committed.wait(10)
    threading.Timer(0.05, processor.writing.set).start()
    world.consumer.rebalance(gone=places(0))
    assert processor.drops[-1] == {0}
    assert (len(processor.written), processor.finished) == (1, [{("journal", 0): 1}])


def test_a_claim_waits_for_what_is_under_way(world: World) -> None:
    processor, loop = ahead(world)
    loop._turn()
    assert processor.committed.wait(10)
    threading.Timer(0.05, processor.writing.set).start()
    world.consumer.rebalance(new=places(1))
    written: list[int] = []
    claim = processor.claim

    def watched(committed: Offsets) -> Offsets:
        written.append(len(processor.written))
        return claim(committed)

    with patch.object(processor, "claim", watched):
        loop._turn()
    assert written == [1]


def test_timed_work_is_not_put_off_by_a_backlog(world: World) -> None:
    processor, loop = ahead(world)
    processor.writing.set()
    world.turn(loop)  # each turn takes longer than TIMED_SECONDS on this clock
    assert processor.idles == 1
    assert len(processor.written) == 1  # timed work finds nothing under way
    loop._turn()
    assert processor.idles == 1
    world.turn(loop)
    assert processor.idles == 2


def test_a_worker_that_stops_ends_what_is_under_way(world: World) -> None:
    processor, loop = ahead(world)
    processor.writing.set()
    processor.batch_size = 9
    world.consumer.between.extend([lambda: None, world.stop.set])  # before another turn ends it
    loop.run()
    assert len(answered(world)) == 9
    assert len(processor.finished) == 1
    assert processor.closes == 1


def test_the_end_of_a_partition_begins_no_batch(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends come after each fetch: a batch that began with one would be gathered from then on."""
    loop = world.loop(Counting(batch_size=10))
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    consume, asked = world.consumer.consume, list[int]()

    def counted(count: int, seconds: float) -> list[Message]:
        asked.append(count)
        return consume(count, seconds)

    monkeypatch.setattr(world.consumer, "consume", counted)
    end = KafkaError(KafkaError._PARTITION_EOF)
    world.consumer.errors.append(Message("eu.reviews", partition=0, offset=0, error=end))
    world.turn(loop)
    assert asked == [1]
    fill(world, 1, 0)
    world.turn(loop)
    assert asked == [1, 1, 9]
