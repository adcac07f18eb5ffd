"""A shop's own producer."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from streams.config import KafkaConfig
from tests.faults import producer as module
from tests.faults.producer import PersistentProducer


@dataclass
class Sent:
    name: str

    def topic(self) -> str:
        return self.name


@dataclass
class Scripted:
    """Acknowledges records, or stands still."""

    still: bool
    taken: list[bytes] = field(default_factory=list[bytes])
    due: list[Callable[[], Any]] = field(default_factory=list[Callable[[], Any]])

    def produce(self, topic: str, value: bytes, key: bytes, on_delivery: Any) -> None:
        self.taken.append(value)
        self.due.append(lambda: on_delivery(None, Sent(topic)))

    def poll(self, seconds: float) -> None:
        while self.due and not self.still:
            self.due.pop(0)()

    def purge(self) -> None:
        self.due.clear()

    def flush(self, seconds: float) -> None:
        """Nothing is left after a purge."""


def test_what_a_producer_that_stands_still_holds_is_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = [Scripted(still=False), Scripted(still=False)]
    waiting = iter(made)
    monkeypatch.setattr(module, "Producer", lambda config: next(waiting))
    monkeypatch.setattr(module, "STILL_SECONDS", -1.0)
    played = Counter[str]()
    producer = PersistentProducer(KafkaConfig(topic_prefix="eu."), played)
    producer.send("eu.reviews", b"u", b"first")
    producer._producer.poll(0)
    made[0].still = True
    for value in (b"second", b"third"):
        producer.send("eu.reviews", b"u", value)
    assert producer.finish() == 0
    assert made[1].taken == [b"second", b"third"]
    assert played == {"reviews": 3, "sent again": 2}
