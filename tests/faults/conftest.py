"""Three brokers and two stores with replicas, started once for all tests of a file."""

import logging
from collections.abc import Iterator
from contextlib import closing

import pytest
import structlog

from starcast.log import LogConfig, configure
from tests.conftest import started
from tests.faults.servers import Servers, start_servers


@pytest.fixture(scope="module")  # four JVMs: no test of another file runs beside them
def faulty_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers that can be killed, cut off and emptied."""
    with closing(started(start_servers, tmp_path_factory)) as servers:
        yield servers


@pytest.fixture(autouse=True)
def only_errors() -> Iterator[None]:
    """Logs of errors alone; tests of other folders look at warnings too."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    configure(LogConfig(level="error"))
    yield
    structlog.reset_defaults()
    root.handlers, root.level = handlers, level
