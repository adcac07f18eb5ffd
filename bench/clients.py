"""Kafka clients that several benchmarks have: a shop's producer, and those of the bare loops."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from confluent_kafka import Consumer, Producer

from schemas.exceptions import StarcastError
from streams.clients import client_config
from streams.config import KafkaConfig
from streams.fetching import HOLDING
from streams.sender import BY_KEY, OUTPUT_MESSAGES, RETRY_MS

WAIT_SECONDS = 60.0  # a broker that answers nothing any more ends the benchmark
FULL_SECONDS = 0.05  # a queue that is full takes more after this

Record = dict[str, Any]  # as `produce_batch` takes it


def shop_producer(kafka: KafkaConfig, **options: Any) -> Producer:
    """What sends a shop's events."""
    return Producer(
        client_config(
            kafka,
            partitioner="murmur2_random",
            linger_ms=5,  # its own default
            compression_type="snappy",  # as brokers keep it: they would pack it anew
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
            **HOLDING,
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
            queue_buffering_max_messages=OUTPUT_MESSAGES,
            retry_backoff_ms=RETRY_MS,
        )
    )
    producer.init_transactions(WAIT_SECONDS)
    return producer


def by_partition(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Records by the partition that they go to: a call's is heeded, not those of its messages."""
    found = defaultdict[int, list[Record]](list)
    for record in records:
        found[record.get("partition", BY_KEY)].append(record)
    return found


def produce(producer: Producer, topic: str, records: Mapping[int, list[Record]]) -> None:
    """Write what a bare loop writes. Raises StarcastError where the producer does not take all."""
    for partition, batch in records.items():
        if producer.produce_batch(topic, batch, partition=partition) < len(batch):
            raise StarcastError("The bare loop's queue is full: take smaller batches.")
