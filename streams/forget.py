"""Forgetting users: null values on their way, then an archive without what came before these.

A null value in `users` deletes a user's attributes. When no worker has a copy of these any more,
one in each topic of events erases the state, in the order of that topic; `texts` sends one more to
`text-features`, since it may still be reading what the user wrote. The archive is erased once it
holds all of these: then nothing that came before them is still to be archived, and no row that
comes after has read what is erased.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from model.ids import hash_ids, partitions_of
from schemas import archive
from schemas.journal import TOPICS
from streams.admin import committed, existing_topic, topic_configs
from streams.claims import header_offset
from streams.clients import (
    REQUEST_SECONDS,
    client_config,
    error_of,
    group_name,
    reach,
    reader,
    refused_option,
    topic_name,
    watermarks,
)
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
from streams.reader import ATTRIBUTES_SECONDS, USER_KIND, USER_STATE
from streams.rebuild import Shop
from streams.tail import bounds, read_topic
from streams.user_states import decode_header

TEXTS = "text-features"
ATTRIBUTES = ("users",)  # topics that get a null value from here, before those in TOPICS
HOLDING = (*OF_USERS, "journal", "dead-letters")  # topics that hold something of users
DELIVERY_SECONDS = 60.0  # a broker that is gone for longer fails the command
LOOK_SECONDS = 0.5  # between two looks at what workers have done
COPIED_SECONDS = ATTRIBUTES_SECONDS + 1  # after which no worker predicts from deleted attributes

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

    The catalog, the scorer with `texts`, `answers`, and the archiver are waited for `seconds` each;
    `progress` is told of what is waited for. It may be repeated. Raises ErasureError for what is no
    user's id, TopicError, BrokerError and UnreachableError for a Kafka, store or archive that does
    not do its part.
    """
    if wrong := [user for user in users if user_of(user) is None]:
        raise ErasureError(f"{wrong[0]!r} is no user's id: 1 to 256 characters, none of them NUL.")
    try:
        return _forget(shop, users, seconds, progress)
    except KafkaException as problem:  # a broker went away between two questions
        reason = error_of(problem).str()
        raise BrokerError(f"Kafka failed meanwhile: {reason}. Run the command again.") from None


def _forget(
    shop: Shop, users: Sequence[str], seconds: float, progress: Callable[[str], None]
) -> list[Place]:
    told = tell(shop.kafka, _known(shop.kafka, list(dict.fromkeys(users))), ATTRIBUTES)
    catalog = _wait(lambda: undeleted(shop, told), seconds, progress)
    if not catalog and any(_has_attributes(shop, each.partition) for each in told):
        progress("workers' copies of attributes to end")
        time.sleep(COPIED_SECONDS)
    told = tell(shop.kafka, told, TOPICS)
    scorer = _wait(lambda: unapplied(shop, told), seconds, progress)
    partitions = sorted({each.partition for each in told})
    if not scorer:  # what `texts` sent last may be hidden behind a transaction, or be one's
        texts = {each: end for each, (_, end) in bounds(shop.kafka, TEXTS, partitions).items()}
        scorer = _wait(lambda: unread(shop, texts), seconds, progress)
    places = [_place("attributes", "deleted", catalog), _place("states", "erased", scorer)]
    if not archive.tables(shop.archive.url, shop.archive.storage_options):
        said = f"nothing at {shop.archive.url}; an archiver that starts takes what Kafka still has"
        return [*places, Place("archive", True, said)]
    if waiting := sorted(catalog | scorer):
        who = " and ".join(waiting)
        said = f"not erased: it has to hold what {who} makes of the null values; run it again then"
        return [*places, Place("archive", False, said)]
    asked = _written(shop, "score-requests", partitions)
    if _wait(lambda: unanswered(shop, asked), seconds, progress):
        said = "not erased: answers is behind; start it and run the command again"
        return [*places, Place("archive", False, said)]
    ends = asked | _ends(shop, told)
    if behind := _wait(lambda: unarchived(shop, ends), seconds, progress):
        topics = ", ".join(sorted(behind))
        said = f"not erased: the archiver is behind in {topics}; start it and run the command again"
        return [*places, Place("archive", False, said)]
    return [*places, *_archive(shop, told, ends)]


