"""How a worker's consumer fetches: how much at once, and how long brokers gather for it."""

from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import KafkaError, TopicPartition

from streams.clients import FETCH_AGAIN_MS, client_config, group_name
from streams.config import KafkaConfig
from streams.processor import Processor

FETCH_KILOBYTES = 8_192  # prefetched input a worker holds at most, and one answer of a broker,
FETCH_BYTES = 4 * 1024 * 1024  # which behind a backlog would hold a megabyte of each partition
FETCH_WAIT_SECONDS = 0.1  # a broker without news answers after this
# Each fetch names all partitions, news or not: 5 µs of client and broker for each. Waits of so long
# for each keep that at a twentieth of a core.
FETCH_PARTITION_SECONDS = 0.0001
PROMPT_SECONDS = 0.01  # who lingers for less has brokers answer at once; others
GATHER_BYTES = 256 * 1024  # let them gather up to this much: each fetch costs both sides

HOLDING: Mapping[str, int] = {
    "queued.max.messages.kbytes": FETCH_KILOBYTES,
    "fetch.queue.backoff.ms": FETCH_AGAIN_MS,
}
"""A consumer's options by which it holds some input, and no more."""


def consumer_config(
    processor: Processor,
    config: KafkaConfig,
    ends: bool,
    on_commit: Callable[[KafkaError | None, list[TopicPartition]], None],
) -> dict[str, Any]:
    """The options of a processor's consumer.

    Args:
        processor: what reads.
        config: how Kafka is reached, and the group's protocol and timeouts.
        ends: whether the end of a partition is to be told.
        on_commit: what is told of commits outside transactions.
    """
    group = group_name(config, processor.name)
    options: dict[str, Any] = {
        "group.id": group,
        "enable.auto.commit": False,
        "auto.offset.reset": "error",  # what retention deleted is counted, never skipped
        "client.id": group,
        "isolation.level": "read_committed",
        "enable.partition.eof": ends,
        "on_commit": on_commit,
        **HOLDING,
        "fetch.max.bytes": FETCH_BYTES,
        **fetching(processor.linger_seconds, len(processor.topics) * config.partitions),
    }
    if config.group_protocol == "consumer":
        options |= {"group.protocol": "consumer", "group.remote.assignor": "range"}
    else:
        options |= {
            "partition.assignment.strategy": "range",
            "session.timeout.ms": config.session_timeout_ms,
            "heartbeat.interval.ms": max(config.session_timeout_ms // 3, 100),
        }
    return client_config(config, **options)


def fetching(linger: float, partitions: int) -> dict[str, int]:
    """A consumer's options so that brokers gather for the half of `linger` (seconds).

    Where there are many partitions, of all topics together, they gather for longer.
    """
    if linger < PROMPT_SECONDS:
        return {"fetch.wait.max.ms": round(FETCH_WAIT_SECONDS * 1_000), "fetch.min.bytes": 1}
    wait = max(linger / 2, min(FETCH_PARTITION_SECONDS * partitions, FETCH_WAIT_SECONDS))
    return {"fetch.wait.max.ms": round(wait * 1_000), "fetch.min.bytes": GATHER_BYTES}


def lingering(linger: float) -> float:
    """Seconds that are left of `linger` once there is a record."""
    return linger if linger < PROMPT_SECONDS else linger / 2
