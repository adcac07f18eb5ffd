"""The loop against a scripted Kafka; `tests/integration/test_pipeline.py` has it on a real one."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
from confluent_kafka import KafkaError, KafkaException, Message
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from schemas.exceptions import UnreachableError
from schemas.topics import LARGEST_MESSAGE
from streams import loop as loops
from streams import sender as senders
from streams.config import KafkaConfig
from streams.exceptions import BrokerError, FencedError, StoreAheadError, StoreError
from streams.loop import Loop
from streams.metrics import Metrics, make_metrics
from streams.processor import Outcome, Output, OutputBatch, Position
from tests.unit.streams.scripted_kafka import Broker, Place, ScriptedConsumer, failure

TOPICS = ("reviews", "behavior")


@dataclass
class Clock:
    """Stands in for the loop's `time`."""

    now: float = 1_000.0
    each: float = 0.0  # passes with every look

    def monotonic(self) -> float:
        self.now += self.each
        return self.now


@dataclass
class Counting:
    """A processor whose state of a partition is the next offset of each topic.

    Strict: it takes a message only where its state stands, so a message that is skipped, doubled,
    or of a partition that it has not claimed fails the test.
    """

    topics: Sequence[str] = TOPICS
    together: bool = True
    transactional: bool = True
    batch_size: int = 100
    name: str = "counting"
    linger_seconds: float = 0.0
    lag: int = 0
    errors: dict[str, list[Exception]] = field(default_factory=dict[str, list[Exception]])
    outputs: list[Output] | None = None  # in place of those that the messages make
    starts: dict[str, int] = field(default_factory=dict[str, int])  # in place of the committed
    states: dict[Position, int] = field(default_factory=dict[Position, int])
    claims: list[tuple[int, dict[str, int]]] = field(
        default_factory=list[tuple[int, dict[str, int]]]
    )
    drops: list[set[int]] = field(default_factory=list[set[int]])
    batches: list[list[Place]] = field(default_factory=list[list[Place]])
    finished: list[dict[Position, int]] = field(default_factory=list[dict[Position, int]])
    idles: int = 0
    closes: int = 0

    def claim(self, partition: int, committed: dict[str, int]) -> dict[str, int]:
        self.claims.append((partition, committed))
        self._may_fail("claim")
        starts = {topic: self.starts.get(topic, at) for topic, at in committed.items()}
        for topic, start in starts.items():
            self.states[topic, partition] = max(start, 0)
        return starts

    def drop(self, partitions: Iterable[int]) -> None:
        gone = set(partitions)
        self.drops.append(gone)
        self.states = {place: at for place, at in self.states.items() if place[1] not in gone}

    def process(self, messages: list[Message]) -> Outcome:
        self._may_fail("process")
        places: list[Place] = []
        for message in messages:
            topic = str(message.topic()).removeprefix("eu.")
            place = (topic, message.partition() or 0)
            assert message.offset() == self.states[place]
            self.states[place] += 1
            places.append((topic, message.offset() or 0))
        self.batches.append(places)

        def finish(delivered: dict[Position, int]) -> None:
            self._may_fail("finish")
            self.finished.append(delivered)

        values = [
            b"%b/%d/%d" % (str(each.topic()).encode(), each.partition() or 0, each.offset() or 0)
            for each in messages
        ]
        return Outcome(
            batches=[OutputBatch("predicted-ratings", [{"value": value} for value in values])],
            outputs=self.outputs or [Output("journal", b"k", b"j", messages[0].partition() or 0)],
            tracked=frozenset({"journal"}),
            finish=finish,
        )

    def idle(self) -> Outcome | None:
        self.idles += 1
        self._may_fail("idle")
        return None

    def close(self) -> None:
        self.closes += 1
        self._may_fail("close")

    def _may_fail(self, method: str) -> None:
        if waiting := self.errors.get(method):
            raise waiting.pop(0)


