"""Reading partitions' journals back, from Kafka and, before that, from the archive."""

import time
from collections.abc import Iterator, Mapping

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from schemas import archive
from schemas.journal import Joiner, OnTorn, TornError, Transaction
from streams.clients import SHORT_POLL_MS, reader, topic_name
from streams.config import ArchiveConfig, KafkaConfig
from streams.exceptions import JournalGapError, StoreAheadError
from streams.tail import archived_end, bounds

TOPIC = "journal"
END_SECONDS = 20.0  # a partition leader that is being elected answers within this
WAIT_SECONDS = 0.5
_LOG = structlog.get_logger(__name__)


def read_journal(
    kafka: KafkaConfig, archived: ArchiveConfig, partition: int, start: int
) -> Iterator[Transaction]:
    """The transactions of one partition from offset `start` to the stable end, in order.

    Raises what `read_journals` does.
    """
    for _, transaction in read_journals(kafka, archived, {partition: start}):
        if transaction is not None:
            yield transaction


def read_journals(
    kafka: KafkaConfig, archived: ArchiveConfig, starts: Mapping[int, int]
) -> Iterator[tuple[int, Transaction | None]]:
    """The transactions of partitions from their start to the stable end, and None at that end.

    Those of one partition come in order. What retention has taken from Kafka is read from the
    archive. Where there are no transactions a worker may have ended between two pieces of one of
    its own: nobody applied it, and it is left out; so is an entry in whose place another was
    sent. Raises `JournalGapError` when neither reaches back to a start, `StoreAheadError` when the
    journal ends before it.
    """
    entries = _entries(kafka, archived, starts)
    return entries if kafka.exactly_once else _standing(entries, starts)


def _standing(
    entries: Iterator[tuple[int, Transaction | None]], starts: Mapping[int, int]
) -> Iterator[tuple[int, Transaction | None]]:
    """The entries on which the states of the newest one stand.

    Without transactions an entry that a worker gave up may come late: before or after what was sent
    in its place, which has the same rows and perhaps more. Each tells how far its worker had read
    the journal. So of several entries made from one place, that which the next knew stands; where
    there is no next, the last does, since whoever recovers then goes on from it.
    """
    reached = dict(starts)
    waiting: dict[int, list[Transaction]] = {partition: [] for partition in starts}
    for partition, entry in entries:
        made = waiting[partition]
        known = [each for each in made if entry is None or each.last_offset < _known(entry)]
        if known:
            yield partition, known[-1]
            reached[partition] = known[-1].last_offset + 1
            made.clear()
        if entry is None:
            yield partition, None
        elif _known(entry) >= reached[partition]:
            made.append(entry)


def _known(entry: Transaction) -> int:
    """The next journal offset to apply when an entry was made: it begins the header it has."""
    return int.from_bytes(entry.journal.partition_state[:8], "little")


def _entries(
    kafka: KafkaConfig, archived: ArchiveConfig, starts: Mapping[int, int]
) -> Iterator[tuple[int, Transaction | None]]:
    """All that is there in whole, as `read_journals` tells it."""
    on_torn = None if kafka.exactly_once else _leave_out
    with reader(kafka, auto_offset_reset="error", fetch_wait_max_ms=SHORT_POLL_MS) as consumer:
        # Else leaders are found half a second late.
        consumer.list_topics(topic_name(kafka, TOPIC), END_SECONDS)
        left = dict(starts)
        while left:
            passed: set[int] = set()
            yield from _read(consumer, topic_name(kafka, TOPIC), left, passed, on_torn)
            reached, left = left, {}
            for partition, (low, high) in bounds(kafka, TOPIC, passed).items():
                start = reached[partition]
                if start >= low:
                    raise StoreAheadError(
                        f"States of partition {partition} stand at offset {start} of the journal, "
                        "which ends before: the topic was made anew. Take another "
                        "STARCAST_KAFKA__TOPIC_PREFIX and STARCAST_REDIS__KEY_PREFIX for the new "
                        "topics, or bring the old ones back."
                    )
                left[partition] = low
                for transaction in _archived(archived, partition, start, low, high, on_torn):
                    yield partition, transaction
                    # Retention may have cut into it: its last piece may stand after `low`.
                    left[partition] = max(low, transaction.last_offset + 1)


def _read(
    consumer: Consumer,
    topic: str,
    starts: Mapping[int, int],
    passed: set[int],
    on_torn: OnTorn | None,
) -> Iterator[tuple[int, Transaction | None]]:
    """What Kafka has; `passed` is to have the partitions whose start it has not."""
    consumer.assign([TopicPartition(topic, partition, at) for partition, at in starts.items()])
    joiners = {partition: Joiner(on_torn) for partition in starts}
    begun: set[int] = set()
    moved = time.monotonic()
    while joiners:
        if time.monotonic() - moved > END_SECONDS:
            raise KafkaException(
                KafkaError(
                    KafkaError._TIMED_OUT,  # pyright: ignore[reportPrivateUsage]
                    f"the journal gave nothing for {END_SECONDS:.0f} s",
                )
            )
        # One message waits for nothing; a batch would wait for more until its timeout.
        messages = consumer.consume(1, WAIT_SECONDS)
        for message in messages:
            error, partition = message.error(), message.partition() or 0
            if partition not in joiners:  # it has been read to what was its end
                continue
            if error is None:
                begun.add(partition)
                added = joiners[partition].add(message.offset() or 0, message.value() or b"")
                if added is not None:
                    yield partition, added
            elif error.code() == KafkaError._PARTITION_EOF:  # pyright: ignore[reportPrivateUsage]
                joiner = joiners.pop(partition)
                if on_torn is None:
                    joiner.end()
                yield partition, None
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # pyright: ignore[reportPrivateUsage]
                if partition in begun:  # retention has passed it meanwhile: the next claim finds it
                    raise KafkaException(error)
                del joiners[partition]
                passed.add(partition)
            else:
                raise KafkaException(error)
        if messages:  # after the yields: who reads may take long
            moved = time.monotonic()


def _archived(
    archived: ArchiveConfig, partition: int, start: int, low: int, high: int, on_torn: OnTorn | None
) -> Iterator[Transaction]:
    """What the archive has from `start` on; Kafka has the offsets from `low` to before `high`."""
    options = archived.storage_options
    reached = start
    for transaction in archive.journal(
        archived.url, partition, options, start=start, on_torn=on_torn
    ):
        if transaction.first_offset >= low:
            break
        reached = transaction.last_offset + 1
        yield transaction
    if reached > start:
        return
    # The end of a transaction has an offset, but no row: in a shop at rest that of the last one may
    # be all that was taken. Were it more, what follows would not go on from the states, or the
    # journal would end before the committed offsets, which whoever recovers is told.
    if not (start and (low == high or archived_end(archived, TOPIC, partition) >= low)):
        raise JournalGapError(
            f"Journal partition {partition} begins at offset {low} in Kafka, the store stands at "
            f"{start}, and the archive at {archived.url} has nothing between. Point "
            "STARCAST_ARCHIVE__URL at the archive of this shop."
        )


def _leave_out(torn: TornError) -> None:
    _LOG.warning("left out", reason=str(torn))
