"""A loop in a scripted Kafka, with a processor that counts."""

import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from confluent_kafka import KafkaError, KafkaException, Message
from prometheus_client import CollectorRegistry

from streams import loop as loops
from streams import ownership, starts
from streams import sender as senders
from streams.config import KafkaConfig
from streams.loop import Loop
from streams.metrics import Metrics, make_metrics
from streams.processor import Offsets, Outcome, Output, OutputBatch, Position
from tests.unit.streams.scripted_kafka import Broker, Place, ScriptedConsumer, failure

TOPICS = ("reviews", "behavior")


ABORTS: Mapping[str, list[KafkaException]] = {
    "begin_transaction": [failure(KafkaError._STATE)],
    "produce": [failure(KafkaError.MSG_SIZE_TOO_LARGE)],
    "produce_batch": [failure(KafkaError.MSG_SIZE_TOO_LARGE)],
    "send_offsets_to_transaction": [
        failure(KafkaError.ILLEGAL_GENERATION, txn_requires_abort=True)
    ],
    "commit_transaction": [failure(KafkaError._INCONSISTENT, txn_requires_abort=True)],
}


@dataclass
class Clock:
    """Stands in for the loop's `time`."""

    now: float = 1_000.0
    each: float = 0.0  # passes with every look

    def monotonic(self) -> float:
        self.now += self.each
        return self.now


@dataclass
class Counting:
    """A processor whose state of a partition is the next offset of each topic.

    Strict: it takes a message only where its state stands, so a message that is skipped, doubled,
    or of a partition that it has not claimed fails the test.
    """

    topics: Sequence[str] = TOPICS
    together: bool = True
    transactional: bool = True
    batch_size: int = 100
    name: str = "counting"
    linger_seconds: float = 0.0
    lag: int = 0
    errors: dict[str, list[Exception]] = field(default_factory=dict[str, list[Exception]])
    outputs: list[Output] | None = None  # in place of those that the messages make
    starts: dict[str, int] = field(default_factory=dict[str, int])  # in place of the committed
    slow: set[int] = field(default_factory=set[int])  # partitions that a claim leaves out
    states: dict[Position, int] = field(default_factory=dict[Position, int])
    claims: list[tuple[int, dict[str, int]]] = field(
        default_factory=list[tuple[int, dict[str, int]]]
    )
    drops: list[set[int]] = field(default_factory=list[set[int]])
    batches: list[list[Place]] = field(default_factory=list[list[Place]])
    finished: list[dict[Position, int]] = field(default_factory=list[dict[Position, int]])
    idles: int = 0
    closes: int = 0

    def claim(self, committed: Offsets) -> Offsets:
        self.claims += committed.items()
        self._may_fail("claim")
        starts = {
            partition: {topic: self.starts.get(topic, at) for topic, at in topics.items()}
            for partition, topics in committed.items()
            if partition not in self.slow
        }
        for partition, topics in starts.items():
            for topic, start in topics.items():
                self.states[topic, partition] = max(start, 0)
        return starts

    def drop(self, partitions: Iterable[int]) -> None:
        gone = set(partitions)
        self.drops.append(gone)
        self.states = {place: at for place, at in self.states.items() if place[1] not in gone}

    def process(self, messages: list[Message]) -> Outcome:
        self._may_fail("process")
        places: list[Place] = []
        for message in messages:
            topic = str(message.topic()).removeprefix("eu.")
            place = (topic, message.partition() or 0)
            assert message.offset() == self.states[place]
            self.states[place] += 1
            places.append((topic, message.offset() or 0))
        self.batches.append(places)

        def finish(delivered: dict[Position, int]) -> None:
            self._may_fail("finish")
            self.finished.append(delivered)

        values = [
            b"%b/%d/%d" % (str(each.topic()).encode(), each.partition() or 0, each.offset() or 0)
            for each in messages
        ]
        return Outcome(
            batches=[OutputBatch("predicted-ratings", [{"value": value} for value in values])],
            outputs=self.outputs or [Output("journal", b"k", b"j", messages[0].partition() or 0)],
            tracked=frozenset({"journal"}),
            finish=finish,
        )

    def idle(self) -> Outcome | None:
        self.idles += 1
        self._may_fail("idle")
        return None

    def close(self) -> None:
        self.closes += 1
        self._may_fail("close")

    def _may_fail(self, method: str) -> None:
        if waiting := self.errors.get(method):
            raise waiting.pop(0)


@dataclass
class World:
    broker: Broker
    clock: Clock
    metrics: Metrics
    stop: threading.Event

    def loop(self, processor: Counting, **config: Any) -> Loop:
        kafka = KafkaConfig.model_validate({"topic_prefix": "eu.", "partitions": 4, **config})
        made = Loop(processor, kafka, self.metrics, self.stop)
        made._processor = processor
        self.subscribe(made)
        return made

    def subscribe(self, loop: Loop) -> None:
        """What `run` does before its turns."""
        loop._sender.start()
        loop._ownership.join()

    @property
    def consumer(self) -> ScriptedConsumer:
        return self.broker.consumers[-1]

    def turn(self, loop: Loop, turns: int = 1) -> None:
        for _ in range(turns):
            self.clock.now += 10
            loop._turn()

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"starcast_{name}", labels)


def fenced() -> KafkaException:
    return failure(KafkaError._FENCED, fatal=True)


def places(*partitions: int, topics: Sequence[str] = TOPICS) -> list[Place]:
    return [(f"eu.{topic}", partition) for topic in topics for partition in partitions]


def fill(world: World, count: int, *partitions: int, topics: Sequence[str] = TOPICS) -> None:
    for topic, partition in places(*partitions, topics=topics):
        world.broker.append(topic, partition, *[b"v"] * count)


def answered(world: World) -> list[bytes | None]:
    return [value for topic, value in world.broker.outputs if topic == "eu.predicted-ratings"]


@contextmanager
def scripted() -> Generator[World]:
    """A broker and a clock in place of the real ones."""
    broker, clock = Broker(), Clock()
    with (
        patch.object(ownership, "Consumer", broker.consumer),
        patch.object(senders, "Producer", broker.producer),
        patch.object(starts, "watermarks", broker.watermarks),
        patch.object(ownership, "watermarks", broker.watermarks),
        patch.object(loops, "time", clock),
        patch.object(ownership, "time", clock),
        patch.object(senders, "time", clock),
    ):
        yield World(broker, clock, make_metrics(CollectorRegistry()), threading.Event())
