"""The cold-start ladder: how much is known of a user and an item, and what to say with no model."""

import numpy as np
from numpy.typing import NDArray

from model.features import INDEX
from model.state import STARS

TIERS = ("global", "item_text", "item_state", "user_state", "full")
GLOBAL, ITEM_TEXT, ITEM_STATE, USER_STATE, FULL = range(len(TIERS))

VERSION = "ladder"  # stands as the model's version in predictions without a bundle

_SHARES = [INDEX[f"item_share_{stars}"] for stars in range(1, STARS + 1)]
_LEAST_SHARE = 1e-3  # of a star, so that no rating is impossible


def tiers(features: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The tier (a position in TIERS) of each row of features (n, F), shape (n,)."""

    def known(name: str) -> NDArray[np.bool_]:
        return features[:, INDEX[name]] > 0  # nan is not

    user, item = known("user_events"), known("item_events")
    text = known("text_known") | known("item_known")
    cases = [user & item, user, item, text]
    choices = [np.uint8(tier) for tier in (FULL, USER_STATE, ITEM_STATE, ITEM_TEXT)]
    return np.select(cases, choices, np.uint8(GLOBAL))


def outputs(features: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a network would say, from running means alone: mean (n,) and logits (n, 5).

    The mean is the running bias, the shape that of the item's ratings, damped to all ratings'.
    """
    shares = features[:, _SHARES].astype(np.float64)
    mean = features[:, INDEX["bias"]].astype(np.float64)
    return mean, np.log(np.maximum(shares, _LEAST_SHARE))
