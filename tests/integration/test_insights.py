"""Insights against real brokers and a real store: windows, alerts, dead letters, restarts."""

import asyncio
import base64
import json
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from aiokafka.consumer.fetcher import Fetcher
from confluent_kafka import Consumer, KafkaException, Producer
from pydantic import SecretStr

from schemas.codec import encode
from schemas.records import Alert, DeadLetter, ScoreDigest
from streams import embedded
from streams.admin import apply_topics
from streams.clients import client_config, topic_name
from streams.config import InsightsConfig, KafkaConfig, RedisConfig
from streams.insights import QUIET_SECONDS, Readiness, _step_over, run_insights
from streams.metrics import Metrics, make_metrics
from streams.store import connect
from streams.tail import read_topic
from streams.windows import WINDOW_FIELD, WINDOWS_KEY, Window
from tests.digests import digest
from tests.odd_headers import NoName, send_with
from tests.shops import until

STOP_SECONDS = 10.0
INSIGHTS = InsightsConfig(
    window_seconds=6,
    step_seconds=1,
    grace_seconds=1,
    least_rated=2,
    highest_rmse=1.2,
    largest_drift=9,
)


@pytest.fixture(params=["kafka", "embedded_broker"])
def cluster(request: pytest.FixtureRequest) -> KafkaConfig:
    config = KafkaConfig(
        bootstrap_servers=request.getfixturevalue(request.param),
        topic_prefix=f"{uuid.uuid4().hex[:8]}.",
        group_id=uuid.uuid4().hex[:8],
        partitions=1,
        session_timeout_ms=10_000,  # who is left out on a busy machine reads all again
    )
    apply_topics(config)
    return config


@contextmanager
def insights(kafka: KafkaConfig, url: str, metrics: Metrics) -> Generator[Readiness]:
    """Insights in a thread; that it ends in time is part of each test."""
    stop, readiness = threading.Event(), Readiness()
    redis = RedisConfig(url=SecretStr(url))
    arguments = kafka, redis, INSIGHTS, stop, metrics, readiness
    thread = threading.Thread(target=run_insights, args=arguments, daemon=True)
    thread.start()
    try:
        yield readiness
    finally:
        started = time.monotonic()
        stop.set()
        thread.join(STOP_SECONDS)
        assert not thread.is_alive()
        assert time.monotonic() - started < STOP_SECONDS


def send(kafka: KafkaConfig, *values: bytes) -> None:
    """Compressed as the workers' producers do."""
    producer = Producer(client_config(kafka, compression_type="lz4"))
    for value in values:
        producer.produce(topic_name(kafka, "score-digests"), value=value, key=b"scorer-0")
    assert producer.flush(10) == 0


def now_digest(count: int, name: str, error: float = 0.0) -> ScoreDigest:
    return digest(datetime.now(UTC), [(3.0 + error, 3.0)] * count, name=name)


def windows(url: str) -> list[Window]:
    client = connect(RedisConfig(url=SecretStr(url)))
    rows = client.xrange(f"starcast:{WINDOWS_KEY}")
    client.close()
    return [Window.model_validate_json(fields[WINDOW_FIELD]) for _, fields in rows]


def counted(found: list[Window]) -> int:
    """Predictions in the steps, each of which counts once."""
    return sum(
        scored.sums.count
        for window in found
        for kind in window.kinds.values()
        for scored in kind.step.values()
    )


def read(kafka: KafkaConfig, topic: str) -> list[bytes]:
    return [
        value
        for batch in read_topic(kafka, topic)
        for message in batch
        if (value := message.value()) is not None
    ]


def test_digests_become_windows_alerts_and_dead_letters(cluster: KafkaConfig, store: str) -> None:
    metrics = make_metrics()
    with insights(cluster, store, metrics):
        good = now_digest(10, "a")
        mixed = now_digest(1, "mixed").model_copy(update={"kinds": {"review": 1, "request": 1}})
        send(cluster, encode(good), encode(good), b"{}", encode(mixed))
        until(lambda: counted(windows(store)) >= 10)
        send(cluster, encode(now_digest(10, "b", error=2.0)))
        until(lambda: counted(windows(store)) >= 20)
        # The next windows fire too, but the alert has been given.
        until(lambda: sum("rmse/interaction" in each.firing for each in windows(store)) >= 3)
    found = windows(store)
    assert counted(found) == 20
    for one, other in pairwise(found):  # after one with nothing in it there may be a pause
        assert other.end_ms == one.end_ms + 1_000 or (not one.kinds and other.end_ms > one.end_ms)
    (alert,) = [Alert.model_validate_json(value) for value in read(cluster, "alerts")]
    assert (alert.rule, alert.subject, alert.threshold) == ("rmse", "interaction", 1.2)
    letters = [DeadLetter.model_validate_json(value) for value in read(cluster, "dead-letters")]
    assert [letter.source.offset for letter in letters] == [2, 3]
    assert {letter.source.topic for letter in letters} == {"score-digests"}
    assert letters[0].field is not None
    assert "review" in letters[1].reason
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    assert samples["starcast_duplicates_total", "insights"] == 1
    assert samples["starcast_dead_letters_total", "insights", "contract"] == 2


