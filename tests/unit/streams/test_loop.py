"""The loop against a scripted Kafka; `tests/integration/test_pipeline.py` has it on a real one."""

import threading
from collections.abc import Sequence
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
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from schemas.exceptions import UnreachableError
from schemas.topics import LARGEST_MESSAGE
from streams import loop as loops
from streams import membership
from streams.admin import TopicError
from streams.clients import KafkaOptionError
from streams.config import KafkaConfig
from streams.exceptions import (
    BrokerError,
    FencedError,
    LeftOutError,
    StoreAheadError,
    StoreError,
)
from streams.loop import Loop
from streams.metrics import make_metrics
from streams.processor import CLAIM_SECONDS, Offsets, Outcome, Output, Position
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
    assert world.value("rebalances_total", processor="counting") == 2


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


def test_what_was_claimed_and_could_not_be_begun_is_dropped(world: World) -> None:
    processor = Counting(starts={"reviews": 0, "behavior": 0})
    loop = world.loop(processor)
    fill(world, 2, 0)
    world.broker.fail("watermarks", failure(KafkaError._TRANSPORT))
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    assert (len(processor.claims), processor.drops, loop.live) == (1, [{0}], frozenset())
    world.consumer.rebalance(gone=places(0))  # a claim that stayed would be looked after for ever
    assert processor.drops == [{0}, {0}]


def test_topics_that_have_got_more_partitions_end_the_worker(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grown(_: KafkaConfig) -> None:
        raise TopicError("more partitions than the settings say")

    monkeypatch.setattr(loops, "check_topics", grown)
    loop = world.loop(Counting(), group_protocol="consumer", partitions=4)
    world.consumer.rebalance(new=places(3))
    world.turn(loop)
    assert loop.live
    world.consumer.rebalance(new=places(4))
    with pytest.raises(TopicError):
        world.turn(loop)


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
    processor = Counting(slow={1, 2})
    loop = world.loop(processor)
    fill(world, 1, 0, 1, 2, 3)
    world.consumer.rebalance(new=places(0, 1, 2, 3))
    world.turn(loop)
    assert [partition for partition, _ in processor.claims] == [0, 1, 2, 3]
    assert {partition for _, partition in loop.live} == {0, 3}
    assert len(answered(world)) == 4
    processor.slow = {2}
    world.turn(loop, 2)
    assert [partition for partition, _ in processor.claims[4:]] == [1, 2, 2]
    assert (len(answered(world)), loop.waiting) == (6, True)


def test_a_partition_that_cannot_be_had_keeps_none_from_the_others(world: World) -> None:
    class Refused(Counting):
        def claim(self, committed: Offsets) -> Offsets:
            if 1 in committed:
                raise StoreError("its part of the store does not answer")
            return super().claim(committed)

    loop = world.loop(Refused())
    fill(world, 1, 0, 1, 2)
    world.consumer.rebalance(new=places(0, 1, 2))
    world.turn(loop)
    assert not loop.live  # they were asked for together
    world.turn(loop)
    assert {partition for _, partition in loop.live} == {0, 2}
    assert loop.waiting


def test_a_partition_that_takes_long_to_be_refused_holds_up_the_others_less_and_less(
    world: World,
) -> None:
    class Slow(Counting):
        def claim(self, committed: Offsets) -> Offsets:
            if 0 in committed:
                world.clock.now += CLAIM_SECONDS + 1
                raise StoreError("its part of the store does not answer in time")
            return super().claim(committed)

    loop = world.loop(Slow())
    world.consumer.rebalance(new=places(0, 1, 2))
    with capture_logs() as logs:
        world.turn(loop, 3)
        assert {partition for _, partition in loop.live} == {1, 2}
        for _ in range(4):
            fill(world, 1, 1)
            world.turn(loop)
    waits = [line["seconds"] for line in logs if line["event"] == "paused"]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]


def test_claims_one_by_one_leave_time_to_poll(world: World) -> None:
    processor = Counting(errors={"claim": [StoreError("does not answer")]})
    loop = world.loop(processor)
    world.consumer.rebalance(new=places(0, 1, 2, 3))
    world.turn(loop)
    processor.claims.clear()
    world.clock.each = CLAIM_SECONDS
    world.turn(loop)
    assert [partition for partition, _ in processor.claims] == [0]
    world.turn(loop, 3)
    assert [partition for partition, _ in processor.claims] == [0, 1, 2, 3]


def test_what_is_assigned_waits_for_no_claim_that_failed_before(world: World) -> None:
    processor = Counting(errors={"claim": [StoreError("does not answer")]})
    loop = world.loop(processor)
    world.consumer.rebalance(new=places(0))
    loop._turn()
    loop._turn()
    assert (len(processor.claims), loop.live) == (1, frozenset())
    world.consumer.rebalance(gone=places(0), new=places(0))
    loop._turn()
    assert loop.live == {("reviews", 0), ("behavior", 0)}


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


