"""Baselines against numbers worked out by hand."""

import numpy as np
import pytest

from trainer.baselines import fit_damped_bias, fit_lightgbm, predict_damped_bias


def ids(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def test_damped_bias_by_hand() -> None:
    bias = fit_damped_bias(ids(7, 7, 9), ids(1, 2, 1), np.array([5.0, 3.0, 4.0]))
    assert bias.mean == 4
    # Item 1: (1 + 0) / (2 + 5); item 2: -1 / (1 + 5). User 7: what is left of 1 and of -1.
    item_1, item_2 = 1 / 7, -1 / 6
    user_7 = ((1 - item_1) + (-1 - item_2)) / (2 + 5)
    user_9 = (0 - item_1) / (1 + 5)
    found = predict_damped_bias(bias, ids(7, 9, 7, 8), ids(1, 2, 99, 99))
    assert found == pytest.approx([4 + item_1 + user_7, 4 + item_2 + user_9, 4 + user_7, 4])


def test_boosted_trees_learn_a_step_and_repeat() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(600, 3)).astype(np.float32)
    rating = np.where(features[:, 1] > 0, 4.0, 2.0)

    def fit() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        booster = fit_lightgbm(
            (features[:400], features[400:500]), (rating[:400], rating[400:500]), seed=1, threads=1
        )
        return np.asarray(booster.predict(features[500:]))

    found = fit()
    assert np.abs(found - rating[500:]).mean() < 0.2
    assert (found == fit()).all()
