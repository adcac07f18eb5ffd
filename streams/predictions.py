"""From predictions to what records say of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.canary import Part, in_order
from model.ladder import TIERS
from schemas.codec import Column

_TIERS = [f'"{tier}"'.encode() for tier in TIERS]  # as JSON


def prediction_columns(parts: Sequence[Part]) -> dict[str, Column]:
    """What prediction records say of a batch's predictions, n of each, for `encode_columns`."""
    intervals = in_order(parts, lambda each: np.stack([each.low, each.high], axis=1))
    tiers = in_order(parts, lambda each: each.tier)
    return {
        "rating": rounded(in_order(parts, lambda each: each.rating)),
        "distribution": rounded(in_order(parts, lambda each: each.distribution)),
        "interval": rounded(intervals),
        "tier": list(map(_TIERS.__getitem__, tiers.tolist())),
        "model_version": _versions(parts),
    }


def rounded(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Four decimals: more would only be bytes on the wire."""
    return np.round(values.astype(np.float64), 4)


def _versions(parts: Sequence[Part]) -> Column:
    """Which version answered each row; one string where one answered all."""
    first, *others = (part.predictions.version for part in parts)
    if not others:
        return first
    return in_order(parts, lambda each: np.full(len(each.rating), each.version, object)).tolist()
