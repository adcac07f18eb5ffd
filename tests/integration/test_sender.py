"""Transactions that follow each other at once, on a real broker."""

import threading
import time
import uuid

import numpy as np
import pytest
from confluent_kafka import Consumer, TopicPartition

from streams.admin import apply_topics
from streams.clients import group_name, reader_config, topic_name
from streams.config import KafkaConfig
from streams.processor import Outcome, OutputBatch
from streams.sender import Sender

FIRST, MORE = 20, 60  # transactions: a broker that has just begun is slow
LATE_SECONDS = 0.08  # librdkafka's own wait is 100 ms, give or take a fifth


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
