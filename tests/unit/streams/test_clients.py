from typing import cast

import pytest
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)

from schemas.exceptions import UnreachableError
from streams import clients
from streams.clients import (
    KafkaOptionError,
    client_config,
    option_name,
    reach,
    topic_name,
    watermarks,
)
from streams.config import KafkaConfig
from streams.embedded import HOST, free_port
from tests.unit.streams.scripted_kafka import Offsets


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


def test_a_failure_is_logged_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    now = [0.0]

    class Log:
        def warning(self, event: str, error: str, **_: object) -> None:
            logged.append(error)

    monkeypatch.setattr(clients, "_LOG", Log())
    monkeypatch.setattr(clients.time, "monotonic", lambda: now[0])
    report = client_config(KafkaConfig())["error_cb"]
    for _ in range(3):
        report(KafkaError(KafkaError._TRANSPORT, "x refused (after 1 ms)"))
        report(KafkaError(KafkaError._TRANSPORT, "x refused (after 2 ms)"))
        now[0] += clients.REPEAT_SECONDS
    report(KafkaError(KafkaError._TRANSPORT, "y refused"))
    assert logged == ["x refused"] * 3 + ["y refused"]


def test_refused_option_says_where_options_are_set() -> None:
    problem = KafkaException(KafkaError(KafkaError._INVALID_ARG, "No such property: foo"))
    assert "STARCAST_KAFKA__OPTIONS" in str(clients.refused_option(problem))


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
