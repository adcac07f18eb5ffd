from pydantic import SecretStr

from streams.config import RedisConfig
from streams.dashboard_data import Feed, _follow_store
from streams.embedded import HOST, free_port
from streams.store import Store


def test_a_cluster_that_is_down_is_told_and_asked_again() -> None:
    feed, rounds = Feed(), iter([True, True, False])
    url = SecretStr(f"redis://{HOST}:{free_port()}")
    store = Store(RedisConfig(url=url, cluster=True), "abcd", 1)
    _follow_store(feed, store, "windows", lambda _: next(rounds))
    assert next(rounds, None) is None
    assert feed.snapshot.store.up is False
    assert "STARCAST_REDIS__URL" in feed.snapshot.store.reason
