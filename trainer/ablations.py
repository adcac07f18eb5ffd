"""What each part of the rating network is worth: taken away in turn, fitted anew.

An input that is gone says nothing in training and in the test alike; a part of the model is left
out, or one that the defaults leave out is put in. What the change costs is the squared error with
it less that of the network as it is, on the same test rows, with a paired bootstrap interval: above
zero, the network is better as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.progress import Progress

from model.features import FEATURES, INDEX, Group
from model.network import Inputs
from trainer.baselines import running_bias
from trainer.config import FitConfig, TrainerConfig
from trainer.gate import difference
from trainer.metrics import Difference, Floats, rmse
from trainer.models import predict
from trainer.prepare import Prepared
from trainer.train import fit_network, refit_network

KEPT = "bias"  # the network corrects it, so it always stays

Without = Callable[[Inputs], Inputs]


@dataclass(frozen=True)
class Ablated:
    """The network without one part, or with one more."""

    rmse: float
    cost: Difference | None  # squared error less that of the whole; none for the whole


def _features(group: Group) -> Without:
    columns = [at for at, each in enumerate(FEATURES) if each.group == group and each.name != KEPT]

    def without(inputs: Inputs) -> Inputs:
        features = inputs.features.copy()
        features[:, columns] = 0
        return replace(inputs, features=features)

    return without


def _vectors(inputs: Inputs) -> Inputs:
    return inputs.without_vectors(inputs.vectors.shape[1])


def _newcomers(inputs: Inputs) -> Inputs:
    features = inputs.features.copy()
    features[:, INDEX[KEPT]] = running_bias(features)
    return replace(inputs, features=features)


INPUTS: Mapping[str, Without] = {
    "user features": _features("user"),
    "item features": _features("item"),
    "behavior features": _features("behavior"),
    "cross features": _features("cross"),
    "attributes": _features("attributes"),
    "text features": _features("text"),
    "text vectors": _vectors,
    "newcomers' level": _newcomers,
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "taste of recent ratings": {"sizes": {"factors": 0}},
    "boosted trees": {"trees": False},
    "+ hashed ids": {"sizes": {"identity": 8}},
    "+ attention to recent items": {"sizes": {"identity": 8, "heads": 2}},  # ids tell items apart
}
"""Changes of `fit`."""

PARTS = (*INPUTS, *SETTINGS)
"""What is taken away in turn, or with a plus put in."""


def ablate(
    data: Prepared, config: TrainerConfig, part: str | None, progress: Progress | None = None
) -> Floats:
    """Predicted ratings of the test rows (n) by a network with a part changed, or as it is."""
    if part is not None and part in SETTINGS:
        config = changed(config, SETTINGS[part])
    elif part is not None:
        examples = data.examples
        data = replace(data, examples=replace(examples, inputs=INPUTS[part](examples.inputs)))
    fitted, corrected = fit_network(data, config, progress)
    known = np.concatenate([data.split.train, data.split.validation])
    network = refit_network(fitted, data, known, config, progress)
    return predict(network, corrected, data.examples.take(data.split.test)).rating


def changed(config: TrainerConfig, changes: Mapping[str, Any]) -> TrainerConfig:
    """The settings with these changes of `fit` and its sizes."""
    fit = config.fit.model_dump()
    sizes = {**fit["sizes"], **changes.get("sizes", {})}
    return config.model_copy(
        update={"fit": FitConfig.model_validate({**fit, **changes, "sizes": sizes})}
    )


def compare(
    rating: Floats, whole: Floats, without: Mapping[str, Floats], config: TrainerConfig
) -> dict[str, Ablated]:
    """Each part beside the whole; ratings and predictions (n)."""
    found = {"nothing": Ablated(rmse(rating, whole), None)}
    for name, predicted in without.items():
        cost = difference(rating, predicted, whole, config.gate, config.seed)
        found[name] = Ablated(rmse(rating, predicted), cost)
    return found
