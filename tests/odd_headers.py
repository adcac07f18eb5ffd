"""Records with headers whose names are no text, which Kafka takes and most clients do not."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

from aiokafka import AIOKafkaProducer
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from streams.clients import topic_name
from streams.config import KafkaConfig

_BUILDERS = [
    f"aiokafka.producer.{module}.DefaultRecordBatchBuilder"
    for module in ("producer", "message_accumulator")
]


class NoName(str):
    """A header's name whose bytes are not UTF-8."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"\xff"


def send_with(
    headers: list[tuple[str, bytes]], kafka: KafkaConfig, topic: str, value: bytes
) -> None:
    """By aiokafka's producer in Python: others take names that are text alone."""

    async def send() -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=kafka.bootstrap_servers,
            compression_type="snappy",  # else brokers pack it anew, and mend the name
        )
        async with producer:
            name = topic_name(kafka, topic)
            await producer.send_and_wait(name, value, key=b"ann", headers=headers)

    one, other = (patch(name, _DefaultRecordBatchBuilderPy) for name in _BUILDERS)
    with one, other, ThreadPoolExecutor(1) as thread:  # Playwright's loop may run in this one
        thread.submit(lambda: asyncio.run(send())).result()
