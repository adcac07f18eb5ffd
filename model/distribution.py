"""Distributions over 1 to 5 stars with a given mean.

The exponential tilt of a distribution p is q_k ∝ p_k · exp(θ·k); its mean rises with θ, so for any
mean inside (1, 5) there is one θ. Among all distributions with that mean it is the one nearest to
p in relative entropy (Csiszár 1975, "I-divergence geometry").
"""

import torch
from torch import Tensor

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
    theta = _solve(logits.detach().double(), mean.detach().double()).to(logits.dtype)
    probability = torch.softmax(logits + theta[:, None] * stars, -1)
    reached = (probability * stars).sum(-1)
    variance = (probability * (stars - reached[:, None]) ** 2).sum(-1).detach()
    gap = reached - mean
    theta = theta - (gap - gap.detach()) / variance
    return torch.log_softmax(logits + theta[:, None] * stars, -1)


@torch.no_grad()
def _solve(logits: Tensor, mean: Tensor) -> Tensor:
    """θ (n,) by Newton's method on the log odds of the mean, which are nearly linear in θ.

    A step that leaves the bracket, or follows one that did not halve the error, becomes a bisection
    (as `rtsafe` of Numerical Recipes). A row that has settled is left alone, so its result does not
    depend on the other rows.
    """
    stars = torch.arange(1, 6, dtype=logits.dtype, device=logits.device)
    target = torch.log((mean - 1) / (5 - mean))
    theta = torch.zeros_like(mean)
    low = torch.full_like(mean, -_LARGEST_TILT)
    high = torch.full_like(mean, _LARGEST_TILT)
    last = torch.full_like(mean, torch.inf)
    for _ in range(_MOST_STEPS):
        probability = torch.softmax(logits + theta[:, None] * stars, -1)
        above_one = (probability * (stars - 1)).sum(-1)
        below_five = (probability * (5 - stars)).sum(-1)
        error = torch.log(above_one / below_five) - target
        settled = error.abs() < _SETTLED
        if bool(settled.all()):
            break
        low = torch.where(error < 0, theta, low)
        high = torch.where(error > 0, theta, high)
        centred = stars - 1 - above_one[:, None]
        variance = (probability * centred * centred).sum(-1)
        step = theta - error * above_one * below_five / (4 * variance)
        newton = (step > low) & (step < high) & (error.abs() < last / 2)
        theta = torch.where(settled, theta, torch.where(newton, step, (low + high) / 2))
        last = error.abs()
    return theta


def mean_and_deviation(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n,) in stars of distributions (n, 5)."""
    stars = torch.arange(1, 6, dtype=probability.dtype, device=probability.device)
    mean = (probability * stars).sum(-1)
    variance = (probability * (stars - mean[:, None]) ** 2).sum(-1)
    return mean, variance.sqrt()
