"""A shop whose Kafka is scripted and whose store, archive and models are real, for one processor.

The broker is that of `tests/unit/streams/scripted_kafka.py`; here its messages have keys and times
too, and its journal can be read back. So the real loop drives the real processor, and a test says
what goes wrong in between.
"""

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import orjson
import redis
from confluent_kafka import Message, TopicPartition
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from model.state import LAYOUT_HASH
from schemas import archive, journal
from schemas.journal import Transaction
from starcast.settings import Settings
from streams import items, ownership, starts, user_states
from streams import sender as senders
from streams.loop import Loop
from streams.metrics import make_metrics
from streams.models import Models
from streams.processor import Processor
from streams.run import _make, _Shared
from streams.store import Store
from tests.contracts.inputs import PARTITIONS, Sent
from tests.unit.streams.journals import told
from tests.unit.streams.messages import NOW_MS, PREFIX
from tests.unit.streams.scripted_kafka import Broker, Place, ScriptedConsumer, ScriptedProducer

BATCH = 12  # records in one turn: a shop's records are several turns
MOST_TURNS = 200
STOP_SECONDS = 20.0  # on a machine that does much else
CLOCKS = frozenset({"predicted_at", "first_failed_at"})  # fields that tell when work was done


class Value(bytes):
    """An output's value that knows its partition."""

    place: int  # its partition; -1: the key decides


class Consumer(ScriptedConsumer):
    """Its messages have the keys and times that they were sent with."""

    broker: "Kafka"

    def consume(self, count: int, timeout: float) -> list[Message]:
        found = super().consume(count, timeout)
        return [each if each.error() else self.broker.full(each) for each in found]


class Producer(ScriptedProducer):
    """Its outputs keep their places."""

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        partition: int = -1,
        headers: Any = None,
        on_delivery: Any = None,
    ) -> None:
        placed = Value(value or b"")
        placed.place = partition
        super().produce(topic, placed, key, partition, headers, on_delivery)


