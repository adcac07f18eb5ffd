"""Distributions over 1 to 5 stars with a given mean.

The exponential tilt of a distribution p is q_k ∝ p_k · exp(θ·k); its mean rises with θ, so for any
mean inside (1, 5) there is one θ. Among all distributions with that mean it is the one nearest to
p in relative entropy (Csiszár 1975, "I-divergence geometry").
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.compiled import compiled

LOWEST = 1.02  # ratings are predicted inside this range: at the edges θ would be infinite
HIGHEST = 4.98

_LARGEST_LOGIT = 5.0  # of a star against the mean logit: a star is at most e**10 times another
_LARGEST_TILT = 2 * _LARGEST_LOGIT + 6  # at this θ every mean in LOWEST..HIGHEST is passed
_MOST_STEPS = 60  # Newton's method takes about 6; bisection alone would settle in 30
_SETTLED = 1e-6  # largest error in log odds of the mean


def tilt(logits: Tensor, mean: Tensor) -> Tensor:
    """Log-probabilities (n, 5) of the tilt of softmax(`logits`) (n, 5) whose mean is `mean` (n,).

    `mean` is clipped to LOWEST..HIGHEST. Differentiable in both arguments: θ is solved without a
    graph, then a Newton step of length zero carries the derivatives of the implicit function.
    """
    logits = (logits - logits.mean(-1, keepdim=True)).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
    mean = mean.clamp(LOWEST, HIGHEST)
    stars = torch.arange(1, 6, dtype=logits.dtype, device=logits.device)
    solved = np.empty(mean.shape)
    _solve(_reals(logits), _reals(mean), solved)
    theta = torch.from_numpy(solved).to(logits)
    if not (logits.requires_grad or mean.requires_grad):
        return torch.log_softmax(logits + theta[:, None] * stars, -1)
    probability = torch.softmax(logits + theta[:, None] * stars, -1)
    reached = (probability * stars).sum(-1)
    variance = (probability * (stars - reached[:, None]) ** 2).sum(-1).detach()
    gap = reached - mean
    theta = theta - (gap - gap.detach()) / variance
    return torch.log_softmax(logits + theta[:, None] * stars, -1)


def _reals(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().cpu().contiguous().numpy()


@compiled
def _solve(logits: Any, mean: Any, theta: Any) -> None:
    """θ (n,) by Newton's method on the log odds of the mean, which are nearly linear in θ.

    A step that leaves the bracket, or follows one that did not halve the error, becomes a bisection
    (as `rtsafe` of Numerical Recipes).
    """
    count = logits.shape[1]
    shares = np.empty(count)
    for row in range(len(mean)):
        target = np.log((mean[row] - 1) / (count - mean[row]))
        low, high = -_LARGEST_TILT, _LARGEST_TILT
        last, found = np.inf, 0.0
        for _ in range(_MOST_STEPS):
            largest = -np.inf
            for star in range(count):
                shares[star] = logits[row, star] + found * (star + 1)
                largest = max(largest, shares[star])
            total = above = 0.0
            for star in range(count):
                shares[star] = np.exp(shares[star] - largest)
                total += shares[star]
                above += shares[star] * star
            above /= total  # the mean's distance from one star,
            below = count - 1 - above  # and from five
            error = np.log(above / below) - target
            if abs(error) < _SETTLED:
                break
            if error < 0:
                low = found
            else:
                high = found
            variance = 0.0
            for star in range(count):
                variance += shares[star] / total * (star - above) ** 2
            found -= error * above * below / ((count - 1) * variance)
            if not (low < found < high) or abs(error) >= last / 2:
                found = (low + high) / 2
            last = abs(error)
        theta[row] = found


def softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Distributions (n, 5) of logits (n, 5)."""
    return torch.softmax(torch.from_numpy(logits).double(), -1).numpy()


def mean_and_deviation(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n,) in stars of distributions (n, 5)."""
    stars = torch.arange(1, 6, dtype=probability.dtype, device=probability.device)
    mean = (probability * stars).sum(-1)
    variance = (probability * (stars - mean[:, None]) ** 2).sum(-1)
    return mean, variance.sqrt()
