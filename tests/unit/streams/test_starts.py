"""Where a partition that is taken over is read on, by a loop in a scripted Kafka."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException
from structlog.testing import capture_logs

from streams.config import KafkaConfig
from streams.exceptions import StoreAheadError, StoreError
from streams.processor import Offsets
from streams.starts import Start, claim
from tests.unit.streams.looped import Counting, World, fill, places
from tests.unit.streams.scripted_kafka import failure

CONFIG = KafkaConfig(topic_prefix="eu.")


def test_a_store_that_is_ahead_of_offsets_that_have_moved_is_not_called_ahead(world: World) -> None:
    """A worker that slept after it had asked for the offsets compares with old ones."""

    class Ahead(Counting):
        def claim(self, committed: Offsets) -> Offsets:
            starts = super().claim(committed)
            if len(self.claims) == 1:
                world.broker.committed["eu.reviews", 0] = 2  # by another, meanwhile
            if committed[0]["reviews"] < 2:
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
        def claim(self, committed: Offsets) -> Offsets:
            start = world.broker.first.get(("eu.reviews", 0), 1)  # as far as the archive was needed
            self.starts = {"reviews": start, "behavior": 0}
            world.broker.first["eu.reviews", 0] = 4  # just after
            return super().claim(committed)

    processor = Archived()
    loop = world.loop(processor)
    fill(world, 6, 0)
    world.consumer.rebalance(new=places(0))
    world.turn(loop)
    assert len(processor.claims) == 2
    assert processor.batches[0][-2:] == [("reviews", 4), ("reviews", 5)]
    lost = {"processor": "counting", "topic": "reviews", "partition": "0"}
    assert world.value("lost_records_total", **lost) == 0  # told before there are any


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


@pytest.mark.parametrize("exactly_once", [True, False])
def test_a_position_that_retention_has_passed_is_told(world: World, exactly_once: bool) -> None:
    processor = Counting(starts={"reviews": 1}, transactional=False)
    loop = world.loop(processor, exactly_once=exactly_once)
    fill(world, 9, 0)
    world.broker.first["eu.reviews", 0] = 5
    processor.states["reviews", 0] = 5
    world.consumer.rebalance(new=places(0))
    claim = processor.claim

    def claim_and_move(committed: Offsets) -> Offsets:
        starts = claim(committed)
        processor.states["reviews", 0] = 5  # whose first message will be the one that is left
        return starts

    with capture_logs() as logs, patch.object(processor, "claim", claim_and_move):
        world.turn(loop)
    assert processor.batches[0][-4:] == [("reviews", offset) for offset in range(5, 9)]
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert (line["where"], line["first"], line["left"]) == ("eu.reviews partition 0", 1, 5)
    lost = {"processor": "counting", "topic": "reviews", "partition": "0"}
    assert world.value("lost_records_total", **lost) == 4


def test_what_is_lost_is_counted_once_however_often_it_is_claimed(world: World) -> None:
    """Where nothing came since, nothing is committed beyond it."""
    loop = world.loop(Counting())
    fill(world, 9, 0, topics=["reviews"])
    world.broker.committed["eu.reviews", 0] = 1
    lost = {"processor": "counting", "topic": "reviews", "partition": "0"}
    for first, count in ((5, 4), (5, 4), (7, 6)):
        world.broker.first["eu.reviews", 0] = first
        world.consumer.rebalance(gone=world.consumer.positions, new=places(0))
        loop._ownership._claim_pending()
        assert world.value("lost_records_total", **lost) == count


def test_without_exactly_once_the_ends_of_partitions_are_not_compared(world: World) -> None:
    """The embedded broker tells of ends that are too low."""
    loop = world.loop(Counting(starts={"reviews": 3}), exactly_once=False)
    world.consumer.rebalance(new=places(0))
    loop._ownership._claim_pending()
    assert loop._ownership.live == {("reviews", 0): 3, ("behavior", 0): OFFSET_BEGINNING}


def claimed(world: World, processor: Counting, *partitions: int) -> dict[tuple[str, int], Start]:
    consumer: Any = world.broker.consumer({})
    return claim(processor, consumer, CONFIG, {each: ["reviews"] for each in partitions})


def test_what_retention_took_is_lost_from_the_first_record_on(world: World) -> None:
    fill(world, 6, 0)
    world.broker.first["eu.reviews", 0] = 4
    processor = Counting(starts={"reviews": 0})
    assert claimed(world, processor, 0) == {("reviews", 0): Start(4, lost=4)}
    assert len(processor.claims) == 2  # the archive might have had them


@pytest.mark.parametrize(
    ("topic", "first", "lost"),
    [
        ("text-features", 6, 0),  # its last offset was of the end of a transaction
        ("text-features", 5, 1),  # there is more: nobody knows what 4 was
        ("reviews", 6, 1),
    ],
)
def test_the_end_of_a_transaction_is_not_lost(
    world: World, topic: str, first: int, lost: int
) -> None:
    world.broker.append(f"eu.{topic}", 0, *[b"v"] * 6)
    world.broker.first[f"eu.{topic}", 0] = first
    world.broker.committed[f"eu.{topic}", 0] = first - 1
    consumer: Any = world.broker.consumer({})
    starts = claim(Counting(), consumer, CONFIG, {0: [topic]})
    assert starts == {(topic, 0): Start(first, lost)}


def test_only_partitions_that_retention_has_passed_are_claimed_again(world: World) -> None:
    class Reading(Counting):
        def claim(self, committed: Offsets) -> Offsets:
            starts = super().claim(committed)
            self.slow = {1}  # the archive has long to tell
            return starts

    fill(world, 6, 0, 1)
    world.broker.committed |= {("eu.reviews", 0): 2, ("eu.reviews", 1): 2}
    world.broker.first["eu.reviews", 1] = 4
    processor = Reading()
    assert claimed(world, processor, 0, 1) == {("reviews", 0): Start(2)}
    assert [partition for partition, _ in processor.claims] == [0, 1, 1]


def test_an_input_of_which_kafka_tells_nothing_is_not_read_from_its_beginning() -> None:
    problem = KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)
    told = SimpleNamespace(topic="eu.reviews", partition=0, offset=-1001, error=problem)
    consumer: Any = SimpleNamespace(committed=lambda *_: [told])
    with pytest.raises(KafkaException) as raised:
        claim(Counting(), consumer, CONFIG, {0: ["reviews"]})
    assert raised.value.args[0] is problem


def test_of_many_inputs_without_an_answer_three_are_named(world: World) -> None:
    def error(code: int, *partitions: int) -> str:
        world.broker.fail("committed", failure(code))
        with pytest.raises((StoreError, KafkaException)) as raised:
            claimed(world, Counting(), *partitions)
        return str(raised.value)

    asked = error(KafkaError._TIMED_OUT, 0, 1, 2)
    assert "of eu.reviews partition 0, eu.reviews partition 1, eu.reviews partition 2: " in asked
    assert "partition 2 and 2 more: " in error(KafkaError._TIMED_OUT, 0, 1, 2, 3, 4)
    assert "hangs" not in error(KafkaError.GROUP_AUTHORIZATION_FAILED, 0)