@dataclass
class World:
    broker: Broker
    clock: Clock
    metrics: Metrics
    stop: threading.Event

    def loop(self, processor: Counting, **config: Any) -> Loop:
        kafka = KafkaConfig.model_validate({"topic_prefix": "eu.", "partitions": 4, **config})
        made = Loop(processor, kafka, self.metrics, self.stop)
        made._processor = processor
        self.subscribe(made)
        return made

    def subscribe(self, loop: Loop) -> None:
        """What `run` does before its turns."""
        loop._sender.start()
        names = [f"eu.{topic}" for topic in loop._processor.topics]
        self.consumer.subscribe(names, loop._on_assign, loop._on_revoke, loop._on_revoke)

    @property
    def consumer(self) -> ScriptedConsumer:
        return self.broker.consumers[-1]

    def turn(self, loop: Loop, turns: int = 1) -> None:
        for _ in range(turns):
            self.clock.now += 10
            loop._turn()

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"starcast_{name}", labels)


@pytest.fixture
def world() -> Iterator[World]:
    broker, clock = Broker(), Clock()
    with (
        patch.object(loops, "Consumer", broker.consumer),
        patch.object(senders, "Producer", broker.producer),
        patch.object(loops, "time", clock),
        patch.object(senders, "time", clock),
    ):
        yield World(broker, clock, make_metrics(CollectorRegistry()), threading.Event())


def places(*partitions: int, topics: Sequence[str] = TOPICS) -> list[Place]:
    return [(f"eu.{topic}", partition) for topic in topics for partition in partitions]


def fill(world: World, count: int, *partitions: int, topics: Sequence[str] = TOPICS) -> None:
    for topic, partition in places(*partitions, topics=topics):
        world.broker.append(topic, partition, *[b"v"] * count)


def answered(world: World) -> list[bytes | None]:
    return [value for topic, value in world.broker.outputs if topic == "eu.predicted-ratings"]


# -- ownership -----------------------------------------------------------------------------------


def test_topics_wanted_together_wait_for_each_other(world: World) -> None:
    processor = Counting()
    loop = world.loop(processor, group_protocol="consumer")
    fill(world, 2, 0, 1)
    world.consumer.rebalance(new=places(0, topics=["reviews"]))
    world.turn(loop)
    assert (processor.claims, loop.live, loop.waiting) == ([], frozenset(), False)
    world.consumer.rebalance(new=places(0, topics=["behavior"]))
    assert loop.waiting
    world.turn(loop)
    assert processor.claims == [(0, {"reviews": -1, "behavior": -1})]
    assert loop.live == {("reviews", 0), ("behavior", 0)}
    assert not loop.waiting
    assert len(answered(world)) == 4


def test_topics_apart_are_claimed_as_they_come(world: World) -> None:
    processor = Counting(together=False)
    loop = world.loop(processor, group_protocol="consumer")
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0, topics=["reviews"]))
    world.turn(loop)
    world.consumer.rebalance(new=places(0, topics=["behavior"]))
    world.turn(loop)
    assert [sorted(topics) for _, topics in processor.claims] == [["reviews"], ["behavior"]]
    assert len(answered(world)) == 4


def test_a_topic_that_goes_takes_its_partition_along(world: World) -> None:
    processor = Counting(together=False)
    loop = world.loop(processor, group_protocol="consumer")
    world.consumer.rebalance(new=places(0, 1))
    world.turn(loop)
    world.consumer.rebalance(gone=places(0, topics=["reviews"]))
    assert processor.drops[-1] == {0}
    assert loop.live == {("reviews", 1), ("behavior", 1)}
    world.turn(loop)
    assert [sorted(topics) for _, topics in processor.claims[2:]] == [["behavior"]]
    assert loop.live == {("behavior", 0), ("reviews", 1), ("behavior", 1)}


