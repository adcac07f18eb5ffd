"""Whether a group goes on without a worker that has no partition.

A client may lose its way back into its group for good when the group's coordinator moves
(librdkafka issues 2944 and 3396): its partitions are revoked, and it polls for nothing. Such a
worker ends, so that whoever supervises it starts it again. One that has to wait does not: once the
time has run out, Kafka is asked, and asked again.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from confluent_kafka import ConsumerGroupState, KafkaException, TopicPartition

from schemas.exceptions import UnreachableError
from streams.clients import group_name, reach, reader, topic_name
from streams.config import POLL_MILLISECONDS, KafkaConfig
from streams.deadline import within
from streams.exceptions import LeftOutError

# Beyond what Kafka itself waits for members, in a rebalance and for a silent one: a worker that
# ended sooner would leave a group that is about to give it partitions, and hold it up by another.
MARGIN_SECONDS = 60.0
AGAIN_SECONDS = 30.0  # one that woke, or whose Kafka came back, just before has joined by then
ASK_SECONDS = 3.0  # a broker that takes longer to answer is none
LONGEST_SECONDS = 12.0  # for three answers; a client's end may hang (librdkafka issue 3740)
_LOG = structlog.get_logger(__name__)


class Membership:
    """Ends a worker without partitions once its group goes on without it."""

    def __init__(self, kafka: KafkaConfig, processor: str, client: Mapping[str, Any]) -> None:
        """`client` is the configuration of the worker's consumer."""
        self._kafka = kafka
        self._processor = processor
        self._seconds = patience(kafka, client)
        self.moved()

    def moved(self) -> None:
        """Its partitions have changed, or it is as it should be that it has none."""
        self._ask_at = time.monotonic() + self._seconds
        self._missed = False

    def check(self, member: Callable[[], str | None]) -> None:
        """To be called by a worker that has no partition; `member` tells its id in the group.

        Raises LeftOutError when Kafka has said twice that the group does not know of it.
        """
        if time.monotonic() < self._ask_at:
            return
        if not self._missing(member):
            self.moved()
            return
        if self._missed:
            raise LeftOutError(
                f"{group_name(self._kafka, self._processor)} goes on without this worker, which "
                f"has had no partition for over {self._seconds:.0f} s: its Kafka client does not "
                "come back to the group, as may happen when brokers go away (librdkafka issues "
                "2944 and 3396). Start the worker again; Compose does so, and systemd with "
                "`Restart=on-failure`. Nothing is lost."
            )
        self._missed = True
        self._ask_at = time.monotonic() + AGAIN_SECONDS

    def _missing(self, member: Callable[[], str | None]) -> bool:
        try:
            missing = within(
                LONGEST_SECONDS, lambda: left_out(self._kafka, self._processor, member() or "")
            )
        except (UnreachableError, KafkaException, TimeoutError) as problem:
            _LOG.warning(
                "no partition, and Kafka does not tell of the group",
                processor=self._processor,
                reason=str(problem),
            )
            return False
        if missing:
            _LOG.warning("the group goes on without this worker", processor=self._processor)
        return missing


def patience(kafka: KafkaConfig, client: Mapping[str, Any]) -> float:
    """How long, in seconds, a worker may be without partitions before Kafka is asked."""
    poll = int(client.get("max.poll.interval.ms", POLL_MILLISECONDS))
    return (poll + kafka.session_timeout_ms) / 1_000 + MARGIN_SECONDS


def left_out(kafka: KafkaConfig, processor: str, member: str) -> bool:
    """Whether a processor's group has settled without `member`, which has no partition.

    A member that the group gives none is in it, as where there are more workers than partitions;
    one that has some in the group's eyes alone is not. Raises UnreachableError or KafkaException
    when Kafka does not tell.
    """
    group = group_name(kafka, processor)
    admin = reach(kafka, ASK_SECONDS)
    # Whether the coordinator answers is asked by a consumer: the process of an administrative
    # client may end by a signal where it does not (librdkafka 2.16, issue 4605).
    with reader(kafka, group_id=group) as consumer:
        place = TopicPartition(topic_name(kafka, "model-updates"), 0)  # any, for its answer alone
        (told,) = consumer.committed([place], ASK_SECONDS)
    if told.error is not None:
        raise KafkaException(told.error)
    described = admin.describe_consumer_groups([group], request_timeout=ASK_SECONDS)
    found = described[group].result()
    if found.state == ConsumerGroupState.STABLE and found.members:
        return all(
            each.member_id != member or each.assignment.topic_partitions for each in found.members
        )
    # Stable and of nobody is each group to the embedded broker, which does not tell of members.
    return found.state in (ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD)
