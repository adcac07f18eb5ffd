"""Where embedded servers listen; `tests/integration/test_servers.py` starts them."""

import socket
from pathlib import Path

import pytest

from streams import embedded
from streams.embedded import HOST, EmbeddedError, free_port

CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not CONNECTIONS.exists(), reason="the system does not tell")
def test_a_server_that_was_down_finds_its_port_free() -> None:
    """A connection that was given the port of a broker that was killed kept it from coming back."""
    lowest = int(CONNECTIONS.read_text().split()[0])
    assert all(free_port() < lowest for _ in range(50))


def test_ports_that_are_found_together_are_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PORTS", range(20_000, 20_030))
    ports = embedded.free_ports(10)
    assert len(set(ports)) == 10
    with pytest.raises(EmbeddedError, match="20000 to 20029"):
        embedded.free_ports(31)


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, free_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(embedded, "PORTS", range(port, port + 1))
        with pytest.raises(EmbeddedError, match=f"Ports {port} to {port} of"):
            free_port()
    assert free_port() == port
