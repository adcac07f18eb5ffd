"""Fixtures that all tests share: real servers, started once a session, and a browser."""

import os
from collections.abc import Callable, Generator, Iterator
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from pathlib import Path
from shutil import which
from tempfile import gettempdir
from typing import Any, NoReturn, TypeVar

import pytest
import redis
from hypothesis import settings

from schemas.exceptions import StarcastError
from streams.embedded import start_broker, start_store
from tests.servers import start_kafka, start_object_store

# A busy machine is no failure, nor is a function that compiles when it is first called.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Without a GPU Triton's kernels run as Python; Triton asks for this when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

_Server = TypeVar("_Server")

CHROMIUM = "/usr/bin/chromium"
# No sandbox since CI runs as root; the rest keeps the browser from calling home.
CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs alone first, so that two test processes share all the rest."""
    items.sort(key=lambda item: "alone" not in item.keywords)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Test processes wait while one of them runs a test that is marked `alone`.

    Around all else, so that a test's time limit does not run while it waits.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return (yield)
    path = Path(gettempdir()) / f"starcast-tests-{run}"
    with path.open("w") as room, path.with_suffix(".door").open("w") as door:
        flock(door, LOCK_EX)  # who waits to be alone lets nobody pass meanwhile
        flock(room, LOCK_EX if "alone" in item.keywords else LOCK_SH)
        flock(door, LOCK_UN)
        return (yield)


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap servers of a real Apache Kafka."""
    with started(start_kafka, tmp_path_factory) as child:
        yield child.address


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap servers of embedded mode's broker."""
    with started(start_broker, tmp_path_factory) as child:
        yield child.address


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Valkey or Redis, with what earlier tests left in it."""
    with started(start_store, tmp_path_factory) as child:
        yield child.address


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server."""
    with started(start_object_store, tmp_path_factory) as child:
        yield child.address


@pytest.fixture
def store(store_server: str) -> str:
    """The URL of a real and empty Valkey or Redis."""
    with redis.Redis.from_url(store_server) as client:
        client.flushall()
    return store_server


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any]) -> dict[str, Any]:
    """Debian's Chromium for pytest-playwright, whose own fixtures do the rest."""
    if which(CHROMIUM) is None:
        _missing(f"There is no {CHROMIUM}: make system")
    return {
        **browser_type_launch_args,
        "executable_path": CHROMIUM,
        "args": CHROMIUM_ARGUMENTS,
    }


def started(start: Callable[[Path], _Server], folders: pytest.TempPathFactory) -> _Server:
    """A server in a folder of its own; a reason to skip, or to fail in CI, where there is none."""
    try:
        return start(folders.mktemp(start.__name__))
    except StarcastError as error:
        _missing(str(error))


def _missing(what: str) -> NoReturn:
    """A server that cannot be had: a failure in CI, else a reason to skip."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)