@pytest.mark.parametrize("cluster", ["kafka"], indirect=True)
def test_a_digest_whose_headers_cannot_be_read_stops_nothing(
    cluster: KafkaConfig, store: str
) -> None:
    metrics = make_metrics()
    with insights(cluster, store, metrics):
        send(cluster, encode(now_digest(5, "a")))
        until(lambda: counted(windows(store)) == 5)
        odd = encode(now_digest(200, "odd"))
        send_with([(NoName("trace"), b"1")], cluster, "score-digests", odd)
        until(lambda: read(cluster, "dead-letters") != [])
        send(cluster, encode(now_digest(7, "b")))
        until(lambda: counted(windows(store)) == 12)
    (letter,) = [DeadLetter.model_validate_json(value) for value in read(cluster, "dead-letters")]
    assert letter.source.offset == 1
    assert letter.reason == "not read (headers left out: a name is not UTF-8)"
    assert base64.b64decode(letter.value or "") == odd


@pytest.mark.parametrize("cluster", ["kafka"], indirect=True)
def test_a_commit_that_is_refused_makes_no_second_letter(cluster: KafkaConfig) -> None:
    send_with([(NoName("trace"), b"1")], cluster, "score-digests", b"{}")
    metrics, letters = make_metrics(), set[int]()
    other = Consumer(client_config(cluster, group_id=f"{cluster.group_id}-insights"))
    try:
        other.subscribe([topic_name(cluster, "score-digests")])
        until(lambda: (other.poll(0.1), other.assignment())[1] != [])
        for _ in range(2):
            with pytest.raises(KafkaException, match=r"UNKNOWN_MEMBER_ID|unknown member"):
                _step_over(cluster, metrics, letters)
    finally:
        other.close()
    _step_over(cluster, metrics, letters)
    assert len(read(cluster, "dead-letters")) == 1
    _step_over(cluster, metrics, set())  # it is behind it now
    assert len(read(cluster, "dead-letters")) == 1


def test_a_restart_neither_loses_nor_doubles(cluster: KafkaConfig, store: str) -> None:
    metrics = make_metrics()
    with insights(cluster, store, metrics):
        send(cluster, encode(now_digest(5, "a")))
        until(lambda: counted(windows(store)) == 5)
    before = windows(store)
    send(cluster, encode(now_digest(7, "b")), encode(now_digest(0, "a")))
    with insights(cluster, store, metrics):
        until(lambda: counted(windows(store)) == 12)
    after = windows(store)
    assert after[: len(before)] == before
    ends = [window.end_ms for window in after]
    assert ends == sorted(set(ends))
    # The digest of before the restart is still in the windows after it, as long as they reach it.
    reaching = [window for window in after[len(before) :] if window.start_ms < before[0].end_ms]
    assert reaching or before[-1].end_ms - before[0].end_ms >= 5_000  # or it took long to end
    for window in reaching:
        assert window.kinds["interaction"].total().sums.count >= 5


def test_a_broker_that_is_slow_to_hand_over_a_backlog_is_waited_for(
    cluster: KafkaConfig, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with insights(cluster, store, make_metrics()):
        send(cluster, encode(now_digest(5, "a")))
        until(lambda: counted(windows(store)) == 5)
    send(cluster, encode(now_digest(7, "b")))
    fetch = Fetcher._proc_fetch_request
    begun = time.monotonic()

    async def slow(fetcher: Any, *arguments: Any) -> Any:
        if (left := begun + INSIGHTS.window_seconds + QUIET_SECONDS - time.monotonic()) > 0:
            await asyncio.sleep(left)
        return await fetch(fetcher, *arguments)

    monkeypatch.setattr(Fetcher, "_proc_fetch_request", slow)
    with insights(cluster, store, make_metrics()):
        until(lambda: counted(windows(store)) == 12)


def test_a_store_that_is_gone_is_waited_for(
    cluster: KafkaConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = embedded.start_store(tmp_path_factory.mktemp("first"))
    port = int(store.address.rpartition(":")[2].partition("/")[0])
    with insights(cluster, store.address, make_metrics()) as readiness:
        send(cluster, encode(now_digest(3, "a")))
        until(lambda: counted(windows(store.address)) == 3)
        store.stop()
        send(cluster, encode(now_digest(4, "b")))
        until(lambda: "the store does not answer" in (readiness.reason or ""))
        time.sleep(3)
        with _store_at(port, tmp_path_factory) as url:
            # What fell due meanwhile is written when the store is back.
            until(lambda: counted(windows(url)) == 4)
            until(lambda: readiness.reason is None)


@contextmanager
def _store_at(port: int, folders: pytest.TempPathFactory) -> Generator[str]:
    free_port = embedded.free_port
    embedded.free_port = lambda: port
    try:
        child = embedded.start_store(folders.mktemp("again"))
    finally:
        embedded.free_port = free_port
    with child:
        yield child.address


def test_one_works_and_one_stands_by(cluster: KafkaConfig, store: str) -> None:
    with insights(cluster, store, make_metrics()) as one:
        assert one.reason is not None
        until(lambda: one.reason is None)
        with insights(cluster, store, make_metrics()) as other:
            until(lambda: one.reason is None and other.reason is None)


def test_window_json_is_what_the_page_and_programs_read(cluster: KafkaConfig, store: str) -> None:
    with insights(cluster, store, make_metrics()):
        send(cluster, encode(now_digest(4, "a", error=1.0)))
        until(lambda: counted(windows(store)) == 4)
    client = connect(RedisConfig(url=SecretStr(store)))
    identity, fields = client.xrange(f"starcast:{WINDOWS_KEY}", count=1)[0]
    client.close()
    told = json.loads(fields[WINDOW_FIELD])
    assert identity == f"{told['end_ms']}-0".encode()
    sums = told["kinds"]["interaction"]["models"]["ladder"]["sums"]
    assert (sums["count"], sums["rmse"], sums["mean_rating"]) == (4, 1.0, 3.0)
