"""Kafka's administration: our topics, and what a group has committed."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import stamina
from confluent_kafka import (
    Consumer,
    ConsumerGroupState,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import (  # its stubs export the client alone
    AdminClient,
    AlterConfigOpType,  # pyright: ignore[reportPrivateImportUsage]
    ConfigEntry,  # pyright: ignore[reportPrivateImportUsage]
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
    NewTopic,  # pyright: ignore[reportPrivateImportUsage]
    ResourceType,  # pyright: ignore[reportPrivateImportUsage]
    TopicMetadata,  # pyright: ignore[reportPrivateImportUsage]
)

from schemas.exceptions import ContractError
from schemas.topics import BY_NAME, TOPICS, Topic
from streams.clients import (
    REQUEST_SECONDS,
    SHORT_POLL_MS,
    error_of,
    group_name,
    reach,
    reader,
    topic_name,
    unreachable,
    watermarks,
)
from streams.config import KafkaConfig
from streams.exceptions import BrokerError

VISIBLE_SECONDS = 30.0  # a producer would meet a broker that has not heard of a new topic
VISIBLE_PARTITION_SECONDS = 0.05  # and for each partition: a broker makes a folder and files of it
VISIBLE_PAUSE_SECONDS = 0.1
MOST_ENDS = 100  # so few offsets behind a group may all be ends of transactions: it is looked
_NO_LEADER = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.OFFSET_NOT_AVAILABLE,
    # A client that has asked a broker which has not heard of it yet.
    KafkaError._UNKNOWN_TOPIC,  # pyright: ignore[reportPrivateUsage]
    KafkaError._UNKNOWN_PARTITION,  # pyright: ignore[reportPrivateUsage]
)
_FORBIDDEN = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)
_NO_COORDINATOR = (
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
)
_WITHOUT_MEMBERS = (ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD)
COORDINATOR_PAUSE_SECONDS = 0.2  # a group has another coordinator in a moment
_Answer = TypeVar("_Answer")


class TopicError(BrokerError):
    """Topics that are not as the table of topics says, and cannot be made so."""


class _NoLeaderError(TopicError):
    """A partition whose leader does not know that it is, or is not yet: a moment later it does."""


@dataclass(frozen=True)
class TopicReport:
    """One topic of the contract as the cluster has it; `partitions` is 0 when it has not."""

    name: str
    topic: Topic
    wanted_partitions: int
    partitions: int = 0
    replication: int = 0
    records: int | None = None  # between the first and the last offset; None when not told
    differences: Mapping[str, tuple[str, str]] = field(
        default_factory=dict[str, tuple[str, str]]
    )  # setting → (as found, as wanted)

    @property
    def problem(self) -> str:
        """What is wrong with the topic, empty when nothing is."""
        if not self.partitions:
            return "missing"
        if self.partitions != self.wanted_partitions:
            return f"has {self.partitions} partitions, settings say {self.wanted_partitions}"
        return ", ".join(
            f"{name} is {found}, wanted {wanted}"
            for name, (found, wanted) in self.differences.items()
        )


Change = Literal["created", "altered", "unchanged"]


def show_topics(kafka: KafkaConfig) -> list[TopicReport]:
    """Every topic of the contract as the cluster has it, in the table's order."""
    admin = reach(kafka)
    found = _request(kafka, lambda: admin.list_topics(timeout=REQUEST_SECONDS)).topics
    names = [topic_name(kafka, topic.name) for topic in TOPICS]
    present = [name for name in names if name in found and found[name].partitions]
    configs = _configs(kafka, admin, present)
    counts = _counts(kafka, present, found)
    reports: list[TopicReport] = []
    for name, topic in zip(names, TOPICS, strict=True):
        wanted = topic.partitions(kafka.partitions)
        if name not in present:
            reports.append(TopicReport(name, topic, wanted))
            continue
        partitions = found[name].partitions
        reports.append(
            TopicReport(
                name,
                topic,
                wanted,
                len(partitions),
                min(len(partition.replicas) for partition in partitions.values()),
                counts.get(name),
                topic.differences(configs[name]),
            )
        )
    return reports


