"""Three brokers and two stores with replicas, started once for all tests of this folder."""

import os
from collections.abc import Iterator

import pytest

from schemas.exceptions import StarcastError
from starcast.log import LogConfig, configure
from tests.faults.servers import Servers, start_servers


@pytest.fixture(scope="session")
def faulty_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers that can be killed, cut off and emptied."""
    configure(LogConfig(level="error"))
    try:
        servers = start_servers(tmp_path_factory.mktemp("servers"))
    except StarcastError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    yield servers
    servers.close()
