"""From predictions to what records say of them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.ladder import TIERS
from model.predict import Predictions


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
