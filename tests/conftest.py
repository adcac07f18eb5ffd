"""Fixtures that all tests share: real servers, started once a session, and a browser."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any, NoReturn

import pytest
import redis

from schemas.exceptions import StarcastError
from streams.embedded import Child, start_broker, start_store
from tests.servers import start_kafka

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
    """The longest file first, so that of two test processes none is left waiting for it."""
    items.sort(key=lambda item: "faults" not in item.path.parts)


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap servers of a real Apache Kafka."""
    with _started(start_kafka, tmp_path_factory) as child:
        yield child.address


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap servers of embedded mode's broker."""
    with _started(start_broker, tmp_path_factory) as child:
        yield child.address


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Valkey or Redis, with what earlier tests left in it."""
    with _started(start_store, tmp_path_factory) as child:
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


def _started(start: Callable[[Path], Child], folders: pytest.TempPathFactory) -> Child:
    try:
        return start(folders.mktemp(start.__name__))
    except StarcastError as error:
        _missing(str(error))


def _missing(what: str) -> NoReturn:
    """A server that cannot be had: a failure in CI, else a reason to skip."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)
