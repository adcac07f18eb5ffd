"""What ratings that are asked for are predicted from, of states in a real store."""

import subprocess
import sys

AFTER_WARMTH = """
import sys
import numpy as np
from pydantic import SecretStr
from model.calibration import Calibration
from model.events import blank
from model.ids import hash_ids
from model.lookups import VECTOR_DTYPE
from model.predict import Predictor, warm
from model.state import ITEM_ATTRIBUTES, LAYOUT_HASH, USER
from model.state_bytes import to_bytes
from streams.asking import Asking
from streams.config import RedisConfig
from streams.reader import ITEM_KIND, USER_STATE, Reader, store_keys, vector_keys
from streams.store import Store
from tests.unit.model.shop import compiled_kinds
from tests.unit.model.test_serving import trained

predictor = Predictor("test", trained(3, factors=4), Calibration(), None)
items, users = hash_ids([*"abcdefghi"]), hash_ids(["ann"])
store = Store(RedisConfig(url=SecretStr(sys.argv[1])), LAYOUT_HASH, 4)
described, user = blank(ITEM_ATTRIBUTES, len(items)), blank(USER, 1)
described["text"], user["recent"]["item"][0][0], user["step"] = items, items[0], 1
store.put(store_keys(store, ITEM_KIND, items), to_bytes(described))
store.put(store_keys(store, USER_STATE, users), to_bytes(user))
vectors = np.ones((len(items), predictor.vector_width), VECTOR_DTYPE)
store.put(vector_keys(store, "words", items), [vector.tobytes() for vector in vectors])

warm(predictor)
known = compiled_kinds()
for encoder in ("", "words"):
    asking = Asking(store, Reader(store))
    for count in (1, 2, 9):
        asked = asking.observe(encoder, users.repeat(count), items[:count], np.full(count, 9))
        assert (asked[2].vectors is not None) == (encoder == "words")
        predictor.predict(*asked)
print(*(name for name, _ in compiled_kinds() - known))
"""


def test_no_request_waits_for_loops_to_compile_once_a_predictor_is_warm(store: str) -> None:
    """Nor one for a single item."""
    command = [sys.executable, "-c", AFTER_WARMTH, store]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == []
