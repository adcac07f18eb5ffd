"""Corrections of what a network says, fitted on rows that it was not trained on."""

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from model import distribution

Reals = NDArray[np.float64]
Singles = NDArray[np.float32]

NORMAL_80 = 1.2816  # deviations around the mean that hold 80% of a normal distribution


class Calibration(BaseModel):
    """How means, distributions and intervals are corrected; the defaults correct nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    intercept: float = Field(default=0.0, description="of the rating, in stars")
    slope: float = Field(default=1.0, description="of the rating against the network's mean")
    temperature: float = Field(default=1.0, gt=0, description="of the logits")
    interval: float = Field(
        default=NORMAL_80,
        ge=0,
        description="half an 80% interval, in the distribution's standard deviations",
    )


def calibrate(
    mean: Reals, logits: Reals, calibration: Calibration
) -> tuple[Singles, Singles, Singles, Singles]:
    """Rating (n,), distribution (n, 5), low (n,) and high (n,) from a network's outputs.

    The rating is the mean of the distribution. Low and high are that many deviations from it: a
    conformal interval whose score is scaled by a measure of spread (Lei et al. 2018, section 5.2).
    """
    rating = torch.as_tensor(calibration.intercept + calibration.slope * mean)
    rating = rating.clamp(distribution.LOWEST, distribution.HIGHEST)
    shares = distribution.tilt(torch.as_tensor(logits / calibration.temperature), rating).exp()
    _, deviation = distribution.mean_and_deviation(shares)
    margin = calibration.interval * deviation
    low, high = (rating - margin).clamp(min=1), (rating + margin).clamp(max=5)
    return _single(rating), _single(shares), _single(low), _single(high)


def _single(tensor: torch.Tensor) -> Singles:
    return tensor.float().numpy()
