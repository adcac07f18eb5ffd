"""From predictions to what records say of them."""

import numpy as np
from numpy.typing import NDArray

from model.ladder import TIERS
from model.predict import Predictions
from schemas.codec import Column

_TIERS = [f'"{tier}"'.encode() for tier in TIERS]  # as JSON


def prediction_columns(predictions: Predictions) -> dict[str, Column]:
    """What a prediction record says of the prediction, n of each, for `encode_columns`."""
    return {
        "rating": rounded(predictions.rating),
        "distribution": rounded(predictions.distribution),
        "interval": rounded(np.stack([predictions.low, predictions.high], axis=1)),
        "tier": list(map(_TIERS.__getitem__, predictions.tier.tolist())),
        "model_version": predictions.version,
    }


def rounded(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Four decimals: more would only be bytes on the wire."""
    return np.round(values.astype(np.float64), 4)
