"""Reading a partition's journal back, from Kafka and, before that, from the archive."""

import time
from collections.abc import Iterator

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from schemas import archive, journal
from schemas.journal import Transaction
from streams.admin import reader_config
from streams.config import ArchiveConfig, KafkaConfig
from streams.exceptions import JournalGapError, StoreAheadError

TOPIC = "journal"
END_SECONDS = 20.0  # a partition leader that is being elected answers within this
WAIT_SECONDS = 0.5
SHORT_POLL_MS = 20  # the end of a partition is told only after one


def read_journal(
    kafka: KafkaConfig, archived: ArchiveConfig, partition: int, start: int
) -> Iterator[Transaction]:
    """The transactions of one partition from offset `start` to the stable end, in order.

    What retention has taken from Kafka is read from the archive. Raises `JournalGapError` when
    neither reaches back to `start`, `StoreAheadError` when the journal ends before it.
    """
    topic = kafka.topic_prefix + TOPIC
    consumer = Consumer(
        reader_config(kafka, auto_offset_reset="error", fetch_wait_max_ms=SHORT_POLL_MS)
    )
    try:
        low, _ = consumer.get_watermark_offsets(TopicPartition(topic, partition), END_SECONDS)
        if start < low:
            yield from _archived(archived, partition, start, low)
            start = low
        consumer.assign([TopicPartition(topic, partition, start)])
        yield from journal.decode_all(_messages(consumer, partition, start))
    finally:
        consumer.close()


def _messages(consumer: Consumer, partition: int, start: int) -> Iterator[tuple[int, bytes]]:
    """Offset and value of each message up to the stable end."""
    moved = time.monotonic()
    while time.monotonic() - moved < END_SECONDS:
        # One message waits for nothing; a batch would wait for more until its timeout.
        for message in consumer.consume(1, WAIT_SECONDS):
            error = message.error()
            if error is None:
                moved = time.monotonic()
                yield message.offset() or 0, message.value() or b""
            elif error.code() == KafkaError._PARTITION_EOF:  # pyright: ignore[reportPrivateUsage]
                return
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # pyright: ignore[reportPrivateUsage]
                low, _ = consumer.get_watermark_offsets(
                    TopicPartition(message.topic() or "", partition), END_SECONDS
                )
                if start < low:  # retention has passed it meanwhile: the next claim finds it
                    raise KafkaException(error)
                raise StoreAheadError(
                    f"States of partition {partition} stand at offset {start} of the journal, "
                    "which ends before: the topic was made anew. Take another "
                    "STARCAST_KAFKA__TOPIC_PREFIX and STARCAST_REDIS__KEY_PREFIX for the new "
                    "topics, or bring the old ones back."
                )
            else:
                raise KafkaException(error)
    raise KafkaException(
        KafkaError(
            KafkaError._TIMED_OUT,  # pyright: ignore[reportPrivateUsage]
            f"the journal gave nothing for {END_SECONDS:.0f} s",
        )
    )


def _archived(
    archived: ArchiveConfig, partition: int, start: int, low: int
) -> Iterator[Transaction]:
    options = {name: value.get_secret_value() for name, value in archived.options.items()}
    reached = start
    for transaction in archive.journal(archived.url, partition, options, start=start):
        if transaction.first_offset >= low:
            break
        reached = transaction.last_offset + 1
        yield transaction
    if reached == start:
        raise JournalGapError(
            f"Journal partition {partition} begins at offset {low} in Kafka, the store stands at "
            f"{start}, and the archive at {archived.url} has nothing between. Point "
            "STARCAST_ARCHIVE__URL at the archive of this shop."
        )