def tell(kafka: KafkaConfig, told: Sequence[Told], topics: Sequence[str]) -> list[Told]:
    """Send each user's null values; where all are by now."""
    present = reach(kafka).list_topics(timeout=DELIVERY_SECONDS).topics
    names = {topic: existing_topic(kafka, topic, set(present)) for topic in topics}
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

    for each in told:
        for topic, name in names.items():
            producer.produce(
                name,
                key=each.user.encode(),
                value=None,
                partition=each.partition,
                on_delivery=settle(topic, each.user),
            )
            producer.poll(0)
    left = producer.flush(DELIVERY_SECONDS)
    if failed or left:
        reason = failed[0].str() if failed else f"no answer within {DELIVERY_SECONDS:.0f} s"
        raise BrokerError(f"Kafka did not take all null values: {reason}. Run the command again.")
    return [
        replace(
            each, offsets={**each.offsets, **{topic: offsets[topic, each.user] for topic in topics}}
        )
        for each in told
    ]


def undeleted(shop: Shop, told: Sequence[Told]) -> set[str]:
    """The catalog, where it has worked and not come to all null values in `users`."""
    behind = any(
        _has_attributes(shop, each.partition)
        and header_offset(shop.store.header(USER_KIND, each.partition)) <= each.offsets["users"]
        for each in told
    )
    return {"catalog"} if behind else set()


def unapplied(shop: Shop, told: Sequence[Told]) -> set[str]:
    """Of `scorer` and, where it has ever worked, `texts`: who has not done with the null values."""
    waiting: set[str] = set()
    texts = committed(shop.kafka, group_name(shop.kafka, "texts"))
    read = texts.get("reviews", {})
    for partition in sorted({each.partition for each in told}):
        mine = [each for each in told if each.partition == partition]
        last = {topic: max(each.offsets[topic] for each in mine) for topic in TOPICS}
        ends = _applied(shop, partition)
        if any(ends[topic] <= last[topic] for topic in TOPICS):
            waiting.add("scorer")
        if not texts:
            continue
        if read.get(partition, 0) <= last["reviews"]:  # at first it may have read items alone
            waiting.add("texts")
        elif _has_null(shop.kafka, partition, ends["text-features"], mine):
            waiting.add("scorer")
    return waiting


def unread(shop: Shop, ends: Mapping[int, int]) -> set[str]:
    """The scorer, where it has not read all text features before the end of a partition.

    Those of an open transaction, which may be committed yet, too.
    """
    read = {each: _applied(shop, each)[TEXTS] for each in ends}
    return {"scorer"} if _behind(shop.kafka, TEXTS, read, ends) else set()


def unanswered(shop: Shop, asked: Ends) -> set[str]:
    """`answers`, where it has ever worked and not answered all requests before these ends.

    What it answers later has a state without what was erased, and would say what was asked before.
    """
    read = committed(shop.kafka, group_name(shop.kafka, "answers")).get("score-requests", {})
    starts = {partition: read.get(partition, 0) for _, partition in asked} if read else {}
    for partition, start in starts.items():
        end = asked["score-requests", partition]
        if start < end and _next(shop.kafka, "score-requests", partition, start, end) < end:
            return {"answers"}
    return set()


def unarchived(shop: Shop, ends: Ends) -> set[str]:
    """The topics of which the archive lacks a record before the end of a partition."""
    behind: set[str] = set()
    for topic in sorted({topic for topic, _ in ends}):
        positions = archive.positions(shop.archive.url, topic, shop.archive.storage_options)
        mine = {partition: end for (name, partition), end in ends.items() if name == topic}
        if _behind(shop.kafka, topic, positions, mine):
            behind.add(topic)
    return behind


def _behind(
    kafka: KafkaConfig, topic: str, positions: Mapping[int, int], ends: Mapping[int, int]
) -> bool:
    """Whether a record before the end of a partition is not before its position, or may yet be."""
    starts = {each: max(positions.get(each, 0), 0) for each in ends}
    starts = {each: start for each, start in starts.items() if start < ends[each]}
    decided = _decided(kafka, topic, starts)
    return any(
        min(_next(kafka, topic, each, start, ends[each]), decided.get(each, ends[each]))
        < ends[each]
        for each, start in starts.items()
    )