def apply_topics(kafka: KafkaConfig) -> list[tuple[TopicReport, Change]]:
    """Makes the cluster's topics as the table says; each topic as it was, and what was done.

    Raises TopicError, before anything is changed, when a topic has another partition count: the
    count decides where a user's events lie, so it is fixed at birth.
    """
    reports = show_topics(kafka)
    _refuse_other_counts(
        {r.name: (r.partitions, r.wanted_partitions) for r in reports if r.partitions}
    )
    admin = reach(kafka)
    _create(kafka, admin, [report for report in reports if not report.partitions])
    _alter(admin, [report for report in reports if report.differences])
    return [(report, _change(report)) for report in reports]


def check_topics(kafka: KafkaConfig) -> None:
    """See that every topic is there, with the partitions that settings say.

    Otherwise workers would send to topics that are not there again and again, and keep states
    where no other worker looks for them. Raises TopicError, which says what to do, and
    UnreachableError when no broker answers.
    """
    admin = reach(kafka)
    found = _request(kafka, lambda: admin.list_topics(timeout=REQUEST_SECONDS)).topics
    wanted = {topic_name(kafka, topic.name): topic.partitions(kafka.partitions) for topic in TOPICS}
    missing = [name for name in wanted if name not in found or not found[name].partitions]
    if missing:
        raise TopicError(
            f"Kafka at {kafka.bootstrap_servers} has no topic {', '.join(missing)}. Make them "
            "with `starcast topics apply`; if they are there, the principal needs the Describe "
            "permission."
        )
    _refuse_other_counts({name: (len(found[name].partitions), wanted[name]) for name in wanted})


def existing_topic(kafka: KafkaConfig, topic: str, present: Collection[str]) -> str:
    """A topic's name on the cluster, where it must be present: Kafka would make it the wrong way.

    Raises TopicError when it is missing, ContractError when there is no such topic.
    """
    if topic not in BY_NAME:
        raise ContractError(f"There is no topic {topic!r}; topics are: {', '.join(BY_NAME)}.")
    name = topic_name(kafka, topic)
    if name not in present:
        raise TopicError(
            f"Topic {name} does not exist at {kafka.bootstrap_servers}. "
            "Make all topics with `starcast topics apply`."
        )
    return name


def _refuse_other_counts(counts: Mapping[str, tuple[int, int]]) -> None:
    """`counts` are of each topic the partitions that it has and those that settings say."""
    wrong = [
        f"{name} ({has}, not {wanted})" for name, (has, wanted) in counts.items() if has != wanted
    ]
    if wrong:
        raise TopicError(
            f"Topics of other partition counts than settings say: {', '.join(wrong)}. Counts are "
            "fixed at birth: set STARCAST_KAFKA__PARTITIONS to what exists; docs/operate.md, Begin "
            "anew, says how a shop gets more."
        )


def committed(kafka: KafkaConfig, group: str) -> dict[str, dict[int, int]]:
    """Topic → partition → the offset that a consumer group goes on from, where it has committed.

    Topics are those of the contract, without the prefix in settings.
    """
    admin = reach(kafka)
    present = _request(kafka, lambda: admin.list_topics(timeout=REQUEST_SECONDS)).topics
    names = {topic_name(kafka, topic.name): topic.name for topic in TOPICS}
    asked = [
        TopicPartition(name, partition)
        for name in names.keys() & present.keys()
        for partition in present[name].partitions
    ]
    # A consumer asks: librdkafka (2.16, issue 5040) ends the process of an administrative client
    # that asks while the group is given another coordinator. It is told what is committed now,
    # whatever is under way.
    with reader(kafka, group_id=group, isolation_level="read_uncommitted") as consumer:
        found = _request(kafka, lambda: _coordinated(consumer, asked))
    places: dict[str, dict[int, int]] = {}
    for place in found:
        if place.offset >= 0:
            places.setdefault(names[place.topic], {})[place.partition] = place.offset
    return places


@dataclass(frozen=True)
class GroupReport:
    """How far a processor's group is."""

    members: int | None  # None: the broker names none of a group that is not empty
    waiting: int | None  # records, about, behind what it has committed; none where it never has


