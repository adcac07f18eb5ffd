"""Loops against the broker that librdkafka has within itself."""

from collections.abc import Generator, Iterable
from typing import Any, cast

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from bench import worker
from bench.clients import produce
from bench.loop import run_bare
from bench.watch import Transaction, packed
from schemas.exceptions import StarcastError
from streams.config import KafkaConfig
from streams.processor import Offsets, Outcome

WAIT_SECONDS = 30.0
PARTITIONS = 4  # of each topic, as that broker has it


@pytest.fixture
def kafka() -> Generator[KafkaConfig]:
    home = Producer({"test.mock.num.brokers": 1, "log_level": 2})
    (broker,) = home.list_topics(timeout=WAIT_SECONDS).brokers.values()
    yield KafkaConfig(bootstrap_servers=f"{broker.host}:{broker.port}")
    home.flush(0)  # held until here, since the broker ends with it


def test_the_bare_loop_writes_each_record_where_the_scorer_did(kafka: KafkaConfig) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 2})
    for number in range(10):
        for topic in ("reviews", "behavior"):
            producer.produce(topic, b"event", b"user-%d" % number)
    producer.flush(WAIT_SECONDS)
    # A journal's key is its partition; its hash would be another. A prediction goes by its key.
    journals = [{"key": b"%d" % at, "value": b"rows", "partition": at} for at in range(PARTITIONS)]
    predicted = [{"key": b"user", "value": b"stars"}]
    outputs = {"journal": [packed(journals)], "predicted-ratings": [packed(predicted)]}

    run = run_bare(
        kafka,
        kafka.model_copy(update={"topic_prefix": "bare."}),
        [Transaction(5, outputs) for _ in range(4)],
    )

    assert run.events == 15  # the first transaction is not measured
    assert read(kafka, "bare.journal") == {at: [b"%d" % at] * 4 for at in range(PARTITIONS)}
    assert list(read(kafka, "bare.predicted-ratings").values()) == [[b"user"] * 4]


def test_a_processor_to_whom_nothing_comes_any_more_ends_the_benchmark(
    kafka: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 2})
    for _ in range(3):
        producer.produce("reviews", b"event")
    producer.flush(WAIT_SECONDS)
    monkeypatch.setattr(worker, "WAIT_SECONDS", 5.0)
    config = kafka.model_copy(update={"partitions": PARTITIONS})
    assert worker.work(lambda _: Counting(), config, 3).left == 0
    with pytest.raises(StarcastError, match=r"of 5 records were left .* Kafka and the store"):
        worker.work(lambda _: Counting(), config, 5)


class Counting:
    """A processor that makes nothing of what it reads."""

    name, topics, together, transactional = "counting", ("reviews",), False, True
    batch_size, linger_seconds, lag = 10, 0.0, 0

    def claim(self, committed: Offsets) -> Offsets:
        """Go on from what is committed."""
        return committed

    def drop(self, partitions: Iterable[int]) -> None:
        """Holds nothing."""

    def process(self, messages: list[Message]) -> Outcome:
        """Nothing."""
        return Outcome()

    def idle(self) -> Outcome | None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def test_a_bare_loop_that_drops_records_is_no_limit() -> None:
    class Full:
        def produce_batch(self, _: str, batch: list[Any], partition: int) -> int:
            return len(batch) - partition

    records = [{"key": b"user", "value": b"stars"}] * 3
    produce(cast(Producer, Full()), "journal", {0: records})
    with pytest.raises(StarcastError, match="queue is full"):
        produce(cast(Producer, Full()), "journal", {0: records, 1: records})


def read(kafka: KafkaConfig, topic: str) -> dict[int, list[bytes | None]]:
    """The keys in each partition that has any."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": "test",
            "enable.partition.eof": True,
            "log_level": 2,
        }
    )
    consumer.assign([TopicPartition(topic, at, 0) for at in range(PARTITIONS)])
    found: dict[int, list[bytes | None]] = {}
    ended = 0
    while ended < PARTITIONS:
        message = consumer.poll(WAIT_SECONDS)
        assert message is not None
        if message.error() is None:
            found.setdefault(message.partition() or 0, []).append(cast(bytes, message.key()))
        else:
            ended += 1
    consumer.close()
    return dict(sorted(found.items()))
