"""Ridge regression by hand, and how much it is shrunk."""

import math

import numpy as np
import pytest

from trainer import ridge

ENDS = [200, 300, 400]


def test_weights_by_hand() -> None:
    # About their means x is -1, 0, 1 and y is -3, 0, 3: x y sums to 6, x x to 2.
    design, target = np.array([[0.0], [1.0], [2.0]]), np.array([1.0, 4.0, 7.0])
    weights, intercept = ridge.solve(design, target, penalty=1.0)
    assert weights.tolist() == pytest.approx([6 / (2 + 1)])
    assert intercept == pytest.approx(4 - 2)  # it passes through the means, whatever the penalty
    assert ridge.solve(design, target, math.inf)[0].tolist() == [0.0]
    assert ridge.solve(design, target, math.inf)[1] == 0.0


def test_what_holds_good_ahead_is_shrunk_least_and_noise_to_nothing() -> None:
    random = np.random.default_rng(1)
    design = random.normal(size=(400, 3))
    assert ridge.choose(design, design @ [1.0, -2.0, 0.5], ENDS) == 100
    assert ridge.choose(design, random.normal(size=400), ENDS) == math.inf
