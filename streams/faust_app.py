"""The Faust app of insights, as Kafka's settings say; its client is aiokafka, not librdkafka."""

import logging
import ssl
import time
from collections.abc import Generator
from contextlib import contextmanager

import faust
import structlog
from faust.auth import SASLCredentials, SSLCredentials

from schemas.topics import LARGEST_MESSAGE
from streams.clients import REPEAT_SECONDS, KafkaOptionError, option_name
from streams.config import KafkaConfig

COMMIT_SECONDS = 1.0
REQUEST_SECONDS = 90.0  # Faust's own; it refuses sessions that are longer
REBALANCE_SECONDS = 6.0  # the embedded broker waits half of this for others to join

_SECURITY_OPTIONS = {
    "enable.ssl.certificate.verification",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.password",
    "sasl.username",
    "ssl.ca.location",
    "ssl.ca.pem",
    "ssl.certificate.location",
    "ssl.endpoint.identification.algorithm",
    "ssl.key.location",
    "ssl.key.password",
}
_LOG = structlog.get_logger(__name__)


def make_app(kafka: KafkaConfig, folder: str) -> faust.App:
    """A Faust app without web server, leader topic, tables or topics of its own."""
    servers = (each.strip().rpartition("://")[2] for each in kafka.bootstrap_servers.split(","))
    return faust.App(
        f"{kafka.group_id}-insights",
        env={},  # else BROKER_URL or APP_VERSION, as other programs have them, would win
        broker=[f"kafka://{server}" for server in servers if server],  # Faust takes "" for its own
        broker_client_id=f"{kafka.group_id}-insights",
        broker_credentials=broker_credentials(kafka),
        broker_session_timeout=kafka.session_timeout_ms / 1_000,
        broker_request_timeout=max(REQUEST_SECONDS, kafka.session_timeout_ms / 1_000),
        broker_rebalance_timeout=REBALANCE_SECONDS,
        broker_heartbeat_interval=kafka.session_timeout_ms / 3_000,
        broker_commit_interval=COMMIT_SECONDS,
        consumer_auto_offset_reset="earliest",
        producer_max_request_size=LARGEST_MESSAGE,  # of a dead letter; Faust's own is 1 MB
        store="memory://",
        datadir=folder,
        autodiscover=False,
        stream_wait_empty=False,  # digests wait for their window to pass; they are read again
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        key_serializer="raw",
        value_serializer="raw",
    )


def broker_credentials(kafka: KafkaConfig) -> SASLCredentials | SSLCredentials | None:
    """librdkafka's security options as Faust takes them; None for plain text.

    Raises KafkaOptionError for what cannot be expressed: insights alone reads through aiokafka.
    """
    options = {option_name(name): value for name, value in kafka.options.items()}
    protocol = options.get("security.protocol", "plaintext").upper()
    if protocol == "PLAINTEXT":
        return None
    security = {name for name in options if name.startswith(("ssl.", "sasl.", "enable.ssl."))}
    if unknown := security - _SECURITY_OPTIONS:
        raise KafkaOptionError(
            f"insights cannot use {', '.join(sorted(unknown))}: it reads through another client, "
            f"which takes {', '.join(sorted(_SECURITY_OPTIONS))}."
        )
    context = _ssl_context(options) if protocol in ("SSL", "SASL_SSL") else None
    if protocol == "SSL":
        return SSLCredentials(context=context)
    mechanism = options.get("sasl.mechanism", options.get("sasl.mechanisms", "GSSAPI"))
    if protocol not in ("SASL_PLAINTEXT", "SASL_SSL"):
        raise KafkaOptionError(f"Kafka has no security.protocol {protocol}.")
    if mechanism not in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
        raise KafkaOptionError(
            f"insights cannot log in by sasl.mechanism {mechanism}; it can by PLAIN, SCRAM-SHA-256 "
            "and SCRAM-SHA-512. Give it such a user, or leave insights out."
        )
    return SASLCredentials(
        username=options.get("sasl.username"),
        password=options.get("sasl.password"),
        mechanism=mechanism,
        ssl_context=context,
    )


def _ssl_context(options: dict[str, str]) -> ssl.SSLContext:
    authorities = options.get("ssl.ca.location")
    try:
        context = ssl.create_default_context(
            cafile=None if authorities == "probe" else authorities,
            cadata=options.get("ssl.ca.pem"),
        )
        if options.get("enable.ssl.certificate.verification") == "false":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if options.get("ssl.endpoint.identification.algorithm") == "none":
            context.check_hostname = False
        if certificate := options.get("ssl.certificate.location"):
            key, password = options.get("ssl.key.location"), options.get("ssl.key.password")
            context.load_cert_chain(certificate, key, password)
    except OSError as error:  # ssl.SSLError is one
        raise KafkaOptionError(
            f"A TLS file in kafka.options cannot be used: {error}. ssl.ca.location is "
            f"{authorities}, ssl.certificate.location {options.get('ssl.certificate.location')}."
        ) from error
    return context


@contextmanager
def sparing_logs() -> Generator[None]:
    """Log each kind of failure of aiokafka once in a while: it tells each ten times a second."""
    logger = logging.getLogger("aiokafka")
    handler = _Sparing(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate, before = False, logger.propagate
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


class _Sparing(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._last: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        kind, now = str(record.msg), time.monotonic()
        if now - self._last.get(kind, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._last[kind] = now
            _LOG.warning("kafka client of insights", error=record.getMessage())
