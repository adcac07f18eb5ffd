"""Plain confluent-kafka, one event at a time, exactly-once.

`poll` gives one event, `produce` takes one prediction; a transaction carries up to `--batch` events
and their offsets, as the transactional example of confluent-kafka's repository has it.
"""

import sys

from confluent_kafka import Consumer, KafkaException, Message, Producer

from bench.peers.work import HOLDING, WAIT_SECONDS, Arrival, Settings, Work, serve
from schemas.exceptions import StarcastError


def run(settings: Settings, work: Work) -> None:
    """Score until all events have come."""
    consumer = Consumer(
        {
            "bootstrap.servers": settings.bootstrap,
            "group.id": settings.prefix,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "partition.assignment.strategy": "range",
            **HOLDING,
        }
    )
    producer = Producer(
        {
            "bootstrap.servers": settings.bootstrap,
            "transactional.id": settings.prefix,
            "partitioner": "murmur2_random",
            "compression.type": "lz4",
            "linger.ms": 5,
        }
    )
    producer.init_transactions(WAIT_SECONDS)
    consumer.subscribe(settings.inputs)
    while not work.done:
        producer.begin_transaction()
        for _ in range(settings.batch):
            [prediction] = work.score([arrival(consumer.poll(WAIT_SECONDS))])
            producer.produce(
                settings.output, prediction.value, prediction.key, prediction.partition
            )
            producer.poll(0)
            if work.done:
                break
        producer.send_offsets_to_transaction(
            consumer.position(consumer.assignment()), consumer.consumer_group_metadata()
        )
        producer.commit_transaction(WAIT_SECONDS)
    consumer.close()


def arrival(message: Message | None) -> Arrival:
    """The event in a message."""
    if message is None:
        raise StarcastError(f"Kafka gave nothing for {WAIT_SECONDS:.0f} s.")
    if message.error():
        raise KafkaException(message.error())
    return Arrival(
        message.topic() or "",
        message.partition() or 0,
        message.offset() or 0,
        message.value() or b"",
    )


if __name__ == "__main__":
    sys.exit(serve("confluent", ["confluent-kafka"], run))
