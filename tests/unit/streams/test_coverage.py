from uuid import uuid4

import pytest
from pydantic import SecretStr

from streams.config import RedisConfig
from streams.coverage import reach, reached, share
from streams.store import Store


@pytest.fixture
def items(store: str) -> Store:
    """A shop whose `items` have three partitions."""
    return Store(RedisConfig(url=SecretStr(store), key_prefix=uuid4().hex), "layout", 3)


def test_vectors_reach_as_far_as_they_were_said_to(items: Store) -> None:
    reach(items, "one", {0: 7, 2: 5})
    assert reached(items, "one", [2, 1, 0]) == [5, 0, 7]
    assert reached(items, "other", range(3)) == [0, 0, 0]


def test_vectors_cover_others_once_they_reach_as_far_in_each_partition(items: Store) -> None:
    assert share(items, "one", "other") == 1  # nothing to read again
    reach(items, "one", {0: 6, 2: 4})
    assert share(items, "one", "other") == 0
    reach(items, "other", {0: 3})
    assert share(items, "one", "other") == 0.3
    reach(items, "other", {0: 99})  # what is newer makes up for nothing
    assert share(items, "one", "other") == 0.6
    reach(items, "other", {1: 2, 2: 4})
    assert share(items, "one", "other") == 1
    assert share(items, "other", "one") == 10 / 105
