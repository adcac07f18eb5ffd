"""Clients of Kafka: their configuration, whether a broker answers, readers outside any group.

`client_config` is the one place where the configuration of a Kafka client is put together.
"""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import structlog
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from schemas.exceptions import StarcastError, UnreachableError
from streams.config import POLL_MILLISECONDS, KafkaConfig

REACH_SECONDS = 10.0  # a wrong address, a firewall or a wrong security protocol would wait for ever
REQUEST_SECONDS = 30.0  # a controller that is being elected would leave a request unanswered
REPEAT_SECONDS = 30.0  # a broker that is down would fill the log, ten lines a second
# A consumer that holds as much as it may looks again after this whether there is room: in the
# second that librdkafka waits (its issue 2879) a quick reader behind a backlog runs dry.
FETCH_AGAIN_MS = 20
SHORT_POLL_MS = 20  # the end of a partition is told only after one
_NOT_MAPPED = (
    "log_level",
    "error_cb",
    "stats_cb",
    "throttle_cb",
    "oauth_cb",
    "on_commit",
    "on_delivery",
)
_LOG = structlog.get_logger(__name__)


class KafkaOptionError(StarcastError):
    """A librdkafka option that does not exist, or a value that it does not take."""


def option_name(name: str) -> str:
    """librdkafka's name of an option: `SECURITY_PROTOCOL`, `security_protocol`, `ssl.ca.location`.

    No public librdkafka option has an underscore; environment variables cannot have dots.
    """
    return name if name in _NOT_MAPPED else name.lower().replace("_", ".")


def topic_name(kafka: KafkaConfig, name: str) -> str:
    """A topic's name on the cluster."""
    return kafka.topic_prefix + name


def group_name(kafka: KafkaConfig, processor: str) -> str:
    """The consumer group of a processor's workers."""
    return f"{kafka.group_id}-{processor}"


def error_of(exception: KafkaException) -> KafkaError:
    """What an exception of a Kafka client is about."""
    return exception.args[0]


def client_config(kafka: KafkaConfig, **options: Any) -> dict[str, Any]:
    """The configuration of one consumer, producer or administrative client.

    `options` are what the caller's correctness rests on (`group_id`, `transactional_id`,
    `isolation_level`, …): they win over the options in settings, which win over what stands here.
    Names may be written with underscores or as librdkafka writes them.
    """
    defaults: dict[str, Any] = {
        "client.id": kafka.group_id,
        "log_level": 2,  # failures reach `error_cb`, which says them once
        "error_cb": _report_error(),
    }
    settings = {option_name(name): value for name, value in kafka.options.items()}
    wanted = {option_name(name): value for name, value in options.items()}
    return defaults | settings | {"bootstrap.servers": kafka.bootstrap_servers} | wanted


def reader_config(kafka: KafkaConfig, **options: Any) -> dict[str, Any]:
    """The configuration of a consumer that joins no group: settings for members do not matter."""
    reader: dict[str, Any] = {
        "group_id": f"{kafka.group_id}-reader",  # required, never joined
        "session_timeout_ms": 6_000,
        "max_poll_interval_ms": POLL_MILLISECONDS,
        "enable_auto_commit": False,
        "enable_partition_eof": True,
        "isolation_level": "read_committed",
        "fetch_queue_backoff_ms": FETCH_AGAIN_MS,
    }
    return client_config(kafka, **reader | options)


@contextmanager
def reader(kafka: KafkaConfig, **options: Any) -> Generator[Consumer]:
    """A consumer that joins no group, closed in the end."""
    consumer = Consumer(reader_config(kafka, **options))
    try:
        yield consumer
    finally:
        consumer.close()


def watermarks(
    consumer: Consumer, places: Iterable[TopicPartition], seconds: float
) -> dict[tuple[str, int], tuple[int, int]]:
    """The first offset of each partition and the next one to be read, by topic and partition.

    For a consumer of what is committed that is where the oldest open transaction begins. A consumer
    is asked, since the process of an administrative client may end by a signal when its broker goes
    away meanwhile (`list_offsets` of librdkafka 2.16).

    Raises KafkaException when it is not answered within `seconds`, or in part.
    """
    asked = [(place.topic, place.partition) for place in places]
    if not asked:
        return {}
    lows, highs = (
        {
            (told.topic, told.partition): _offset(told)
            for told in consumer.offsets_for_times(
                [TopicPartition(*place, end) for place in asked], seconds
            )
        }
        for end in (OFFSET_BEGINNING, OFFSET_END)
    )
    return {place: (lows[place], highs[place]) for place in asked}


def _offset(told: TopicPartition) -> int:
    """What Kafka told; raises KafkaException where it told none."""
    if told.error is not None:
        raise KafkaException(told.error)
    if told.offset < 0:
        raise KafkaException(
            KafkaError(
                KafkaError.OFFSET_NOT_AVAILABLE,
                f"Kafka does not tell where {told.topic} partition {told.partition} begins or ends",
            )
        )
    return told.offset


def reach(kafka: KafkaConfig, seconds: float | None = None) -> AdminClient:
    """An administrative client whose broker has answered.

    Raises UnreachableError when no broker answers within `seconds` (REACH_SECONDS), and
    KafkaOptionError when librdkafka refuses an option.
    """
    seconds = REACH_SECONDS if seconds is None else seconds
    failures: dict[str, None] = {}

    def keep(error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # pyright: ignore[reportPrivateUsage]
            failures[error.str().split(" (after ")[0].split(": ", 1)[-1]] = None

    try:
        admin = AdminClient(client_config(kafka, error_cb=keep))
    except KafkaException as problem:
        raise refused_option(problem) from None
    try:
        admin.list_topics(timeout=seconds)
    except KafkaException as problem:
        admin.poll(0)
        raise unreachable(kafka, "; ".join(failures) or error_of(problem).str(), seconds) from None
    return admin


def refused_option(problem: KafkaException) -> KafkaOptionError:
    """What librdkafka says of an option, and where options are set."""
    return KafkaOptionError(
        f"Kafka client: {error_of(problem).str()}. Options come from kafka.options in settings "
        "(STARCAST_KAFKA__OPTIONS__…); `starcast config` shows their values and sources."
    )


def unreachable(kafka: KafkaConfig, reason: str, seconds: float) -> UnreachableError:
    """The error of a broker that does not answer."""
    protocol = client_config(kafka).get("security.protocol", "PLAINTEXT")
    return UnreachableError(
        f"No Kafka broker answers at {kafka.bootstrap_servers} within {seconds:g} s ({reason}). "
        "Start it, or set STARCAST_KAFKA__BOOTSTRAP_SERVERS to its host:port; the security "
        f"protocol tried is {protocol} (STARCAST_KAFKA__OPTIONS__SECURITY_PROTOCOL)."
    )


def _report_error() -> Callable[[KafkaError], None]:
    """An error callback that logs each distinct failure at most once in REPEAT_SECONDS."""
    last_logged: dict[str, float] = {}

    def report(error: KafkaError) -> None:
        text = error.str().split(" (after ")[0]
        now = time.monotonic()
        if now - last_logged.get(text, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            last_logged[text] = now
            _LOG.warning("kafka client", error=text, code=error.name(), fatal=error.fatal())

    return report
