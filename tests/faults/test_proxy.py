"""Links that are cut for one process."""

import os
import socket
import threading
from collections.abc import Generator
from contextlib import closing

import pytest

from streams.embedded import HOST
from tests.faults.proxy import Proxy, Rule

SILENCE_SECONDS = 0.3


@pytest.fixture
def link() -> Generator[tuple[Proxy, int]]:
    """A proxy, and where it listens in front of a server that sends back what it gets."""
    with socket.create_server((HOST, 0)) as server, closing(Proxy()) as proxy:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=_send_back, args=(client,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield proxy, proxy.add("server", server.getsockname()[1])


def _send_back(client: socket.socket) -> None:
    with client:
        while data := client.recv(100):
            client.sendall(data)


def _connected(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=10)


def _answer(client: socket.socket, data: bytes, seconds: float = 10) -> bytes:
    client.settimeout(seconds)
    client.sendall(data)
    return client.recv(100)


def test_a_cut_is_of_connections_before_it_and_after_it(link: tuple[Proxy, int]) -> None:
    proxy, port = link
    cut = Rule("server", os.getpid())
    with _connected(port) as before:
        assert _answer(before, b"a") == b"a"
        proxy.break_(cut)
        with _connected(port) as after:
            for client in (before, after):
                with pytest.raises(TimeoutError):
                    _answer(client, b"b", SILENCE_SECONDS)
            proxy.heal(cut)
            for client in (before, after):
                client.settimeout(10)
                assert client.recv(100) == b"b"


def test_a_cut_of_one_process_leaves_others_their_links(link: tuple[Proxy, int]) -> None:
    proxy, port = link
    proxy.break_(Rule("server", os.getppid()))
    with _connected(port) as client:
        assert _answer(client, b"a") == b"a"
