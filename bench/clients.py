"""Kafka clients that several benchmarks have: a shop's producer, and those of the bare loops."""

from collections.abc import Callable
from typing import Any

from confluent_kafka import Consumer, Producer

from streams.clients import client_config
from streams.config import KafkaConfig
from streams.loop import FETCH_KILOBYTES

WAIT_SECONDS = 60.0  # a broker that answers nothing any more ends the benchmark
FULL_SECONDS = 0.05  # a queue that is full takes more after this


def shop_producer(kafka: KafkaConfig, **options: Any) -> Producer:
    """What sends a shop's events."""
    return Producer(
        client_config(
            kafka,
            partitioner="murmur2_random",
            linger_ms=5,  # its own default
            compression_type="lz4",
            **options,
        )
    )


def hand_over(
    producer: Producer,
    topic: str,
    value: bytes | None,
    key: bytes | None,
    on_delivery: Callable[[Any, Any], None] | None = None,
) -> None:
    """Give a record to a producer, once its queue has room."""
    while True:
        try:
            producer.produce(topic, value, key, on_delivery=on_delivery)
            return
        except BufferError:
            producer.poll(FULL_SECONDS)


def bare_consumer(kafka: KafkaConfig, **options: Any) -> Consumer:
    """The consumer of a loop that does nothing with what it reads."""
    return Consumer(
        client_config(
            kafka,
            group_id="bare",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            queued_max_messages_kbytes=FETCH_KILOBYTES,
            **options,
        )
    )


def bare_producer(kafka: KafkaConfig) -> Producer:
    """Its producer, ready for transactions."""
    producer = Producer(
        client_config(
            kafka,
            transactional_id="bare",
            partitioner="murmur2_random",
            linger_ms=1,
            compression_type="lz4",
        )
    )
    producer.init_transactions(WAIT_SECONDS)
    return producer
