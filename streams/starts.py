"""Where a processor that takes partitions over reads on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from schemas.topics import BY_NAME
from streams.clients import error_of, group_name, topic_name, watermarks
from streams.config import KafkaConfig
from streams.exceptions import StoreAheadError, StoreError
from streams.processor import Offsets, Position, Processor

CONTROL_SECONDS = 10.0  # a coordinator that moves is found again within this
NAMED = 3  # inputs that an error names; there may be thousands


@dataclass(frozen=True)
class Start:
    """The offset at which an input is read on, and how many records before it are lost."""

    offset: int
    lost: int = 0


def claim(
    processor: Processor,
    consumer: Consumer,
    config: KafkaConfig,
    wanted: Mapping[int, Sequence[str]],
) -> dict[Position, Start]:
    """Have a processor claim these topics of partitions; where each of them is read on.

    Partitions that the processor is not through with are left out. Raises what its `claim` does,
    KafkaException, `StoreError` when Kafka does not tell what is committed, and `StoreAheadError`
    when the topics are not those that were worked on.
    """
    committed = _committed(processor, consumer, config, wanted)
    try:
        starts = processor.claim(committed)
    except StoreAheadError:
        # A worker that slept in between compares with offsets that another has moved since.
        moved = _committed(processor, consumer, config, wanted)
        if moved == committed:
            raise
        committed = moved
        starts = processor.claim(committed)
    ends = _ends(consumer, config, starts)
    # Retention may have passed a start meanwhile, and what left Kafka is in the archive.
    while passed := _passed(starts, ends):
        again = processor.claim({each: committed[each] for each in passed})
        if again == {each: starts[each] for each in passed}:
            break
        starts = {each: starts[each] for each in starts if each not in passed} | again
        ends = _ends(consumer, config, starts)
    return {
        (topic, partition): _start(processor, config, topic, partition, at, *ends[topic, partition])
        for partition, topics in starts.items()
        for topic, at in topics.items()
    }


def _committed(
    processor: Processor,
    consumer: Consumer,
    config: KafkaConfig,
    wanted: Mapping[int, Sequence[str]],
) -> Offsets:
    """The group's committed offset of each input, -1 where there is none."""
    inputs = _places(config, wanted)
    try:
        found = consumer.committed(inputs, CONTROL_SECONDS)
    except KafkaException as error:
        if error_of(error).code() != KafkaError._TIMED_OUT:
            raise
        where = ", ".join(f"{each.topic} partition {each.partition}" for each in inputs[:NAMED])
        more = f" and {len(inputs) - NAMED} more" if len(inputs) > NAMED else ""
        raise StoreError(
            f"Kafka does not tell what {group_name(config, processor.name)} has committed of "
            f"{where}{more}: {error}. If it goes on for minutes, a transaction hangs on the "
            "group's offsets: end it with kafka-transactions.sh (docs/operate.md)."
        ) from error
    committed: Offsets = {partition: {} for partition in wanted}
    for each in found:
        if each.error is not None:
            raise KafkaException(each.error)
        topic = each.topic.removeprefix(config.topic_prefix)
        committed[each.partition][topic] = max(each.offset, -1)
    return committed


def _ends(
    consumer: Consumer, config: KafkaConfig, starts: Offsets
) -> dict[Position, tuple[int, int]]:
    """The first offset of each input and the next one to be read."""
    places = _places(config, starts)
    found = watermarks(consumer, places, CONTROL_SECONDS)
    return {
        (topic.removeprefix(config.topic_prefix), partition): each
        for (topic, partition), each in found.items()
    }


def _places(config: KafkaConfig, inputs: Mapping[int, Iterable[str]]) -> list[TopicPartition]:
    return [
        TopicPartition(topic_name(config, topic), partition)
        for partition, topics in inputs.items()
        for topic in topics
    ]


def _passed(starts: Offsets, ends: Mapping[Position, tuple[int, int]]) -> list[int]:
    """Partitions of which Kafka begins after a start."""
    return [
        partition
        for partition, topics in starts.items()
        if any(0 <= at < ends[topic, partition][0] for topic, at in topics.items())
    ]


def _start(
    processor: Processor,
    config: KafkaConfig,
    topic: str,
    partition: int,
    offset: int,
    low: int,
    high: int,
) -> Start:
    """At `offset`, or at the first record where that is gone."""
    if offset < 0:
        return Start(OFFSET_BEGINNING)
    # The embedded broker tells of an end that is too low, and rightly where a partition begins.
    if offset > high and config.exactly_once:
        raise StoreAheadError(
            f"The {processor.name} has done with {topic_name(config, topic)} partition {partition} "
            f"up to offset {offset}, but it ends at {high}: the topic was made anew. Take another "
            "STARCAST_KAFKA__TOPIC_PREFIX, STARCAST_REDIS__KEY_PREFIX and STARCAST_ARCHIVE__URL "
            "for the new topics, or bring the old ones back."
        )
    # Where all is gone, the last offset was of the end of a transaction, which is no record.
    ended = low == high and config.exactly_once and BY_NAME[topic].transactional
    return Start(max(offset, low), max(low - offset - ended, 0))
