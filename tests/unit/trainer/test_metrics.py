"""Metrics against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest

from trainer.metrics import (
    by_rating,
    calibration,
    class_scores,
    evaluate,
    log_loss,
    paired,
    rmse,
    scores,
    shown_difference,
    text_scores,
)


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
    models = {"ones": np.full(5, -3.0), "fives": np.full(5, 9.0), "exact": rating}
    found = evaluate(rating, history, models)
    assert found["ones"].all.mse == pytest.approx((0 + 1 + 4 + 9 + 16) / 5)
    by_bucket = {name: bucket.rows for name, bucket in found["ones"].buckets.items()}
    assert by_bucket == {"0": 1, "1-2": 2, "3-9": 1, "10+": 1}
    assert found["ones"].buckets["1-2"].mse == pytest.approx((1 + 4) / 2)
    assert found["fives"].all.mse == found["ones"].all.mse
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


def test_a_paired_interval_is_as_wide_as_its_confidence_asks() -> None:
    rating = np.full(400, 3.0)
    model = np.tile([3.0, 4.0], 200)  # gaps of 0 and 1: a mean of 0.5, off by 0.025
    options: Any = {"resamples": 4000, "seed": 1}
    for confidence, deviations in ((0.9, 1.645), (0.5, 0.674)):
        gap = paired(rating, model, rating, confidence=confidence, **options)
        assert gap.mean == 0.5
        assert gap.low == pytest.approx(0.5 - deviations * 0.025, abs=0.003)
        assert gap.high == pytest.approx(0.5 + deviations * 0.025, abs=0.003)


def test_whole_users_are_drawn_since_their_ratings_go_together() -> None:
    rating = np.full(4, 3.0)
    model = np.array([4.0, 4.0, 4.0, 3.0])  # gaps of one user: 1, 1, 1; of the other: 0
    users = np.array([7, 7, 7, 9], np.uint64)
    options: Any = {"confidence": 0.4, "resamples": 4000, "seed": 1}
    gap = paired(rating, model, rating, users=users, **options)
    # The first twice, one of each, the second twice: 1, 3 of 4 rows, 0, by chances of 1, 2 and 1.
    assert (gap.low, gap.mean, gap.high) == (0.75, 0.75, 0.75)
    wide = paired(rating, model, rating, users=users, **options | {"confidence": 0.6})
    assert (wide.low, wide.mean, wide.high) == (0, 0.75, 1)
    alone = np.arange(4, dtype=np.uint64)
    assert paired(rating, model, rating, users=alone, **options) == paired(
        rating, model, rating, **options
    )


def test_one_user_or_row_alone_tells_no_interval() -> None:
    rating, model = np.full(3, 3.0), np.array([3.0, 4.0, 4.0])
    options: Any = {"confidence": 0.9, "resamples": 100, "seed": 1}
    gap = paired(rating, model, rating, users=np.full(3, 7, np.uint64), **options)
    assert gap.mean == pytest.approx(2 / 3)
    assert np.isnan([gap.low, gap.high]).all()
    gap = paired(rating[1:2], model[1:2], rating[1:2], **options)
    assert gap.mean == 1
    assert np.isnan([gap.low, gap.high]).all()


def test_of_one_user_alone_a_table_shows_no_interval() -> None:
    assert shown_difference({"low": np.nan, "high": np.nan}) == "–"
    assert shown_difference({"low": -0.5, "high": 0.0}) == "[-0.5000, +0.0000]"
    assert shown_difference({"mean": 0.25, "low": None, "high": None}) == "+0.2500 –"  # of JSON
    assert shown_difference(None) == ""


def test_what_a_model_predicts_past_the_stars_counts_as_the_last_one() -> None:
    rating = np.array([1.0, 5.0])
    assert rmse(rating, np.array([-9.0, 9.0])) == 0
    past = np.array([-9.0, 9.0])
    options: Any = {"confidence": 0.9, "resamples": 9, "seed": 1}
    assert paired(rating, past, rating, **options).mean == 0
    assert paired(rating, rating, past, **options).mean == 0


def test_rows_by_their_rounded_rating() -> None:
    masks = by_rating(np.array([0.2, 1.0, 2.4, 3.0, 3.6, 5.0, 5.9]))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()} == {
        "1 stars": [0, 1],
        "2 stars": [2],
        "3 stars": [3],
        "4 stars": [4],
        "5 stars": [5, 6],
    }


def test_log_loss_is_of_all_stars_that_the_label_holds() -> None:
    distribution = np.array([[0.5, 0.25, 0.25, 0, 0], [0, 0, 0, 0, 1.0]])
    labels = np.array([[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1]], np.float32)
    assert log_loss(distribution, labels) == pytest.approx(0.75 * np.log(2))
    never = np.array([[0, 0, 0, 0, 1]], np.float32)
    assert log_loss(np.array([[1.0, 0, 0, 0, 0]]), never) == pytest.approx(-np.log(1e-9))


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


def test_half_a_star_is_no_calibration_error() -> None:
    """A shop of nothing but 4.5, and a model that says so: half fours, half fives."""
    told = np.tile([0, 0, 0, 0.5, 0.5], (3, 1))
    found = calibration(np.full(3, 4.5), told, np.full(3, 4.0), np.full(3, 5.0))
    assert found.ece == pytest.approx(0)
    assert found.bins == [(0.5, 0.5, 3), (1.0, 1.0, 9)]
    assert found.log_loss == pytest.approx(np.log(2))


def test_what_happens_though_it_was_all_but_ruled_out_has_its_log_loss() -> None:
    seldom = np.array([[0.05, 0, 0, 0, 0.95], [0.0, 0, 0, 0, 1]])
    found = calibration(np.ones(2), seldom, np.ones(2), np.ones(2))
    assert found.log_loss == pytest.approx(-(np.log(0.05) + np.log(1e-9)) / 2)
    assert found.bins == [(0.975, 0.0, 8)]  # what is sure is of the last bin


def test_calibration_by_bins_of_what_was_claimed() -> None:
    """Of ratings 3 and 9 (five): P(stars ≥ 2..5) is 0.85, 0.65, 0.25, 0.05 and 1, 1, 1, 1."""
    distribution = np.array([[0.15, 0.2, 0.4, 0.2, 0.05], [0, 0, 0, 0, 1.0]])
    found = calibration(np.array([3.0, 9.0]), distribution, np.ones(2), np.array([2.0, 9.0]))
    claimed, happened, rows = zip(*found.bins, strict=True)
    assert claimed == pytest.approx((0.05, 0.25, 0.65, 0.85, 1))
    assert happened == (0, 0, 1, 1, 1)
    assert rows == (1, 1, 1, 1, 4)
    assert found.ece == pytest.approx((0.05 + 0.25 + 0.35 + 0.15) / 8)
    assert found.log_loss == pytest.approx(-np.log(0.4) / 2)
    assert (found.coverage, found.width) == (0.5, 4.5)


def test_text_scores_use_the_expected_stars_and_the_likeliest() -> None:
    distribution = np.array([[0.0, 0, 0, 0.5, 0.5], [1.0, 0, 0, 0, 0]])
    found = text_scores(np.array([4.0, 3.0]), distribution)
    assert found.accuracy == 0.5
    assert found.off_by_one == 0.5
    assert found.rmse == pytest.approx(((0.5**2 + 2**2) / 2) ** 0.5)
    assert found.mae == pytest.approx(1.25)


def test_macro_f1_counts_every_star_that_occurs_alike() -> None:
    rating = np.array([1.0, 1.0, 1.0, 5.0])
    found = class_scores(rating, rating, np.array([1, 1, 2, 5]))
    # One star: 2 hits of 2 claimed and 3 true; five: 1 of 1 and 1.
    assert found.macro_f1 == pytest.approx((2 * 2 / (2 + 3) + 1) / 2)
    assert found.accuracy == 0.75
    assert found.off_by_one == 1
    assert class_scores(np.array([1.0]), np.array([9.0]), np.array([5])).rmse == 4  # clipped
    assert np.isnan(class_scores(np.empty(0), np.empty(0), np.empty(0, np.int64)).macro_f1)
