import json
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from threading import enumerate as enumerate_threads

import pytest
from prometheus_client import CollectorRegistry

from streams.embedded import HOST
from streams.health import Check, PortError, serve_health
from streams.metrics import make_metrics


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def asked(checks: Mapping[str, Check], path: str) -> tuple[int, str]:
    with serve_health(HOST, 0, CollectorRegistry(), checks) as port:
        return get(port, path)


def test_an_address_of_ipv6() -> None:
    with (
        serve_health("::1", 0, CollectorRegistry(), {}) as port,
        urllib.request.urlopen(f"http://[::1]:{port}/health", timeout=5) as response,
    ):
        assert response.status == 200


def test_alive_even_when_not_ready() -> None:
    status, body = asked({"scorer": lambda: "recovering"}, "/health")
    assert (status, json.loads(body)) == (200, {"alive": True})


def test_ready_when_every_check_passes() -> None:
    status, body = asked({"scorer": lambda: None, "items": lambda: None}, "/ready")
    checks = {"scorer": {"ready": True}, "items": {"ready": True}}
    assert (status, json.loads(body)) == (200, {"ready": True, "checks": checks})


def test_not_ready_says_which_and_why() -> None:
    def broken() -> str | None:
        raise ValueError("a bug")

    status, body = asked(
        {"scorer": lambda: "partition 3 recovers", "items": lambda: None, "texts": broken},
        "/ready?verbose",
    )
    report = json.loads(body)
    assert status == 503
    assert report["checks"]["scorer"] == {"ready": False, "reason": "partition 3 recovers"}
    assert report["checks"]["items"] == {"ready": True}
    assert report["checks"]["texts"] == {"ready": False, "reason": "ValueError: a bug"}


def test_metrics_are_those_of_the_registry() -> None:
    metrics = make_metrics(CollectorRegistry())
    metrics.duplicates.labels("scorer").inc(2)
    with serve_health(HOST, 0, metrics.registry, {}) as port:
        status, body = get(port, "/metrics")
    assert status == 200
    assert 'starcast_duplicates_total{processor="scorer"} 2.0' in body


def test_metrics_that_are_named_come_alone() -> None:
    metrics = make_metrics(CollectorRegistry())
    metrics.duplicates.labels("scorer").inc(2)
    metrics.misplaced.labels("scorer").inc(3)
    with serve_health(HOST, 0, metrics.registry, {}) as port:
        _, body = get(port, "/metrics?name[]=starcast_duplicates_total")
    lines = [line for line in body.splitlines() if not line.startswith("#")]
    assert lines == ['starcast_duplicates_total{processor="scorer"} 2.0']


def test_other_paths_are_told() -> None:
    status, body = asked({}, "/")
    assert status == 404
    assert "/metrics" in body


def test_a_client_that_says_nothing_does_not_block_others() -> None:
    with (
        serve_health(HOST, 0, CollectorRegistry(), {}) as port,
        socket.create_connection((HOST, port)),
    ):
        assert get(port, "/health")[0] == 200


def hang_up(port: int, said: bytes) -> None:
    with socket.create_connection((HOST, port)) as client:
        client.sendall(said)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_client_that_hangs_up_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    with serve_health(HOST, 0, CollectorRegistry(), {}) as port:
        for said in (b"", b"GET /metrics HTTP/1.1\r\n\r\n"):
            hang_up(port, said)
        assert get(port, "/health")[0] == 200  # which is taken after them
        while any("process_request" in thread.name for thread in enumerate_threads()):
            time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_a_taken_port_is_one_message() -> None:
    with (
        socket.create_server((HOST, 0)) as taken,
        pytest.raises(PortError, match="STARCAST_WEB__METRICS_PORT"),
        serve_health(HOST, taken.getsockname()[1], CollectorRegistry(), {}),
    ):
        pass


def test_the_port_is_free_again_afterwards() -> None:
    with serve_health(HOST, 0, CollectorRegistry(), {}) as port:
        pass
    with serve_health(HOST, port, CollectorRegistry(), {}) as again:
        assert again == port
