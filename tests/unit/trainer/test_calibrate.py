"""Corrections that are fitted undo what is wrong with outputs."""

import numpy as np
import pytest

from model.calibration import calibrate
from trainer.calibrate import COVERAGE, fit_calibration


def test_intervals_hold_as_many_ratings_as_they_should() -> None:
    random = np.random.default_rng(2)
    centre = random.uniform(2.5, 3.5, 4_000)
    rating = np.clip(centre + random.normal(0, 0.5, 4_000), 1, 5)
    logits = np.zeros((4_000, 5))
    found = fit_calibration(centre[:2_000], logits[:2_000], rating[:2_000])
    predicted, shares, low, high = calibrate(centre[2_000:], logits[2_000:], found)
    held = np.mean((rating[2_000:] >= low) & (rating[2_000:] <= high))
    assert held == pytest.approx(COVERAGE, abs=0.03)
    assert predicted == pytest.approx(centre[2_000:], abs=1e-4)
    assert shares.sum(1) == pytest.approx(1, abs=1e-5)


def test_intervals_hold_as_many_with_distributions_that_were_too_sure() -> None:
    random = np.random.default_rng(2)
    centre = random.uniform(2.5, 3.5, 4_000)
    rating = np.clip(centre + random.normal(0, 0.9, 4_000), 1, 5)
    logits = -2.0 * (np.arange(1, 6) - centre[:, None]) ** 2
    found = fit_calibration(centre[:2_000], logits[:2_000], rating[:2_000])
    assert found.temperature > 2
    _, _, low, high = calibrate(centre[2_000:], logits[2_000:], found)
    held = np.mean((rating[2_000:] >= low) & (rating[2_000:] <= high))
    assert held == pytest.approx(COVERAGE, abs=0.03)


def test_an_interval_of_few_rows_is_as_wide_as_the_largest_error() -> None:
    """Of all stars alike the deviation is √2; of four scores the quantile of 0.8 is the fourth."""
    found = fit_calibration(np.full(4, 3.0), np.zeros((4, 5)), np.array([3.0, 3.5, 4.0, 5.0]))
    assert found.interval == pytest.approx(2 / 2**0.5, rel=1e-4)


def test_the_temperature_undoes_logits_that_are_too_sure() -> None:
    random = np.random.default_rng(3)
    truth = np.array([0.1, 0.1, 0.1, 0.3, 0.4])
    rating = random.choice(np.arange(1.0, 6.0), 3_000, p=truth)
    logits = np.tile(2.0 * np.log(truth), (3_000, 1))
    middle = np.full(3_000, float(truth @ np.arange(1, 6)))
    found = fit_calibration(middle, logits, rating)
    assert found.temperature == pytest.approx(2.0, rel=0.25)
