"""What the dashboard shows: followed from Kafka, the store and the registry by three threads.

Each thread has its own server and outlives that server's restarts; the others go on meanwhile.
What was seen last stays. Readers take `feed.snapshot`, which is never changed, only replaced.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from pydantic import ValidationError

from model import registry
from model.ids import hash_ids
from model.registry import Registry
from model.state import LAYOUT_HASH
from schemas.codec import decode
from schemas.exceptions import StarcastError
from schemas.records import Alert, Behavior, PredictedRating, Review
from schemas.topics import BY_NAME, TOPICS
from streams.catalog import title_of
from streams.clients import reach, reader_config, topic_name, watermarks
from streams.config import KafkaConfig, RedisConfig
from streams.exceptions import StoreError
from streams.reader import ITEM_KIND, store_keys
from streams.store import STORE_ERRORS, Store
from streams.windows import WINDOW_FIELD, WINDOWS_KEY, Window

KAFKA_SECONDS = 1.5  # between two looks at the ends of the topics
STORE_SECONDS = 0.5
REGISTRY_SECONDS = 2.0
ANSWER_SECONDS = 3.0  # a broker that is gone is reported, and noticed to be back, this soon
ROUND_SECONDS = 2.0  # a topic that grows faster than it is read must not hold the page back
STOP_SECONDS = 4.0  # a server that does not answer must not hold the process's end

MOST_WINDOWS = 2_000
TAIL = 12  # newest predictions read of each partition
SHOWN = 30  # predictions kept, each kind by itself
ALERTS = 50
LONGEST_SPAN = 500  # records between the oldest and the newest source looked up in one partition
TITLES = 5_000  # titles remembered

_LOG = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Link:
    """Whether a server answers; `up` is None until it was asked."""

    up: bool | None = None
    reason: str = ""
    since_ms: int = 0


@dataclass(frozen=True)
class Prediction:
    """One predicted rating with what its event turned out to be."""

    key: tuple[str, str, int, int, str]  # kind, source topic, partition, offset, item
    kind: str
    user_id: str
    item_id: str
    title: str
    rating: float | None
    low: float | None
    high: float | None
    tier: str
    version: str
    predicted_ms: int
    action: str = ""  # what the shopper did: review, view, cart, …
    truth: float | None = None  # the true rating


@dataclass(frozen=True)
class Topics:
    """What Kafka holds."""

    missing: tuple[str, ...] = ()
    events: int = 0  # reviews and behavior, between first and last offset
    predictions: int = 0


@dataclass(frozen=True)
class Snapshot:
    """All that the page shows at one moment."""

    broker: Link = Link()
    store: Link = Link()
    models: Link = Link()
    topics: Topics = Topics()
    windows: tuple[Window, ...] = ()  # oldest first
    predictions: tuple[Prediction, ...] = ()  # newest first
    alerts: tuple[Alert, ...] = ()  # newest first
    registry: Registry = field(default_factory=Registry)
    titles: dict[str, str] = field(default_factory=dict[str, str])


class Feed:
    """The newest snapshot; threads replace parts of it."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._lock = threading.Lock()

    def update(self, **parts: Any) -> None:
        """Replace parts of the snapshot."""
        with self._lock:
            self.snapshot = replace(self.snapshot, **parts)

    def link(self, name: str, reason: str | None) -> None:
        """Note that a server answers, or why it does not."""
        before: Link = getattr(self.snapshot, name)
        up = reason is None
        if before.up is not up:
            self.update(**{name: Link(up, reason or "", now_ms())})
            if not up:
                _LOG.warning("dashboard waits", server=name, reason=reason)
        elif not up and before.reason != reason:
            self.update(**{name: replace(before, reason=reason or "")})


