"""What a worker's process is asked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from starcast.settings import Settings
from starcast.workers import is_ready, read_metrics, start_worker
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


def test_a_worker_listens_where_it_is_asked_whatever_a_shop_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(name: str, command: Sequence[str], address: str, *others: Any) -> SimpleNamespace:
        environment: Mapping[str, str] = others[-1]
        return SimpleNamespace(address=address, environment=environment)

    monkeypatch.setattr("starcast.workers.start_child", start)
    shop = Settings()
    shop.web.metrics_host = "10.0.0.5"
    found: Any = start_worker("scorer", ["scorer"], shop, tmp_path)
    host, port = (found.environment[f"STARCAST_WEB__METRICS_{each}"] for each in ("HOST", "PORT"))
    assert found.address == f"{host}:{port}"
