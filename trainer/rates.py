"""How the learning rate of a fit rises and falls from step to step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trainer.config import Fall


def rate(step: int, steps: int, warm_up: float, fall: Fall) -> float:
    """Share of the highest rate at a step of so many.

    It rises linearly over a share `warm_up` of the steps, then falls to zero at their end:
    linearly, as half a cosine, or not at all.
    """
    rising = max(int(steps * warm_up), 1)
    if step < rising:
        return (step + 1) / rising
    left = max((steps - step) / max(steps - rising, 1), 0.0)
    if fall == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left if fall == "linear" else 1.0


def schedule(optimizer: Optimizer, steps: int, warm_up: float, fall: Fall) -> LambdaLR:
    """What sets an optimizer's rates; its `step` follows each step of the optimizer."""
    return LambdaLR(optimizer, lambda step: rate(step, steps, warm_up, fall))
