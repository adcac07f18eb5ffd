"""What a processor holds in the store, and up to where it stands."""

from uuid import uuid4

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from streams.claims import Claims
from streams.config import RedisConfig
from streams.exceptions import FencedError
from streams.metrics import make_metrics
from streams.store import Store

KIND, OTHER = b"i", b"a"


@pytest.fixture
def kept(store: str) -> Store:
    return Store(RedisConfig(url=SecretStr(store), key_prefix=uuid4().hex), "abcd", 3)


def make(kept: Store) -> Claims:
    return Claims(kept, make_metrics(CollectorRegistry()), "items")


def test_the_next_owner_goes_on_where_the_last_one_stood(kept: Store) -> None:
    mine = make(kept)
    assert mine.claim(KIND, [0, 1]) == {0: 0, 1: 0}
    keys = [kept.key(KIND, 1, name) for name in (b"cup", b"pot")]
    mine.write(KIND, 1, keys, [b"x", b"y"], 6)
    mine.write(KIND, 1, keys[:1], [b""], 7)
    assert kept.read(keys) == [None, b"y"]
    written = {"processor": "items", "outcome": "written"}
    assert mine._metrics.registry.get_sample_value("starcast_state_writes_total", written) == 3
    assert make(kept).claim(KIND, [0, 1]) == {0: 0, 1: 7}
    with pytest.raises(FencedError):
        mine.write(KIND, 1, keys, [b"x", b"y"], 8)


def test_claims_are_looked_at_now_and_then_and_not_those_that_went(kept: Store) -> None:
    mine = make(kept)
    mine.claim(KIND, [0, 1])
    mine.claim(OTHER, [0, 1])
    mine.check()
    make(kept).claim(KIND, [1])
    mine.check()  # it has just looked
    mine._check_at = 0.0
    with pytest.raises(FencedError, match="claimed partition 1"):
        mine.check()
    mine.drop([1])
    mine._check_at = 0.0
    mine.check()
    make(kept).claim(OTHER, [0])
    mine._check_at = 0.0
    with pytest.raises(FencedError, match="claimed partition 0"):
        mine.check()