def test_a_store_that_is_ahead_of_offsets_that_have_moved_is_not_called_ahead(world: World) -> None:
    """A worker that slept after it had asked for the offsets compares with old ones."""

    class Ahead(Counting):
        def claim(self, partition: int, committed: dict[str, int]) -> dict[str, int]:
            starts = super().claim(partition, committed)
            if len(self.claims) == 1:
                world.broker.committed["eu.reviews", 0] = 2  # by another, meanwhile
            if committed["reviews"] < 2:
                raise StoreAheadError("the store has applied 2")
            return starts

    processor = Ahead()
    loop = world.loop(processor)
    fill(world, 3, 0)
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    assert [committed["reviews"] for _, committed in processor.claims] == [-1, 2]
    assert loop.live
    world.broker.committed["eu.reviews", 0] = 1  # an operator's reset stays an error
    world.consumer.rebalance(gone=places(0), new=places(0))
    with pytest.raises(StoreAheadError):
        world.turn(loop)


def test_retention_that_passes_a_start_while_it_is_claimed_costs_nothing(world: World) -> None:
    """The processor takes from the archive what left Kafka, when it claims again."""

    class Archived(Counting):
        def claim(self, partition: int, committed: dict[str, int]) -> dict[str, int]:
            start = world.broker.first.get(("eu.reviews", 0), 1)  # as far as the archive was needed
            self.starts = {"reviews": start, "behavior": 0}
            world.broker.first["eu.reviews", 0] = 4  # just after
            return super().claim(partition, committed)

    processor = Archived()
    loop = world.loop(processor)
    fill(world, 6, 0)
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    assert len(processor.claims) == 2
    assert processor.batches[0][-2:] == [("reviews", 4), ("reviews", 5)]
    lost = {"processor": "counting", "topic": "reviews", "partition": "0"}
    assert world.value("lost_records_total", **lost) is None


def test_what_was_claimed_and_could_not_be_begun_is_dropped(world: World) -> None:
    processor = Counting(starts={"reviews": 0, "behavior": 0})
    loop = world.loop(processor)
    fill(world, 2, 0)
    world.broker.fail("get_watermark_offsets", failure(KafkaError._TRANSPORT))
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    assert (len(processor.claims), processor.drops, loop.live) == (1, [{0}], frozenset())
    world.consumer.rebalance(gone=places(0))  # a claim that stayed would be looked after for ever
    assert processor.drops == [{0}, {0}]


def test_work_goes_on_from_the_committed_offsets(world: World) -> None:
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 5, 0)
    world.broker.committed = {("eu.reviews", 0): 3, ("eu.behavior", 0): 1}
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    assert processor.claims == [(0, {"reviews": 3, "behavior": 1})]
    assert processor.batches == [
        [*(("behavior", offset) for offset in range(1, 5)), ("reviews", 3), ("reviews", 4)]
    ]
    assert world.broker.committed == {("eu.reviews", 0): 5, ("eu.behavior", 0): 5}


@pytest.mark.parametrize("lost", [False, True], ids=["revoked", "lost"])
def test_a_partition_that_goes_in_mid_poll_takes_its_messages_along(
    world: World, lost: bool
) -> None:
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 3, 0, 1)
    world.consumer.rebalance(new=places(0, 1))
    world.turn(loop)
    fill(world, 3, 0, 1)
    again = places(0, 1)
    world.consumer.between.extend(
        [lambda: None, lambda: world.consumer.rebalance(gone=again, new=again, lost=lost)]
    )
    world.turn(loop)
    assert len(answered(world)) == 12  # what was polled before the rebalance is not worked on
    assert loop.live == frozenset()
    world.turn(loop)
    assert len(answered(world)) == 24
    assert len(set(answered(world))) == 24


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


def test_a_worker_with_much_to_recover_polls_in_between(world: World) -> None:
    processor = Counting()
    loop = world.loop(processor)
    world.consumer.rebalance(new=places(0, 1, 2, 3))
    world.clock.each = loops.CLAIM_SECONDS
    world.turn(loop)
    assert [partition for partition, _ in processor.claims] == [0]
    world.turn(loop, 3)
    assert [partition for partition, _ in processor.claims] == [0, 1, 2, 3]