def kept_by_kafka(kafka: KafkaConfig) -> dict[str, str]:
    """For each topic that holds something of users, when Kafka lets go of what it has now."""
    names = {topic: topic_name(kafka, topic) for topic in HOLDING}
    configs = topic_configs(kafka, list(names.values()))
    now = datetime.now(UTC)
    return {topic: _kept(configs[name], now) for topic, name in names.items()}


def _kept(config: Mapping[str, str], now: datetime) -> str:
    segment = int(config.get("segment.ms", 0))
    if "compact" in config.get("cleanup.policy", ""):
        return f"when Kafka compacts it; its segment is closed {_by(now, segment)}"
    kept = int(config.get("retention.ms", -1))
    if kept < 0:
        return "never: its retention has no end"
    return f"{_by(now, kept)}; what shares a segment with newer records, {_by(now, kept + segment)}"


def _by(now: datetime, milliseconds: int) -> str:
    try:
        return f"by {now + timedelta(milliseconds=milliseconds):%Y-%m-%d %H:%M} UTC"
    except OverflowError:
        return "never"


def _known(kafka: KafkaConfig, users: Sequence[str]) -> list[Told]:
    """Users of whom nobody has been told."""
    hashes = hash_ids(users)
    partitions = partitions_of(hashes, kafka.partitions).tolist()
    return [
        Told(user, hash_, partition, {})
        for user, hash_, partition in zip(users, hashes.tolist(), partitions, strict=True)
    ]


def _has_attributes(shop: Shop, partition: int) -> bool:
    return shop.store.header(USER_KIND, partition) is not None


def _place(name: str, done: str, waiting: set[str]) -> Place:
    if not waiting:
        return Place(name, True, done)
    who = " and ".join(sorted(waiting))
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


def _decided(kafka: KafkaConfig, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """Up to where nothing can be committed any more; not told where there are no transactions."""
    if not kafka.exactly_once:
        return {}
    places = [TopicPartition(topic_name(kafka, topic), each) for each in partitions]
    with reader(kafka) as consumer:  # of what is committed
        found = watermarks(consumer, places, REQUEST_SECONDS)
    return {partition: end for (_, partition), (_, end) in found.items()}


def _next(kafka: KafkaConfig, topic: str, partition: int, start: int, none: int) -> int:
    """The offset of the first record from `start` on; `none` where there is none."""
    batches = read_topic(kafka, topic, start={partition: start}, partitions=[partition])
    return next((each.offset() or 0 for batch in batches for each in batch), none)


def _ends(shop: Shop, told: Sequence[Told]) -> dict[tuple[str, int], int]:
    """What the archive has to hold of each topic before it is erased, but for requests."""
    partitions = sorted({each.partition for each in told})
    ends = _written(shop, "dead-letters", [0])
    for topic in ("predicted-ratings", "journal"):
        ends |= _written(shop, topic, partitions)
    for partition in partitions:
        ends |= {(topic, partition): end for topic, end in _applied(shop, partition).items()}
        mine = [each.offsets["users"] for each in told if each.partition == partition]
        ends["users", partition] = max(mine) + 1
    return ends


def _written(shop: Shop, topic: str, partitions: Sequence[int]) -> dict[tuple[str, int], int]:
    """The offset after the last record of partitions, archived or in Kafka.

    The broker of embedded mode tells too low an end, so what follows is looked at.
    """
    archived = archive.positions(shop.archive.url, topic, shop.archive.storage_options)
    ends: dict[tuple[str, int], int] = {}
    for partition, (_, end) in bounds(shop.kafka, topic, partitions).items():
        start = max(end, archived.get(partition, 0))
        batches = read_topic(shop.kafka, topic, start={partition: start}, partitions=[partition])
        last = max((each.offset() or 0 for batch in batches for each in batch), default=-1)
        ends[topic, partition] = max(start, last + 1)
    return ends


def _archive(shop: Shop, told: Sequence[Told], ends: Ends) -> list[Place]:
    """Erase the archive: the journal first, which then asks for no rows of the other tables."""
    url, options = shop.archive.url, shop.archive.storage_options
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
            if topic in OF_USERS and (other := rows_elsewhere(url, options, topic, erased)):
                said = (
                    f"{other:,} rows stay in partitions that are not their user's: a producer "
                    "takes another partitioner than murmur2_random"
                )
                places.append(Place(f"archive: {topic}", False, said))
    except ErasureError as error:
        places.append(Place("archive", False, str(error)))
    return places