@pytest.mark.parametrize(("start", "done"), [(2, 0), (2, 2), (0, 1)])
def test_a_consumer_that_goes_back_to_where_its_assignment_began_repeats_nothing(
    world: World, start: int, done: int
) -> None:
    """Seen with librdkafka 2.16 on a busy machine: the answer to its first query undoes a seek."""
    loop = world.loop(Counting(batch_size=10))
    world.broker.append("eu.reviews", 0, b"a", b"b", b"c", b"d")
    world.broker.committed["eu.reviews", 0] = start
    world.consumer.rebalance(new=places(0))

    def go_back() -> None:
        world.consumer.positions["eu.reviews", 0] = 0

    world.consumer.between.extend([lambda: None] * (done > 0) + [go_back])
    with capture_logs() as logs:
        world.turn(loop, 3)
    assert answered(world) == [b"eu.reviews/0/%d" % offset for offset in range(start, 4)]
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


def test_what_cannot_be_mended_by_waiting_ends_the_worker(world: World) -> None:
    processor = Counting(errors={"claim": [StoreAheadError("offsets were reset")]})
    loop = world.loop(processor)
    world.consumer.rebalance(new=places(0))
    with pytest.raises(StoreAheadError):
        world.turn(loop)


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


# -- order between topics ------------------------------------------------------------------------


@dataclass
class Reading(Counting):
    """It reads reviews, and what is read off their texts."""

    topics: Sequence[str] = ("reviews", "text-features")


def test_what_tells_of_a_review_is_read_after_it(world: World) -> None:
    """Kafka's client gives one partition far ahead of another."""
    processor = Reading()
    loop = world.loop(processor)
    both = places(0, topics=processor.topics)
    fill(world, 4, 0, topics=processor.topics)
    world.broker.times = {("eu.reviews", 0): [10, 20, 30, 40]}
    world.broker.times["eu.text-features", 0] = [12, 22, 32, 42]
    world.consumer.rebalance(new=both)
    world.consumer.most = {("eu.reviews", 0): 1}  # in each of a turn's two polls
    world.turn(loop)
    assert processor.batches == [[("reviews", 0), ("reviews", 1), ("text-features", 0)]]
    assert world.broker.committed == {("eu.reviews", 0): 2, ("eu.text-features", 0): 1}
    world.turn(loop)
    assert processor.batches[1:] == [[("reviews", 2), ("reviews", 3)]]
    world.turn(loop)  # the end of the reviews is known
    assert processor.batches[2:] == [[("text-features", at) for at in (1, 2, 3)]]
    assert world.broker.committed == {("eu.reviews", 0): 4, ("eu.text-features", 0): 4}


def test_what_waits_for_reviews_waits_no_more_for_another_worker(world: World) -> None:
    processor = Reading()
    loop = world.loop(processor)
    both = places(0, topics=processor.topics)
    fill(world, 2, 0, topics=processor.topics)
    world.broker.times = {place: [at + 10, at + 20] for at, place in enumerate(both)}
    world.consumer.rebalance(new=both)
    world.consumer.most = {("eu.reviews", 0): 0}
    world.turn(loop)
    assert (processor.batches, world.broker.committed) == ([], {})
    world.consumer.rebalance(gone=both)
    world.turn(loop)
    world.consumer.most = {}
    world.consumer.rebalance(new=both)
    world.turn(loop, 2)
    assert [len(batch) for batch in processor.batches] == [4]


def test_a_partition_that_cannot_be_put_back_is_claimed_again(world: World) -> None:
    processor = Reading()
    loop = world.loop(processor)
    both = places(0, topics=processor.topics)
    fill(world, 1, 0, topics=processor.topics)
    world.broker.times = {place: [at + 10] for at, place in enumerate(both)}
    world.consumer.rebalance(new=both)
    world.consumer.most = {("eu.reviews", 0): 0}
    world.consumer.between.append(lambda: world.broker.fail("seek", failure(KafkaError._STATE)))
    world.turn(loop)
    assert loop.live == frozenset()
    world.consumer.most = {}
    world.turn(loop, 2)
    assert processor.batches == [[("reviews", 0), ("text-features", 0)]]


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
    world.consumer.errors.extend(
        Message(topic="eu.reviews", partition=0, error=KafkaError(code)) for code in codes
    )
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


def test_what_cannot_be_decompressed_is_told_with_its_place(world: World) -> None:
    loop = world.loop(Counting())
    world.consumer.rebalance(new=places(0))
    error = KafkaError(KafkaError._BAD_COMPRESSION, "Decompression failed")
    world.consumer.errors.append(Message("eu.reviews", partition=0, offset=7, error=error))
    with capture_logs() as logs:
        world.turn(loop)
    (told,) = [line for line in logs if line["log_level"] == "error"]
    assert told["where"] == "eu.reviews partition 0 offset 7"
    assert "docs/operate.md" in told["do"]


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


