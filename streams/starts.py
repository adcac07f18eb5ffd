"""Where a processor that takes a partition over reads on."""

from dataclasses import dataclass

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from streams.admin import error_of, group_name, topic_name
from streams.config import KafkaConfig
from streams.exceptions import StoreAheadError, StoreError
from streams.processor import Processor

CONTROL_SECONDS = 10.0  # a coordinator that moves is found again within this


@dataclass(frozen=True)
class Start:
    """The offset at which an input is read on, and how many records before it are lost."""

    offset: int
    lost: int = 0


def claim(
    processor: Processor, consumer: Consumer, config: KafkaConfig, partition: int, topics: list[str]
) -> dict[str, Start]:
    """Have a processor claim a partition; where each of these topics is read on.

    Raises what the processor's `claim` does, KafkaException, `StoreError` when Kafka does not tell
    what is committed, and `StoreAheadError` when the topics are not those that were worked on.
    """
    inputs = {topic: TopicPartition(topic_name(config, topic), partition) for topic in topics}
    committed = _committed(processor, consumer, config, inputs)
    try:
        starts = processor.claim(partition, committed)
    except StoreAheadError:
        # A worker that slept in between compares with offsets that another has moved since.
        moved = _committed(processor, consumer, config, inputs)
        if moved == committed:
            raise
        committed = moved
        starts = processor.claim(partition, committed)
    if not config.exactly_once:  # the embedded broker does not tell a partition's ends
        return {
            topic: Start(OFFSET_BEGINNING if starts[topic] < 0 else starts[topic])
            for topic in topics
        }
    ends = _ends(consumer, inputs)
    # Retention may have passed a start meanwhile, and what left Kafka is in the archive.
    while any(0 <= starts[topic] < low for topic, (low, _) in ends.items()):
        again = processor.claim(partition, committed)
        if again == starts:
            break
        starts, ends = again, _ends(consumer, inputs)
    return {
        topic: _start(processor, where, starts[topic], *ends[topic])
        for topic, where in inputs.items()
    }


def _committed(
    processor: Processor, consumer: Consumer, config: KafkaConfig, inputs: dict[str, TopicPartition]
) -> dict[str, int]:
    """The group's committed offset of each input, -1 where there is none."""
    try:
        found = consumer.committed([*inputs.values()], CONTROL_SECONDS)
    except KafkaException as error:
        if error_of(error).code() != KafkaError._TIMED_OUT:
            raise
        where = ", ".join(f"{each.topic} partition {each.partition}" for each in inputs.values())
        raise StoreError(
            f"Kafka does not tell what {group_name(config, processor.name)} has committed of "
            f"{where}: {error}. If it goes on for minutes, a transaction hangs on the group's "
            "offsets: end it with kafka-transactions.sh (docs/operate.md)."
        ) from error
    for each in found:
        if each.error is not None:
            raise KafkaException(each.error)
    return {each.topic.removeprefix(config.topic_prefix): max(each.offset, -1) for each in found}


def _ends(consumer: Consumer, inputs: dict[str, TopicPartition]) -> dict[str, tuple[int, int]]:
    """The first offset of each input and the next one to be written."""
    return {
        topic: consumer.get_watermark_offsets(where, CONTROL_SECONDS)
        for topic, where in inputs.items()
    }


def _start(processor: Processor, where: TopicPartition, offset: int, low: int, high: int) -> Start:
    """At `offset`, or at the first record where that is gone."""
    if offset < 0:
        return Start(OFFSET_BEGINNING)
    if offset > high:
        raise StoreAheadError(
            f"The {processor.name} has done with {where.topic} partition {where.partition} up to "
            f"offset {offset}, but it ends at {high}: the topic was made anew. Take another "
            "STARCAST_KAFKA__TOPIC_PREFIX, STARCAST_REDIS__KEY_PREFIX and STARCAST_ARCHIVE__URL "
            "for the new topics, or bring the old ones back."
        )
    return Start(max(offset, low), max(low - offset, 0))
