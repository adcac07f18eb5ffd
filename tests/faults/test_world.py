"""A shop's own producer."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from streams.config import KafkaConfig
from tests.faults import world
from tests.faults.world import Sender


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
    monkeypatch.setattr(world, "Producer", lambda config: next(waiting))
    monkeypatch.setattr(world, "STILL_SECONDS", -1.0)
    played = Counter[str]()
    sender = Sender(KafkaConfig(topic_prefix="eu."), played)
    sender.send("eu.reviews", b"u", b"first")
    sender._producer.poll(0)
    made[0].still = True
    for value in (b"second", b"third"):
        sender.send("eu.reviews", b"u", value)
    assert sender.finish() == 0
    assert made[1].taken == [b"second", b"third"]
    assert played == {"reviews": 3, "sent again": 2}
