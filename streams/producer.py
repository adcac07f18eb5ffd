"""Sending records from outside the loop: files of records, generated ones, redriven dead letters.

Every record is acknowledged by all replicas or counted as failed with its reason; none is lost in
silence.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import orjson
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from schemas.codec import encode
from schemas.records import Record
from schemas.topics import BY_NAME, LARGEST_MESSAGE
from streams.admin import existing_topic
from streams.clients import client_config, error_of, reach, refused_option
from streams.config import KafkaConfig

DELIVERY_SECONDS = 120.0  # a broker that is gone for longer fails what was sent to it meanwhile
FLUSH_SECONDS = DELIVERY_SECONDS + 10  # librdkafka gives every record a verdict before this
STEP_SECONDS = 0.05  # a stop, and acknowledgements, are noticed this soon while waiting
PROGRESS_SECONDS = 0.1  # a progress bar does not need more

Headers = Sequence[tuple[str, bytes | None]]
Settle = Callable[[KafkaError | None, Message | None], None]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to send; `topic` is without the prefix in settings."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


@dataclass
class Sent:
    """What became of the records so far."""

    sent: Counter[str] = field(default_factory=Counter[str])  # by topic, handed to librdkafka
    delivered: Counter[str] = field(default_factory=Counter[str])  # by topic, acknowledged
    failed: Counter[str] = field(default_factory=Counter[str])  # by reason
    seconds: float = 0.0


class CountingProducer:
    """An idempotent producer that counts the verdict on each record.

    Raises UnreachableError when no broker answers.
    """

    def __init__(self, kafka: KafkaConfig) -> None:
        self.report = Sent()
        self._kafka = kafka
        self._present = set(reach(kafka).list_topics(timeout=DELIVERY_SECONDS).topics)
        self._lanes: dict[str, tuple[str, Settle]] = {}
        try:
            self._producer = Producer(
                client_config(
                    kafka,
                    acks="all",
                    enable_idempotence=True,
                    partitioner="murmur2_random",
                    message_max_bytes=LARGEST_MESSAGE,
                    message_timeout_ms=int(DELIVERY_SECONDS * 1000),
                )
            )
        except KafkaException as problem:
            raise refused_option(problem) from None

    def send(self, record: Outgoing, stop: threading.Event | None = None) -> bool:
        """Hands a record over, waiting while the queue is full; False when `stop` came first.

        Raises TopicError when the topic is missing, ContractError when there is no such topic.
        """
        if record.topic not in self._lanes:
            name = existing_topic(self._kafka, record.topic, self._present)
            self._lanes[record.topic] = name, self._settle(record.topic)
        name, settle = self._lanes[record.topic]
        while not self._accepted(name, record, settle):
            if stop and stop.is_set():
                return False
            self.wait(STEP_SECONDS)
        self.report.sent[record.topic] += 1
        self.wait(0)
        return True

    def wait(self, seconds: float) -> None:
        """Takes acknowledgements for so long."""
        self._producer.poll(seconds)

    def finish(self) -> Sent:
        """Waits until every record has its verdict."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while (left := self._producer.flush(STEP_SECONDS)) and time.monotonic() < deadline:
            pass  # in steps, since a signal is only seen between them
        if left:
            self.report.failed[f"not acknowledged within {FLUSH_SECONDS:g} s"] += left
        return self.report

    def _settle(self, topic: str) -> Settle:
        def settle(error: KafkaError | None, _: Message | None) -> None:
            if error is None:
                self.report.delivered[topic] += 1
            else:
                self.report.failed[error.str()] += 1

        return settle

    def _accepted(self, name: str, record: Outgoing, settle: Settle) -> bool:
        """Whether librdkafka took the record; what it refuses for good is counted as failed."""
        try:
            return offer(self._producer, name, record, settle)
        except KafkaException as problem:  # larger than LARGEST_MESSAGE, or a fatal error
            settle(error_of(problem), None)
            return True


def offer(producer: Producer, name: str, record: Outgoing, settle: Settle | None) -> bool:
    """Whether librdkafka took a record for the topic `name`; not while its queue is full."""
    try:
        producer.produce(
            name,
            key=record.key,
            value=record.value,
            headers=list(record.headers),
            on_delivery=settle,
        )
    except BufferError:
        return False
    return True


def outgoing(records: Iterable[tuple[str, Record]]) -> Iterator[Outgoing]:
    """Records, encoded, with the keys of their topics."""
    for topic, record in records:
        key: str = getattr(record, BY_NAME[topic].key)
        yield Outgoing(topic, key.encode(), encode(record))


def play(
    records: Iterable[Outgoing],
    kafka: KafkaConfig,
    *,
    rate: float | None = None,
    speed: float | None = None,
    stop: threading.Event | None = None,
    on_progress: Callable[[Sent], None] | None = None,
) -> Sent:
    """Sends records to their topics, in order, until they end or `stop` is set.

    `rate` is in records a second; `speed` is a multiple of the pace of the records' own
    `event_time`s; without either they go as fast as Kafka takes them. `on_progress` is called a
    few times a second and at the end. Raises as `CountingProducer` does.
    """
    stop = stop or threading.Event()
    sender = CountingProducer(kafka)
    due = _pace(rate, speed)
    started = told = time.monotonic()
    try:
        for index, record in enumerate(records):
            at = started + due(index, record)
            while (wait := at - time.monotonic()) > 0 and not stop.is_set():
                sender.wait(min(wait, STEP_SECONDS))
            if stop.is_set() or not sender.send(record, stop):
                break
            if on_progress and (now := time.monotonic()) - told >= PROGRESS_SECONDS:
                told = now
                sender.report.seconds = now - started
                on_progress(sender.report)
    finally:  # also when `records` fail: what was sent must arrive
        report = sender.finish()
        report.seconds = time.monotonic() - started
        if on_progress:
            on_progress(report)
    return report


def _pace(rate: float | None, speed: float | None) -> Callable[[int, Outgoing], float]:
    """When each record is due, in seconds after the first."""
    if rate is not None:
        return lambda index, _: index / rate
    if speed is None:
        return lambda *_: 0.0
    first: float | None = None
    latest = 0.0

    def due(_: int, record: Outgoing) -> float:
        nonlocal first, latest
        event_time = _event_time(record.value)
        if event_time is not None:
            first = event_time if first is None else first
            latest = max(latest, (event_time - first) / speed)
        return latest

    return due


def _event_time(value: bytes | None) -> float | None:
    """A record's event_time in seconds since 1970, none when it has none that can be read."""
    try:
        return datetime.fromisoformat(orjson.loads(value or b"")["event_time"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return None
