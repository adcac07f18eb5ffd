"""A small generated shop, for the tests of what predicts from its events."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher
from numpy.typing import NDArray

from model.events import EVENT, PURCHASE, REVIEW, VIEW, Rows, blank
from model.lookups import Lookups, table, vectors_of
from model.replay import History, Observation
from model.state import ITEM_ATTRIBUTES

WIDTH = 16  # of the shop's vectors


@dataclass(frozen=True)
class Observed:
    """Events, and what predictions for them are made from."""

    events: Rows
    observation: Observation
    lookups: Lookups

    def take(self, rows: NDArray[np.intp]) -> "Observed":
        """The same of these rows."""
        fields = {name: column[rows] for name, column in vars(self.observation).items()}
        return Observed(self.events[rows], replace(self.observation, **fields), self.lookups)


def observe(count: int = 300) -> Observed:
    """The last events of 40 users and 60 items; some items lack vectors, some attributes."""
    random = np.random.default_rng(1)
    before = 500
    users = random.integers(1, 2**63, 40).astype(np.uint64)
    items = np.unique(random.integers(1, 2**63, 60).astype(np.uint64))
    events = blank(EVENT, before + count)
    events["user"] = random.choice(users, len(events))
    events["item"] = random.choice(items, len(events))
    events["event_id"] = np.arange(1, len(events) + 1)
    events["time"] = 1_600_000_000_000 + np.cumsum(random.integers(0, 10**7, len(events)))
    events["action"] = random.choice([REVIEW, REVIEW, VIEW, PURCHASE], len(events))
    stars = random.integers(1, 6, len(events))
    events["rating"] = np.where(events["action"] == REVIEW, stars, np.nan)
    described = items[:50]
    attributes = blank(ITEM_ATTRIBUTES, len(described))
    attributes["version"] = 1
    attributes["text"] = described
    attributes["brand"] = random.integers(1, 9, len(described))
    attributes["category"] = random.integers(1, 9, (len(described), 4))
    vectors = random.normal(size=(40, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    history = History(
        item_attributes=table(described, attributes),
        vectors=vectors_of(described[:40], vectors),
        batch_events=before,
    )
    *_, last = history.run(events)
    return Observed(events[last.rows], last.result.observation, last.lookups)


def compiled_kinds() -> set[tuple[str, Any]]:
    """Loops of the model that are compiled, and the kinds of arrays each is compiled for."""
    modules = [module for name, module in sys.modules.items() if name.startswith("model.")]
    found: list[Any] = [each for module in modules for each in vars(module).values()]
    loops = {each for each in found if isinstance(each, Dispatcher)}
    return {(loop.py_func.__name__, kind) for loop in loops for kind in loop.signatures}
