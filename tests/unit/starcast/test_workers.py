"""What a worker's process is asked."""

from prometheus_client import CollectorRegistry, Gauge

from starcast.workers import is_ready, read_metrics
from streams.embedded import HOST
from streams.health import serve_health


def test_a_worker_is_ready_while_its_checks_pass() -> None:
    registry = CollectorRegistry()
    Gauge("starcast_lag", "Records that wait.", registry=registry).set(7)
    reasons: list[str | None] = ["no partitions"]
    with serve_health(HOST, 0, registry, {"scorer": lambda: reasons[-1]}) as port:
        address = f"{HOST}:{port}"
        assert not is_ready(address)
        reasons.append(None)
        assert is_ready(address)
        assert "starcast_lag 7.0" in read_metrics(address)
    assert not is_ready(address)