def group_report(kafka: KafkaConfig, processor: str) -> GroupReport:
    """Members of a processor's group now, and records that wait for it.

    The embedded broker names no members, and keeps the state of a group whose members were killed.

    Raises UnreachableError and BrokerError as a broker answers.
    """
    group = group_name(kafka, processor)
    places = committed(kafka, group)
    admin = reach(kafka)  # which must live until it has its answer
    described = admin.describe_consumer_groups([group], request_timeout=REQUEST_SECONDS)
    try:
        told = described[group].result()
        members = len(told.members) or (0 if told.state in _WITHOUT_MEMBERS else None)
    except KafkaException as problem:
        if error_of(problem).code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise TopicError(
                f"Kafka does not tell of group {group}: {error_of(problem).str()}."
            ) from None
        members = 0
    if not places:
        return GroupReport(members, None)
    asked = [
        TopicPartition(topic_name(kafka, topic), partition)
        for topic, offsets in places.items()
        for partition in offsets
    ]
    with reader(kafka, fetch_wait_max_ms=SHORT_POLL_MS) as consumer:
        ends = _request(kafka, partial(watermarks, consumer, asked, REQUEST_SECONDS))
        starts = {
            (name, partition): max(offset, ends[name, partition][0])
            for topic, offsets in places.items()
            for name in [topic_name(kafka, topic)]
            for partition, offset in offsets.items()
        }
        spans = {place: max(ends[place][1] - start, 0) for place, start in starts.items()}
        few = [place for place, span in spans.items() if 0 < span <= MOST_ENDS]
        behind = _behind(consumer, [TopicPartition(*place, starts[place]) for place in few])
    waiting = sum(span for place, span in spans.items() if span > MOST_ENDS or place in behind)
    return GroupReport(members, waiting)


def _behind(consumer: Consumer, starts: Sequence[TopicPartition]) -> set[tuple[str, int]]:
    """Those partitions of which there is a record to read from a start on, or may be one.

    The end of a transaction, ours or a producer's, and what was aborted, has offsets and no record.
    """
    behind = {(each.topic, each.partition) for each in starts}
    left = set(behind)
    consumer.assign(list(starts))
    until = time.monotonic() + REQUEST_SECONDS
    while left and time.monotonic() < until:
        for message in consumer.consume(MOST_ENDS, VISIBLE_PAUSE_SECONDS):
            place, error = (message.topic() or "", message.partition() or 0), message.error()
            if place in left and error is not None and error.code() == KafkaError._PARTITION_EOF:
                behind.discard(place)
            left.discard(place)
    return behind


@stamina.retry(
    on=lambda problem: (
        isinstance(problem, KafkaException) and error_of(problem).code() in _NO_COORDINATOR
    ),
    attempts=None,
    timeout=REQUEST_SECONDS,
    wait_initial=COORDINATOR_PAUSE_SECONDS,
    wait_max=COORDINATOR_PAUSE_SECONDS,
    wait_jitter=0,
)
def _coordinated(member: Consumer, asked: list[TopicPartition]) -> list[TopicPartition]:
    """The answer of a group's coordinator, which may be about to be another broker."""
    found = member.committed(asked, REQUEST_SECONDS)
    if failed := [place.error for place in found if place.error is not None]:
        raise KafkaException(failed[0])
    return found


def topic_configs(kafka: KafkaConfig, names: list[str]) -> dict[str, dict[str, str]]:
    """The configuration of topics by their names on the cluster, all of which exist."""
    return _configs(kafka, reach(kafka), names)


def _change(report: TopicReport) -> Change:
    if not report.partitions:
        return "created"
    return "altered" if report.differences else "unchanged"


def _create(kafka: KafkaConfig, admin: AdminClient, missing: list[TopicReport]) -> None:
    if not missing:
        return
    futures = admin.create_topics(
        [
            NewTopic(
                report.name,
                num_partitions=report.wanted_partitions,
                replication_factor=kafka.replication,
                config=report.topic.config(),
            )
            for report in missing
        ],
        operation_timeout=REQUEST_SECONDS,
        request_timeout=REQUEST_SECONDS,
    )
    for name, future in futures.items():
        try:
            future.result()
        except KafkaException as problem:
            error = error_of(problem)
            if error.code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another worker was faster
                advice = (
                    f" Replication {kafka.replication} (STARCAST_KAFKA__REPLICATION) needs as many "
                    "brokers."
                    if error.code() == KafkaError.INVALID_REPLICATION_FACTOR
                    else _permission(error, "Create permission")
                )
                raise TopicError(
                    f"Kafka refused to create topic {name}: {error.str()}.{advice}"
                ) from None
    _wait_until_visible(kafka, admin, missing)


