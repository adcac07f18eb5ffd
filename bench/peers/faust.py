"""Faust: batches by `take`, user states in Redis. At least once.

Acknowledgements follow a batch and are committed by a timer, as Faust does by default, so an event
may be scored again after a crash, and its prediction published twice.
"""

import asyncio
import sys
import tempfile
from typing import Any, cast

import faust

from bench.peers.work import WAIT_SECONDS, Arrival, Settings, Work, serve

GATHER_SECONDS = 1.0  # an event waits no longer than this for a fuller batch
COMMIT_SECONDS = 1.0
STOP_SECONDS = 10.0  # a Faust service that does not end is left to the end of its event loop


def run(settings: Settings, work: Work) -> None:
    """Score until all events have come."""
    with tempfile.TemporaryDirectory(prefix="starcast-faust-") as folder:
        asyncio.run(_run(settings, work, folder))


async def _run(settings: Settings, work: Work, folder: str) -> None:
    done = asyncio.Event()
    app = cast(
        Any,
        faust.App(
            settings.prefix,
            broker=f"kafka://{settings.bootstrap}",
            broker_commit_interval=COMMIT_SECONDS,
            broker_max_poll_records=settings.batch,
            consumer_auto_offset_reset="earliest",
            producer_compression_type="lz4",
            producer_linger=0.005,
            producer_max_batch_size=256 * 1024,
            stream_buffer_maxsize=2 * settings.batch,
            store="memory://",
            datadir=folder,
            autodiscover=False,
            web_enabled=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            key_serializer="raw",
            value_serializer="raw",
        ),
    )
    output = app.topic(settings.output)

    @app.agent(app.topic(*settings.inputs), name="score")
    async def score(stream: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        async for events in stream.take_events(settings.batch, within=GATHER_SECONDS):
            predictions = work.score([_arrival(event.message) for event in events])
            sent = [
                await output.send(key=each.key, value=each.value, partition=each.partition)
                for each in predictions
            ]
            await asyncio.gather(*sent)
            if work.done:
                done.set()

    try:
        await app.start()
        async with asyncio.timeout(WAIT_SECONDS + settings.events / 100):
            await done.wait()
    finally:
        await asyncio.wait([asyncio.create_task(app.stop())], timeout=STOP_SECONDS)


def _arrival(message: Any) -> Arrival:
    return Arrival(message.topic, message.partition, message.offset, message.value)


if __name__ == "__main__":
    sys.exit(serve("faust", ["faust-streaming", "aiokafka"], run))
