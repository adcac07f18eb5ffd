"""Why a prediction is not the running bias: what each input adds, in stars.

Integrated gradients (Sundararajan et al. 2017) from a row of which nothing is known: average
features, unknown ids, no text, no recent items. Of trees, the steps along a row's paths from the
roots; of a taste also what is believed of it. The contributions of a row sum to what its prediction
is above the running bias, less the correction of the baseline and the roots.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.features import FEATURES, INDEX, NAMES
from model.network import FusedNetwork, Inputs, blocks, tensors
from model.taste import ADDED, COLUMNS, Taste

_STEPS = 32  # of the integral, by the midpoint rule; the sum is then exact to about 0.01 stars


@dataclass(frozen=True)
class Contribution:
    """What one input added to a prediction."""

    name: str  # a feature's or a taste column's name, or one of the other blocks of network.blocks
    meaning: str
    stars: float


_MEANINGS = {feature.name: feature.meaning for feature in FEATURES} | {
    "taste_bias": "the running bias and what is believed of the taste",
    "taste_level": "level and mood of the user, as far as they are believed",
    "taste_mood": "mood of the user's newest ratings",
    "item_level": "level of the item, damped as this shop's are",
    "taste": "what factors make of the user's ratings of other items",
    "taste_known": "remembered ratings of items with factors",
    "taste_strength": "how much the user's taste is told of",
    "item_strength": "how much the item's factors tell",
    "item text": "words of the item",
    "item": "this very item",
    "category": "categories of the item",
    "brand": "brand of the item",
    "user": "this very user",
    "recent items": "what the user met last",
}


def running_bias(stars: float) -> Contribution:
    """What all else is added to."""
    return Contribution("running bias", _MEANINGS["bias"], stars)


def explain(network: FusedNetwork, inputs: Inputs, top: int = 5) -> list[list[Contribution]]:
    """The `top` largest contributions to each row's correction, largest first."""
    rows = tensors(network.config, inputs, network.prior.device)
    total = np.zeros((len(inputs), len(_names(network))))
    with torch.no_grad():
        columns = network.columns(rows)
    for member in network.networks:
        with torch.no_grad():
            joined = member.join(network.standardise(columns), rows)
        gradient = torch.zeros_like(joined)
        for step in range(_STEPS):
            point = (joined * ((step + 0.5) / _STEPS)).requires_grad_()
            corrections: Tensor = member.head(point)[:, 0].sum()
            gradient += torch.autograd.grad(corrections, point)[0] / _STEPS
        added = joined * gradient * network.shrink / len(network.members)
        total += _by_input(network, added.detach().cpu().numpy())
    if network.taste is not None:
        said = columns[:, network.config.features :]
        bias = rows.features[:, INDEX["bias"]]
        total[:, network.config.features :][:, ADDED] += _moved(network.taste, said, bias)
    if network.trees is not None:
        with torch.no_grad():
            grown = network.trees.attributions(columns) * network.shrink
        total[:, : grown.shape[1]] += grown.cpu().numpy()
    names = _names(network)
    order: list[list[int]] = np.argsort(-np.abs(total), axis=1)[:, :top].tolist()
    return [
        [
            Contribution(names[column], _MEANINGS[names[column]], float(row[column]))
            for column in columns
        ]
        for row, columns in zip(total, order, strict=True)
    ]


def _moved(taste: Taste, said: Tensor, bias: Tensor) -> NDArray[np.float32]:
    """What each of `taste.ADDED` moves running biases (n) by, (n, 3); less where 1 or 5 is met."""
    added = said[:, ADDED] * taste.trust
    whole, moved = added.sum(1), said[:, 0] - bias
    share = torch.where(whole == 0, 0.0, moved / whole)
    return (added * share[:, None]).cpu().numpy()


def _names(network: FusedNetwork) -> list[str]:
    taste = COLUMNS if network.config.factors else ()
    return [*NAMES, *taste, *list(blocks(network.config))[2:]]


def _by_input(network: FusedNetwork, added: NDArray[np.float32]) -> NDArray[np.float32]:
    """Contributions (n, inputs): a feature's value and missing flag are one input."""
    widths = blocks(network.config)
    parts = np.split(added, np.cumsum(list(widths.values()))[:-1], axis=1)
    values, missing, *others = parts
    return np.column_stack([values + missing, *(part.sum(1) for part in others)])
