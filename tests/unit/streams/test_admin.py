from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)

from schemas.exceptions import UnreachableError
from schemas.topics import BY_NAME
from streams import admin
from streams.admin import (
    KafkaOptionError,
    TopicError,
    TopicReport,
    _counts,
    client_config,
    committed,
    option_name,
    reach,
    topic_name,
    watermarks,
)
from streams.config import KafkaConfig
from streams.embedded import HOST, free_port


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("SECURITY_PROTOCOL", "security.protocol"),
        ("security_protocol", "security.protocol"),
        ("ssl.ca.location", "ssl.ca.location"),
        ("ENABLE_SSL_CERTIFICATE_VERIFICATION", "enable.ssl.certificate.verification"),
        ("error_cb", "error_cb"),
        ("log_level", "log_level"),
    ],
)
def test_option_name(written: str, name: str) -> None:
    assert option_name(written) == name


def test_callers_win_over_settings_and_settings_over_defaults() -> None:
    kafka = KafkaConfig(
        bootstrap_servers="a:1",
        group_id="shop",
        options={"CLIENT_ID": "mine", "acks": "1", "bootstrap.servers": "b:2", "log_level": "7"},
    )
    config = client_config(kafka, acks="all", enable_idempotence=True, **{"linger.ms": 5})
    assert config["client.id"] == "mine"
    assert config["acks"] == "all"
    assert config["enable.idempotence"] is True
    assert config["linger.ms"] == 5
    assert config["log_level"] == "7"
    assert config["bootstrap.servers"] == "a:1"


def test_every_client_takes_the_configuration() -> None:
    Producer(client_config(KafkaConfig(options={"SECURITY_PROTOCOL": "PLAINTEXT"})))


def test_topic_name_has_the_prefix() -> None:
    assert topic_name(KafkaConfig(topic_prefix="eu."), "reviews") == "eu.reviews"


def test_no_broker_is_one_message_that_names_it_and_what_to_do() -> None:
    address = f"{HOST}:{free_port()}"
    with pytest.raises(UnreachableError) as caught:
        reach(KafkaConfig(bootstrap_servers=address), seconds=1)
    message = str(caught.value)
    assert address in message
    assert "Connection refused" in message
    assert "STARCAST_KAFKA__BOOTSTRAP_SERVERS" in message


@pytest.mark.parametrize(
    "options", [{"no.such.option": "1"}, {"security.protocol": "odd"}, {"session.timeout.ms": "x"}]
)
def test_a_wrong_option_is_named(options: dict[str, str]) -> None:
    with pytest.raises(KafkaOptionError) as caught:
        reach(KafkaConfig(options=options), seconds=1)
    assert next(iter(options)) in str(caught.value)


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


def test_a_failure_is_logged_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    now = [0.0]

    class Log:
        def warning(self, event: str, error: str, **_: object) -> None:
            logged.append(error)

    monkeypatch.setattr(admin, "_LOG", Log())
    monkeypatch.setattr(admin.time, "monotonic", lambda: now[0])
    report = client_config(KafkaConfig())["error_cb"]
    for _ in range(3):
        report(KafkaError(KafkaError._TRANSPORT, "x refused (after 1 ms)"))
        report(KafkaError(KafkaError._TRANSPORT, "x refused (after 2 ms)"))
        now[0] += admin.REPEAT_SECONDS
    report(KafkaError(KafkaError._TRANSPORT, "y refused"))
    assert logged == ["x refused"] * 3 + ["y refused"]


def test_refused_option_says_where_options_are_set() -> None:
    problem = KafkaException(KafkaError(KafkaError._INVALID_ARG, "No such property: foo"))
    assert "STARCAST_KAFKA__OPTIONS" in str(admin.refused_option(problem))


@dataclass
class Offsets:
    """A consumer that is told, of each partition in order, the offset of its beginning and end."""

    lows: list[int | KafkaError]
    highs: list[int | KafkaError]
    closed: bool = False

    def offsets_for_times(self, asked: list[TopicPartition], _: float) -> list[TopicPartition]:
        told = {OFFSET_BEGINNING: self.lows, OFFSET_END: self.highs}[asked[0].offset]
        found = [
            SimpleNamespace(
                topic=each.topic,
                partition=each.partition,
                offset=OFFSET_INVALID if isinstance(offset, KafkaError) else offset,
                error=offset if isinstance(offset, KafkaError) else None,
            )
            for each, offset in zip(asked, told, strict=True)
        ]
        return cast(list[TopicPartition], found[::-1])  # in an order of its own

    def close(self) -> None:
        self.closed = True


PLACES = [TopicPartition("reviews", 0), TopicPartition("reviews", 1)]


def test_watermarks_are_where_partitions_begin_and_end() -> None:
    found = watermarks(cast(Consumer, Offsets([0, 3], [0, 9])), PLACES, 1)
    assert found == {("reviews", 0): (0, 0), ("reviews", 1): (3, 9)}
    assert watermarks(cast(Consumer, Offsets([], [])), [], 1) == {}


@pytest.mark.parametrize("untold", [-1001, KafkaError(KafkaError._TIMED_OUT)])
def test_a_watermark_that_is_not_told_is_an_error(untold: int | KafkaError) -> None:
    """In a fault run a broker was killed while it was asked: the end came as -1001, no error."""
    with pytest.raises(KafkaException):
        watermarks(cast(Consumer, Offsets([0, 3], [0, untold])), PLACES, 1)


@pytest.mark.parametrize("untold", [-1001, KafkaError(KafkaError.LEADER_NOT_AVAILABLE)])
def test_a_topic_is_not_counted_where_an_offset_is_not_told(
    monkeypatch: pytest.MonkeyPatch, untold: int | KafkaError
) -> None:
    found: Any = {name: SimpleNamespace(partitions={0: None}) for name in ("users", "reviews")}

    class Topics(Offsets):
        def offsets_for_times(self, asked: list[TopicPartition], _: float) -> list[TopicPartition]:
            self.highs = [9 if asked[0].topic == "reviews" else untold]
            return super().offsets_for_times(asked, _)

    consumer = Topics([2], [])
    monkeypatch.setattr(admin, "Consumer", lambda _: consumer)
    assert _counts(KafkaConfig(), [*found], found) == {"reviews": 7}
    assert consumer.closed


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
    monkeypatch.setattr(admin, "Consumer", lambda _: made)
    return made


def test_a_groups_offsets_are_asked_for_until_its_coordinator_has_moved(member: Member) -> None:
    member.errors = [KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_LOAD_IN_PROGRESS]
    assert committed(KafkaConfig(topic_prefix="eu."), "shop") == {"reviews": {0: 7}}
    assert member.closed


def test_another_failure_of_a_groups_coordinator_is_told(member: Member) -> None:
    member.errors = [KafkaError.GROUP_AUTHORIZATION_FAILED]
    with pytest.raises(TopicError, match="refused a request"):
        committed(KafkaConfig(topic_prefix="eu."), "shop")
    assert member.closed
