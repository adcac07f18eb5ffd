"""A shop's own producer."""

import time
from collections import Counter
from functools import partial
from typing import Any

from confluent_kafka import Producer

from streams.clients import client_config
from streams.config import KafkaConfig

DELIVERY_MS = 600_000  # a producer outside waits for brokers that are down
STILL_SECONDS = 120.0  # and is replaced when it stands still for longer than they are ever gone


class PersistentProducer:
    """A shop's own producer: what is not acknowledged it sends again, in order, as shops do.

    An idempotent producer (librdkafka 2.16) was seen to stand still for eight minutes after brokers
    had gone and come back, until its records' time was up; so one that does is replaced.
    """

    def __init__(self, kafka: KafkaConfig, played: Counter[str]) -> None:
        self._kafka = kafka
        self._played = played
        self._waiting: dict[int, tuple[str, bytes, bytes]] = {}  # by number, not acknowledged
        self.sent = 0
        self._heard = time.monotonic()
        self._producer = self._make()

    def send(self, topic: str, key: bytes, value: bytes) -> None:
        """Take one record."""
        if not self._waiting:
            self._heard = time.monotonic()
        self._waiting[self.sent] = record = (topic, key, value)
        self._produce(self.sent, record)
        self.sent += 1

    def turn(self, seconds: float) -> None:
        """Hear what was acknowledged, and begin anew when nothing is for too long."""
        self._producer.poll(seconds)
        if self._waiting and time.monotonic() - self._heard > STILL_SECONDS:
            self._producer.purge()
            self._producer.flush(1)
            self._producer = self._make()
            self._heard = time.monotonic()
            self._played["sent again"] += len(self._waiting)
            for number, record in list(self._waiting.items()):
                self._produce(number, record)

    def finish(self) -> int:
        """Wait for all; how many were never acknowledged."""
        end = time.monotonic() + DELIVERY_MS / 1000
        while self._waiting and time.monotonic() < end:
            self.turn(0.1)
        return len(self._waiting)

    def _produce(self, number: int, record: tuple[str, bytes, bytes]) -> None:
        topic, key, value = record
        while True:
            try:
                self._producer.produce(topic, value, key, on_delivery=partial(self._note, number))
                return
            except BufferError:
                self._producer.poll(0.1)

    def _note(self, number: int, error: Any, message: Any) -> None:
        if error is None and self._waiting.pop(number, None) is not None:
            self._heard = time.monotonic()
            self._played[message.topic().removeprefix(self._kafka.topic_prefix)] += 1

    def _make(self) -> Producer:
        return Producer(
            client_config(
                self._kafka,
                acks="all",
                enable_idempotence=True,
                partitioner="murmur2_random",
                linger_ms=20,
                delivery_timeout_ms=DELIVERY_MS,
                queue_buffering_max_messages=500_000,
            )
        )
