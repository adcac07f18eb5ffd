"""The fit of the fused network, and its calibration."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.calibration import calibrate
from model.features import INDEX
from model.network import default_config
from trainer.calibrate import COVERAGE, fit_calibration
from trainer.config import FitConfig
from trainer.data import Examples, from_file, replay
from trainer.fit import Fitted, fit, mean, refit

CPU = torch.device("cpu")
CONFIG = FitConfig.model_validate(
    {"epochs": 6, "batch_rows": 128, "learning_rate": 3e-3, "sizes": {"members": 2, "width": 16}}
)


@pytest.fixture(scope="module")
def examples(shop_file: Path) -> Examples:
    return replay(from_file(shop_file), None, "", 0, lambda done, total: None)


def run(examples: Examples, rating: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Fitted:
    rows = np.arange(len(examples))
    sizes = CONFIG.sizes.model_dump()
    return fit(
        default_config(vector=0, **sizes),
        examples.inputs,
        rating,
        rows[:500],
        rows[500:600],
        CONFIG,
        seed=1,
        device=CPU,
        on_epoch=lambda epoch, error: None,
    )


def rmse(predicted: object, rating: object) -> float:
    return float(np.sqrt(np.mean((np.asarray(predicted) - np.asarray(rating)) ** 2)))


def test_it_learns_what_the_bias_cannot_know_and_repeats(examples: Examples) -> None:
    fitted = run(examples, examples.rating)
    test = np.arange(600, len(examples))
    bias = examples.inputs.features[test, INDEX["bias"]]
    predicted = mean(fitted.network, examples.inputs, test)
    truth = examples.rating[test]
    assert rmse(predicted, truth) < 0.85 * rmse(bias, truth)
    again = run(examples, examples.rating)
    assert (mean(again.network, examples.inputs, test) == predicted).all()


def test_of_noise_it_learns_to_leave_the_bias_alone(examples: Examples) -> None:
    bias = examples.inputs.features[:, INDEX["bias"]].astype(np.float64)
    noise = np.random.default_rng(5).normal(0, 1, len(bias))
    fitted = run(examples, np.clip(bias + noise, 1, 5))
    rows = np.arange(600, len(examples))
    correction = mean(fitted.network, examples.inputs, rows) - bias[rows]
    assert np.abs(correction - correction.mean()).mean() < 0.1


def test_a_refit_uses_what_was_chosen(examples: Examples) -> None:
    fitted = run(examples, examples.rating)
    rows = np.arange(len(examples))
    epochs: list[int] = []
    network = refit(
        fitted,
        examples.inputs,
        examples.rating,
        rows,
        CONFIG,
        1,
        CPU,
        lambda epoch, error: epochs.append(epoch),
    )
    assert epochs == list(range(1, fitted.epochs + 1))
    assert rmse(mean(network, examples.inputs, rows), examples.rating) < rmse(
        examples.inputs.features[:, INDEX["bias"]], examples.rating
    )


def test_features_that_say_nothing_in_training_say_nothing_later(examples: Examples) -> None:
    network = run(examples, examples.rating).network
    column = INDEX["user_text_stars"]  # no text was read before this training
    assert np.isnan(examples.inputs.features[:, column]).all()
    assert network.feature_used[column] == 0
    later = examples.inputs.take(np.arange(20))
    before = mean(network, later, np.arange(20))
    later.features[:, column] = 1.0
    assert (mean(network, later, np.arange(20)) == before).all()


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


def test_the_temperature_undoes_logits_that_are_too_sure() -> None:
    random = np.random.default_rng(3)
    truth = np.array([0.1, 0.1, 0.1, 0.3, 0.4])
    rating = random.choice(np.arange(1.0, 6.0), 3_000, p=truth)
    logits = np.tile(2.0 * np.log(truth), (3_000, 1))
    middle = np.full(3_000, float(truth @ np.arange(1, 6)))
    found = fit_calibration(middle, logits, rating)
    assert found.temperature == pytest.approx(2.0, rel=0.25)
