"""From observations of several partitions to one prediction call, and on to records."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.events import opaque
from model.ladder import TIERS
from model.predict import Predictions
from model.replay import Observation


def select(observations: Sequence[Observation], rows: NDArray[np.intp]) -> Observation:
    """The rows, in order, by their position in all of several observations."""
    joined = {
        each.name: _joined([getattr(one, each.name) for one in observations])
        for each in fields(Observation)
    }
    if len(rows) == len(joined["features"]):
        return Observation(**joined)
    return Observation(**{name: column.take(rows, axis=0) for name, column in joined.items()})


def _joined(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len(columns) == 1:
        return columns[0]
    if columns[0].dtype.names:  # as bytes: field by field is slow
        return np.concatenate([opaque(column) for column in columns]).view(columns[0].dtype)
    return np.concatenate(columns)


def prediction_columns(predictions: Predictions) -> dict[str, list[Any]]:
    """What a prediction record says of the prediction, n of each, as plain values."""
    return {
        "rating": rounded(predictions.rating),
        "distribution": rounded(predictions.distribution),
        "interval": rounded(np.stack([predictions.low, predictions.high], axis=1)),
        "tier": [TIERS[tier] for tier in predictions.tier.tolist()],
        "model_version": [predictions.version] * len(predictions.rating),
    }


def rounded(values: NDArray[np.float32]) -> list[Any]:
    """Four decimals, as plain floats: more would only be bytes on the wire."""
    return np.round(values.astype(np.float64), 4).tolist()
