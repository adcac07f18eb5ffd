"""What the dashboard follows, against real brokers and a real store."""

import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Producer
from pydantic import SecretStr

from model import registry
from model.ids import hash_ids
from model.state import ITEM_ATTRIBUTES, LAYOUT_HASH
from schemas.codec import encode
from schemas.records import Alert, Behavior, Kind, PredictedRating, Record, Review, Source
from streams.admin import apply_topics
from streams.clients import client_config, topic_name
from streams.config import KafkaConfig, RedisConfig
from streams.dashboard_data import Feed, Snapshot, follow
from streams.embedded import kafka_answers
from streams.reader import ITEM_KIND, store_keys
from streams.store import Store
from streams.windows import WINDOW_FIELD, WINDOWS_KEY, Window
from tests.servers import start_kafka

PATIENCE_SECONDS = 30.0
NOW = datetime.now(UTC)


@pytest.fixture(params=["kafka", "embedded_broker"])
def cluster(request: pytest.FixtureRequest) -> KafkaConfig:
    return KafkaConfig(
        bootstrap_servers=request.getfixturevalue(request.param),
        topic_prefix=f"{uuid.uuid4().hex[:8]}.",
        partitions=3,
    )


@contextmanager
def feed_of(kafka: KafkaConfig, url: str, models: Path) -> Generator[Feed]:
    redis = RedisConfig(url=SecretStr(url))
    with follow(kafka, redis, str(models), threading.Event()) as feed:
        yield feed


def wait_for(feed: Feed, what: Callable[[Snapshot], bool]) -> Snapshot:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what(feed.snapshot):
        assert time.monotonic() < deadline, feed.snapshot
        time.sleep(0.1)
    return feed.snapshot


def send(kafka: KafkaConfig, topic: str, *records: Record, key: str = "u") -> list[tuple[int, int]]:
    """Partition and offset of each record."""
    places: dict[int, tuple[int, int]] = {}
    producer = Producer(client_config(kafka))
    for number, record in enumerate(records):
        producer.produce(
            topic_name(kafka, topic),
            encode(record),
            key,
            on_delivery=lambda _, message, number=number: places.update(
                {number: (message.partition() or 0, message.offset() or 0)}
            ),
        )
    assert producer.flush(10) == 0
    return [places[number] for number in range(len(records))]


def review(number: int, rating: float) -> Review:
    return Review(event_id=f"e{number}", user_id="u", item_id="i", event_time=NOW, rating=rating)


def predicted(
    number: int, topic: str, place: tuple[int, int], kind: Kind = "interaction"
) -> PredictedRating:
    return PredictedRating(
        event_id=f"e{number}",
        user_id="u",
        item_id="i",
        event_time=NOW,
        predicted_at=NOW + timedelta(seconds=number),
        kind=kind,
        rating=3.5,
        distribution=[0.2] * 5,
        interval=[3.0, 4.0],
        tier="full",
        model_version="ladder",
        source=Source(topic=topic, partition=place[0], offset=place[1]),
    )


def test_from_no_topics_to_predictions_with_what_came_of_them(
    cluster: KafkaConfig, store: str, tmp_path: Path
) -> None:
    with feed_of(cluster, store, tmp_path) as feed:
        found = wait_for(feed, lambda now: bool(now.broker.up and now.store.up and now.models.up))
        assert "reviews" in found.topics.missing
        apply_topics(cluster)
        wait_for(feed, lambda now: not now.topics.missing)

        rated, other = send(cluster, "reviews", review(0, 5.0), review(1, 2.0))
        (seen,) = send(
            cluster,
            "behavior",
            Behavior(event_id="b", user_id="u", item_id="i", event_time=NOW, action="cart"),
        )
        wait_for(feed, lambda now: now.topics.events >= 2)
        keeper = Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, cluster.partitions)
        (key,) = store_keys(keeper, ITEM_KIND, hash_ids(["i"]))
        keeper.client.set(key, np.zeros(1, ITEM_ATTRIBUTES).tobytes() + "Saitensatz ♪".encode())
        send(
            cluster,
            "predicted-ratings",
            predicted(0, "reviews", rated),
            predicted(1, "behavior", seen),
            predicted(2, "reviews", other, kind="review"),
        )
        found = wait_for(
            feed, lambda now: len(now.predictions) == 3 and all(p.action for p in now.predictions)
        )
        assert [(p.kind, p.action, p.truth) for p in found.predictions] == [
            ("review", "review", 2.0),
            ("interaction", "cart", None),
            ("interaction", "review", 5.0),
        ]
        assert {p.title for p in found.predictions} == {"Saitensatz ♪"}
        keeper.client.set(key, np.zeros(1, ITEM_ATTRIBUTES).tobytes() + b"renamed")
        wait_for(feed, lambda now: {p.title for p in now.predictions} == {"renamed"})
        keeper.close()