def test_a_seek_that_comes_too_early_is_soon_repeated(world: World) -> None:
    processor = Counting()
    loop = world.loop(processor)
    world.consumer.rebalance(new=places(0))
    world.broker.fail("seek", failure(KafkaError._STATE))
    with capture_logs() as logs:
        loop._turn()
        assert loop.live == frozenset()
        world.clock.now += 0.03
        loop._turn()
    assert loop.live == {("reviews", 0), ("behavior", 0)}
    assert logs == []


@pytest.mark.parametrize("done", [0, 2])
def test_a_consumer_that_goes_back_to_where_its_assignment_began_repeats_nothing(
    world: World, done: int
) -> None:
    """Seen with librdkafka 2.16 on a busy machine: the answer to its first query undoes a seek."""
    loop = world.loop(Counting(batch_size=10))
    world.broker.append("eu.reviews", 0, b"a", b"b", b"c", b"d")
    world.broker.committed["eu.reviews", 0] = 2
    world.consumer.rebalance(new=places(0))

    def go_back() -> None:
        world.consumer.positions["eu.reviews", 0] = 0

    world.consumer.between.extend([lambda: None] * (done > 0) + [go_back])
    with capture_logs() as logs:
        world.turn(loop, 3)
    assert answered(world) == [b"eu.reviews/0/2", b"eu.reviews/0/3"]
    assert world.broker.committed["eu.reviews", 0] == 4
    assert [(each["event"], each["partitions"]) for each in logs] == [("went back", [0])]


@pytest.mark.parametrize(
    "error",
    [
        StoreError("the store is gone"),
        FencedError("claimed"),
        UnreachableError("the archive is gone"),
        failure(KafkaError._TRANSPORT),
    ],
)
def test_a_claim_that_fails_is_tried_again_later_and_later(world: World, error: Exception) -> None:
    processor = Counting(errors={"claim": [error] * 8})
    loop = world.loop(processor)
    fill(world, 1, 0)
    world.consumer.rebalance(new=places(0))
    waits: list[float] = []
    with capture_logs() as logs:
        while not loop.live:
            started, tries = world.clock.now, len(processor.claims)
            while len(processor.claims) == tries:
                world.clock.now += 0.01
                loop._turn()
            waits.append(world.clock.now - started)
    assert waits[1:] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5], abs=0.02)
    assert [line["seconds"] for line in logs if line["event"] == "paused"] == pytest.approx(
        [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]
    )
    assert len(answered(world)) == 2


def test_offsets_that_kafka_does_not_tell_are_waited_for_and_told(world: World) -> None:
    loop = world.loop(Counting())
    world.consumer.rebalance(new=places(0))
    world.broker.fail("committed", failure(KafkaError._TIMED_OUT))
    with capture_logs() as logs:
        world.turn(loop)
        assert loop.live == frozenset()
        world.turn(loop)
    assert loop.live == {("reviews", 0), ("behavior", 0)}
    (paused,) = [line for line in logs if line["event"] == "paused"]
    assert "a transaction hangs" in paused["reason"]


def test_what_cannot_be_mended_by_waiting_ends_the_worker(world: World) -> None:
    processor = Counting(errors={"claim": [StoreAheadError("offsets were reset")]})
    loop = world.loop(processor)
    world.consumer.rebalance(new=places(0))
    with pytest.raises(StoreAheadError):
        world.turn(loop)


def test_a_position_past_the_end_is_refused(world: World) -> None:
    processor = Counting(starts={"reviews": 4}, transactional=False)
    loop = world.loop(processor)
    fill(world, 3, 0)
    world.consumer.rebalance(new=places(0))
    with pytest.raises(
        StoreAheadError,
        match=r"counting .* eu.reviews partition 0 up to offset 4, but it ends at 3.*made anew",
    ):
        world.turn(loop)