class Kafka(Broker):
    """A scripted broker that takes whole records, and gives the journal back."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[Place, list[Sent]] = {}
        self.exactly_once = True

    def commit(self, offsets: Iterable[TopicPartition]) -> None:
        """At least once, a position may be committed again, and is not where a worker goes on."""
        if self.exactly_once:
            super().commit(offsets)
        else:
            self.committed |= {(each.topic, each.partition): each.offset for each in offsets}

    def consumer(self, config: Any) -> Consumer:
        self.consumers.append(made := Consumer(self, config))
        return made

    def producer(self, config: Any) -> Producer:
        self.producers.append(made := Producer(self, config))
        return made

    def send(self, records: Sequence[Sent]) -> None:
        for each in records:
            place = PREFIX + each.topic, each.partition
            self.append(*place, each.value or b"")
            self.sent.setdefault(place, []).append(each)

    def full(self, message: Message) -> Message:
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        sent = self.sent[str(topic), partition or 0][offset or 0]
        return Message(
            topic=topic,
            partition=partition,
            offset=offset,
            key=sent.key,
            value=sent.value,
            timestamp=(2, NOW_MS + (offset or 0)),
        )

    def read_journals(
        self, _: Any, __: Any, starts: Mapping[int, int]
    ) -> Iterator[tuple[int, Transaction | None]]:
        """As `streams.journal` reads them; offsets are of all partitions together."""
        values = [value for topic, value in self.outputs if topic == f"{PREFIX}journal"]
        for partition, start in starts.items():
            mine = (
                (at, value)
                for at, value in enumerate(values)
                if at >= start and isinstance(value, Value) and value.place == partition
            )
            yield from told(partition, journal.decode_all(mine))


@dataclass
class ScriptedShop:
    """One processor's world; `processor()` gives a new worker's instance of it."""

    name: str
    settings: Settings
    store: Store
    models: Models
    kafka: Kafka
    metrics: Any
    stop: threading.Event = field(default_factory=threading.Event)

    def processor(self) -> Processor:
        shared = _Shared(self.settings, self.store, lambda: self.models, self.metrics)
        made: Any = _make(self.name, shared, 0)
        if self.name != "scorer":  # whose settings say it
            made.batch_size = made.most = BATCH
        return made

    def loop(self, processor: Processor) -> Loop:
        """A new worker of the group, before it has heard of its partitions."""
        self.kafka.exactly_once = processor.transactional
        loop = Loop(processor, self.settings.kafka, self.metrics, self.stop)
        loop._sender.start()
        loop._ownership.join()
        return loop

    @property
    def member(self) -> ScriptedConsumer:
        """The group's newest member."""
        return self.kafka.consumers[-1]

    def places(self, processor: Processor, *partitions: int) -> list[Place]:
        """All topics' partitions, or these."""
        wanted = partitions or range(PARTITIONS)
        return [
            (PREFIX + topic, partition)
            for topic in processor.topics
            for partition in wanted
            if (PREFIX + topic, partition) in self.kafka.sent or processor.together
        ]

    def turns(self, loop: Loop, count: int) -> None:
        """Turns that wait for nothing but, at last, the transaction under way."""
        for _ in range(count):
            loop._ownership._retry_at = 0.0
            loop._turn()
        loop._settle()

    def drain(self, loop: Loop) -> None:
        """Turn until all that was sent is read and worked on."""
        for _ in range(MOST_TURNS):
            loop._ownership._retry_at = 0.0
            loop._turn()
            if not loop.waiting and self.left(loop) == 0 and loop._settle():
                return
        raise AssertionError("the worker comes to no end")

    def left(self, loop: Loop) -> int:
        return sum(
            len(self.kafka.logs.get(place, [])) - position
            for place, position in self.member.positions.items()
        )

    def work(self) -> None:
        """A worker from its start to the end of what there is, as nothing goes wrong."""
        processor = self.processor()
        loop = self.loop(processor)
        self.member.rebalance(new=self.places(processor))
        self.drain(loop)
        processor.close()

    def outputs(self) -> list[tuple[str, Any]]:
        """What was sent, without digests and without what tells when."""
        return [
            (topic.removeprefix(PREFIX), _timeless(value or b""))
            for topic, value in self.kafka.outputs
            if topic != f"{PREFIX}score-digests"
        ]

    def kept(self) -> dict[bytes | str, Any]:
        """All that is kept of the inputs: keys of the store but for claims, rows of the archive."""
        found: dict[bytes | str, Any] = {}
        prefix = self.settings.redis.key_prefix.encode()
        with redis.Redis.from_url(self.settings.redis.url.get_secret_value()) as client:
            for key in client.scan_iter(match=prefix + b":*", count=1_000):
                if client.type(key) == b"hash":
                    value: Any = client.hget(key, "data")
                else:
                    value = client.get(key)
                if value is not None:
                    found[key.removeprefix(prefix)] = value
        url = self.settings.archive.url
        for topic in archive.tables(url):
            rows = archive.read(url, topic).sort("kafka_partition", "kafka_offset").collect()
            found[topic] = rows.rows()
        return found


@contextmanager
def scripted_shop(
    name: str, store_url: str, models_url: Path, folder: Path
) -> Generator[ScriptedShop]:
    """A new shop, its own keys and archive."""
    settings = Settings.model_validate(
        {
            "scorer": {"batch_events": BATCH},
            "kafka": {"topic_prefix": PREFIX, "group_id": "shop", "partitions": PARTITIONS},
            "redis": {"url": SecretStr(store_url), "key_prefix": uuid4().hex},
            "archive": {"url": str(folder / uuid4().hex), "flush_rows": 5 * BATCH},
            "models": {"url": str(models_url), "encoder": "none", "device": "cpu"},
        }
    )
    kafka, metrics = Kafka(), make_metrics(CollectorRegistry())
    store = Store(settings.redis, LAYOUT_HASH, PARTITIONS)
    models = Models(settings.models, metrics)
    models.refresh()
    with (
        patch.object(ownership, "Consumer", kafka.consumer),
        patch.object(senders, "Producer", kafka.producer),
        patch.object(starts, "watermarks", kafka.watermarks),
        patch.object(ownership, "watermarks", kafka.watermarks),
        patch.object(user_states, "read_journals", kafka.read_journals),
        patch.object(items, "bounds", lambda *_: {}),
    ):
        yield ScriptedShop(name, settings, store, models, kafka, metrics)
    store.close()


def _timeless(value: bytes) -> Any:
    if not value:
        return {}  # a null value, which erases a user
    try:
        record = orjson.loads(bytes(value))
    except orjson.JSONDecodeError:
        return bytes(value)  # a journal
    return {name: each for name, each in record.items() if name not in CLOCKS}
