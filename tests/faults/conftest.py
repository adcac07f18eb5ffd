"""Three brokers and two stores with replicas, started once for all tests of this folder."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from starcast.log import LogConfig, configure
from tests.conftest import started
from tests.faults.servers import Servers, start_servers


@pytest.fixture(scope="session")
def faulty_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers that can be killed, cut off and emptied."""
    configure(LogConfig(level="error"))
    with closing(started(start_servers, tmp_path_factory)) as servers:
        yield servers