def test_a_position_that_retention_has_passed_is_told(world: World) -> None:
    processor = Counting(starts={"reviews": 1}, transactional=False)
    loop = world.loop(processor)
    fill(world, 9, 0)
    world.broker.first["eu.reviews", 0] = 5
    processor.states["reviews", 0] = 5
    world.consumer.rebalance(new=places(0))
    claim = processor.claim

    def claim_and_move(partition: int, committed: dict[str, int]) -> dict[str, int]:
        starts = claim(partition, committed)
        processor.states["reviews", 0] = 5  # whose first message will be the one that is left
        return starts

    with capture_logs() as logs, patch.object(processor, "claim", claim_and_move):
        world.turn(loop)
    assert processor.batches[0][-4:] == [("reviews", offset) for offset in range(5, 9)]
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert (line["where"], line["first"], line["left"]) == ("eu.reviews partition 0", 1, 5)
    lost = {"processor": "counting", "topic": "reviews", "partition": "0"}
    assert world.value("lost_records_total", **lost) == 4


def test_retention_that_passes_a_running_worker_ends_it(world: World) -> None:
    """librdkafka does not seek in a partition whose position was out of range."""
    loop = world.loop(Counting())
    fill(world, 3, 0)
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    gone = KafkaError(KafkaError._AUTO_OFFSET_RESET)
    world.consumer.errors.append(Message(topic="eu.reviews", partition=1, error=gone))
    world.turn(loop)  # of no concern here
    world.consumer.errors.append(Message(topic="eu.reviews", partition=0, error=gone))
    with pytest.raises(BrokerError, match=r"Retention .* eu.reviews partition 0.* the archive"):
        world.turn(loop)


def test_without_exactly_once_the_ends_of_partitions_are_not_asked_for(world: World) -> None:
    processor = Counting(starts={"reviews": 3})
    loop = world.loop(processor, exactly_once=False)
    world.broker.fail("get_watermark_offsets", failure(KafkaError._TRANSPORT))
    world.consumer.rebalance(new=places(0))
    loop._claim_pending()
    assert loop.live == {("reviews", 0), ("behavior", 0)}


# -- transactions --------------------------------------------------------------------------------


def test_records_of_a_batch_go_to_the_partitions_that_they_name(world: World) -> None:
    class Placing(Counting):
        def process(self, messages: list[Message]) -> Outcome:
            outcome = super().process(messages)
            places = [{"value": b"%d" % at, "partition": at % 3} for at in range(7)]
            outcome.batches = [OutputBatch("predicted-ratings", [*places, {"value": b"by key"}])]
            return outcome

    loop = world.loop(Placing())
    fill(world, 1, 0)
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    (producer,) = world.broker.producers
    sent = zip(answered(world), producer.partitions, strict=False)
    assert sorted(sent) == [*((b"%d" % at, at % 3) for at in range(7)), (b"by key", -1)]


def test_states_are_written_after_the_commit(world: World) -> None:
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 2, 3)
    world.consumer.rebalance(new=places(3))
    world.turn(loop)
    assert processor.finished == [{("journal", 3): 1}]
    fill(world, 1, 3)
    world.turn(loop)
    assert processor.finished[1:] == [{("journal", 3): 2}]
    assert world.broker.committed == {("eu.reviews", 3): 3, ("eu.behavior", 3): 3}


ABORTS: Mapping[str, list[KafkaException]] = {
    "begin_transaction": [failure(KafkaError._STATE)],
    "produce": [failure(KafkaError.MSG_SIZE_TOO_LARGE)],
    "produce_batch": [failure(KafkaError.MSG_SIZE_TOO_LARGE)],
    "send_offsets_to_transaction": [
        failure(KafkaError.ILLEGAL_GENERATION, txn_requires_abort=True)
    ],
    "commit_transaction": [failure(KafkaError._INCONSISTENT, txn_requires_abort=True)],
}


