"""FastStream on confluent-kafka: batches from its subscriber, user states in Redis. At least once.

The broker takes a `transactional_id`, but has no call that begins or commits a transaction; offsets
are committed after each batch. Bodies go through undecoded, and no types are applied.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from confluent_kafka import Message
from faststream.confluent import (  # pyright: ignore[reportMissingImports]
    KafkaBroker,
    KafkaPublishMessage,
)
from faststream.middlewares import AckPolicy  # pyright: ignore[reportMissingImports]

from bench.peers.confluent import arrival
from bench.peers.work import HOLDING, WAIT_SECONDS, Settings, Work, serve

GATHER_SECONDS = 1.0  # an event waits no longer than this for a fuller batch


def run(settings: Settings, work: Work) -> None:
    """Score until all events have come."""
    asyncio.run(_run(settings, work))


async def _run(settings: Settings, work: Work) -> None:
    done = asyncio.Event()
    broker = KafkaBroker(
        settings.bootstrap,
        partitioner="murmur2_random",
        compression_type="lz4",
        linger_ms=5,
        acks="all",
        enable_idempotence=True,
        apply_types=False,
        logger=None,
        config=HOLDING,
    )

    @broker.subscriber(  # pyright: ignore[reportUntypedFunctionDecorator]
        *settings.inputs,
        group_id=settings.prefix,
        batch=True,
        max_records=settings.batch,
        polling_interval=GATHER_SECONDS,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        partition_assignment_strategy="range",
        ack_policy=AckPolicy.ACK,
        decoder=_undecoded,
    )
    async def score(messages: Sequence[Message]) -> None:  # pyright: ignore[reportUnusedFunction]
        predictions = work.score([arrival(message) for message in messages])
        await broker.publish_batch(
            *(KafkaPublishMessage(each.value, key=each.key) for each in predictions),
            topic=settings.output,
        )
        if work.done:
            done.set()

    async with broker:
        await broker.start()
        async with asyncio.timeout(WAIT_SECONDS + settings.events / 100):
            await done.wait()


async def _undecoded(message: Any) -> Any:
    return message.raw_message


if __name__ == "__main__":
    sys.exit(serve("faststream", ["faststream", "confluent-kafka"], run))
