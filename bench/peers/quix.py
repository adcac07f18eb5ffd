"""Quix Streams, exactly-once: each event through `apply` to a topic, user states in Redis.

Quix hands over one event at a time; a checkpoint of `commit_every` events is one transaction.
"""

import sys
import tempfile
from typing import Any

from quixstreams import Application, message_context  # pyright: ignore[reportMissingImports]

from bench.peers.work import HOLDING, WAIT_SECONDS, Arrival, Settings, Work, serve

CHECKPOINT_SECONDS = 60.0  # so that `commit_every` decides


def run(settings: Settings, work: Work) -> None:
    """Score until all events have come."""
    with tempfile.TemporaryDirectory(prefix="starcast-quix-") as folder:
        application = Application(
            broker_address=settings.bootstrap,
            consumer_group=settings.prefix,
            processing_guarantee="exactly-once",
            commit_every=settings.batch,
            commit_interval=CHECKPOINT_SECONDS,
            auto_offset_reset="earliest",
            auto_create_topics=False,
            consumer_extra_config={
                "isolation.level": "read_committed",
                **HOLDING,
            },
            producer_extra_config={
                "partitioner": "murmur2_random",
                "compression.type": "lz4",
                "linger.ms": 5,
            },
            state_dir=folder,
            loglevel="WARNING",
        )
        output = application.topic(settings.output, value_serializer="bytes")

        def score(value: bytes) -> bytes:
            context: Any = message_context()
            [prediction] = work.score(
                [Arrival(context.topic, context.partition, context.offset, value)]
            )
            return prediction.value

        for name in settings.inputs:
            topic = application.topic(name, value_deserializer="bytes")
            application.dataframe(topic).apply(score).to_topic(output)
        application.run(count=settings.events, timeout=WAIT_SECONDS, collect=False)


if __name__ == "__main__":
    sys.exit(serve("quix", ["quixstreams", "confluent-kafka"], run))
