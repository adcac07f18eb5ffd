"""Forgetting users: null values on their way, then an archive without what came before these.

A null value in `reviews` and one in `behavior` erase a user's state, each in the order of its
topic; `texts` sends a third to `text-features`, since it may still be reading what the user wrote.
One in `users` deletes their attributes. The archive is erased once it holds all of these: then
nothing that came before them is still to be archived.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from model.ids import hash_ids, partitions_of
from schemas import archive
from schemas.journal import TOPICS
from streams.admin import (
    client_config,
    committed,
    group_name,
    reach,
    refused_option,
    topic_configs,
    topic_name,
)
from streams.claims import header_offset
from streams.config import KafkaConfig
from streams.erasure import (
    OF_USERS,
    Erased,
    ErasureError,
    erase_journal,
    erase_rows,
    rows_elsewhere,
)
from streams.exceptions import BrokerError
from streams.inputs import user_of
from streams.producer import existing_topic
from streams.reader import USER_KIND, USER_STATE
from streams.rebuild import Shop
from streams.tail import bounds, read_topic
from streams.user_states import decode_header

TOLD = ("reviews", "behavior", "users")  # topics that get a null value from here
HOLDING = (*OF_USERS, "journal", "dead-letters")  # topics that hold something of users
DELIVERY_SECONDS = 60.0  # a broker that is gone for longer fails the command
LOOK_SECONDS = 0.5  # between two looks at what workers have done

Ends = Mapping[tuple[str, int], int]  # by topic and partition


@dataclass(frozen=True)
class Told:
    """A user, and where the null values are that erase them."""

    user: str
    hash: int
    partition: int
    offsets: Mapping[str, int]  # by topic


@dataclass(frozen=True)
class Place:
    """What became of users in one place."""

    name: str
    erased: bool
    said: str


def forget(
    shop: Shop,
    users: Sequence[str],
    seconds: float,
    progress: Callable[[str], None] = lambda said: None,
) -> list[Place]:
    """Forget users in the store, the topics and the archive; what became of them in each place.

    Workers, and then the archiver, are waited for `seconds` each; `progress` is told of what is
    waited for. Raises ErasureError for what is no user's id, TopicError, BrokerError and
    UnreachableError for a Kafka, store or archive that does not do its part. It may be repeated.
    """
    if wrong := [user for user in users if user_of(user) is None]:
        raise ErasureError(f"{wrong[0]!r} is no user's id: 1 to 256 characters, none of them NUL.")
    told = tell(shop.kafka, list(dict.fromkeys(users)))
    waiting = _wait(lambda: unapplied(shop, told), seconds, progress)
    states = sorted(waiting - {"catalog"})
    places = [
        _place("states", "erased", states),
        _place("attributes", "deleted", sorted(waiting & {"catalog"})),
    ]
    if not archive.tables(shop.archive.url, _options(shop)):
        said = f"nothing at {shop.archive.url}; an archiver that starts takes what Kafka still has"
        return [*places, Place("archive", True, said)]
    if states:
        said = f"not erased: it has to hold what {' and '.join(states)} did; run the command again"
        return [*places, Place("archive", False, said)]
    ends = _ends(shop, told)
    if behind := _wait(lambda: unarchived(shop, ends), seconds, progress):
        topics = ", ".join(sorted(behind))
        said = f"not erased: the archiver is behind in {topics}; start it and run the command again"
        return [*places, Place("archive", False, said)]
    return [*places, *_archive(shop, told, ends)]


def tell(kafka: KafkaConfig, users: Sequence[str]) -> list[Told]:
    """Send each user's null values; where they lie."""
    hashes = hash_ids(users)
    partitions = partitions_of(hashes, kafka.partitions).tolist()
    present = reach(kafka).list_topics(timeout=DELIVERY_SECONDS).topics
    names = {topic: existing_topic(kafka, topic, set(present)) for topic in TOLD}
    offsets: dict[tuple[str, str], int] = {}
    failed: list[KafkaError] = []
    options = {"acks": "all", "enable_idempotence": True}
    try:
        producer = Producer(
            client_config(kafka, **options, message_timeout_ms=int(DELIVERY_SECONDS * 1_000))
        )
    except KafkaException as problem:
        raise refused_option(problem) from None

    def settle(topic: str, user: str) -> Callable[[KafkaError | None, Message], None]:
        def settled(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                failed.append(error)
            else:
                offsets[topic, user] = message.offset() or 0

        return settled

    for user, partition in zip(users, partitions, strict=True):
        for topic, name in names.items():
            producer.produce(
                name,
                key=user.encode(),
                value=None,
                partition=partition,
                on_delivery=settle(topic, user),
            )
            producer.poll(0)
    left = producer.flush(DELIVERY_SECONDS)
    if failed or left:
        reason = failed[0].str() if failed else f"no answer within {DELIVERY_SECONDS:.0f} s"
        raise BrokerError(f"Kafka did not take all null values: {reason}. Run the command again.")
    return [
        Told(user, hash_, partition, {topic: offsets[topic, user] for topic in TOLD})
        for user, hash_, partition in zip(users, hashes.tolist(), partitions, strict=True)
    ]


def unapplied(shop: Shop, told: Sequence[Told]) -> set[str]:
    """The processors that have not done with what was told.

    Of `texts` and `catalog` none is waited for where none has ever worked.
    """
    waiting: set[str] = set()
    read = committed(shop.kafka, group_name(shop.kafka, "texts")).get("reviews", {})
    for partition in sorted({each.partition for each in told}):
        mine = [each for each in told if each.partition == partition]
        last = {topic: max(each.offsets[topic] for each in mine) for topic in TOLD}
        ends = _applied(shop, partition)
        if min(ends["reviews"] - last["reviews"], ends["behavior"] - last["behavior"]) <= 0:
            waiting.add("scorer")
        kept = shop.store.header(USER_KIND, partition)
        if kept is not None and header_offset(kept) <= last["users"]:
            waiting.add("catalog")
        if partition not in read:
            continue
        if read[partition] <= last["reviews"]:
            waiting.add("texts")
        elif _has_null(shop.kafka, partition, ends["text-features"], mine):
            waiting.add("scorer")
    return waiting


def unarchived(shop: Shop, ends: Ends) -> set[str]:
    """The topics of which the archive lacks a record before the end of a partition."""
    behind: set[str] = set()
    for topic in sorted({topic for topic, _ in ends}):
        positions = archive.positions(shop.archive.url, topic, _options(shop))
        mine = {partition: end for (name, partition), end in ends.items() if name == topic}
        for partition, end in mine.items():
            start = positions.get(partition, 0)
            if start < end and _next(shop.kafka, topic, partition, start, end) < end:
                behind.add(topic)
    return behind


def kept_by_kafka(kafka: KafkaConfig) -> dict[str, str]:
    """For each topic that holds something of users, until when Kafka keeps what it has now."""
    names = {topic: topic_name(kafka, topic) for topic in HOLDING}
    configs = topic_configs(kafka, list(names.values()))
    now = datetime.now(UTC)
    return {topic: _kept(configs[name], now) for topic, name in names.items()}


def _kept(config: Mapping[str, str], now: datetime) -> str:
    segment = timedelta(milliseconds=int(config.get("segment.ms", 0)))
    if "compact" in config.get("cleanup.policy", ""):
        return f"until Kafka compacts the partition: from {_moment(now + segment)} on, or sooner"
    kept = timedelta(milliseconds=int(config["retention.ms"]))
    if kept < timedelta(0):
        return "for good: its retention has no end"
    return (
        f"until {_moment(now + kept)}; what shares a segment with newer records, "
        f"until {_moment(now + kept + segment)} at the latest"
    )


def _moment(time: datetime) -> str:
    try:
        return f"{time:%Y-%m-%d %H:%M} UTC"
    except OverflowError:
        return "for good"


def _place(name: str, done: str, waiting: Sequence[str]) -> Place:
    if not waiting:
        return Place(name, True, done)
    who = " and ".join(waiting)
    said = f"not yet: {who} has not read the null values, and does so when it runs"
    return Place(name, False, said)


def _wait(
    look: Callable[[], set[str]], seconds: float, progress: Callable[[str], None]
) -> set[str]:
    """What is still waited for in the end."""
    until = time.monotonic() + seconds
    while (waiting := look()) and time.monotonic() < until:
        progress(", ".join(sorted(waiting)))
        time.sleep(LOOK_SECONDS)
    return waiting


def _applied(shop: Shop, partition: int) -> dict[str, int]:
    """The next offset of each input that a partition's states in the store have not applied."""
    header = decode_header(shop.store.header(USER_STATE, partition))
    return dict(zip(TOPICS, header["ends"].tolist(), strict=True))


def _has_null(kafka: KafkaConfig, partition: int, start: int, told: Sequence[Told]) -> bool:
    """Whether the scorer has yet to read a null value that `texts` sent."""
    keys = {each.user.encode() for each in told}
    batches = read_topic(
        kafka, "text-features", start={partition: max(start, 0)}, partitions=[partition]
    )
    return any(each.value() is None and each.key() in keys for batch in batches for each in batch)


def _next(kafka: KafkaConfig, topic: str, partition: int, start: int, none: int) -> int:
    """The offset of the first record from `start` on; `none` where there is none."""
    batches = read_topic(kafka, topic, start={partition: start}, partitions=[partition])
    return next((each.offset() or 0 for batch in batches for each in batch), none)


def _ends(shop: Shop, told: Sequence[Told]) -> Ends:
    """What the archive has to hold of each topic before it is erased."""
    partitions = sorted({each.partition for each in told})
    ends = {("dead-letters", 0): bounds(shop.kafka, "dead-letters", [0])[0][1]}
    for topic in ("score-requests", "predicted-ratings", "journal"):
        found = bounds(shop.kafka, topic, partitions)
        ends |= {(topic, partition): found[partition][1] for partition in partitions}
    for partition in partitions:
        applied = _applied(shop, partition)["text-features"]
        ends["text-features", partition] = max(applied, 0)
        for topic in TOLD:
            mine = [each.offsets[topic] for each in told if each.partition == partition]
            ends[topic, partition] = max(mine) + 1
    return ends


def _archive(shop: Shop, told: Sequence[Told], ends: Ends) -> list[Place]:
    """Erase the archive: the journal first, which then asks for no rows of the other tables."""
    url, options = shop.archive.url, _options(shop)
    users = [
        Erased(
            each.user,
            each.hash,
            each.partition,
            {
                "users": each.offsets["users"] + 1,
                "dead-letters": ends["dead-letters", 0],
                "score-requests": ends["score-requests", each.partition],
                "predicted-ratings": ends["predicted-ratings", each.partition],
            },
        )
        for each in told
    ]
    places: list[Place] = []
    try:
        erased, count = erase_journal(url, options, users)
        places.append(Place("archive: journal", True, f"{count:,} rows are of nobody now"))
        if missing := len(users) - len(erased):
            said = f"{missing} users have no row there that erased them; run the command again"
            places.append(Place("archive: journal", False, said))
        for topic in (*OF_USERS, "dead-letters"):
            count = erase_rows(url, options, topic, erased)
            places.append(Place(f"archive: {topic}", True, f"{count:,} rows erased"))
            if topic in OF_USERS and (
                other := sum(rows_elsewhere(url, options, topic, each) for each in erased)
            ):
                said = (
                    f"{other:,} rows stay in partitions that are not their user's: a producer "
                    "takes another partitioner than murmur2_random"
                )
                places.append(Place(f"archive: {topic}", False, said))
    except ErasureError as error:
        places.append(Place("archive", False, str(error)))
    return places


def _options(shop: Shop) -> dict[str, str]:
    return {name: value.get_secret_value() for name, value in shop.archive.options.items()}
