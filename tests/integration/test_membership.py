"""Workers without partitions on a real broker: those that have to wait live on, the others end."""

import signal
import threading
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka import Consumer
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from model.state import LAYOUT_HASH
from schemas.exceptions import UnreachableError
from streams import membership
from streams.admin import apply_topics
from streams.catalog import Catalog
from streams.clients import client_config, group_name, topic_name
from streams.config import KafkaConfig, RedisConfig
from streams.exceptions import LeftOutError
from streams.loop import Loop
from streams.metrics import make_metrics
from streams.store import Store
from tests.servers import start_kafka
from tests.shops import until

SOON_SECONDS = 0.5
ASKS = 3  # of which two in a row would end a worker
JOIN_SECONDS = 60.0


class Worker:
    """A catalog's loop in a thread, and what it ended with."""

    def __init__(self, kafka: KafkaConfig, store: str) -> None:
        self._stop = threading.Event()
        self.ended: list[Exception] = []
        states = Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, kafka.partitions)
        metrics = make_metrics(CollectorRegistry())
        self.loop = Loop(Catalog(states, kafka.topic_prefix, metrics), kafka, metrics, self._stop)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.loop.run()
        except Exception as problem:  # noqa: BLE001 - the test looks at it
            self.ended.append(problem)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @contextmanager
    def running(self) -> Generator["Worker"]:
        self._thread.start()
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(JOIN_SECONDS)
        assert not self.alive


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool | Exception]:
    """Have Kafka asked soon, though not twice before a client on a busy machine has joined."""
    told: list[bool | Exception] = []
    ask = membership.left_out

    def asked(kafka: KafkaConfig, processor: str, member: str) -> bool:
        try:
            told.append(ask(kafka, processor, member))
        except Exception as problem:
            told.append(problem)
            raise
        return bool(told[-1])

    monkeypatch.setattr(membership, "left_out", asked)
    monkeypatch.setattr(membership, "patience", lambda *_: SOON_SECONDS)
    return told


@pytest.fixture(params=["classic", "consumer"])
def shop(kafka: str, request: pytest.FixtureRequest) -> KafkaConfig:
    return made(kafka, request.param)


def made(kafka: str, protocol: str = "classic") -> KafkaConfig:
    """A shop of one partition, for which two workers are one too many."""
    prefix = f"{uuid.uuid4().hex[:8]}."
    config = KafkaConfig(
        bootstrap_servers=kafka,
        topic_prefix=prefix,
        group_id=prefix,
        partitions=1,
        group_protocol=protocol,
        session_timeout_ms=2_000,
    )
    apply_topics(config)
    return config


def works(worker: Worker) -> Callable[[], bool]:
    return lambda: len(worker.loop.live) == 2


def test_a_worker_whose_client_has_left_its_group_ends(
    shop: KafkaConfig,
    store: str,
    answers: list[bool | Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Worker(shop, store).running() as worker:
        until(works(worker))
        monkeypatch.setattr(membership, "AGAIN_SECONDS", SOON_SECONDS)
        worker.loop._ownership.consumer.unsubscribe()  # behind its back, and it does not come back
        until(lambda: not worker.alive)
    assert [type(each) for each in worker.ended] == [LeftOutError]
    assert answers[-2:] == [True, True]


@pytest.mark.parametrize(
    ("server", "protocol"),
    [("kafka", "classic"), ("kafka", "consumer"), ("embedded_broker", "classic")],
)
def test_a_worker_beyond_the_number_of_partitions_lives_on(
    server: str,
    protocol: str,
    store: str,
    answers: list[bool | Exception],
    request: pytest.FixtureRequest,
) -> None:
    shop = made(request.getfixturevalue(server), protocol)
    with Worker(shop, store).running() as first:
        until(works(first))
        with Worker(shop, store).running() as second:
            until(lambda: answers[-ASKS:] == [False] * ASKS)
            until(lambda: {len(first.loop.live), len(second.loop.live)} == {0, 2})
            idle, busy = (second, first) if works(first)() else (first, second)
            busy.stop()
            until(works(idle))
    assert first.ended == second.ended == []


def test_a_rebalance_that_takes_long_is_waited_for(
    kafka: str, store: str, answers: list[bool | Exception]
) -> None:
    shop = made(kafka)
    slow = Consumer(
        client_config(
            shop,
            group_id=group_name(shop, "catalog"),
            session_timeout_ms=6_000,
            partition_assignment_strategy="range",
        )
    )
    try:
        slow.subscribe([topic_name(shop, each) for each in ("items", "users")])
        until(lambda: (slow.poll(0.1), slow.assignment())[1] != [])
        with Worker(shop, store).running() as worker:  # and nobody polls for the other
            until(lambda: answers[-ASKS:] == [False] * ASKS)
            assert worker.loop.live == frozenset()
    finally:
        slow.close()
    assert worker.ended == []


def test_a_kafka_that_stands_still_is_waited_for(
    tmp_path: Path, store: str, answers: list[bool | Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "ASK_SECONDS", 1.0)
    with start_kafka(tmp_path) as broker, Worker(made(broker.address), store).running() as worker:
        until(works(worker))
        answers.clear()
        broker.process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: len(answers) >= ASKS)
            assert {type(each) for each in answers} == {UnreachableError}
        finally:
            broker.process.send_signal(signal.SIGCONT)
        until(works(worker))
    assert worker.ended == []
