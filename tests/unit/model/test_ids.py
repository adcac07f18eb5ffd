"""Hashed ids: Kafka's own vectors, and the partition that a hash carries."""

import numpy as np
from confluent_kafka import murmur2 as librdkafka_murmur2
from hypothesis import given
from hypothesis import strategies as st

from model.ids import NONE, hash_ids, partitions_of


def test_murmur2_gives_what_kafkas_own_test_expects() -> None:
    # org.apache.kafka.common.utils.UtilsTest.testMurmur2
    expected = {
        "21": -973932308,
        "foobar": -790332482,
        "a-little-bit-long-string": -985981536,
        "a-little-bit-longer-string": -1486304829,
        "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        "abc": 479470107,
    }
    lowest = 2**31 - 1  # a hash has 31 bits of it
    found = hash_ids(list(expected)) & np.uint64(lowest)
    assert found.tolist() == [number & lowest for number in expected.values()]


@given(st.lists(st.text(min_size=1)), st.integers(1, 1_000))
def test_a_hash_carries_its_kafka_partition(ids: list[str], partitions: int) -> None:
    ids = [name for name in ids if name.isprintable()]
    expected = [librdkafka_murmur2(name.encode(), partitions) for name in ids]
    assert partitions_of(hash_ids(ids), partitions).tolist() == expected


def test_no_id_is_none_and_another_seed_is_another_hash() -> None:
    assert hash_ids([None, ""]).tolist() == [NONE, NONE]
    assert hash_ids(["a"])[0] != hash_ids(["a"], seed=1)[0]
    assert hash_ids([]).shape == (0,)
