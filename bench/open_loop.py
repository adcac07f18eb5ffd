"""An open loop around a Kafka loop: events that come when they are due, and a reader that waits.

When each event is due is decided beforehand and does not hang on how fast anything answers: what
waits behind a slow transaction, or behind a late sender, waits in the figures too. The number in
an event's id says when it was due, and its prediction carries the same id.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition
from numpy.typing import NDArray

from bench.clients import (
    WAIT_SECONDS,
    bare_consumer,
    bare_producer,
    by_partition,
    hand_over,
    produce,
    shop_producer,
)
from bench.pool import Template
from schemas.codec import format_times
from schemas.exceptions import StarcastError
from streams.clients import client_config, topic_name
from streams.config import KafkaConfig, ScorerConfig
from streams.fetching import FETCH_BYTES, FETCH_WAIT_SECONDS, fetching, lingering
from streams.loop import IDLE_SECONDS
from streams.memory import settle
from streams.scorer import Scorer
from streams.tail import read_topic

PREDICTIONS = "predicted-ratings"
OTHER_OUTPUTS = ("item-updates", "journal", "score-digests")
ID = slice(13, 37)  # of a value's bytes: both events and predictions begin with {"event_id":"
TICK_SECONDS = 0.001  # what is due is sent this often
POLL_SECONDS = 0.05  # a reader without news looks at the clock this often
READ = 1_000  # records that a reader takes at once: decoding them takes a millisecond
KEPT = 20_000  # records of each topic that the bare loop writes again and again

Positions = Mapping[int, int]  # the next offset to be written, by partition


class Flag(Protocol):
    """An event that several processes share."""

    def set(self) -> None:
        """Raise it."""
        ...

    def is_set(self) -> bool:
        """Whether it is raised."""
        ...


@dataclass(frozen=True)
class Plan:
    """Constant arrivals: `count` events from number `first` on, `rate` a second from `start` on."""

    first: int
    count: int
    rate: float
    start: float  # of the monotonic clock, which all processes of a machine share

    @property
    def end(self) -> float:
        """When the last event has been due for one interval."""
        return self.start + self.count / self.rate

    def due(self, index: Any) -> Any:
        """When the event at a position (or at each of many) is due; the first one is at 0."""
        return self.start + index / self.rate

    def due_by(self, now: float) -> int:
        """How many events are due by now."""
        return min(max(math.floor((now - self.start) * self.rate) + 1, 0), self.count)


@dataclass(frozen=True)
class Sent:
    """What the sender did."""

    count: int
    late: NDArray[np.float64]  # seconds from being due to being sent, of each event


@dataclass(frozen=True)
class Seen:
    """What the reader saw, in that order."""

    index: NDArray[np.int64]  # positions in the plan
    latencies: NDArray[np.float64]  # seconds since each was due
    values: Sequence[bytes]  # the last predictions


@dataclass(frozen=True)
class Sample:
    """What the scorer wrote to one topic: records as `produce_batch` takes them."""

    per_event: float
    records: Sequence[Mapping[str, Any]]


def send(kafka: KafkaConfig, pool: Sequence[Template], plan: Plan, stop: Flag) -> Sent:
    """Send each event when it is due, or as soon after as this process can; less after a stop."""
    failed: list[KafkaError] = []

    def note(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failed.append(error)

    producer = shop_producer(kafka, enable_idempotence=True)
    settle()
    topics = {topic: topic_name(kafka, topic) for topic in Scorer.topics}
    clock = time.time() - time.monotonic()
    events = cycle(pool)
    late: list[NDArray[np.float64]] = []
    sent, asked_at = 0, time.monotonic()
    while sent < plan.count:
        now = time.monotonic()
        if now > asked_at + POLL_SECONDS:
            asked_at = now
            if stop.is_set():
                break
        due = plan.due_by(now)
        if due == sent:
            time.sleep(TICK_SECONDS)
            continue
        event_time = np.array([(clock + plan.due(sent)) * 1_000], np.int64)
        written = format_times(event_time)[0].encode()
        for number, event in zip(range(sent, due), events):  # noqa: B905 - the pool never ends
            value = event.value(plan.first + number, written)
            hand_over(producer, topics[event.topic], value, event.key, note)
        producer.poll(0)
        late.append(time.monotonic() - plan.due(np.arange(sent, due)))
        sent = due
    if producer.flush(WAIT_SECONDS) or failed:
        raise StarcastError(f"Kafka did not take all events: {failed[:1] or 'no answer'}.")
    return Sent(sent, np.concatenate([np.zeros(0), *late]))


def echo(
    kafka: KafkaConfig,
    policy: ScorerConfig,
    predictions: Sequence[bytes],
    samples: Mapping[str, Sample],
    ready: Flag,
    stop: Flag,
) -> int:
    """The bare loop: consume, produce, commit, until stopped and without input.

    It waits for its batches as `streams.loop` does. For each event it writes one of the scorer's
    predictions under the event's id and key, and to the other topics as many of the scorer's
    records. Gives how many transactions there were.
    """
    partitions = len(Scorer.topics) * kafka.partitions
    consumer = bare_consumer(
        kafka, fetch_max_bytes=FETCH_BYTES, **fetching(policy.linger_ms / 1_000, partitions)
    )
    producer = bare_producer(kafka)
    consumer.subscribe(
        [topic_name(kafka, topic) for topic in Scorer.topics],
        on_assign=lambda *_: ready.set(),
    )
    settle()
    tails = cycle([value[ID.stop :] for value in predictions])
    others = {topic: (sample.per_event, cycle(sample.records)) for topic, sample in samples.items()}
    owed = dict.fromkeys(others, 0.0)
    transactions = 0
    while True:
        messages = consumer.consume(1, IDLE_SECONDS)
        if not messages:
            if stop.is_set():
                break
            continue
        messages += consumer.consume(policy.batch_events - 1, lingering(policy.linger_ms / 1_000))
        metadata = consumer.consumer_group_metadata()
        producer.begin_transaction()
        predicted = by_partition(map(_predicted, messages, tails))
        produce(producer, topic_name(kafka, PREDICTIONS), predicted)
        for topic, (per_event, records) in others.items():
            owed[topic] += per_event * len(messages)
            count = int(owed[topic])
            owed[topic] -= count
            chosen = by_partition(map(dict, islice(records, count)))
            produce(producer, topic_name(kafka, topic), chosen)
        producer.poll(0)
        ends = {(each.topic(), each.partition()): (each.offset() or 0) + 1 for each in messages}
        producer.send_offsets_to_transaction(
            [TopicPartition(str(topic), at or 0, end) for (topic, at), end in ends.items()],
            metadata,
        )
        producer.commit_transaction(WAIT_SECONDS)
        transactions += 1
    consumer.close()
    return transactions


def watch(
    kafka: KafkaConfig,
    plan: Plan,
    ends: Positions,
    stop: Flag,
    sent: Callable[[], int | None],
    give_up_seconds: float,
    drain_seconds: float,
) -> Seen:
    """Read predictions as they become visible until there is one of each event.

    Stops the sender once the newest prediction is `give_up_seconds` behind what is due. `sent`
    tells how many events there are once that is certain.
    """
    consumer = Consumer(
        client_config(
            kafka,
            group_id="latency",  # required, never joined
            enable_auto_commit=False,
            isolation_level="read_committed",
            fetch_wait_max_ms=int(FETCH_WAIT_SECONDS * 1_000),
        )
    )
    topic = topic_name(kafka, PREDICTIONS)
    consumer.assign([TopicPartition(topic, at, end) for at, end in ends.items()])
    index: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    latencies: list[NDArray[np.float64]] = [np.zeros(0)]
    values: deque[bytes] = deque(maxlen=KEPT)
    seen = 0
    while (count := sent()) is None or seen < count:
        messages = consumer.consume(1, POLL_SECONDS)
        messages += consumer.consume(READ - 1, 0)
        now = time.monotonic()
        found = [_value(message) for message in messages]
        values += found
        index.append(np.array([int(value[ID], 16) for value in found], np.int64) - plan.first)
        latencies.append(now - plan.due(index[-1]))
        seen += len(found)
        if min(now, plan.end) - plan.due(seen) > give_up_seconds:
            stop.set()
        if now > plan.end + drain_seconds:
            raise StarcastError(
                f"{drain_seconds:.0f} s after the last event only {seen} were answered."
            )
    consumer.close()
    return Seen(np.concatenate(index), np.concatenate(latencies), values)


def ends_of(kafka: KafkaConfig, topic: str) -> Positions:
    """Where each partition of a topic ends now."""
    name = topic_name(kafka, topic)
    consumer = Consumer(client_config(kafka, group_id="latency"))
    found = consumer.list_topics(name, WAIT_SECONDS).topics[name].partitions
    ends = {
        at: consumer.get_watermark_offsets(TopicPartition(name, at), WAIT_SECONDS)[1]
        for at in found
    }
    consumer.close()
    return ends


def sample_of(kafka: KafkaConfig, topic: str, start: Positions, events: int) -> Sample:
    """What was written to a topic since it ended at `start`, while so many events were scored."""
    count = 0
    kept: deque[tuple[int, dict[str, Any]]] = deque(maxlen=KEPT)
    of_partition: defaultdict[int, int] = defaultdict(int)
    for messages in read_topic(kafka, topic, start=start):
        count += len(messages)
        for message in messages:
            partition = message.partition() or 0
            record = {"key": message.key(), "value": message.value(), "partition": partition}
            kept.append((of_partition[partition], record))
            of_partition[partition] += 1
    # In turn from all partitions, as in a transaction of the scorer.
    records = [record for _, record in sorted(kept, key=lambda each: each[0])]
    return Sample(count / events if records else 0.0, records)


def _predicted(message: Message, tail: bytes) -> dict[str, Any]:
    return {
        "key": message.key(),
        "value": _value(message)[: ID.stop] + tail,
        "partition": message.partition(),
    }


def _value(message: Message) -> bytes:
    if (error := message.error()) is not None:
        raise StarcastError(f"Kafka gives no records: {error.str()}.")
    return message.value() or b""
