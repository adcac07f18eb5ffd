"""Item deltas as records of the topic `item-updates`, and back."""

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import orjson
from numpy.typing import NDArray

from model.events import ACTIONS, COUNTED, Rows
from model.ids import hash_ids
from model.state import ITEM_DELTA
from schemas.codec import encode_columns
from schemas.columns import milliseconds
from schemas.records import ItemUpdate

_ALIKE = (  # fields of one name in a record and in a row
    "rating_count",
    "rating_sum",
    "rating_square_sum",
    "price_count",
    "price_log_sum",
    "sessions",
)


def encode_updates(items: Sequence[str], deltas: Rows, sources: Sequence[bytes]) -> list[bytes]:
    """The wire form (`schemas.records.ItemUpdate`) of ITEM_DELTA rows of these items (n).

    `sources` (n): the span of input records that each comes from (`UpdateSource`), as JSON.
    """
    return encode_columns(
        {
            "item_id": items,
            "source": sources,
            "counts": _counts(deltas["actions"]),
            "rating_count": deltas["rating_count"],
            "rating_sum": deltas["rating_sum"],
            "rating_square_sum": deltas["rating_square_sum"],
            "rating_histogram": deltas["histogram"],
            "price_count": deltas["price_count"],
            "price_log_sum": deltas["price_log_sum"],
            "sessions": deltas["sessions"],
            "first_event_time": deltas["first_time"].astype("M8[ms]"),
            "last_event_time": deltas["last_time"].astype("M8[ms]"),
        }
    )


def _counts(actions: NDArray[np.int32]) -> list[bytes]:
    """JSON of the counts by name; most rows are one of a few."""
    rows, size = np.ascontiguousarray(actions).tobytes(), actions.shape[1] * actions.itemsize
    keys = [rows[at : at + size] for at in range(0, len(rows), size)]
    first = dict(zip(keys, range(len(keys)), strict=True))
    made = {key: orjson.dumps(_named(actions[row].tolist())) for key, row in first.items()}
    return [made[key] for key in keys]


def _named(counts: Sequence[int]) -> dict[str, int]:
    return {ACTIONS[code]: count for code, count in enumerate(counts) if count}


def from_updates(updates: Sequence[ItemUpdate]) -> Rows:
    """ITEM_DELTA rows of n updates; `source`, on which no state depends, is left 0."""
    deltas = np.zeros(len(updates), ITEM_DELTA)
    deltas["item"] = hash_ids([update.item_id for update in updates])
    deltas["actions"] = np.array(
        [[update.counts.get(name, 0) for name in ACTIONS[:COUNTED]] for update in updates], np.int32
    ).reshape(-1, COUNTED)
    deltas["histogram"] = np.array(
        [update.rating_histogram for update in updates], np.int32
    ).reshape(-1, 5)
    for name in _ALIKE:
        deltas[name] = list(map(attrgetter(name), updates))
    deltas["first_time"] = milliseconds([update.first_event_time for update in updates])
    deltas["last_time"] = milliseconds([update.last_event_time for update in updates])
    return deltas