@pytest.mark.parametrize("step", ABORTS)
def test_an_aborted_transaction_leaves_nothing_behind(world: World, step: str) -> None:
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 3, 0, 1)
    world.consumer.rebalance(new=places(0, 1))
    world.broker.fail(step, *ABORTS[step])
    world.turn(loop)
    assert (world.broker.outputs, world.broker.committed) == ([], {})
    assert processor.finished == []
    assert processor.drops[-1] == {0, 1}
    assert not world.broker.producers[0].begun
    world.turn(loop)
    assert len(answered(world)) == len(set(answered(world))) == 12


def test_transactions_that_are_aborted_again_and_again_come_later_and_later(world: World) -> None:
    refused = failure(KafkaError._INCONSISTENT, txn_requires_abort=True)
    loop = world.loop(Counting())
    fill(world, 1, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.fail("commit_transaction", *[refused] * 5)
    with capture_logs() as logs:
        world.turn(loop, 7)
    paused = [line["seconds"] for line in logs if line["event"] == "paused"]
    assert paused == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])
    assert len(answered(world)) == 2
    world.broker.fail("commit_transaction", refused)
    fill(world, 1, 0)
    with capture_logs() as logs:
        world.turn(loop)
    assert [line["seconds"] for line in logs if line["event"] == "paused"] == [0.1]


def test_a_commit_or_an_abort_that_times_out_is_asked_for_again(world: World) -> None:
    late = [failure(KafkaError._TIMED_OUT, retriable=True)] * 2
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 1, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.fail("commit_transaction", *late)
    world.turn(loop)
    assert len(answered(world)) == 2
    fill(world, 1, 0)
    world.broker.fail("send_offsets_to_transaction", late[0])
    world.broker.fail("abort_transaction", *late)
    world.turn(loop, 2)
    assert len(answered(world)) == len(set(answered(world))) == 4


def test_a_stop_does_not_wait_for_a_broker_that_is_gone(world: World) -> None:
    loop = world.loop(Counting())
    fill(world, 1, 0)
    world.consumer.rebalance(new=places(0))
    late = [failure(KafkaError._TIMED_OUT, retriable=True)] * 3
    world.broker.fail("commit_transaction", *late)
    world.broker.fail("abort_transaction", *late)
    world.stop.set()
    world.turn(loop)  # Kafka ends the transaction by itself, or the next producer of its id does
    assert answered(world) == []
    assert loop.live == frozenset()


def fenced() -> KafkaException:
    return failure(KafkaError._FENCED, fatal=True)


@pytest.mark.parametrize("step", ["begin_transaction", "commit_transaction", "abort_transaction"])
def test_a_fenced_worker_begins_anew_with_another_producer(world: World, step: str) -> None:
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0))
    if step == "abort_transaction":
        world.broker.fail("produce", failure(KafkaError.MSG_SIZE_TOO_LARGE))
    world.broker.fail(step, fenced())
    world.turn(loop)
    assert (answered(world), processor.finished) == ([], [])
    assert [each.ready for each in world.broker.producers] == [True, True]
    world.turn(loop)
    assert len(answered(world)) == 4


def test_two_workers_with_one_transactional_id_do_not_go_on_fencing_each_other(
    world: World,
) -> None:
    loop = world.loop(Counting())
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.fail("commit_transaction", fenced(), fenced())
    world.turn(loop)
    with pytest.raises(BrokerError, match=r"Another worker uses the transactional id eu\."):
        world.turn(loop)


def test_a_producer_that_hangs_is_replaced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "HANG_SECONDS", 0.1)
    processor, released = Counting(), threading.Event()
    loop = world.loop(processor)
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0))
    monkeypatch.setattr(
        world.broker.producers[0], "send_offsets_to_transaction", lambda *_: released.wait()
    )
    with capture_logs() as logs:
        world.turn(loop)
    assert (answered(world), processor.finished) == ([], [])
    assert [each.ready for each in world.broker.producers] == [True, True]
    assert logs[-1]["reason"] == "no answer in 0.1 s"
    world.turn(loop)
    released.set()
    assert len(answered(world)) == 4


