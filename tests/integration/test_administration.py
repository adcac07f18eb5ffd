"""Topics, playing, reading and dead letters against a real Kafka and the embedded broker."""

import base64
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from confluent_kafka.admin import (
    AlterConfigOpType,  # pyright: ignore[reportPrivateImportUsage]
    ConfigEntry,  # pyright: ignore[reportPrivateImportUsage]
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
    NewPartitions,  # pyright: ignore[reportPrivateImportUsage]
    ResourceType,  # pyright: ignore[reportPrivateImportUsage]
)
from pydantic import SecretStr

from model.ids import hash_ids, partitions_of
from model.state import LAYOUT_HASH
from schemas.codec import encode
from schemas.exceptions import ContractError, UnreachableError
from schemas.records import DeadLetter, Header, Record, Review, Source, User
from schemas.topics import TOPICS
from streams import clients
from streams.admin import (
    GroupReport,
    TopicError,
    apply_topics,
    check_topics,
    group_report,
    show_topics,
)
from streams.catalog import Catalog
from streams.clients import client_config, group_name, reach, reader, topic_name, watermarks
from streams.config import KafkaConfig, RedisConfig
from streams.dead_letters import (
    ATTEMPTS_HEADER,
    FIRST_FAILED_HEADER,
    REDRIVEN_HEADER,
    Wanted,
    dead_letter,
    read_letters,
)
from streams.loop import Loop
from streams.metrics import make_metrics
from streams.producer import Outgoing, Sent, outgoing, play
from streams.redrive import redrive
from streams.store import Store
from streams.tail import read_topic
from tests.shops import until

TIME = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["kafka", "embedded_broker"])
def cluster(request: pytest.FixtureRequest) -> KafkaConfig:
    """A prefix of its own on each kind of broker, with the contract's topics."""
    config = KafkaConfig(
        bootstrap_servers=request.getfixturevalue(request.param),
        topic_prefix=f"{uuid.uuid4().hex[:8]}.",
        partitions=3,
        exactly_once=request.param == "kafka",
    )
    apply_topics(config)
    return config


@pytest.fixture
def real(kafka: str) -> KafkaConfig:
    return KafkaConfig(
        bootstrap_servers=kafka, topic_prefix=f"{uuid.uuid4().hex[:8]}.", partitions=3
    )


def test_a_topic_that_grows_ends_its_workers(real: KafkaConfig, store: str) -> None:
    """What the new partition holds is for nobody: no other topic has a partition beside it."""
    apply_topics(real)
    admin_client = reach(real)
    items = NewPartitions(topic_name(real, "items"), real.partitions + 1)
    (grown,) = admin_client.create_partitions([items]).values()
    grown.result()
    stop, metrics = threading.Event(), make_metrics()
    states = Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, real.partitions)
    loop = Loop(Catalog(states, real.topic_prefix, metrics), real, metrics, stop)
    late = threading.Timer(30, stop.set)  # a worker that goes on fails the test
    late.start()
    with pytest.raises(TopicError, match=r"items \(4, not 3\)"):
        loop.run()
    late.cancel()


def users(count: int) -> list[tuple[str, Record]]:
    return [("users", User(user_id=f"user {n}", event_time=TIME)) for n in range(count)]


def read(kafka: KafkaConfig, topic: str) -> list[Message]:
    return [message for batch in read_topic(kafka, topic) for message in batch]


def test_apply_makes_every_topic_once(real: KafkaConfig) -> None:
    assert {report.problem for report in show_topics(real)} == {"missing"}
    assert {change for _, change in apply_topics(real)} == {"created"}
    reports = show_topics(real)
    assert [report.topic for report in reports] == list(TOPICS)
    assert {report.problem for report in reports} == {""}
    assert {r.partitions for r in reports if r.topic.keyed} == {3}
    assert {change for _, change in apply_topics(real)} == {"unchanged"}