@contextmanager
def follow(
    kafka: KafkaConfig, redis: RedisConfig, models_url: str, stop: threading.Event
) -> Generator[Feed]:
    """A feed that is kept up to date while the block runs and until `stop`."""
    feed = Feed()
    ended = threading.Event()

    def wait(seconds: float) -> bool:
        """Whether to go on, after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not (stop.is_set() or ended.is_set()):
            ended.wait(min(0.1, seconds))
        return not (stop.is_set() or ended.is_set())

    store = Store(redis, LAYOUT_HASH, kafka.partitions)
    key = f"{redis.key_prefix}:{WINDOWS_KEY}"
    threads = [
        threading.Thread(target=task, args=arguments, name=f"dashboard-{name}", daemon=True)
        for name, task, arguments in (
            ("store", _follow_store, (feed, store, key, wait)),
            ("kafka", _follow_kafka, (feed, kafka, store, wait)),
            ("models", _follow_registry, (feed, models_url, wait)),
        )
    ]
    for thread in threads:
        thread.start()
    try:
        yield feed
    finally:
        ended.set()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        store.close()


Wait = Callable[[float], bool]


def _follow_store(feed: Feed, store: Store, key: str, wait: Wait) -> None:
    """Append the windows that insights writes; those that end later are gone by then."""
    last = b"-"
    while True:
        try:
            rows: Any = store.client.xrange(key, min=last, count=MOST_WINDOWS)
            if rows and rows[0][0] == last:
                rows = rows[1:]
            else:  # at first, and where windows have begun anew
                rows = store.client.xrevrange(key, count=MOST_WINDOWS)[::-1]
            feed.link("store", None)
        except STORE_ERRORS as error:
            rows = []
            feed.link(
                "store", f"{str(error).rstrip('.')}. Start the store, or set STARCAST_REDIS__URL."
            )
        if rows:
            first, last = int(rows[0][0].partition(b"-")[0]), rows[-1][0]
            kept = [window for window in feed.snapshot.windows if window.end_ms < first]
            kept += _windows(fields for _, fields in rows)
            feed.update(windows=tuple(kept[-MOST_WINDOWS:]))
        if not wait(STORE_SECONDS):
            return


def _windows(rows: Iterable[dict[bytes, bytes]]) -> Iterator[Window]:
    for fields in rows:
        try:
            yield Window.model_validate_json(fields[WINDOW_FIELD])
        except (ValidationError, KeyError) as error:
            _LOG.warning("a window in the store cannot be read", reason=str(error))


def _follow_registry(feed: Feed, url: str, wait: Wait) -> None:
    """Follow which version is stable, and since when."""
    while True:
        try:
            feed.update(registry=registry.read(url))
            feed.link("models", None)
        except StarcastError as error:
            feed.link("models", str(error))
        if not wait(REGISTRY_SECONDS):
            return


def _follow_kafka(feed: Feed, kafka: KafkaConfig, store: Store, wait: Wait) -> None:
    """Look at the ends of the topics again and again, outside any consumer group.

    A failure takes a new consumer: an old one may go on with what it knew of a broker's last life.
    """
    consumer: Consumer | None = None
    going = True
    while going:
        try:
            if consumer is None:
                reach(kafka, ANSWER_SECONDS)
                consumer = _consumer(kafka)
            _look(feed, kafka, store, consumer)
            feed.link("broker", None)
        except (KafkaException, StarcastError) as error:
            told = error.args[0]
            if isinstance(told, KafkaError):
                told = f"Kafka at {kafka.bootstrap_servers}: {told.str()}."
            feed.link("broker", str(told))
            if consumer is not None:
                consumer.close()
            consumer = None
        going = wait(KAFKA_SECONDS)
    if consumer is not None:
        consumer.close()


def _consumer(kafka: KafkaConfig) -> Consumer:
    return Consumer(
        reader_config(
            kafka,
            group_id=f"{kafka.group_id}-dashboard",
            auto_offset_reset="latest",
            fetch_wait_max_ms=50,
            fetch_message_max_bytes=262_144,
            error_cb=_ignore,
        )
    )


def _ignore(_: KafkaError) -> None:
    """What matters is told by the next look."""


def _look(feed: Feed, kafka: KafkaConfig, store: Store, consumer: Consumer) -> None:
    """One look: which topics there are, what they hold, and their newest records."""
    found = consumer.list_topics(timeout=ANSWER_SECONDS).topics
    partitions = {
        topic.name: sorted(found[name].partitions)
        for topic in TOPICS
        if (name := topic_name(kafka, topic.name)) in found
    }
    missing = tuple(topic.name for topic in TOPICS if topic.name not in partitions)
    counts = {
        name: _count(consumer, kafka, name, partitions.get(name, []))
        for name in ("reviews", "behavior", "predicted-ratings")
    }
    feed.update(
        topics=Topics(missing, counts["reviews"] + counts["behavior"], counts["predicted-ratings"])
    )
    wanted = [
        TopicPartition(topic_name(kafka, name), partition, -2_000 - depth)  # OFFSET_TAIL(depth)
        for name, depth in (("predicted-ratings", TAIL), ("alerts", ALERTS))
        for partition in partitions.get(name, [])
    ]
    records = _decoded(kafka, read_spans(consumer, wanted))
    alerts = {each.alert_id: each for each in records.values() if isinstance(each, Alert)}
    newest = sorted(alerts.values(), key=lambda alert: alert.window_end, reverse=True)
    feed.update(alerts=tuple(newest[:ALERTS]))
    predicted = [each for each in records.values() if isinstance(each, PredictedRating)]
    _show(feed, kafka, store, consumer, predicted)


def _count(consumer: Consumer, kafka: KafkaConfig, topic: str, partitions: Sequence[int]) -> int:
    """Offsets between the beginning and the end of a topic."""
    places = [TopicPartition(topic_name(kafka, topic), partition) for partition in partitions]
    found = watermarks(consumer, places, ANSWER_SECONDS).values()
    return sum(max(high, 0) - max(low, 0) for low, high in found)


def read_spans(
    consumer: Consumer,
    places: Sequence[TopicPartition],
    ends: dict[tuple[str, int], int] | None = None,
) -> list[Message]:
    """Messages from the given positions to each partition's end, or to its offset in `ends`."""
    left = {(place.topic, place.partition) for place in places}
    messages: list[Message] = []
    if not left:
        return messages
    consumer.assign(list(places))
    deadline = time.monotonic() + ROUND_SECONDS
    try:
        while left and time.monotonic() < deadline:
            for message in consumer.consume(1_000, 0.1):
                where = message.topic() or "", message.partition() or 0
                error = message.error()
                if error is None:
                    messages.append(message)
                    if ends and (message.offset() or 0) >= ends[where]:
                        left.discard(where)
                elif error.code() == KafkaError._PARTITION_EOF:  # pyright: ignore[reportPrivateUsage]
                    left.discard(where)
                elif not error.retriable():
                    raise KafkaException(error)
    finally:
        consumer.unassign()
    return messages