def test_what_waits_for_a_worker_that_is_paused_is_lag_too(world: World) -> None:
    processor = Counting(errors={"claim": [StoreError("the store is gone")] * 3})
    loop = world.loop(processor)
    fill(world, 5, 0)
    world.broker.committed = {("eu.reviews", 0): 3}
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    assert (loop.live, processor.lag) == (frozenset(), 2 + 5)
    labels = {"processor": "counting", "topic": "reviews", "partition": "0"}
    assert world.value("lag", **labels) is None  # `StarcastPartitionsPaused` counts on it
    fill(world, 1, 0)
    world.turn(loop)
    assert processor.lag == 3 + 6
    world.broker.fail("watermarks", failure(KafkaError._TRANSPORT))
    world.turn(loop)
    assert processor.lag == 3 + 6  # until Kafka tells
    world.turn(loop)
    assert (len(loop.live), processor.lag) == (2, 0)


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


@pytest.fixture
def alone(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Members that Kafka, of whose groups each has settled without them, is asked about."""
    asked: list[str] = []
    monkeypatch.setattr(membership, "time", world.clock)
    monkeypatch.setattr(membership, "left_out", lambda *about: asked.append(about[2]) or True)
    return asked


def test_a_worker_that_its_group_goes_on_without_ends(
    world: World, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its client hangs."""
    monkeypatch.setattr(loops, "LEAVE_SECONDS", 0.1)
    loop, consumer, answered_at_last = world.loop(Counting()), world.consumer, threading.Event()
    monkeypatch.setattr(consumer, "close", answered_at_last.wait)

    def pass_by() -> None:
        world.clock.now += 10

    consumer.between.extend([*[pass_by] * 60, world.stop.set])
    with pytest.raises(LeftOutError, match="counting goes on without this worker"):
        loop.run()
    answered_at_last.set()
    assert alone == ["member", "member"]
    assert len(consumer.between) == 61 - 40  # 366 s, and 30 s more


def test_a_worker_with_partitions_is_not_asked_about(world: World, alone: list[str]) -> None:
    loop = world.loop(Counting())
    world.consumer.rebalance(new=places(0))
    world.turn(loop, 100)
    world.consumer.rebalance(gone=places(0))
    world.turn(loop, 36)  # of ten seconds each
    assert alone == []
    world.turn(loop, 1)
    assert alone == ["member"]


def test_a_run_that_fails_writes_nothing_more(world: World) -> None:
    processor = Counting(errors={"process": [ZeroDivisionError()]})
    loop = world.loop(processor)
    fill(world, 3, 0)
    world.consumer.between.append(lambda: world.consumer.rebalance(new=places(0)))
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert (processor.closes, world.consumer.closed) == (0, True)
    assert processor.drops[-1] == {0}


def test_a_consumer_is_set_up_for_exactly_once(world: World) -> None:
    options = {"isolation_level": "read_uncommitted", "enable_auto_commit": "true"}
    world.loop(Counting(), options=options)
    consumer = world.consumer.config
    assert consumer["isolation.level"] == "read_committed"
    assert consumer["enable.auto.commit"] is False
    assert consumer["fetch.max.bytes"] >= LARGEST_MESSAGE
    assert consumer["partition.assignment.strategy"] == "range"
    world.loop(Counting(), group_protocol="consumer", exactly_once=False)
    consumer = world.consumer.config
    assert (consumer["group.protocol"], consumer["group.remote.assignor"]) == ("consumer", "range")
    assert "session.timeout.ms" not in consumer


def test_options_that_do_not_go_together_are_named() -> None:
    kafka = KafkaConfig(options={"max.poll.interval.ms": "5000"})
    with pytest.raises(KafkaOptionError, match=r"max\.poll\.interval\.ms"):
        Loop(Counting(), kafka, make_metrics(CollectorRegistry()), threading.Event())


def test_brokers_gather_for_half_of_the_wait(world: World) -> None:
    def gathered(linger: float) -> tuple[int, int]:
        world.loop(Counting(linger_seconds=linger))
        config = world.consumer.config
        return config["fetch.min.bytes"], config["fetch.wait.max.ms"]

    assert gathered(0.5) == (262_144, 250)
    assert gathered(0.02) == (262_144, 10)
    assert gathered(0.005) == (1, 100)  # a shopper waits


def test_brokers_gather_longer_where_a_fetch_names_many_partitions(world: World) -> None:
    def waited(linger: float, partitions: int) -> int:
        world.loop(Counting(linger_seconds=linger), partitions=partitions)
        return world.consumer.config["fetch.wait.max.ms"]

    topics = len(Counting().topics)
    assert waited(0.02, 300) == 30 * topics
    assert waited(0.5, 300) == 250
    assert waited(0.02, 4_000) == 100


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
