"""When a worker without partitions ends, by what Kafka says of its group."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException, TopicPartition

from schemas.exceptions import UnreachableError
from streams import clients, membership
from streams.config import KafkaConfig
from streams.exceptions import LeftOutError
from streams.membership import AGAIN_SECONDS, Membership, left_out, patience
from tests.unit.streams.looped import Clock
from tests.unit.streams.scripted_kafka import failure

KAFKA = KafkaConfig(topic_prefix="eu.")
SECONDS = 366.0  # five minutes between polls, a session of 6 s, a minute more
GONE: Exception = UnreachableError("no broker answers")


def test_kafka_is_asked_after_all_that_it_may_wait_for_itself() -> None:
    assert patience(KAFKA, {}) == SECONDS
    longer = KAFKA.model_copy(update={"session_timeout_ms": 45_000})
    assert patience(longer, {"max.poll.interval.ms": "900000"}) == 900 + 45 + 60


@dataclass
class Group:
    """Answers, or fails, as it is told, and to nobody who has not asked the coordinator first."""

    state: ConsumerGroupState = ConsumerGroupState.STABLE
    members: dict[str, int] = field(default_factory=dict[str, int])  # partitions of each
    fails: KafkaException | None = None
    asked: list[str] = field(default_factory=list[str])
    committed_fails: KafkaError | None = None

    def committed(self, places: list[TopicPartition], _: float) -> list[Any]:
        self.asked.append(places[0].topic)
        return [SimpleNamespace(error=self.committed_fails)]

    def close(self) -> None:
        self.asked.append("closed")

    def describe_consumer_groups(self, names: list[str], request_timeout: float) -> Any:
        assert self.asked[-2:] == ["eu.model-updates", "closed"]
        members = [
            SimpleNamespace(
                member_id=name,
                assignment=SimpleNamespace(
                    topic_partitions=[TopicPartition("eu.items", 0)] * count
                ),
            )
            for name, count in self.members.items()
        ]

        def result() -> Any:
            if self.fails is not None:
                raise self.fails
            return SimpleNamespace(state=self.state, members=members)

        assert names == ["starcast-items"]
        return {names[0]: SimpleNamespace(result=result)}


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    made = Group()
    monkeypatch.setattr(membership, "reach", lambda *_: made)
    monkeypatch.setattr(clients, "Consumer", lambda _: made)
    return made


@pytest.mark.parametrize(
    ("state", "members", "out"),
    [
        ("EMPTY", {}, True),
        ("DEAD", {}, True),  # as Kafka calls a group that it does not know
        ("STABLE", {}, False),  # as the embedded broker calls each
        ("STABLE", {"other": 8}, True),
        ("STABLE", {"other": 8, "we": 0}, False),  # more workers than partitions
        ("STABLE", {"other": 4, "we": 4}, True),  # which nobody works on
        ("PREPARING_REBALANCING", {"other": 8}, False),
        ("COMPLETING_REBALANCING", {"other": 0}, False),
        ("UNKNOWN", {"other": 8}, False),  # a KIP-848 group that is given partitions
    ],
)
def test_a_group_that_has_settled_without_a_member(
    group: Group, state: str, members: dict[str, int], out: bool
) -> None:
    group.state, group.members = ConsumerGroupState[state], members
    assert left_out(KAFKA, "items", "we") is out


def test_a_member_that_has_lost_its_id_is_none_of_the_group(group: Group) -> None:
    group.members = {"other": 0}
    assert left_out(KAFKA, "items", "")


def test_a_group_of_which_kafka_does_not_tell(group: Group) -> None:
    group.fails = failure(KafkaError.GROUP_ID_NOT_FOUND)
    with pytest.raises(KafkaException):
        left_out(KAFKA, "items", "we")


def test_a_coordinator_that_is_gone_is_asked_nothing_more(group: Group) -> None:
    group.committed_fails = KafkaError(KafkaError.NOT_COORDINATOR)
    with pytest.raises(KafkaException):
        left_out(KAFKA, "items", "we")
    assert group.asked == ["eu.model-updates", "closed"]


def test_a_kafka_that_is_not_there_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "ASK_SECONDS", 0.3)
    with pytest.raises(UnreachableError):
        left_out(KafkaConfig(bootstrap_servers="127.0.0.1:1"), "items", "we")


@dataclass
class Worker:
    """A worker that polls each half a second and is told what `answers` has, the last for ever."""

    answers: list[bool | Exception]
    clock: Clock
    asked: list[float] = field(default_factory=list[float])

    def __post_init__(self) -> None:
        self.membership = Membership(KAFKA, "items", {})

    def left_out(self, kafka: KafkaConfig, processor: str, member: str) -> bool:
        assert (kafka, processor, member) == (KAFKA, "items", "we")
        self.asked.append(self.clock.now)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def live(self, seconds: float) -> None:
        until = self.clock.now + seconds
        with patch.object(membership, "left_out", self.left_out):
            while self.clock.now < until:
                self.clock.now += 0.5
                self.membership.check(lambda: "we")


@pytest.fixture
def clock() -> Iterator[Clock]:
    with patch.object(membership, "time", made := Clock(0.0)):
        yield made


def test_one_that_is_left_out_twice_ends_and_says_what_to_do(clock: Clock) -> None:
    worker = Worker([True], clock)
    with pytest.raises(
        LeftOutError,
        match=r"starcast-items goes on without.*for over 366 s.*Start the worker again",
    ):
        worker.live(3_600)
    assert worker.asked == [SECONDS, SECONDS + AGAIN_SECONDS]


@pytest.mark.parametrize(
    "answers",
    [
        [False],  # more workers than partitions, or a rebalance that goes on
        [GONE],
        [failure(KafkaError._TIMED_OUT)],
        [True, False, True, GONE, True, failure(KafkaError.NOT_COORDINATOR), False],
    ],
)
def test_one_that_has_to_wait_lives_on(clock: Clock, answers: list[bool | Exception]) -> None:
    worker = Worker([*answers], clock)
    worker.live(3_600)
    assert len(worker.asked) > 8
    assert min(b - a for a, b in zip(worker.asked, worker.asked[1:], strict=False)) >= AGAIN_SECONDS


def test_what_its_client_tells_begins_the_time_anew(clock: Clock) -> None:
    worker = Worker([True], clock)
    worker.live(SECONDS + 1)  # once left out
    worker.membership.moved()  # given none, or some and lost them
    worker.live(SECONDS - 1)
    assert worker.asked == [SECONDS]
    with pytest.raises(LeftOutError):
        worker.live(SECONDS)
    assert len(worker.asked) == 3


def test_an_answer_that_hangs_is_none(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(membership, "LONGEST_SECONDS", 0.01)
    monkeypatch.setattr(membership, "left_out", lambda *_: released.wait())
    member = Membership(KAFKA, "items", {})
    for _ in range(5):
        clock.now += SECONDS
        member.check(lambda: "we")
    released.set()