def _decoded(kafka: KafkaConfig, messages: Iterable[Message]) -> dict[tuple[str, int, int], Any]:
    """Records by topic (without prefix), partition and offset; broken ones left out."""
    by_topic: dict[str, list[Message]] = {}
    for message in messages:
        by_topic.setdefault(message.topic() or "", []).append(message)
    records: dict[tuple[str, int, int], Any] = {}
    for name, group in by_topic.items():
        topic = BY_NAME[name.removeprefix(kafka.topic_prefix)]
        positions = [(each.partition() or 0, each.offset() or 0) for each in group]
        decoded = decode(topic, [each.value() for each in group], positions, name)
        for position, record in zip(positions, decoded.records, strict=True):
            if record is not None:
                records[topic.name, *position] = record
    return records


def _show(
    feed: Feed,
    kafka: KafkaConfig,
    store: Store,
    consumer: Consumer,
    read: Iterable[PredictedRating],
) -> None:
    """Merge newly read predictions in, with their items' titles and what their events were."""
    known = {each.key: each for each in feed.snapshot.predictions}
    for record in read:
        fresh = _prediction(record)
        seen = known.get(fresh.key)
        if seen is None or seen.predicted_ms < fresh.predicted_ms:  # topics may have begun anew
            known[fresh.key] = fresh
    newest: list[Prediction] = []
    for kind in ("interaction", "review", "request"):
        of_kind = [each for each in known.values() if each.kind == kind]
        newest += sorted(of_kind, key=lambda each: each.predicted_ms, reverse=True)[:SHOWN]
    newest.sort(key=lambda each: each.predicted_ms, reverse=True)
    sources = {each.key[1:4] for each in newest if not each.action and each.kind != "request"}
    events = _decoded(kafka, _read_sources(kafka, consumer, sources))
    titles = _titles(feed, store, newest)
    feed.update(
        predictions=tuple(
            replace(
                _with_event(each, events.get(each.key[1:4])), title=titles.get(each.item_id, "")
            )
            for each in newest
        )
    )


def _prediction(record: PredictedRating) -> Prediction:
    source = record.source
    low, high = record.interval or (None, None)
    return Prediction(
        key=(record.kind, source.topic, source.partition, source.offset, record.item_id),
        kind=record.kind,
        user_id=record.user_id,
        item_id=record.item_id,
        title="",
        rating=record.rating,
        low=low,
        high=high,
        tier=record.tier or "",
        version=record.model_version or "",
        predicted_ms=round(record.predicted_at.timestamp() * 1_000),
    )


def _with_event(prediction: Prediction, event: Any) -> Prediction:
    if isinstance(event, Review):
        return replace(prediction, action="review", truth=event.rating)
    if isinstance(event, Behavior):
        return replace(prediction, action=event.action)
    return prediction


def _read_sources(
    kafka: KafkaConfig, consumer: Consumer, sources: Iterable[tuple[str, int, int]]
) -> list[Message]:
    """The events at given positions, and what lies between them."""
    offsets: dict[tuple[str, int], list[int]] = {}
    for topic, partition, offset in sources:
        if topic in ("reviews", "behavior") and partition < kafka.partitions:
            offsets.setdefault((topic_name(kafka, topic), partition), []).append(offset)
    spans = {
        where: (max(min(found), max(found) - LONGEST_SPAN), max(found))
        for where, found in offsets.items()
    }
    return read_spans(
        consumer,
        [TopicPartition(*where, first) for where, (first, _) in spans.items()],
        {where: last for where, (_, last) in spans.items()},
    )


def _titles(feed: Feed, store: Store, predictions: Sequence[Prediction]) -> dict[str, str]:
    """Titles, as they are now, of the items shown and of the top items of the newest windows.

    Beside them those that were seen before: a page may show an older window.
    """
    known = feed.snapshot.titles
    wanted = {each.item_id for each in predictions}
    for window in feed.snapshot.windows[-20:]:
        for kind in window.kinds.values():
            wanted |= {name for name, _ in kind.top_items}
    ids = sorted(wanted)
    if not ids:
        return known
    try:
        values = store.read(store_keys(store, ITEM_KIND, hash_ids(ids)))
    except StoreError:
        return known
    shown = dict(zip(ids, map(title_of, values), strict=True))
    before = {name: title for name, title in known.items() if name not in shown}
    kept = dict([*before.items(), *shown.items()][-TITLES:])  # those that are shown now are newest
    feed.update(titles=kept)
    return kept


def now_ms() -> int:
    """Milliseconds since 1970."""
    return round(time.time() * 1_000)
