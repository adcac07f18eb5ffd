"""Item deltas keep all they say on the wire."""

import numpy as np
import orjson
from hypothesis import given
from hypothesis import strategies as st

from model.ids import hash_ids
from model.state import ITEM_DELTA
from model.updates import from_updates, to_updates
from schemas.records import ItemUpdate


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
    sources = {
        code: {"topic": topic, "partition": 3, "first_offset": 5, "last_offset": 9}
        for code, topic in enumerate(("reviews", "behavior"))
    }
    updates = to_updates(deltas, dict(zip(deltas["item"].tolist(), names, strict=True)), sources)
    records = [ItemUpdate.model_validate_json(orjson.dumps(update)) for update in updates]
    assert [record.item_id for record in records] == names
    assert [record.source.topic for record in records] == [
        ("reviews", "behavior")[code] for code in deltas["source"]
    ]
    deltas["source"] = 0
    assert from_updates(records).tobytes() == deltas.tobytes()