def test_a_full_queue_is_waited_for(world: World) -> None:
    loop = world.loop(Counting())
    fill(world, 5, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.producers[0].room = 3
    world.turn(loop)
    assert len(answered(world)) == len(set(answered(world))) == 10


def test_a_broker_without_transactions_is_told(world: World) -> None:
    world.broker.fail(
        "init_transactions",
        failure(KafkaError._TIMED_OUT, retriable=True),
        failure(KafkaError._UNSUPPORTED_FEATURE),
    )
    with pytest.raises(BrokerError, match="STARCAST_KAFKA__EXACTLY_ONCE=false"):
        world.loop(Counting())


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


def test_what_was_not_delivered_is_worked_on_again(world: World) -> None:
    processor = Counting()
    loop = world.loop(processor, exactly_once=False)
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.fail("deliver", failure(KafkaError._MSG_TIMED_OUT))
    world.turn(loop)
    assert (processor.finished, world.broker.committed) == ([], {})
    world.turn(loop)
    assert len(set(answered(world))) == 4


@pytest.mark.parametrize("step", ["produce", "produce_batch", "flush"])
def test_outputs_that_kafka_does_not_take_are_made_again(world: World, step: str) -> None:
    loop = world.loop(Counting(), exactly_once=False)
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.fail(step, failure(KafkaError.MSG_SIZE_TOO_LARGE))
    world.turn(loop)
    assert world.broker.committed == {}
    world.turn(loop)
    assert len(set(answered(world))) == 4
    world.broker.fail(step, failure(KafkaError._FATAL, fatal=True))
    fill(world, 1, 0)
    with pytest.raises(BrokerError, match="Kafka ended this producer"):
        world.turn(loop)


@pytest.mark.parametrize("method", ["commit", "answer commit"])
def test_offsets_that_are_not_taken_are_told(world: World, method: str) -> None:
    processor = Counting()
    loop = world.loop(processor, exactly_once=False)
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.fail(method, failure(KafkaError.REBALANCE_IN_PROGRESS))
    with capture_logs() as logs:
        world.turn(loop, 2)
    assert "offsets not committed" in [line["event"] for line in logs]
    assert len(processor.finished) == 1


# -- the rest ------------------------------------------------------------------------------------


def test_errors_of_a_poll(world: World) -> None:
    processor = Counting()
    loop = world.loop(processor)
    fill(world, 1, 0)
    world.consumer.rebalance(new=places(0))
    codes = [
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._MAX_POLL_EXCEEDED,
        KafkaError._PARTITION_EOF,
    ]
    world.consumer.errors.extend(Message(error=KafkaError(code)) for code in codes)
    with capture_logs() as logs:
        world.turn(loop)
    assert [(line["event"], line.get("do")) for line in logs if line["log_level"] == "warning"] == [
        ("topic missing", "run `starcast topics apply`, once"),
        ("poll", None),
    ]
    assert len(answered(world)) == 2
    # As it comes of a real poll: by its code, and without the flag.
    world.consumer.errors.append(Message(error=KafkaError(KafkaError._FATAL, "odd")))
    with pytest.raises(BrokerError, match="odd"):
        world.turn(loop)


def test_lag_is_that_of_the_partitions_in_work(world: World) -> None:
    processor = Counting(batch_size=2)
    loop = world.loop(processor)
    fill(world, 5, 0, 1)
    world.consumer.rebalance(new=places(0, 1))
    world.turn(loop)
    assert processor.lag == 20 - 2
    labels = {"processor": "counting", "topic": "behavior", "partition": "0"}
    assert world.value("lag", **labels) == 3
    world.consumer.rebalance(gone=places(0, 1), new=places(1))
    assert world.value("lag", **labels) is None
    world.turn(loop, 6)
    assert processor.lag == 0
    assert world.value("lag", **labels) is None


def test_a_run_ends_with_its_batch(world: World) -> None:
    processor = Counting(errors={"close": [StoreError("the archive is gone")]})
    loop = world.loop(processor)
    fill(world, 3, 0)
    consumer = world.consumer
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


def test_a_run_that_was_fenced_for_good_says_so(world: World) -> None:
    """Though its producer then refuses even to be flushed."""
    loop = world.loop(Counting())
    loop._sender._fenced_at = world.clock.now
    fill(world, 3, 0)
    world.consumer.between.append(lambda: world.consumer.rebalance(new=places(0)))
    world.broker.fail("commit_transaction", fenced())
    world.broker.fail("flush", fenced())
    with pytest.raises(BrokerError, match="Another worker uses"):
        loop.run()


def test_clients_are_set_up_for_exactly_once(world: World) -> None:
    options = {"isolation_level": "read_uncommitted", "enable_auto_commit": "true"}
    world.loop(Counting(), options=options)
    consumer, producer = world.consumer.config, world.broker.producers[-1].config
    assert consumer["isolation.level"] == "read_committed"
    assert consumer["enable.auto.commit"] is False
    assert consumer["fetch.max.bytes"] >= LARGEST_MESSAGE
    assert consumer["partition.assignment.strategy"] == "range"
    assert producer["transactional.id"].startswith("eu.starcast-counting-")
    assert producer["transactional.id"].endswith("-0")
    assert producer["transaction.timeout.ms"] == 10_000
    assert producer["partitioner"] == "murmur2_random"
    assert producer["message.max.bytes"] == LARGEST_MESSAGE
    world.loop(Counting(), group_protocol="consumer", exactly_once=False)
    consumer, producer = world.consumer.config, world.broker.producers[-1].config
    assert (consumer["group.protocol"], consumer["group.remote.assignor"]) == ("consumer", "range")
    assert "session.timeout.ms" not in consumer
    assert "transactional.id" not in producer
    assert producer["enable.idempotence"] is True


def test_brokers_gather_for_half_of_the_wait(world: World) -> None:
    def gathered(linger: float) -> tuple[int, int]:
        world.loop(Counting(linger_seconds=linger))
        config = world.consumer.config
        return config["fetch.min.bytes"], config["fetch.wait.max.ms"]

    assert gathered(0.5) == (262_144, 250)
    assert gathered(0.02) == (262_144, 10)
    assert gathered(0.005) == (1, 100)  # a shopper waits


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
        self.broker, self.clock = Broker(), Clock()
        self.patches = [
            patch.object(loops, "Consumer", self.broker.consumer),
            patch.object(senders, "Producer", self.broker.producer),
            patch.object(loops, "time", self.clock),
            patch.object(senders, "time", self.clock),
        ]
        for each in self.patches:
            each.start()
        metrics = make_metrics(CollectorRegistry())
        self.world = World(self.broker, self.clock, metrics, threading.Event())
        self.processor = Counting(batch_size=5)
        self.loop = self.world.loop(self.processor, group_protocol=self.protocol)
        self.owned: set[int] = set()

    def teardown(self) -> None:
        for each in self.patches:
            each.stop()

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


def ahead(world: World) -> tuple[Ahead, Loop]:
    processor = Ahead()
    loop = world.loop(processor, group_protocol="consumer")
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
    assert loop.live == frozenset()
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

    def watched(partition: int, committed: dict[str, int]) -> dict[str, int]:
        written.append(len(processor.written))
        return claim(partition, committed)

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
    world.consumer.between.extend([lambda: None, lambda: None, world.stop.set])
    loop.run()
    assert len(answered(world)) == 9
    assert len(processor.finished) == 1
    assert processor.closes == 1
