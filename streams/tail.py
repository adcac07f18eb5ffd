"""Reading a topic outside any consumer group: to its end, or for as long as it grows.

And what stands before and beside it in the archive: retention and compaction take records away.
"""

import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from heapq import merge
from itertools import chain, groupby, islice
from typing import Literal

import polars as pl
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from schemas import archive
from schemas.topics import BY_NAME
from streams.admin import TopicError, existing_topic
from streams.clients import (
    REQUEST_SECONDS,
    SHORT_POLL_MS,
    error_of,
    reach,
    reader,
    topic_name,
    unreachable,
    watermarks,
)
from streams.config import ArchiveConfig, KafkaConfig
from streams.exceptions import JournalGapError

WAIT_SECONDS = 0.2  # a stop, or the end of a silent topic, is noticed this soon
STALL_SECONDS = 60.0  # a broker that goes away meanwhile would leave a reader waiting for the end
LONG_POLL_MS = 500  # of who follows, for whom no end is told
BATCH = 1_000
ARCHIVED_ROWS = 20_000  # archived rows in memory at once

Start = Literal["beginning", "end"] | datetime | Mapping[int, int]
"""A mapping holds the offset to begin at of each partition; those that it lacks begin at 0."""


def read_topic(
    kafka: KafkaConfig,
    topic: str,
    *,
    start: Start = "beginning",
    partitions: Collection[int] | None = None,
    follow: bool = False,
    stop: threading.Event | None = None,
    strict: bool = False,
) -> Iterator[list[Message]]:
    """Batches of a topic's committed messages; of one partition they come in order.

    `topic` is without the prefix in settings; `partitions` are all when left out. Ends when every
    partition has once been read to its end, or, when it is to `follow`, only with `stop`; then
    batches may be empty. Raises UnreachableError when no broker answers, TopicError when there
    is no such topic and, where it is `strict`, JournalGapError when retention has taken what was to
    be read next; else what it has left is read.
    """
    stop = stop or threading.Event()
    found = reach(kafka).list_topics(timeout=REQUEST_SECONDS).topics
    name = existing_topic(kafka, topic, [name for name in found if found[name].partitions])
    with reader(
        kafka,
        fetch_wait_max_ms=LONG_POLL_MS if follow else SHORT_POLL_MS,
        auto_offset_reset="error" if strict else "earliest",
    ) as consumer:
        left = set(found[name].partitions if partitions is None else partitions)
        consumer.list_topics(name, REQUEST_SECONDS)  # else its leaders are found half a second late
        moved = time.monotonic()
        consumer.assign(_positions(consumer, name, sorted(left), start))
        while (left or follow) and not stop.is_set():
            batch: list[Message] = []
            messages = consumer.consume(1, WAIT_SECONDS)
            if (
                messages
            ):  # a whole batch would be waited for, up to the timeout, behind the last one
                messages += consumer.consume(BATCH - 1, 0)
            for message in messages:
                moved = time.monotonic()
                error = message.error()
                if error is None:
                    batch.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:  # pyright: ignore[reportPrivateUsage]
                    left.discard(message.partition() or 0)
                elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # pyright: ignore[reportPrivateUsage]
                    raise JournalGapError(
                        f"Retention has deleted what was to be read next of {name} partition "
                        f"{message.partition()}. Run the command again: it takes from the archive "
                        "what the archiver has of it."
                    )
                elif error.fatal() or not error.retriable():
                    raise TopicError(f"Topic {name} cannot be read: {error.str()}.")
            if not follow and time.monotonic() - moved > STALL_SECONDS:
                reason = f"nothing came of topic {name}, which has not ended"
                raise unreachable(kafka, reason, STALL_SECONDS)
            if batch or follow:
                yield batch


def bounds(kafka: KafkaConfig, topic: str, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Where partitions begin, since retention has taken what stood before, and where they end."""
    name = topic_name(kafka, topic)
    places = [TopicPartition(name, partition) for partition in partitions]
    with reader(kafka, isolation_level="read_uncommitted") as consumer:
        found = watermarks(consumer, places, REQUEST_SECONDS)
    return {partition: each for (_, partition), each in found.items()}


def read_log(
    kafka: KafkaConfig, archived: ArchiveConfig, topic: str, partition: int
) -> Iterator[list[Message]]:
    """Batches of all that is left of one partition, up to its stable end, in order.

    What retention has taken from Kafka comes from the archive, and so does what compaction has.
    Raises JournalGapError where the archive lacks what retention has taken, or it takes more
    meanwhile.
    """
    if BY_NAME[topic].cleanup == "delete":
        low, high = bounds(kafka, topic, [partition])[partition]
        end = archived_end(archived, topic, partition)
        if end < low - (low == high):  # the last offset may be that of a transaction's end
            raise JournalGapError(
                f"Topic {topic} partition {partition} begins at offset {low}, and the archive at "
                f"{archived.url} ends at {end}. Run the archiver until it has caught up, or point "
                "STARCAST_ARCHIVE__URL at the archive of this shop."
            )
        yield from read_archived(kafka, archived, topic, partition, 0, low)
        start = {partition: low}
        yield from read_topic(kafka, topic, start=start, partitions=[partition], strict=True)
        return
    both = merge(
        chain.from_iterable(read_archived(kafka, archived, topic, partition)),
        chain.from_iterable(read_topic(kafka, topic, partitions=[partition])),
        key=_offset,
    )
    distinct = (next(same) for _, same in groupby(both, _offset))
    while batch := list(islice(distinct, BATCH)):
        yield batch


def read_archived(
    kafka: KafkaConfig,
    archived: ArchiveConfig,
    topic: str,
    partition: int,
    start: int = 0,
    end: int | None = None,
) -> Iterator[list[Message]]:
    """Batches of a partition's archived rows from `start` to before `end`, as messages."""
    columns = ("kafka_offset", "kafka_key", "kafka_value")
    frame = archive.read(
        archived.url, topic, archived.storage_options, columns=columns, partitions=[partition]
    ).filter(pl.col("kafka_offset") >= start)
    if end is not None:
        frame = frame.filter(pl.col("kafka_offset") < end)
    for rows in archive.chunks(frame, ARCHIVED_ROWS, archive.table_url(archived.url, topic)):
        yield [
            Message(
                topic=topic_name(kafka, topic),
                partition=partition,
                offset=offset,
                key=key,
                value=value,
            )
            for offset, key, value in rows.iter_rows()
        ]


def archived_end(archived: ArchiveConfig, topic: str, partition: int) -> int:
    """The offset after a partition's last archived row; 0 where there is none."""
    return archive.positions(archived.url, topic, archived.storage_options).get(partition, 0)


def _offset(message: Message) -> int:
    return message.offset() or 0


def _positions(
    consumer: Consumer, name: str, partitions: list[int], start: Start
) -> list[TopicPartition]:
    if start == "beginning":
        return [TopicPartition(name, partition, OFFSET_BEGINNING) for partition in partitions]
    if start == "end":
        return [TopicPartition(name, partition, OFFSET_END) for partition in partitions]
    if isinstance(start, Mapping):
        return [
            TopicPartition(name, partition, start.get(partition, OFFSET_BEGINNING))
            for partition in partitions
        ]
    time_ms = int(start.timestamp() * 1000)
    asked = [TopicPartition(name, partition, time_ms) for partition in partitions]
    try:
        return consumer.offsets_for_times(asked, timeout=REQUEST_SECONDS)
    except KafkaException as problem:
        raise TopicError(
            f"Kafka does not tell where {start.isoformat()} lies in topic {name}: "
            f"{error_of(problem).str()}. Read it from the beginning."
        ) from None
