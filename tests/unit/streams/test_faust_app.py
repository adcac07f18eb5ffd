import ssl
from pathlib import Path

import certifi
import pytest
from faust.auth import SASLCredentials, SSLCredentials

from schemas.topics import LARGEST_MESSAGE
from streams.clients import KafkaOptionError
from streams.config import POLL_MILLISECONDS, KafkaConfig
from streams.faust_app import broker_credentials, make_app


def credentials(**options: str) -> SASLCredentials | SSLCredentials | None:
    return broker_credentials(KafkaConfig(options=options))


def test_plain_text_needs_no_credentials() -> None:
    assert credentials() is None
    assert credentials(SECURITY_PROTOCOL="plaintext") is None
    assert credentials(SSL_KEYSTORE_LOCATION="a.p12") is None  # which librdkafka passes over too


def test_tls() -> None:
    found = credentials(SECURITY_PROTOCOL="SSL", SSL_CA_LOCATION=certifi.where())
    assert isinstance(found, SSLCredentials)
    assert found.context.verify_mode is ssl.CERT_REQUIRED
    assert found.context.check_hostname
    assert found.context.cert_store_stats()["x509_ca"] > 10


def test_tls_checks_can_be_loosened_as_librdkafka_names_it() -> None:
    found = credentials(
        security_protocol="SSL", **{"ssl.endpoint.identification.algorithm": "none"}
    )
    assert isinstance(found, SSLCredentials)
    assert not found.context.check_hostname
    assert found.context.verify_mode is ssl.CERT_REQUIRED
    found = credentials(security_protocol="SSL", enable_ssl_certificate_verification="false")
    assert isinstance(found, SSLCredentials)
    assert found.context.verify_mode is ssl.CERT_NONE


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_sasl(mechanism: str) -> None:
    found = credentials(
        SECURITY_PROTOCOL="SASL_PLAINTEXT",
        SASL_MECHANISM=mechanism,
        SASL_USERNAME="shop",
        SASL_PASSWORD="secret",
    )
    assert isinstance(found, SASLCredentials)
    assert (found.username, found.password) == ("shop", "secret")
    assert found.mechanism.value == mechanism
    assert found.protocol.value == "SASL_PLAINTEXT"
    assert found.ssl_context is None


def test_sasl_over_tls() -> None:
    found = credentials(
        **{"security.protocol": "sasl_ssl", "sasl.mechanisms": "PLAIN", "sasl.username": "u"}
    )
    assert isinstance(found, SASLCredentials)
    assert found.protocol.value == "SASL_SSL"
    assert found.ssl_context is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"security.protocol": "SASL_SSL"}, "GSSAPI"),
        ({"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "OAUTHBEARER"}, "OAUTHBEARER"),
        ({"security.protocol": "TLS"}, "TLS"),
        ({"security.protocol": "SSL", "ssl.ca.location": "/no/such/file"}, "/no/such/file"),
        ({"security.protocol": "SSL", "ssl.keystore.location": "a.p12"}, "ssl.keystore.location"),
        (
            {"security.protocol": "SSL", "ssl.certificate.location": "/no/certificate"},
            "/no/certificate",
        ),
    ],
)
def test_what_cannot_be_expressed_is_one_message(options: dict[str, str], message: str) -> None:
    with pytest.raises(KafkaOptionError, match=message):
        broker_credentials(KafkaConfig(options=options))


def test_the_app_keeps_to_itself(tmp_path: Path) -> None:
    kafka = KafkaConfig(bootstrap_servers="a:1,b:2", group_id="shop", session_timeout_ms=3_000)
    app = make_app(kafka, str(tmp_path))
    assert app.conf.id == "shop-insights"
    assert [str(url) for url in app.conf.broker] == ["kafka://a:1", "kafka://b:2"]
    assert not app.conf.web_enabled
    assert not app.conf.topic_allow_declare
    assert app.conf.topic_disable_leader
    assert str(app.conf.store) == "memory:"
    assert app.conf.broker_session_timeout == 3.0
    assert app.conf.producer_max_request_size == LARGEST_MESSAGE  # a dead letter may have it


def test_what_the_environment_has_for_other_programs_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_app(KafkaConfig(), str(tmp_path)).conf
    monkeypatch.setenv("BROKER_URL", "amqp://celery:5672")
    monkeypatch.setenv("APP_VERSION", "2.7.1")
    monkeypatch.setenv("WEB_PORT", "tcp://10.0.0.1:80")  # Kubernetes', of a service named web
    found = make_app(KafkaConfig(), str(tmp_path)).conf
    assert (found.id, found.broker) == (expected.id, expected.broker)


def test_servers_are_told_apart_as_librdkafka_does(tmp_path: Path) -> None:
    app = make_app(KafkaConfig(bootstrap_servers="one:9092, two:9092 ,"), str(tmp_path))
    assert [str(url) for url in app.conf.broker] == ["kafka://one:9092", "kafka://two:9092"]


@pytest.mark.parametrize("session_ms", [6_000, POLL_MILLISECONDS])
def test_faust_takes_each_session_that_settings_allow(tmp_path: Path, session_ms: int) -> None:
    conf = make_app(KafkaConfig(session_timeout_ms=session_ms), str(tmp_path)).conf
    assert conf.broker_session_timeout == session_ms / 1_000
    assert conf.broker_session_timeout <= conf.broker_request_timeout


def test_a_protocol_before_a_server_is_left_to_security_protocol(tmp_path: Path) -> None:
    """As librdkafka takes it, and as it stands in a broker's `advertised.listeners`."""
    app = make_app(KafkaConfig(bootstrap_servers="PLAINTEXT://one:9092"), str(tmp_path))
    assert [str(url) for url in app.conf.broker] == ["kafka://one:9092"]
