"""`starcast run` as a process: ready, stopped by a signal, or ended with a message."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from streams.admin import apply_topics
from streams.config import KafkaConfig
from streams.embedded import HOST, free_port

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_gets_ready_and_ends_on_a_signal(
    worker: subprocess.Popen[str], environment: dict[str, str], number: signal.Signals
) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not ready(environment["STARCAST_WEB__METRICS_PORT"]):
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    worker.send_signal(number)
    _, log = worker.communicate(timeout=STOP_SECONDS)
    assert worker.returncode == 0
    assert "Traceback" not in log
    assert all("event" in json.loads(line) for line in log.splitlines())


def test_an_unknown_processor(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "starcast", "run", "scorer", "nope"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "nope" in done.stderr
    assert "dashboard" in done.stderr
    assert "Traceback" not in done.stderr