def test_apply_mends_a_changed_configuration(real: KafkaConfig) -> None:
    apply_topics(real)
    name = topic_name(real, "reviews")
    entry = ConfigEntry("retention.ms", "1000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry])
    client = reach(real)
    for future in client.incremental_alter_configs([resource]).values():
        future.result(30)
    reviews = next(report for report in show_topics(real) if report.topic.name == "reviews")
    assert reviews.differences == {"retention.ms": ("1000", "604800000")}
    changes = {report.name: change for report, change in apply_topics(real)}
    assert changes.pop(name) == "altered"
    assert set(changes.values()) == {"unchanged"}
    assert not any(report.problem for report in show_topics(real))


def test_another_partition_count_is_refused_and_changes_nothing(real: KafkaConfig) -> None:
    apply_topics(real)
    with pytest.raises(TopicError, match="fixed at birth"):
        apply_topics(real.model_copy(update={"partitions": 4}))
    assert {report.problem for report in show_topics(real)} == {""}


def test_topics_that_are_not_as_settings_say_are_named(cluster: KafkaConfig) -> None:
    check_topics(cluster)
    with pytest.raises(TopicError, match=rf"{cluster.topic_prefix}reviews \(3, not 4\)"):
        check_topics(cluster.model_copy(update={"partitions": 4}))
    with pytest.raises(TopicError, match=r"no topic other\.reviews.*starcast topics apply"):
        check_topics(cluster.model_copy(update={"topic_prefix": "other."}))


def test_how_far_a_group_is(real: KafkaConfig) -> None:
    apply_topics(real)
    config = real.model_copy(update={"group_id": uuid.uuid4().hex[:8]})
    assert group_report(config, "scorer") == GroupReport(0, None)
    name = topic_name(config, "reviews")
    producer = Producer(client_config(config))
    for _ in range(3):
        producer.produce(name, b"{}", partition=0)
    assert producer.flush(10) == 0
    group = Consumer(client_config(config, group_id=group_name(config, "scorer")))
    try:
        group.commit(offsets=[TopicPartition(name, 0, 1)], asynchronous=False)
        assert group_report(config, "scorer") == GroupReport(0, 2)
        group.subscribe([name])
        until(lambda: (group.poll(0.1), group.assignment())[1] != [])
        assert group_report(config, "scorer") == GroupReport(1, 2)
    finally:
        group.close()


def test_ends_of_transactions_are_no_records_that_wait(real: KafkaConfig) -> None:
    """A producer may have transactions too, and so has `redrive`; one of these came to nothing."""
    apply_topics(real)
    config = real.model_copy(update={"group_id": uuid.uuid4().hex[:8]})
    reviews, updates = topic_name(config, "reviews"), topic_name(config, "item-updates")
    producer = Producer(client_config(config, transactional_id=config.group_id))
    producer.init_transactions(10)
    for end in (producer.abort_transaction, producer.commit_transaction):
        producer.begin_transaction()
        for name in (reviews, updates):
            producer.produce(name, b"{}", partition=0)
            producer.produce(name, b"{}", partition=1)
        producer.flush(10)
        end(10)
    with reader(config, group_id=group_name(config, "archiver")) as group:
        for read, waiting in (([3, 3, 3, 3], 0), ([3, 3, 3, 2], 2), ([0, 0, 3, 3], 8)):
            places = [(reviews, 0), (reviews, 1), (updates, 0), (updates, 1)]
            group.commit(
                offsets=[
                    TopicPartition(*place, at) for place, at in zip(places, read, strict=True)
                ],
                asynchronous=False,
            )
            assert group_report(config, "archiver") == GroupReport(0, waiting)


def test_members_that_the_embedded_broker_does_not_name_are_not_counted_as_none(
    embedded_broker: str,
) -> None:
    config = KafkaConfig(bootstrap_servers=embedded_broker, group_id=uuid.uuid4().hex[:8])
    apply_topics(config)
    assert group_report(config, "scorer") == GroupReport(0, None)
    name = topic_name(config, "reviews")
    options = {"group_id": group_name(config, "scorer"), "session_timeout_ms": 2_000}
    group = Consumer(client_config(config, **options))
    try:
        group.subscribe([name])
        until(lambda: (group.poll(0.1), group.assignment())[1] != [])
        assert group_report(config, "scorer") == GroupReport(None, None)
    finally:
        group.close()
    assert group_report(config, "scorer") == GroupReport(0, None)


def test_too_few_brokers_for_the_replication(real: KafkaConfig) -> None:
    with pytest.raises(TopicError, match="STARCAST_KAFKA__REPLICATION"):
        apply_topics(real.model_copy(update={"replication": 3}))


def test_all_that_is_played_is_read_back_once_in_its_partition(cluster: KafkaConfig) -> None:
    seen: list[int] = []
    sent = play(
        outgoing(users(2_000)), cluster, on_progress=lambda sent: seen.append(sent.sent.total())
    )
    assert sent.delivered == Counter(users=2_000)
    assert not sent.failed
    assert seen[-1] == 2_000
    messages = read(cluster, "users")
    assert Counter(message.key() for message in messages) == Counter(
        f"user {n}".encode() for n in range(2_000)
    )
    keys = [(message.key() or b"").decode() for message in messages]
    expected = partitions_of(hash_ids(keys), cluster.partitions)
    assert [message.partition() for message in messages] == expected.tolist()


def test_a_rate_is_kept(cluster: KafkaConfig) -> None:
    sent = play(outgoing(users(50)), cluster, rate=100)
    assert 0.45 < sent.seconds < 5
    assert sent.delivered == Counter(users=50)


def test_a_stop_ends_the_playing_and_loses_nothing(cluster: KafkaConfig) -> None:
    stop = threading.Event()

    def stop_soon(sent: Sent) -> None:
        if sent.sent.total() > 5:
            stop.set()

    sent = play(outgoing(users(10_000)), cluster, rate=50, stop=stop, on_progress=stop_soon)
    assert 5 < sent.sent.total() < 100
    assert sent.delivered == sent.sent
    assert len(read(cluster, "users")) == sent.sent.total()


def test_a_record_that_is_too_large_is_counted(real: KafkaConfig) -> None:
    apply_topics(real)
    large = Outgoing("reviews", b"u", bytes(2_000_000))  # over the topic's max.message.bytes
    larger = Outgoing("reviews", b"u", bytes(5_000_000))  # over the producer's own limit
    sent = play([large, larger, Outgoing("reviews", b"u", b"{}")], real)
    assert sent.delivered == Counter(reviews=1)
    assert sent.failed.total() == 2
    assert sent.sent == Counter(reviews=3)


@pytest.mark.parametrize("topic", ["reviews", "items"])
def test_a_record_that_no_client_would_unpack_is_refused(topic: str, real: KafkaConfig) -> None:
    """It is 5 KB on the wire, and a hundred times what Kafka lets a message have."""
    apply_topics(real)
    options = {"compression_type": "zstd", "message_max_bytes": 200_000_000}
    producer = Producer(client_config(real, **options))
    told: list[int | None] = []
    for value in (bytes(120_000_000), b"{}"):
        producer.produce(
            topic_name(real, topic),
            value,
            b"u",
            on_delivery=lambda error, _: told.append(None if error is None else error.code()),
        )
        producer.flush(60)
    assert told == [KafkaError.MSG_SIZE_TOO_LARGE, None]
    assert [message.value() for message in read(real, topic)] == [b"{}"]


def test_what_was_sent_arrives_though_the_records_fail(cluster: KafkaConfig) -> None:
    def failing() -> Iterator[Outgoing]:
        yield from outgoing(users(500))
        raise ContractError("line 501")

    with pytest.raises(ContractError, match="line 501"):
        play(failing(), cluster)
    assert len(read(cluster, "users")) == 500


def test_playing_needs_the_topics(real: KafkaConfig) -> None:
    with pytest.raises(TopicError, match="starcast topics apply"):
        play(outgoing(users(1)), real)
    apply_topics(real)
    with pytest.raises(ContractError, match="no topic 'nope'"):
        play([Outgoing("nope", None, b"")], real)
    with pytest.raises(TopicError, match="starcast topics apply"):
        read(real.model_copy(update={"topic_prefix": "other."}), "users")


def test_readers_see_committed_records_only(real: KafkaConfig) -> None:
    apply_topics(real)
    producer = Producer(client_config(real, transactional_id=uuid.uuid4().hex))
    producer.init_transactions(30)
    for text, end in ((b"kept", "commit"), (b"aborted", "abort"), (b"kept too", "commit")):
        producer.begin_transaction()
        producer.produce(topic_name(real, "alerts"), value=text)
        producer.flush(30)
        getattr(producer, f"{end}_transaction")(30)
    assert [message.value() for message in read(real, "alerts")] == [b"kept", b"kept too"]


def test_following_waits_for_more(cluster: KafkaConfig) -> None:
    stop = threading.Event()
    found: list[bytes | None] = []

    def follow() -> None:
        for batch in read_topic(cluster, "users", follow=True, stop=stop):
            found.extend(message.key() for message in batch)
            if len(found) == 20:
                stop.set()

    thread = threading.Thread(target=follow)
    thread.start()
    play(outgoing(users(10)), cluster)
    play(outgoing(users(10)), cluster)
    thread.join(30)
    stop.set()
    assert not thread.is_alive()
    assert len(found) == 20


def test_reading_from_a_time(real: KafkaConfig) -> None:
    apply_topics(real)
    play(outgoing(users(5)), real)
    first = read(real, "users")
    later = max(message.timestamp()[1] for message in first) + 1
    while datetime.now(UTC).timestamp() * 1000 <= later:
        pass
    play(outgoing(users(3)), real)
    start = datetime.fromtimestamp(later / 1000, UTC)
    assert sum(len(batch) for batch in read_topic(real, "users", start=start)) == 3


def letter(reason: str, offset: int, **changes: object) -> DeadLetter:
    values: dict[str, object] = {
        "key": base64.b64encode(b"u").decode(),
        "value": base64.b64encode(b"\xffbroken").decode(),
        "headers": [
            Header(key="trace", value=base64.b64encode(b"t1").decode()),
            Header(key=ATTEMPTS_HEADER, value=base64.b64encode(b"1").decode()),
        ],
        "source": Source(topic="reviews", partition=0, offset=offset),
        "processor": "scorer",
        "reason": reason,
        "first_failed_at": TIME + timedelta(days=offset),
        "attempts": 2,
    }
    return DeadLetter.model_validate(values | changes)


def write_letters(kafka: KafkaConfig, letters: list[DeadLetter]) -> None:
    sent = play([Outgoing("dead-letters", b"reviews", encode(each)) for each in letters], kafka)
    assert not sent.failed


def test_letters_are_listed_by_what_is_wanted(cluster: KafkaConfig) -> None:
    write_letters(
        cluster,
        [
            letter("not JSON", 0),
            letter("rating missing", 1, processor="texts"),
            letter("Not JSON either", 2),
        ],
    )
    play([Outgoing("dead-letters", None, b"no letter")], cluster)

    def offsets(wanted: Wanted | None = None) -> list[int]:
        return [each.letter.source.offset for each in read_letters(cluster, wanted)]

    assert offsets() == [0, 1, 2]
    assert offsets(Wanted(reason="not json")) == [0, 2]
    assert offsets(Wanted(processor="texts")) == [1]
    assert offsets(Wanted(topic="behavior")) == []
    assert offsets(Wanted(since=TIME + timedelta(days=1))) == [1, 2]
    assert offsets(Wanted(until=TIME + timedelta(days=1))) == [0]
    assert offsets(Wanted(positions=frozenset(["0/1"]))) == [1]


def test_redriven_records_are_as_they_were_and_tell_their_history(cluster: KafkaConfig) -> None:
    write_letters(cluster, [letter("first", 0), letter("second", 1)])
    sent = redrive(cluster, Wanted(reason="second"))
    assert sent.delivered == Counter(reviews=1)
    (message,) = read(cluster, "reviews")
    assert message.key() == b"u"
    assert message.value() == b"\xffbroken"
    assert message.headers() == [
        ("trace", b"t1"),
        (ATTEMPTS_HEADER, b"2"),
        (FIRST_FAILED_HEADER, b"2026-01-02T00:00:00.000Z"),
        (REDRIVEN_HEADER, b"0/1"),
    ]


def test_a_letter_is_not_told_again_when_its_record_failed_again(cluster: KafkaConfig) -> None:
    write_letters(cluster, [letter("first", 0), letter("second", 1)])
    redrive(cluster, Wanted(reason="second"))
    (message,) = read(cluster, "reviews")
    again = dead_letter(message, "reviews", "scorer", "second once more")
    play([Outgoing("dead-letters", again.key, again.value)], cluster)
    letters = list(read_letters(cluster))
    assert [each.letter.reason for each in letters] == ["first", "second once more"]
    assert letters[1].letter.attempts == 3
    assert letters[1].letter.first_failed_at == TIME + timedelta(days=1)


def test_redriving_ends_though_letters_come_back_meanwhile(cluster: KafkaConfig) -> None:
    write_letters(cluster, [letter("bad", 0), letter("bad", 1)])
    taken = 0
    for each in read_letters(cluster):
        taken += 1
        write_letters(cluster, [each.letter])
        assert taken < 10
    assert taken == 2


def test_a_null_value_is_redriven_as_null(cluster: KafkaConfig) -> None:
    write_letters(cluster, [letter("null value", 0, value=None, key=None, headers=[])])
    redrive(cluster)
    (message,) = read(cluster, "reviews")
    assert message.value() is None
    assert message.key() is None


def test_a_review_can_be_played_from_the_contract(cluster: KafkaConfig) -> None:
    review = Review(event_id="e", user_id="u", item_id="i", event_time=TIME, rating=4.0)
    play(outgoing([("reviews", review)]), cluster)
    (message,) = read(cluster, "reviews")
    assert Review.model_validate_json(message.value() or b"") == review


def test_no_broker_is_told_by_every_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "REACH_SECONDS", 0.5)
    nowhere = KafkaConfig(bootstrap_servers="127.0.0.1:1")
    with pytest.raises(UnreachableError):
        reach(nowhere, 0.5)
    with pytest.raises(UnreachableError):
        play(outgoing(users(1)), nowhere)
    with pytest.raises(UnreachableError):
        list(read_topic(nowhere, "users"))
    with pytest.raises(UnreachableError):
        show_topics(nowhere)


def test_what_is_committed_ends_where_the_oldest_open_transaction_begins(kafka: str) -> None:
    config = KafkaConfig(bootstrap_servers=kafka, topic_prefix="open.", partitions=2)
    apply_topics(config)
    place = TopicPartition(topic_name(config, "reviews"), 1)
    producer = Producer(client_config(config, transactional_id="open"))
    producer.init_transactions(30)
    for commits in (True, False):
        producer.begin_transaction()
        producer.produce(place.topic, b"{}", partition=1)
        producer.flush(30)
        if commits:
            producer.commit_transaction(30)
    told: dict[str, tuple[int, int]] = {}
    for isolation in ("read_committed", "read_uncommitted"):
        with reader(config, isolation_level=isolation) as consumer:
            told[isolation] = watermarks(consumer, [place], 30)[place.topic, 1]
    producer.abort_transaction(30)
    # A record, the marker that it is committed, and a record that is not.
    assert told == {"read_committed": (0, 2), "read_uncommitted": (0, 3)}
