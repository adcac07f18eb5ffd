from pydantic import SecretStr

from starcast.doctor import _store
from streams.config import RedisConfig
from streams.embedded import HOST, free_port


def test_a_cluster_that_is_down_is_a_finding() -> None:
    url = SecretStr(f"redis://{HOST}:{free_port()}")
    (finding,) = _store(RedisConfig(url=url, cluster=True))
    assert (finding.name, finding.state) == ("store", "wrong")
    assert "STARCAST_REDIS__URL" in finding.advice
