"""Alarms: what would let a model know the answer before it is asked.

Each names the rows, since a figure measured beside a leak is worth nothing. Test texts that repeat
older ones are no alarm: `evaluate_texts.texts_of` leaves them out and names them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import features
from model.events import DAY_MS
from model.ids import hash_ids
from trainer.data import Log
from trainer.metrics import Floats

_TOLD = 0.98  # share of a rating's variance that one feature may explain
_BINS = 200  # into which a feature is cut to see what it explains
_LEAST_ROWS = 200  # fewer cannot tell chance from a leak
_NAMED = 10


@dataclass(frozen=True)
class Leak:
    """One kind of leak, how many rows it touches, and which, for example."""

    kind: str
    rows: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        named = f", as {', '.join(self.examples)}" if self.examples else ""
        return f"{self.kind}: {self.rows} rows{named}"


def telling_features(
    rows: NDArray[np.float32], rating: Floats, time: NDArray[np.int64]
) -> list[Leak]:
    """Features (n, F) that say the rating (n) itself; `time` (n) is in milliseconds.

    What a feature explains is the share of the rating's variance that its bins tell, so a leak need
    not be linear.
    """
    found: list[Leak] = []
    days, day = np.unique(time // DAY_MS, return_inverse=True)
    if len(days) == 1:
        day = np.arange(len(rows))
    for column, feature in enumerate(features.FEATURES):
        values = rows[:, column]
        known = ~np.isnan(values)
        if known.sum() < _LEAST_ROWS:
            continue
        edges = np.unique(np.quantile(values[known], np.linspace(0, 1, _BINS + 1)))
        bins = np.searchsorted(edges, values)  # what is missing comes last
        # A feature that is known of one rating alone says it by being known.
        asked = known if rating[known].var() else np.ones(len(rating), bool)
        if _explained(bins[asked], day[asked], rating[asked]) > _TOLD:
            found.append(Leak(f"feature {feature.name} says the rating", int(known.sum()), ()))
    return found


def _explained(bins: NDArray[np.intp], day: NDArray[np.intp], rating: Floats) -> float:
    """Share of the variance of ratings (n) that those of other days in each one's bin explain.

    Rows of one day do not tell of each other: where a user gives ten items one star on a day, the
    mean of all stars tells that day from others, and would seem to say the rating.
    """
    _, own = np.unique(bins * (day.max() + 1) + day, return_inverse=True)

    def of_others(column: Floats) -> NDArray[Any]:
        return np.bincount(bins, column)[bins] - np.bincount(own, column)[own]

    counts = of_others(np.ones(len(rating)))
    told = np.where(counts > 0, of_others(rating) / np.maximum(counts, 1), rating.mean())
    spread = float(rating.var())
    return 1 - float(((rating - told) ** 2).mean()) / spread if spread else 0.0


def known_later(log: Log) -> list[Leak]:
    """Items whose description is dated after an event with them that already sees it."""
    events = log.events
    order = np.argsort(events["item"], kind="stable")
    items = events["item"][order]
    early: list[str] = []
    hashes = hash_ids([item.item_id for _, item in log.items])
    begins = np.searchsorted(items, hashes)
    ends = np.searchsorted(items, hashes, "right")
    for (count, item), begin, end in zip(log.items, begins, ends, strict=True):
        rows = order[begin:end]
        said = int(item.event_time.timestamp() * 1_000)
        if (events["time"][rows[rows >= count]] < said).any():
            early.append(item.item_id)
    kind = "an item's description is dated later than events that see it"
    return [Leak(kind, len(early), tuple(early[:_NAMED]))] if early else []
