"""Transactions that follow each other at once, and some that are too slow, on a real broker."""

import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from prometheus_client import CollectorRegistry

from streams import loop as loops
from streams import sender as senders
from streams.admin import apply_topics
from streams.clients import client_config, group_name, reader_config, topic_name
from streams.config import KafkaConfig
from streams.loop import Loop
from streams.metrics import make_metrics
from streams.processor import Offsets, Outcome, Output, OutputBatch, Position
from streams.sender import Sender

FIRST, MORE = 20, 60  # transactions: a broker that has just begun is slow
LATE_SECONDS = 0.08  # librdkafka's own wait is 100 ms, give or take a fifth
RECORDS = 60


@pytest.fixture
def real(kafka: str) -> KafkaConfig:
    prefix = f"{uuid.uuid4().hex[:8]}."
    config = KafkaConfig(bootstrap_servers=kafka, topic_prefix=prefix, partitions=3)
    apply_topics(config)
    return config


@pytest.mark.alone
def test_a_transaction_does_not_wait_a_tenth_of_a_second_for_the_one_before(
    real: KafkaConfig,
) -> None:
    """Each that Kafka refused at first did: two in five."""
    sender = Sender(real, "scorer", 0, True, threading.Event())
    sender.start()
    consumer = Consumer(reader_config(real, group_id=group_name(real, "scorer")))
    metadata = consumer.consumer_group_metadata()
    records = [{"key": b"u%d" % at, "value": b"{}"} for at in range(9)]
    outcome = Outcome(batches=[OutputBatch("predicted-ratings", records)])
    took: list[float] = []
    for number in range(FIRST + MORE):
        began = time.monotonic()
        sender.begin([TopicPartition(topic_name(real, "reviews"), 0, number + 1)], metadata)
        took.append(time.monotonic() - began)
        sender.send(outcome)
        sender.commit()
    sender.close(1)
    consumer.close()
    assert np.percentile(took[FIRST:], 75) < LATE_SECONDS


@dataclass
class Slow:
    """A processor whose outputs take as long to make as their records are many."""

    seconds_each: float
    stop: threading.Event
    name = "scorer"
    topics = ("reviews",)
    together = True
    transactional = True
    batch_size = 100
    linger_seconds = 0.4
    lag = 0
    sizes: list[int] = field(default_factory=list[int])  # of batches
    ended: list[int] = field(default_factory=list[int])  # of those that were committed

    def claim(self, committed: Offsets) -> Offsets:
        return committed

    def drop(self, partitions: Iterable[int]) -> None: ...

    def process(self, messages: list[Message]) -> Outcome:
        self.sizes.append(len(messages))

        def late() -> list[Output]:
            time.sleep(self.seconds_each * len(messages))
            return [Output("predicted-ratings", b"u", b"{}")]

        def finish(_: dict[Position, int]) -> None:
            self.ended.append(len(messages))
            if sum(self.ended) >= RECORDS:
                self.stop.set()

        return Outcome(late=late, finish=finish)

    def idle(self) -> Outcome | None:
        return None

    def close(self) -> None: ...


def test_a_batch_that_kafka_ends_for_being_slow_comes_again_in_halves(
    real: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (senders, loops):
        monkeypatch.setattr(module, "TRANSACTION_SECONDS", 1.0)
    producer = Producer(client_config(real))
    for at in range(RECORDS):
        producer.produce(topic_name(real, "reviews"), b"{}", b"u%d" % at, partition=0)
    producer.flush()
    stop = threading.Event()
    slow = Slow(0.05, stop)  # 60 records: 3 s
    given_up = threading.Timer(60, stop.set)
    given_up.start()
    Loop(slow, real, make_metrics(CollectorRegistry()), stop).run()
    given_up.cancel()
    assert slow.sizes[:2] == [RECORDS, RECORDS // 2]
    assert sum(slow.ended) == RECORDS
