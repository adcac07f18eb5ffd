"""`starcast run` as a process: ready, stopped by a signal, or ended with a message."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from pydantic import SecretStr

from schemas.codec import encode
from streams.admin import apply_topics
from streams.config import KafkaConfig, RedisConfig
from streams.embedded import HOST, free_port, start_broker
from streams.store import connect
from streams.windows import WINDOWS_KEY
from tests.digests import digest
from tests.shops import until

ROOT = Path(__file__).parents[2]
READY_SECONDS = 90.0
STOP_SECONDS = 10.0


@pytest.fixture
def environment(embedded_broker: str, store: str, tmp_path: Path) -> dict[str, str]:
    prefix = f"{uuid.uuid4().hex[:8]}."
    apply_topics(KafkaConfig(bootstrap_servers=embedded_broker, topic_prefix=prefix, partitions=2))
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "STARCAST_KAFKA__BOOTSTRAP_SERVERS": embedded_broker,
        "STARCAST_KAFKA__EXACTLY_ONCE": "false",
        "STARCAST_KAFKA__TOPIC_PREFIX": prefix,
        "STARCAST_KAFKA__GROUP_ID": prefix,
        "STARCAST_KAFKA__PARTITIONS": "2",
        "STARCAST_REDIS__URL": store,
        "STARCAST_ARCHIVE__URL": str(tmp_path / "archive"),
        "STARCAST_MODELS__URL": str(tmp_path / "models"),
        "STARCAST_MODELS__ENCODER": "none",
        "STARCAST_WEB__METRICS_PORT": str(free_port()),
    }


@pytest.fixture
def worker(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "starcast", "run", "scorer", "items", "catalog"]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def ready(port: str) -> bool:
    try:
        with urlopen(f"http://{HOST}:{port}/ready", timeout=2) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def wait_ready(worker: subprocess.Popen[Any], environment: dict[str, str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not ready(environment["STARCAST_WEB__METRICS_PORT"]):
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_gets_ready_and_ends_on_a_signal(
    worker: subprocess.Popen[str], environment: dict[str, str], number: signal.Signals
) -> None:
    wait_ready(worker, environment)
    worker.send_signal(number)
    _, log = worker.communicate(timeout=STOP_SECONDS)
    assert worker.returncode == 0
    assert "Traceback" not in log
    assert all("event" in json.loads(line) for line in log.splitlines())


def test_insights_ends_without_noise(
    environment: dict[str, str], embedded_broker: str, store: str, tmp_path: Path
) -> None:
    """`datasketches` lists some 600 of its functions where a sketch outlives the interpreter."""
    prefix = environment["STARCAST_KAFKA__TOPIC_PREFIX"]
    steps = {"STARCAST_INSIGHTS__STEP_SECONDS": "1", "STARCAST_INSIGHTS__GRACE_SECONDS": "0"}
    names = {"STARCAST_REDIS__KEY_PREFIX": prefix}
    with subprocess.Popen(
        [sys.executable, "-m", "starcast", "run", "insights"],
        env=environment | steps | names,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_ready(process, environment)
            value = encode(digest(datetime.now(UTC), [(3.0, 4.0)], latencies_ms=[5.0]))
            producer = Producer({"bootstrap.servers": embedded_broker})
            producer.produce(f"{prefix}score-digests", value, "scorer-0")
            assert not producer.flush(30)
            with closing(connect(RedisConfig(url=SecretStr(store)))) as client:
                until(lambda: client.exists(f"{prefix}:{WINDOWS_KEY}") == 1)
            process.terminate()
            _, log = process.communicate(timeout=STOP_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    assert all("event" in json.loads(line) for line in log.splitlines())


def test_a_broker_that_is_gone_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    prefix = environment["STARCAST_KAFKA__TOPIC_PREFIX"]
    command = [sys.executable, "-m", "starcast", "run", "insights"]  # which owns on without one
    with start_broker(tmp_path) as broker:
        apply_topics(KafkaConfig(bootstrap_servers=broker.address, topic_prefix=prefix))
        environment = environment | {"STARCAST_KAFKA__BOOTSTRAP_SERVERS": broker.address}
        with subprocess.Popen(
            command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL
        ) as process:
            try:
                wait_ready(process, environment)
                broker.process.send_signal(signal.SIGSTOP)
                until(lambda: not ready(environment["STARCAST_WEB__METRICS_PORT"]))
                broker.process.send_signal(signal.SIGCONT)
                wait_ready(process, environment)
            finally:
                process.kill()


def test_nothing_is_compiled_once_a_worker_is_ready(
    environment: dict[str, str], embedded_broker: str, tmp_path: Path
) -> None:
    compiled = tmp_path / "compiled"
    command = [sys.executable, "-m", "starcast", "run", "scorer", "items", "catalog"]
    prefix = environment["STARCAST_KAFKA__TOPIC_PREFIX"]
    with subprocess.Popen(
        command,
        env=environment | {"NUMBA_CACHE_DIR": str(compiled)},
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_ready(process, environment)
        before = set(compiled.rglob("*.nbc"))
        producer = Producer({"bootstrap.servers": embedded_broker})
        for item in ("a", "b", "a"):
            view = {"event_id": uuid.uuid4().hex, "user_id": "u", "item_id": item, "action": "view"}
            value = json.dumps(view | {"event_time": "2026-01-01T00:00:00Z"})
            producer.produce(f"{prefix}behavior", value, "u")
        assert not producer.flush(30)
        with closing(
            Consumer({"bootstrap.servers": embedded_broker, "group.id": prefix + "reads"})
        ) as consumer:
            ratings = f"{prefix}predicted-ratings"
            consumer.assign([TopicPartition(ratings, each, OFFSET_BEGINNING) for each in range(2)])
            assert len(consumer.consume(3, READY_SECONDS)) == 3
        process.kill()
    assert before
    assert set(compiled.rglob("*.nbc")) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [({"TOPIC_PREFIX": "none."}, "starcast topics apply"), ({"PARTITIONS": "3"}, "(2, not 3)")],
)
def test_topics_that_are_not_as_settings_say(
    environment: dict[str, str], tmp_path: Path, change: dict[str, str], said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "starcast", "run", "scorer", "items"],
        env=environment | {f"STARCAST_KAFKA__{name}": value for name, value in change.items()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_processor(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "starcast", "run", "scorer", "nope"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "nope" in done.stderr
    assert "dashboard" in done.stderr
    assert "Traceback" not in done.stderr
