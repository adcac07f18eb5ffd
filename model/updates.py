"""Item deltas as records of the topic `item-updates`, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.events import ACTIONS, COUNTED, Rows, milliseconds
from model.ids import hash_ids
from model.state import ITEM_DELTA
from schemas.records import ItemUpdate


def to_updates(
    deltas: Rows, item_ids: Mapping[int, str], sources: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The wire form (`schemas.records.ItemUpdate`) of ITEM_DELTA rows, ready to be encoded.

    `item_ids`: the id of each hash; `sources`: by position in `state.SOURCES`, the span of input
    records (`schemas.records.UpdateSource`) that the batch took from that topic.
    """
    times = {
        name: np.datetime_as_string(deltas[name].astype("datetime64[ms]"), timezone="UTC")
        for name in ("first_time", "last_time")
    }
    columns = zip(
        deltas["item"].tolist(),
        deltas["source"].tolist(),
        deltas["actions"].tolist(),
        deltas["rating_count"].tolist(),
        deltas["rating_sum"].tolist(),
        deltas["rating_square_sum"].tolist(),
        deltas["histogram"].tolist(),
        deltas["price_count"].tolist(),
        deltas["price_log_sum"].tolist(),
        deltas["sessions"].tolist(),
        times["first_time"].tolist(),
        times["last_time"].tolist(),
        strict=True,
    )
    return [
        {
            "item_id": item_ids[item],
            "source": sources[source],
            "counts": {ACTIONS[code]: count for code, count in enumerate(actions) if count},
            "rating_count": ratings,
            "rating_sum": rating_sum,
            "rating_square_sum": square_sum,
            "rating_histogram": histogram,
            "price_count": prices,
            "price_log_sum": log_sum,
            "sessions": sessions,
            "first_event_time": first,
            "last_event_time": last,
        }
        for (
            item,
            source,
            actions,
            ratings,
            rating_sum,
            square_sum,
            histogram,
            prices,
            log_sum,
            sessions,
            first,
            last,
        ) in columns
    ]


def from_updates(updates: Sequence[ItemUpdate]) -> Rows:
    """ITEM_DELTA rows of n updates; `source`, on which no state depends, is left 0."""
    deltas = np.zeros(len(updates), ITEM_DELTA)
    deltas["item"] = hash_ids([update.item_id for update in updates])
    deltas["actions"] = np.array(
        [[update.counts.get(name, 0) for name in ACTIONS[:COUNTED]] for update in updates], np.int32
    ).reshape(-1, COUNTED)
    deltas["rating_count"] = [update.rating_count for update in updates]
    deltas["rating_sum"] = [update.rating_sum for update in updates]
    deltas["rating_square_sum"] = [update.rating_square_sum for update in updates]
    deltas["histogram"] = np.array(
        [update.rating_histogram for update in updates], np.int32
    ).reshape(-1, 5)
    deltas["price_count"] = [update.price_count for update in updates]
    deltas["price_log_sum"] = [update.price_log_sum for update in updates]
    deltas["sessions"] = [update.sessions for update in updates]
    deltas["first_time"] = milliseconds([update.first_event_time for update in updates])
    deltas["last_time"] = milliseconds([update.last_event_time for update in updates])
    return deltas
