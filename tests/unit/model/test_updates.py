"""Item deltas keep all they say on the wire."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.ids import hash_ids
from model.state import ITEM_DELTA
from model.updates import encode_updates, from_updates
from schemas.codec import encode
from schemas.records import ItemUpdate, UpdateSource


@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_deltas_go_over_the_wire_and_back(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    names = [f"item {number}" for number in range(size)]
    deltas = np.zeros(size, ITEM_DELTA)
    deltas["item"] = hash_ids(names)
    deltas["source"] = random.integers(0, 2, size)
    for name in ("actions", "rating_count", "histogram", "price_count", "sessions"):
        deltas[name] = random.integers(-3, 4, deltas[name].shape)
    for name in ("rating_sum", "rating_square_sum", "price_log_sum"):
        deltas[name] = random.integers(-999, 999, size) / 256
    for name in ("first_time", "last_time"):
        deltas[name] = random.integers(10**12, 2 * 10**12, size)
    topics = [("reviews", "behavior")[code] for code in deltas["source"]]
    sources = [
        encode(UpdateSource(topic=topic, partition=3, first_offset=5, last_offset=9))
        for topic in topics
    ]
    updates = encode_updates(names, deltas, sources)
    records = [ItemUpdate.model_validate_json(update) for update in updates]
    assert [record.item_id for record in records] == names
    assert [record.source.topic for record in records] == topics
    deltas["source"] = 0
    assert from_updates(records).tobytes() == deltas.tobytes()
