"""What a loop sends, and the transactions of that, against a scripted Kafka."""

import threading

import pytest
from confluent_kafka import KafkaError, KafkaException, Message
from structlog.testing import capture_logs

from schemas.topics import LARGEST_MESSAGE
from streams import sender as senders
from streams.clients import KafkaOptionError
from streams.config import KafkaConfig
from streams.exceptions import BrokerError
from streams.processor import Outcome, OutputBatch, Position
from streams.sender import TRANSACTION_SECONDS, Sender
from tests.unit.streams.looped import (
    ABORTS,
    Counting,
    World,
    answered,
    fenced,
    fill,
    places,
)
from tests.unit.streams.scripted_kafka import failure


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


@pytest.mark.parametrize(
    "error",
    [fenced(), failure(KafkaError._INCONSISTENT, txn_requires_abort=True)],
    ids=["Kafka ended it", "records ran out of time"],
)
@pytest.mark.parametrize("step", ["produce", "commit_transaction"])
def test_what_was_open_for_too_long_is_tried_again_in_halves(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str, error: KafkaException
) -> None:
    processor = Counting()
    loop = world.loop(processor)
    send = loop._sender.send

    def slow(outcome: Outcome) -> dict[Position, int]:
        seconds = len(outcome.batches[0].messages)  # one each
        world.clock.now += seconds
        if seconds > TRANSACTION_SECONDS:
            world.broker.fail(step, error)
        return send(outcome)

    monkeypatch.setattr(loop._sender, "send", slow)
    fill(world, 30, 0, topics=["reviews"])
    world.consumer.rebalance(new=places(0))
    with capture_logs() as logs:
        world.turn(loop, 7)
    assert [len(batch) for batch in processor.batches] == [30, 15, 7, 7, 7, 7, 2]
    assert len(answered(world)) == len(set(answered(world))) == 30
    slow_ones = [line for line in logs if line["event"] == "a transaction was too slow"]
    assert [(line["records"], line["seconds"]) for line in slow_ones] == [(30, 30), (15, 15)]


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


def test_without_transactions_the_journal_comes_once_all_else_is_delivered(world: World) -> None:
    """It says that the batch is done: a worker that ended in between would leave out the rest."""
    loop = world.loop(Counting(), exactly_once=False)
    fill(world, 1, 0, topics=["reviews"])
    world.consumer.rebalance(new=places(0))
    world.broker.fail("deliver", failure(KafkaError._MSG_TIMED_OUT))
    world.turn(loop)
    assert world.broker.outputs == []
    world.turn(loop)
    assert [topic for topic, _ in world.broker.outputs] == ["eu.predicted-ratings", "eu.journal"]


def test_what_was_not_delivered_is_worked_on_again(world: World) -> None:
    processor = Counting()
    loop = world.loop(processor, exactly_once=False)
    fill(world, 2, 0)
    world.consumer.rebalance(new=places(0))
    world.broker.fail("deliver", failure(KafkaError._MSG_TIMED_OUT))
    world.turn(loop)
    assert (processor.finished, world.broker.committed) == ([], {})
    assert len(world.broker.producers) == 2  # the first may still hold some of it
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


@pytest.mark.parametrize(
    "options",
    [{"acks": "1"}, {"message.timeout.ms": "300000"}, {"max.in.flight": "10"}, {"retries": "0"}],
)
def test_options_that_exactly_once_forbids_are_named(options: dict[str, str]) -> None:
    with pytest.raises(KafkaOptionError, match=next(iter(options))):
        Sender(KafkaConfig(options=options), "scorer", 0, True, threading.Event())


def test_a_producer_is_set_up_for_exactly_once(world: World) -> None:
    world.loop(Counting())
    producer = world.broker.producers[-1].config
    assert producer["transactional.id"].startswith("eu.starcast-counting-")
    assert producer["transactional.id"].endswith("-0")
    assert producer["transaction.timeout.ms"] == 10_000
    assert producer["retry.backoff.ms"] == 10
    assert producer["partitioner"] == "murmur2_random"
    assert producer["message.max.bytes"] == LARGEST_MESSAGE
    world.loop(Counting(), exactly_once=False)
    producer = world.broker.producers[-1].config
    assert not {"transactional.id", "retry.backoff.ms"} & producer.keys()
    assert producer["enable.idempotence"] is True
