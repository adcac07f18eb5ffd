from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import (
    ConsumerGroupState,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from schemas.topics import BY_NAME
from streams import admin, clients
from streams.admin import (
    GroupReport,
    TopicError,
    TopicReport,
    _counts,
    committed,
    group_report,
)
from streams.config import KafkaConfig
from tests.unit.streams.scripted_kafka import Offsets


def test_what_is_wrong_with_a_topic() -> None:
    topic = BY_NAME["reviews"]
    assert TopicReport("reviews", topic, 4).problem == "missing"
    assert TopicReport("reviews", topic, 4, partitions=4).problem == ""
    assert TopicReport("reviews", topic, 4, partitions=3).problem == (
        "has 3 partitions, settings say 4"
    )
    differing = {"retention.ms": ("1", "2")}
    report = TopicReport("reviews", topic, 4, partitions=4, differences=differing)
    assert report.problem == "retention.ms is 1, wanted 2"


@pytest.mark.parametrize(
    "untold",
    [
        -1001,
        KafkaError(KafkaError.LEADER_NOT_AVAILABLE),
        KafkaError(KafkaError._UNKNOWN_PARTITION),  # pyright: ignore[reportPrivateUsage]
    ],
)
def test_a_topic_is_not_counted_where_an_offset_is_not_told(
    monkeypatch: pytest.MonkeyPatch, untold: int | KafkaError
) -> None:
    found: Any = {name: SimpleNamespace(partitions={0: None}) for name in ("users", "reviews")}

    class Topics(Offsets):
        def offsets_for_times(self, asked: list[TopicPartition], _: float) -> list[TopicPartition]:
            self.highs = [9 if asked[0].topic == "reviews" else untold]
            return super().offsets_for_times(asked, _)

    consumer = Topics([2], [])
    monkeypatch.setattr(clients, "Consumer", lambda _: consumer)
    assert _counts(KafkaConfig(), [*found], found) == {"reviews": 7}
    assert consumer.closed


def test_the_ends_of_transactions_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of item updates a group has read the last, of reviews all but one, of behavior next to none.

    Of users Kafka does not answer whether what is left is a record.
    """
    described: Future[Any] = Future()
    described.set_result(SimpleNamespace(members=[], state=ConsumerGroupState.EMPTY))
    told = SimpleNamespace(describe_consumer_groups=lambda groups, **_: {groups[0]: described})
    ends = {
        ("item-updates", 0): (0, 6),
        ("item-updates", 1): (0, 4),
        ("reviews", 0): (0, 6),
        ("behavior", 0): (0, 1_005),
        ("users", 0): (0, 8),
    }
    read = {"item-updates": {0: 5, 1: 4}, "reviews": {0: 5}, "behavior": {0: 5}, "users": {0: 6}}
    assigned: list[tuple[str, int, int]] = []
    ended = KafkaError(KafkaError._PARTITION_EOF)  # pyright: ignore[reportPrivateUsage]
    polls = [
        [
            Message(topic="reviews", partition=0, offset=5),
            Message(topic="reviews", partition=0, offset=6, error=ended),
            Message(topic="item-updates", partition=0, offset=6, error=ended),
        ]
    ]
    consumer = SimpleNamespace(
        assign=lambda places: assigned.extend((at.topic, at.partition, at.offset) for at in places),
        consume=lambda *_: polls.pop() if polls else [],
    )
    monkeypatch.setattr(admin, "REQUEST_SECONDS", 0.05)
    monkeypatch.setattr(admin, "committed", lambda *_: read)
    monkeypatch.setattr(admin, "reach", lambda _: told)
    monkeypatch.setattr(admin, "reader", lambda *_, **__: nullcontext(consumer))
    monkeypatch.setattr(admin, "watermarks", lambda *_: ends)
    report = group_report(KafkaConfig(), "archiver")
    assert report == GroupReport(members=0, waiting=1 + 1_000 + 2)
    assert assigned == [("item-updates", 0, 5), ("reviews", 0, 5), ("users", 0, 6)]


@dataclass
class Member:
    """A member whose group is given another coordinator, and answers then."""

    errors: list[int]
    closed: bool = False

    def committed(self, asked: list[TopicPartition], _: float) -> list[TopicPartition]:
        if self.errors:
            raise KafkaException(KafkaError(self.errors.pop(0)))
        return [
            TopicPartition(each.topic, each.partition, 7 - each.partition * 8) for each in asked
        ]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> Member:
    made = Member([])
    topics = {"eu.reviews": SimpleNamespace(partitions=[0, 1]), "other": SimpleNamespace()}
    there = SimpleNamespace(list_topics=lambda timeout: SimpleNamespace(topics=topics))
    monkeypatch.setattr(admin, "reach", lambda _: there)
    monkeypatch.setattr(clients, "Consumer", lambda _: made)
    return made


def test_a_groups_offsets_are_asked_for_until_its_coordinator_has_moved(member: Member) -> None:
    member.errors = [KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_LOAD_IN_PROGRESS]
    assert committed(KafkaConfig(topic_prefix="eu."), "shop") == {"reviews": {0: 7}}
    assert member.closed


@pytest.mark.parametrize(
    ("code", "permissions"),
    [(KafkaError.GROUP_AUTHORIZATION_FAILED, True), (KafkaError.INVALID_GROUP_ID, False)],
)
def test_another_failure_of_a_groups_coordinator_is_told(
    member: Member, code: int, permissions: bool
) -> None:
    member.errors = [code]
    with pytest.raises(TopicError, match="refused a request") as raised:
        committed(KafkaConfig(topic_prefix="eu."), "shop")
    assert ("permissions" in str(raised.value)) == permissions
    assert member.closed
