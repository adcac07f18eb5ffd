"""A version on trial beside the stable one: whose events it predicts, and what both say of a batch.

A user belongs to the canary by a hash of the user's id: so in every worker, in each batch and in
requests alike. The version is hashed in: another canary has other users. A greater share keeps the
users of a smaller one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from model.events import Rows
from model.exceptions import TrialError
from model.ids import Hashes, hash_ids
from model.lookups import Lookups
from model.predict import Predictions, Predictor
from model.replay import Observation
from schemas.records import Role

T = TypeVar("T")

_EVERYBODY = 2.0**53


@dataclass(frozen=True)
class Canary:
    """A predictor on trial."""

    predictor: Predictor
    share: float  # of users whom it answers, 0 to 1; 0: a shadow, which answers nobody
    since: datetime | None = None  # when its trial began


@dataclass(frozen=True)
class Part:
    """What one version says of some rows of a batch."""

    role: Role
    rows: NDArray[np.intp] | slice
    predictions: Predictions

    def take(self, values: list[T]) -> list[T]:
        """Its rows of a list that has one value for each row of the batch."""
        if isinstance(self.rows, slice):
            return values[self.rows]
        return list(map(values.__getitem__, self.rows.tolist()))


def is_chosen(users: Hashes, version: str, share: float) -> NDArray[np.bool_]:
    """Which of n hashed users belong to the share (0 to 1) of a version, (n,)."""
    mixed = users ^ hash_ids([version])
    # Neighbouring ids must not fall together, and ids carry their Kafka partition in their low
    # half: so all bits are mixed (the finalizer of splitmix64).
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) < share * _EVERYBODY


def predict(
    stable: Predictor,
    canary: Canary | None,
    events: Rows,
    observation: Observation,
    lookups: Lookups,
) -> list[Part]:
    """Predictions for EVENT rows (n): of the stable version, and the canary's of its users.

    Raises TrialError when the canary cannot predict them.
    """
    everything = slice(None)
    if canary is None or not canary.share:
        return [Part("stable", everything, stable.predict(events, observation, lookups))]
    its = is_chosen(events["user"], canary.predictor.version, canary.share)
    sides: list[tuple[Role, Predictor, NDArray[np.intp]]] = [
        ("stable", stable, np.flatnonzero(~its)),
        ("canary", canary.predictor, np.flatnonzero(its)),
    ]
    parts: list[Part] = []
    for role, predictor, rows in sides:
        if len(rows):
            asked = events.take(rows), observation.take(rows), lookups
            said = predictor.predict(*asked) if role == "stable" else attempt(predictor, *asked)
            parts.append(Part(role, rows, said))
    return parts or predict(stable, None, events, observation, lookups)


def attempt(
    predictor: Predictor, events: Rows, observation: Observation, lookups: Lookups
) -> Predictions:
    """What a version on trial says of EVENT rows (n).

    Raises TrialError whatever fails, also where it says what is no number.
    """
    try:
        said = predictor.predict(events, observation, lookups)
    except Exception as error:
        raise TrialError(f"{type(error).__name__}: {error}") from error
    if not said.finite:
        raise TrialError("it says what is no number")
    return said


def in_order(parts: Sequence[Part], column: Callable[[Predictions], NDArray[Any]]) -> NDArray[Any]:
    """A column of the predictions of a whole batch, (n, ...), in the order of its events."""
    values = [column(part.predictions) for part in parts]
    if len(parts) == 1:
        return values[0]
    joined = np.empty((sum(map(len, values)), *values[0].shape[1:]), values[0].dtype)
    for part, mine in zip(parts, values, strict=True):
        joined[part.rows] = mine
    return joined