def _wait_until_visible(kafka: KafkaConfig, admin: AdminClient, made: list[TopicReport]) -> None:
    """Until the leader of every partition answers."""
    seconds = VISIBLE_SECONDS + VISIBLE_PARTITION_SECONDS * sum(
        report.wanted_partitions for report in made
    )
    deadline = time.monotonic() + seconds
    while True:
        found = _request(kafka, lambda: admin.list_topics(timeout=REQUEST_SECONDS)).topics
        waiting = [
            report.name
            for report in made
            if report.name not in found
            or len(found[report.name].partitions) < report.wanted_partitions
        ]
        if not waiting:
            counts = _counts(kafka, [report.name for report in made], found)
            waiting = [report.name for report in made if report.name not in counts]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise TopicError(
                f"Topics {', '.join(waiting)} were created but have no leader after "
                f"{seconds:.0f} s. Look at the brokers' logs, then apply again."
            )
        time.sleep(VISIBLE_PAUSE_SECONDS)


def _alter(admin: AdminClient, changed: list[TopicReport]) -> None:
    if not changed:
        return
    futures = admin.incremental_alter_configs(
        [
            ConfigResource(
                ResourceType.TOPIC,
                report.name,
                incremental_configs=[
                    ConfigEntry(key, wanted, incremental_operation=AlterConfigOpType.SET)
                    for key, (_, wanted) in report.differences.items()
                ],
            )
            for report in changed
        ],
        request_timeout=REQUEST_SECONDS,
    )
    for resource, future in futures.items():
        try:
            future.result()
        except KafkaException as problem:
            error = error_of(problem)
            raise TopicError(
                f"Kafka refused to alter topic {resource.name}: {error.str()}."
                + _permission(error, "AlterConfigs permission")
            ) from None


def _configs(kafka: KafkaConfig, admin: AdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    """The configuration of each topic; without an entry that the broker does not tell."""
    if not names:
        return {}
    futures = admin.describe_configs(
        [ConfigResource(ResourceType.TOPIC, name) for name in names],
        request_timeout=REQUEST_SECONDS,
    )
    return {
        resource.name: {
            key: entry.value
            for key, entry in _request(kafka, future.result).items()
            if entry.value is not None
        }
        for resource, future in futures.items()
    }


def _counts(
    kafka: KafkaConfig, names: list[str], found: Mapping[str, TopicMetadata]
) -> dict[str, int]:
    """The span of offsets of each topic whose leaders all answer."""
    counts: dict[str, int] = {}
    with reader(kafka, isolation_level="read_uncommitted") as consumer:
        for name in names:
            places = [TopicPartition(name, each) for each in found[name].partitions]
            try:
                told = _request(kafka, partial(watermarks, consumer, places, REQUEST_SECONDS))
            except _NoLeaderError:
                continue
            counts[name] = sum(high - low for low, high in told.values())
    return counts


def _request(kafka: KafkaConfig, ask: Callable[[], _Answer]) -> _Answer:
    """The answer to an administrative request, its failure as one of our errors."""
    try:
        return ask()
    except KafkaException as problem:
        error = error_of(problem)
        if error.code() in (
            KafkaError._TRANSPORT,  # pyright: ignore[reportPrivateUsage]
            KafkaError._TIMED_OUT,  # pyright: ignore[reportPrivateUsage]
            KafkaError._ALL_BROKERS_DOWN,  # pyright: ignore[reportPrivateUsage]
        ):
            raise unreachable(kafka, error.str(), REQUEST_SECONDS) from None
        if error.code() in _NO_LEADER:
            raise _NoLeaderError(
                f"Kafka at {kafka.bootstrap_servers} is choosing a leader: {error.str()}. "
                "Try again."
            ) from None
        raise TopicError(
            f"Kafka at {kafka.bootstrap_servers} refused a request: {error.str()}."
            + _permission(error, "Describe and DescribeConfigs permissions")
        ) from None


def _permission(error: KafkaError, wanted: str) -> str:
    """What is wanted, as a sentence behind others, where an error is of permissions."""
    return f" The principal needs the {wanted}." if error.code() in _FORBIDDEN else ""
