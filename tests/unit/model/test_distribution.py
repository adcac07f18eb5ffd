"""Distributions over stars with a given mean."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.distribution import HIGHEST, LOWEST, mean_and_deviation, tilt

logits = arrays(np.float64, (7, 5), elements=st.floats(-60, 60))
means = arrays(np.float64, 7, elements=st.floats(0, 6))


@given(logits, means)
def test_mean_is_the_wanted_one(logits: np.ndarray, means: np.ndarray) -> None:
    shares = tilt(torch.tensor(logits), torch.tensor(means)).exp()
    reached, deviation = mean_and_deviation(shares)
    np.testing.assert_allclose(reached, np.clip(means, LOWEST, HIGHEST), atol=2e-6)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-12)
    assert (shares > 0).all()
    assert (deviation > 0).all()


@given(logits, means)
def test_single_precision_is_as_good_as_it_can_be(logits: np.ndarray, means: np.ndarray) -> None:
    shares = tilt(torch.tensor(logits).float(), torch.tensor(means).float()).exp()
    reached, _ = mean_and_deviation(shares)
    np.testing.assert_allclose(reached, np.clip(means, LOWEST, HIGHEST), atol=1e-5)


@given(logits, means, st.integers(0, 6))
def test_a_row_does_not_depend_on_the_others(
    logits: np.ndarray, means: np.ndarray, row: int
) -> None:
    whole = tilt(torch.tensor(logits), torch.tensor(means))
    alone = tilt(torch.tensor(logits[row : row + 1]), torch.tensor(means[row : row + 1]))
    assert torch.equal(whole[row], alone[0])


def test_a_distribution_with_the_wanted_mean_stays() -> None:
    shares = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]], dtype=torch.float64)
    mean, _ = mean_and_deviation(shares)
    np.testing.assert_allclose(tilt(shares.log(), mean).exp(), shares, atol=1e-6)


def test_the_odds_of_neighbours_change_by_one_factor() -> None:
    logits = torch.tensor([[0.3, -1.0, 0.5, 2.0, -0.2]], dtype=torch.float64)
    shift = tilt(logits, torch.tensor([1.7], dtype=torch.float64)) - logits
    steps = shift.diff()
    np.testing.assert_allclose(steps, steps[0, 0].expand(1, 4), atol=1e-9)


def test_derivatives_are_those_of_the_implicit_function() -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, dtype=torch.float64, generator=random).requires_grad_()
    means = torch.linspace(1.1, 4.9, 6, dtype=torch.float64).requires_grad_()
    # θ is solved to 1e-6, so differences are taken over a step that is wide against that.
    assert torch.autograd.gradcheck(tilt, (logits, means), eps=1e-3, atol=2e-3, rtol=1e-2)
