"""More than a worker can take: lag grows and is worked off, memory stays, nothing is dropped."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest
from confluent_kafka import Message

from schemas.records import Behavior, Review, ScoreRequest
from schemas.topics import LARGEST_MESSAGE
from streams import ownership
from streams.admin import TopicError, apply_topics
from streams.clients import topic_name
from streams.config import KafkaConfig
from streams.fetching import FETCH_KILOBYTES
from streams.producer import CountingProducer, Outgoing, outgoing, play
from tests.shops import PARTITIONS, Shop, check_each_once, check_states, make_shop, until
from tests.unit.model.encoders import bert

BATCH = 200  # events in one transaction of a test's shop
TIME = datetime(2026, 1, 1, tzinfo=UTC)
MEGABYTE = 2**20


@pytest.fixture
def shop(kafka: str, store_server: str, tmp_path: Path) -> Shop:
    return make_shop(kafka, store_server, tmp_path)


def views(count: int) -> list[tuple[str, Behavior]]:
    return [
        (
            "behavior",
            Behavior(
                event_id=f"b-{at}",
                user_id=f"u-{at % 50}",
                item_id=f"i-{at % 20}",
                event_time=TIME + timedelta(seconds=at),
                action="view",
            ),
        )
        for at in range(count)
    ]


def test_a_burst_is_worked_off_and_nothing_of_it_dropped(shop: Shop) -> None:
    """Ten batches come while the worker is held up in one."""
    sent = views(11 * BATCH)
    held, go_on = threading.Event(), threading.Event()
    lags: list[int] = []
    with shop.workers("scorer", "items") as workers:
        scorer, loop = workers.processors["scorer"], workers.loops["scorer"]
        process = scorer.process

        def stalled(messages: list[Message]) -> Any:
            held.set()
            assert go_on.wait(60)
            lags.append(scorer.lag)
            return process(messages)

        # Measured at each turn: within a second all may be worked off.
        with (
            patch.object(scorer, "process", stalled),
            patch.object(ownership, "LAG_SECONDS", 0.0),
        ):
            try:
                shop.play(sent[:BATCH])
                assert held.wait(60)
                shop.play(sent[BATCH:])
                assert len(shop.predictions()) < BATCH
            finally:
                go_on.set()
            until(lambda: len(shop.predictions()) == len(sent))
        until(lambda: scorer.lag == 0)
        assert sum(loop._ownership.lag(*position) for position in loop.live) == 0
        shop.until_items_are_applied()
    assert max(lags) > BATCH  # it was told
    check_each_once(shop.predictions(), sent)
    check_states(shop, sent)
    assert shop.letters() == []


def test_requests_past_their_deadline_are_answered_as_expired(shop: Shop) -> None:
    """They wait for a worker that starts late; those without a deadline are answered in full."""
    requests = [
        ScoreRequest(
            request_id=f"q-{at}",
            user_id=f"u-{at % 7}",
            item_ids=["i-1", "i-2"],
            event_time=datetime.now(UTC),
            deadline_ms=200 if at % 2 else None,
        )
        for at in range(3 * BATCH)
    ]
    shop.play(("score-requests", each) for each in requests)
    time.sleep(0.5)  # longer than the deadline
    with shop.workers("answers"):
        answers = shop.until_predicted(2 * len(requests), "request")
    told = {(each.request_id, each.item_id): each for each in answers}
    assert len(told) == len(answers) == 2 * len(requests)
    for request in requests:
        mine = [told[request.request_id, item] for item in request.item_ids]
        late = request.deadline_ms is not None
        assert {each.status for each in mine} == {"expired" if late else "ok"}
        assert all((each.rating is None) == late for each in mine)


def test_a_slow_text_lane_does_not_hold_up_the_scorer(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    folder = tmp_path / "encoder"
    bert(folder)
    shop = make_shop(kafka, store_server, tmp_path)
    shop.settings.models.encoder = str(folder)
    reviews = [
        (
            "reviews",
            Review(
                event_id=f"r-{at}",
                user_id=f"u-{at % 50}",
                item_id=f"i-{at}",
                event_time=TIME + timedelta(seconds=at),
                rating=1 + at % 5,
                text="a good guitar",
            ),
        )
        for at in range(5 * BATCH)
    ]
    encoding, go_on = threading.Event(), threading.Event()
    with shop.workers("scorer", "texts") as workers:
        texts = workers.processors["texts"]
        process = texts.process

        def slow(messages: list[Message]) -> Any:
            encoding.set()
            assert go_on.wait(120)
            return process(messages)

        with patch.object(texts, "process", slow):
            try:
                shop.play(reviews[:10])
                assert encoding.wait(60)
                shop.play(reviews[10:])
                predictions = shop.until_predicted(len(reviews))
                assert not go_on.is_set()
            finally:
                go_on.set()
    check_each_once(predictions, reviews)


# -- memory ----------------------------------------------------------------------------------------

BACKLOG_MEGABYTES = 150
LARGE_TEXT = 30_000  # characters that do not compress


@pytest.fixture
def worker(shop: Shop) -> Iterator[psutil.Process]:
    """A scorer in a process of its own."""
    with shop.process("scorer") as process:
        yield psutil.Process(process.pid)


@pytest.mark.slow
def test_a_large_backlog_does_not_fill_the_memory(shop: Shop, worker: psutil.Process) -> None:
    """What a worker prefetches is bounded, however much waits."""
    assert FETCH_KILOBYTES * 1024 < BACKLOG_MEGABYTES * MEGABYTE / 4  # else this shows nothing
    shop.play(views(BATCH))
    shop.until_predicted(BATCH)  # all is loaded and warm
    before, most = worker.memory_info().rss, 0
    worker.suspend()  # so that the backlog is there at once, and no part of it is read meanwhile
    random = np.random.default_rng(5)
    count = BACKLOG_MEGABYTES * MEGABYTE // LARGE_TEXT
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     \n", np.uint8)
    reviews = (
        Review(
            event_id=f"r-{at}",
            user_id=f"u-{at % 50}",
            item_id=f"i-{at % 20}",
            event_time=TIME + timedelta(seconds=at),
            rating=1 + at % 5,
            text=letters[random.integers(0, len(letters), LARGE_TEXT)].tobytes().decode(),
        )
        for at in range(count)
    )
    shop.play(("reviews", each) for each in reviews)
    worker.resume()
    told: set[str] = set()

    def drained() -> bool:
        nonlocal most
        most = max(most, worker.memory_info().rss)
        told.update(str(each.event_id) for each in shop.predictions())
        return len(told) == BATCH + count

    until(drained, 240)
    # The queue, one batch of large texts decoded, and librdkafka's own buffers: not the backlog.
    assert most - before < BACKLOG_MEGABYTES * MEGABYTE * 2 / 3


# -- Kafka's limits --------------------------------------------------------------------------------


def test_a_record_that_a_topic_does_not_take_is_counted_with_its_reason(shop: Shop) -> None:
    """One that the broker refuses, and one that is not even sent; the others are delivered."""
    random = np.random.default_rng(7)
    refused = Outgoing("behavior", b"u", random.bytes(LARGEST_MESSAGE // 2))
    unsendable = Outgoing("behavior", b"u", bytes(2 * LARGEST_MESSAGE))
    small = list(outgoing(views(3)))
    report = play([small[0], refused, small[1], unsendable, small[2]], shop.settings.kafka)
    assert report.delivered == Counter(behavior=3)
    assert report.failed.total() == 2
    for reason in report.failed:
        assert "too large" in reason.lower(), report.failed


def test_missing_topics_are_told_before_anything_is_sent(kafka: str) -> None:
    config = KafkaConfig(bootstrap_servers=kafka, topic_prefix="nowhere.")
    with pytest.raises(TopicError) as raised:
        CountingProducer(config).send(next(outgoing(views(1))))
    message = str(raised.value)
    assert "Topic nowhere.behavior does not exist" in message
    assert kafka in message
    assert "starcast topics apply" in message


def test_more_replicas_than_brokers_are_refused_with_the_setting(kafka: str) -> None:
    config = KafkaConfig(bootstrap_servers=kafka, topic_prefix="three.", replication=3)
    with pytest.raises(TopicError) as raised:
        apply_topics(config)
    message = str(raised.value)
    assert "Kafka refused to create topic three." in message
    assert "Replication 3 (STARCAST_KAFKA__REPLICATION) needs as many brokers" in message


def test_another_partition_count_is_refused_with_both_counts(shop: Shop) -> None:
    kafka = shop.settings.kafka
    with pytest.raises(TopicError) as raised:
        apply_topics(kafka.model_copy(update={"partitions": PARTITIONS + 1}))
    message = str(raised.value)
    assert f"{topic_name(kafka, 'reviews')} ({PARTITIONS}, not {PARTITIONS + 1})" in message
    assert "STARCAST_KAFKA__PARTITIONS" in message


def test_a_full_batch_of_large_events_is_one_that_kafka_takes(shop: Shop) -> None:
    """Journal records are cut, so that a batch of any size fits into the topic."""
    sent = views(5 * BATCH)
    shop.play(sent)
    shop.settings.scorer.batch_events = 5 * BATCH
    with shop.workers("scorer"):
        check_each_once(shop.until_predicted(len(sent)), sent)