def test_a_source_that_cannot_be_ends_nothing(kafka: str, store: str, tmp_path: Path) -> None:
    prefix = f"{uuid.uuid4().hex[:8]}."
    cluster = KafkaConfig(bootstrap_servers=kafka, topic_prefix=prefix, partitions=3)
    apply_topics(cluster)
    (place,) = send(cluster, "reviews", review(1, 5.0))
    send(
        cluster,
        "predicted-ratings",
        predicted(0, "reviews", (2**31, 7)),
        predicted(1, "reviews", place),
    )
    with feed_of(cluster, store, tmp_path) as feed:
        found = wait_for(feed, lambda now: len(now.predictions) == 2)
        assert [each.truth for each in found.predictions] == [5.0, None]


def test_many_predictions_are_only_looked_at_from_their_end(
    cluster: KafkaConfig, store: str, tmp_path: Path
) -> None:
    apply_topics(cluster)
    records = [predicted(number, "reviews", (0, number)) for number in range(2_000)]
    for start in range(0, 2_000, 50):
        send(cluster, "predicted-ratings", *records[start : start + 50])
    with feed_of(cluster, store, tmp_path) as feed:
        found = wait_for(feed, lambda now: bool(now.predictions))
    assert len(found.predictions) <= 30
    assert max(each.key[3] for each in found.predictions) == 1_999


def test_alerts_and_model_versions(cluster: KafkaConfig, store: str, tmp_path: Path) -> None:
    apply_topics(cluster)
    alert = Alert(
        alert_id="lag-interaction-1",
        rule="lag",
        severity="warning",
        window_start=NOW,
        window_end=NOW,
        value=3,
        threshold=2,
        subject="interaction",
        text="3 records wait.",
    )
    send(cluster, "alerts", alert, alert, key="lag")  # sent again after a restart
    with feed_of(cluster, store, tmp_path) as feed:
        found = wait_for(feed, lambda now: bool(now.alerts))
        assert [each.text for each in found.alerts] == ["3 records wait."]
        assert found.registry.stable is None
        registry.promote(str(tmp_path), "v-1", "ab", by="trainer", reason="first")
        wait_for(feed, lambda now: bool(now.registry.stable))


def test_windows_are_followed_and_a_broken_one_is_passed_over(
    kafka: str, store: str, tmp_path: Path
) -> None:
    config = KafkaConfig(bootstrap_servers=kafka)
    keeper = Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, 1)
    key = f"starcast:{WINDOWS_KEY}"

    def write(end_ms: int, value: bytes | None = None) -> None:
        window = Window(start_ms=end_ms - 10, end_ms=end_ms, step_ms=5, kinds={})
        told = value or window.model_dump_json().encode()
        keeper.client.xadd(key, {WINDOW_FIELD: told}, id=f"{end_ms}-0")

    write(5)
    with feed_of(config, store, tmp_path) as feed:
        wait_for(feed, lambda now: [window.end_ms for window in now.windows] == [5])
        write(10, b"{}")
        write(15)
        wait_for(feed, lambda now: [window.end_ms for window in now.windows] == [5, 15])
        keeper.client.flushall()
        write(20)
        wait_for(feed, lambda now: [window.end_ms for window in now.windows] == [5, 15, 20])
    keeper.close()


@pytest.mark.slow
def test_aborted_predictions_are_not_shown_and_a_broker_may_restart(
    store: str, tmp_path: Path
) -> None:
    child = start_kafka(tmp_path / "kafka")
    again: subprocess.Popen[bytes] | None = None
    config = KafkaConfig(bootstrap_servers=child.address, partitions=1)
    try:
        apply_topics(config)
        producer = Producer(client_config(config, transactional_id="t"))
        producer.init_transactions(10)
        for number, ending in enumerate(
            (producer.commit_transaction, producer.abort_transaction, producer.commit_transaction)
        ):
            producer.begin_transaction()
            value = encode(predicted(number, "reviews", (0, number)))
            producer.produce("predicted-ratings", value, "u")
            producer.flush(10)
            ending(10)
        with feed_of(config, store, tmp_path / "models") as feed:
            found = wait_for(feed, lambda now: len(now.predictions) == 2)
            assert [each.key[3] for each in found.predictions] == [2, 0]
            child.stop()
            found = wait_for(feed, lambda now: now.broker.up is False)
            assert len(found.predictions) == 2
            again = subprocess.Popen(
                child.process.args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while not kafka_answers(child.address):
                time.sleep(0.2)
            wait_for(feed, lambda now: now.broker.up is True)
            send(config, "predicted-ratings", predicted(7, "reviews", (0, 7)))
            wait_for(feed, lambda now: now.predictions[0].key[3] == 7)
    finally:
        child.stop()
        if again is not None:
            again.kill()
            again.wait()
