"""Every model that is compared, on the same rows: ours, and the baselines."""

from dataclasses import dataclass

import numpy as np

from model import ladder
from model.calibration import Calibration, calibrate
from model.features import INDEX
from model.network import FusedNetwork
from model.predict import raw_outputs
from trainer.baselines import fit_damped_bias, fit_lightgbm, predict_damped_bias
from trainer.config import TrainerConfig
from trainer.data import Examples
from trainer.gate import REFERENCE
from trainer.metrics import Floats
from trainer.prepare import of_width
from trainer.split import Split

_BLOCK = 8_192  # rows at a time, so that a long test fits in memory


@dataclass(frozen=True)
class Predicted:
    """Calibrated predictions of n rows."""

    rating: Floats  # (n)
    distribution: Floats  # (n, 5)
    low: Floats  # (n)
    high: Floats  # (n)


def outputs(network: FusedNetwork | None, examples: Examples) -> tuple[Floats, Floats]:
    """Means (n) and logits (n, 5) as they are served, not calibrated; None: the ladder."""
    if network is None:
        return ladder.outputs(examples.inputs.features)
    inputs = of_width(examples.inputs, network.config.vector)
    parts = [
        raw_outputs(network, inputs.take(slice(start, start + _BLOCK)))
        for start in range(0, len(inputs), _BLOCK)
    ]
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([log for _, log in parts])


def predict(
    network: FusedNetwork | None, calibration: Calibration, examples: Examples
) -> Predicted:
    """What a network with its calibration says of rows; None: the cold-start ladder."""
    rating, shares, low, high = calibrate(*outputs(network, examples), calibration)
    return Predicted(*(array.astype(np.float64) for array in (rating, shares, low, high)))


def baselines(
    examples: Examples, split: Split, asked: Examples, config: TrainerConfig
) -> dict[str, Floats]:
    """Predicted ratings (n) of the asked by each baseline.

    The running ones are features of each row, with newcomers' level in the bias: what is served
    without a model. The others are fitted on the train span, with validation to stop at for
    LightGBM.
    """
    inputs, rating, events = examples.inputs, examples.rating, examples.events
    train, validation = split.train, split.validation

    def global_mean() -> Floats:
        return np.full(len(asked), rating[train].mean())

    def bias_static() -> Floats:
        bias = fit_damped_bias(events["user"][train], events["item"][train], rating[train])
        return predict_damped_bias(bias, asked.events["user"], asked.events["item"])

    def feature(name: str) -> Floats:
        return asked.inputs.features[:, INDEX[name]].astype(np.float64)

    def lightgbm() -> Floats:
        booster = fit_lightgbm(
            (inputs.features[train], inputs.features[validation]),
            (rating[train], rating[validation]),
            seed=config.seed,
            threads=config.threads,
        )
        return np.asarray(booster.predict(asked.inputs.features), np.float64)

    return {
        "global": global_mean(),
        "global_running": feature("global_mean"),
        "bias": bias_static(),
        REFERENCE: feature("bias"),
        "lightgbm": lightgbm(),
    }
