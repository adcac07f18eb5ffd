"""A worker's partitions against a scripted Kafka."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from confluent_kafka import KafkaError, Message
from structlog.testing import capture_logs

from schemas.exceptions import UnreachableError
from streams import loop as loops
from streams import membership, ownership
from streams.admin import TopicError
from streams.config import KafkaConfig
from streams.exceptions import (
    BrokerError,
    FencedError,
    LeftOutError,
    StoreAheadError,
    StoreError,
)
from streams.processor import CLAIM_SECONDS, Offsets
from tests.unit.streams.looped import (
    Counting,
    World,
    answered,
    fill,
    places,
)
from tests.unit.streams.scripted_kafka import failure


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

    monkeypatch.setattr(ownership, "check_topics", grown)
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
        world.turn(loop, len(codes) + 1)
    assert [(line["event"], line.get("do")) for line in logs if line["log_level"] == "warning"] == [
        ("topic missing", "run `starcast topics apply`, once"),
        ("poll", None),
    ]
    assert len(answered(world)) == 2
    # As it comes of a real poll: by its code, and without the flag.
    world.consumer.errors.append(Message(error=KafkaError(KafkaError._FATAL, "odd")))
    with pytest.raises(BrokerError, match="odd"):
        world.turn(loop)


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
