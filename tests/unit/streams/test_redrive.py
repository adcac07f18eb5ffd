from types import SimpleNamespace

import pytest

from schemas.topics import LARGEST_MESSAGE
from streams.config import KafkaConfig
from streams.dead_letters import Letter
from streams.redrive import BUNCH_LETTERS, _bunches, _Redriver, redrive
from tests.unit.streams.messages import letter_of, message
from tests.unit.streams.scripted_kafka import Broker


def test_redrive_says_which_letters_it_cannot_send(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()
    topics = SimpleNamespace(topics=["reviews", "dead-letters"])
    reached = SimpleNamespace(list_topics=lambda timeout: topics)
    monkeypatch.setattr("streams.redrive.reach", lambda _: reached)
    monkeypatch.setattr("streams.redrive.Producer", broker.producer)
    monkeypatch.setattr(_Redriver, "wait_until_decided", lambda _: None)
    values = [b"first", bytes(LARGEST_MESSAGE), b"last"]
    letters = [
        Letter(0, at, letter_of(message("reviews", value))) for at, value in enumerate(values)
    ]
    monkeypatch.setattr("streams.redrive.read_letters", lambda *_: letters)
    sent = redrive(KafkaConfig())
    assert [value for topic, value in broker.outputs if topic == "reviews"] == [b"first", b"last"]
    assert sum(topic == "dead-letters" for topic, _ in broker.outputs) == 2  # marks
    ((reason, count),) = sent.failed.items()
    assert (count, sent.delivered.total()) == (1, 2)
    assert "0/1" in reason


def test_bunches_are_bounded_by_letters_and_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (letter_of(message("reviews", b"x" * size)) for size in (30, 3_000))
    letters = [Letter(0, at, small) for at in range(BUNCH_LETTERS + 1)]
    assert [len(bunch) for bunch in _bunches(letters)] == [BUNCH_LETTERS, 1]
    monkeypatch.setattr("streams.redrive.BUNCH_CHARACTERS", 8_000)
    letters = [Letter(0, at, large) for at in range(5)]
    assert [[each.offset for each in bunch] for bunch in _bunches(letters)] == [[0, 1], [2, 3], [4]]
    assert list(_bunches([])) == []
