"""Metrics against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest

from trainer.metrics import calibration, class_scores, evaluate, paired, scores, text_scores


def test_scores_by_hand() -> None:
    found = scores(np.array([1.0, 5.0]), np.array([2.0, 2.0]))
    assert found.rows == 2
    assert found.mse == pytest.approx((1 + 9) / 2)
    assert found.rmse == pytest.approx(5**0.5)
    assert found.mae == pytest.approx(2)


def test_scores_of_no_rows_are_unknown() -> None:
    found = scores(np.empty(0), np.empty(0))
    assert found.rows == 0
    assert np.isnan(found.rmse)


def test_models_are_compared_on_the_same_rows_by_history_and_clipped() -> None:
    rating = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    history = np.array([0.0, 1.0, 2.0, 9.0, 10.0])
    found = evaluate(rating, history, {"ones": np.full(5, -3.0), "exact": rating})
    assert found["ones"].all.mse == pytest.approx((0 + 1 + 4 + 9 + 16) / 5)
    by_bucket = {name: bucket.rows for name, bucket in found["ones"].buckets.items()}
    assert by_bucket == {"0": 1, "1-2": 2, "3-9": 1, "10+": 1}
    assert found["ones"].buckets["1-2"].mse == pytest.approx((1 + 4) / 2)
    assert found["exact"].all.rmse == 0
    with pytest.raises(ValueError, match="short"):
        evaluate(rating, history, {"short": np.ones(3)})


def test_paired_difference_has_the_sign_of_the_gain_and_repeats() -> None:
    rating = np.tile([1.0, 5.0], 100)
    better = np.tile([1.5, 4.5], 100)
    worse = np.tile([2.0, 4.0], 100)
    options: Any = {"confidence": 0.95, "resamples": 200, "seed": 1}
    gap = paired(rating, better, worse, **options)
    assert gap.mean == pytest.approx(0.25 - 1)
    assert gap.low == pytest.approx(-0.75)  # every row gains the same
    assert gap.high == pytest.approx(-0.75)
    assert gap == paired(rating, better, worse, **options)


def test_a_distribution_that_says_what_happens_has_no_calibration_error() -> None:
    rating = np.array([1.0, 5.0, 5.0, 1.0])
    half = np.tile([0.5, 0, 0, 0, 0.5], (4, 1))
    found = calibration(rating, half, np.full(4, 1.0), np.full(4, 5.0))
    assert found.ece == pytest.approx(0)
    assert found.coverage == 1
    assert found.width == 4
    assert found.log_loss == pytest.approx(np.log(2))
    assert found.bins == [(0.5, 0.5, 16)]


def test_a_distribution_that_is_sure_and_wrong_has_the_largest_calibration_error() -> None:
    sure = np.tile([0.0, 0, 0, 0, 1], (3, 1))
    found = calibration(np.ones(3), sure, np.full(3, 4.0), np.full(3, 5.0))
    assert found.ece == pytest.approx(1)
    assert found.coverage == 0


def test_text_scores_use_the_expected_stars_and_the_likeliest() -> None:
    distribution = np.array([[0.0, 0, 0, 0.5, 0.5], [1.0, 0, 0, 0, 0]])
    found = text_scores(np.array([4.0, 2.0]), distribution)
    assert found.accuracy == 0.5
    assert found.rmse == pytest.approx(((0.5**2 + 1) / 2) ** 0.5)
    assert found.mae == pytest.approx(0.75)


def test_macro_f1_counts_every_star_that_occurs_alike() -> None:
    rating = np.array([1.0, 1.0, 1.0, 5.0])
    found = class_scores(rating, rating, np.array([1, 1, 2, 5]))
    # One star: 2 hits of 2 claimed and 3 true; five: 1 of 1 and 1.
    assert found.macro_f1 == pytest.approx((2 * 2 / (2 + 3) + 1) / 2)
    assert found.accuracy == 0.75
    assert found.off_by_one == 1
    assert class_scores(np.array([1.0]), np.array([9.0]), np.array([5])).rmse == 4  # clipped
    assert np.isnan(class_scores(np.empty(0), np.empty(0), np.empty(0, np.int64)).macro_f1)
