import threading

import pytest
from prometheus_client import CollectorRegistry

from schemas.topics import LARGEST_MESSAGE
from streams.clients import KafkaOptionError
from streams.config import KafkaConfig
from streams.loop import Loop
from streams.metrics import make_metrics
from tests.unit.streams.looped import (
    Counting,
    World,
)


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


def test_a_consumer_that_is_full_looks_soon_again_for_room(world: World) -> None:
    world.loop(Counting())
    config = world.consumer.config
    held = config["queued.max.messages.kbytes"] * 1024
    assert held >= 2 * LARGEST_MESSAGE
    # At 60,000 events a second of 300 bytes each, what it holds lasts for longer than that.
    assert config["fetch.queue.backoff.ms"] / 1_000 < held / (60_000 * 300) / 4


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
