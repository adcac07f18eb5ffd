"""The corrections of a network's outputs, fitted on rows that it was not trained on."""

import numpy as np
import torch

from model.calibration import Calibration, calibrate
from model.distribution import mean_and_deviation
from trainer.metrics import Floats, log_loss
from trainer.text import soft_labels

COVERAGE = 0.8  # of the intervals
_TEMPERATURES = np.geomspace(0.5, 3.0, 26)


def fit_calibration(mean: Floats, logits: Floats, rating: Floats) -> Calibration:
    """Temperature by the least log loss, interval by the conformal quantile.

    Args:
        mean: (n) the network's means.
        logits: (n, 5).
        rating: (n) true ratings.

    The mean stays as it is: the fit's first stage has chosen already how much to believe. The
    interval's score is |rating − mean| over the distribution's deviation (Lei et al. 2018,
    "Distribution-Free Predictive Inference for Regression", section 5.2).
    """
    labels = soft_labels(rating)
    losses = [
        log_loss(calibrate(mean, logits, Calibration(temperature=float(tried)))[1], labels)
        for tried in _TEMPERATURES
    ]
    temperature = float(_TEMPERATURES[int(np.argmin(losses))])
    unit = Calibration(temperature=temperature, interval=0.0)
    predicted, distribution, _, _ = calibrate(mean, logits, unit)
    _, deviation = mean_and_deviation(torch.from_numpy(distribution).double())
    scores = np.sort(np.abs(rating - predicted) / deviation.numpy())
    place = min(int(np.ceil((len(scores) + 1) * COVERAGE)), len(scores)) - 1
    return Calibration(temperature=temperature, interval=float(scores[place]))
