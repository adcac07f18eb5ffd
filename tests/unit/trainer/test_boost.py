"""Trees grown by LightGBM, served as tensors."""

import lightgbm
import numpy as np
import torch

from trainer import boost


def _rows(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    features = random.normal(size=(count, 5)).astype(np.float32)
    target = np.where(features[:, 1] > 0.2, 1.0, -0.5) + 0.1 * random.normal(size=count)
    features[random.random((count, 5)) < 0.2] = np.nan
    features[:, 4] = random.integers(0, 3, count)  # never missing
    return features, target


def test_tensors_say_what_lightgbm_says() -> None:
    features, target = _rows()
    how = boost.Grown(
        {"num_leaves": 8, "min_data_in_leaf": 10, "feature_fraction": 0.8, "lambda_l2": 1.0}, 20
    )
    trees = boost.grow(features, target, how, 1)
    assert trees is not None
    expected = np.zeros(len(target))
    for seed in (1, 2):
        booster = lightgbm.train(
            boost._parameters(how.settings, seed), lightgbm.Dataset(features, target), 20
        )
        expected += np.asarray(booster.predict(features)) / 2
    # A column that was never missing may be when served: LightGBM takes it for 0.
    strange = features.copy()
    strange[:, 4] = np.nan
    assert np.allclose(trees(torch.from_numpy(features)).numpy(), expected, atol=1e-5)
    zero = strange.copy()
    zero[:, 4] = 0
    assert torch.equal(trees(torch.from_numpy(strange)), trees(torch.from_numpy(zero)))


def test_what_is_there_is_found_ahead() -> None:
    features, target = _rows()
    how = boost.choose(features, target - target.mean(), [160, 220, 280, 340, 400], 1)
    assert how.rounds > 0


def test_noise_grows_no_trees() -> None:
    features, _ = _rows()
    ends = [160, 220, 280, 340, 400]
    noise = np.zeros(len(features))
    assert boost.choose(features, noise, ends, 1).rounds == 0
    assert boost.grow(features, noise, boost.Grown({}, 0), 1) is None


def test_a_threshold_stays_on_its_side() -> None:
    between = float(np.nextafter(np.float32(0.1), np.float32(1))) - 1e-12
    assert float(boost._single(between)) <= between
