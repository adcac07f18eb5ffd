"""Predictions, with a network and without one."""

import copy
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from model import ladder
from model.calibration import Calibration, calibrate
from model.distribution import HIGHEST, LOWEST
from model.features import INDEX, NAMES
from model.network import FusedNetwork, gather
from model.predict import (
    Predictions,
    Predictor,
    _outputs_on_device,  # pyright: ignore[reportPrivateUsage]
    predictor,
)
from model.state import OLDER, RATING_STEPS
from tests.unit.model.networks import default_config
from tests.unit.model.shop import WIDTH, Observed, observe

SHOP = observe()


def trained(members: int = 1) -> Predictor:
    """A predictor whose network corrects the bias by about a star."""
    torch.manual_seed(0)
    network = FusedNetwork(default_config(vector=WIDTH, members=members)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.07)
    calibration = Calibration(intercept=0.1, slope=0.95, temperature=1.3, interval=1.1)
    return Predictor("test", network, calibration, "encoder")


def untrained() -> Predictor:
    network = FusedNetwork(default_config(vector=WIDTH)).eval()
    return Predictor("test", network, Calibration(), None)


MODELS = {"trained": trained(), "members": trained(2), "untrained": untrained()}
MODELS["ladder"] = predictor(None)


def predict(model: Predictor, shop: Observed) -> Predictions:
    return model.predict(shop.events, shop.observation, shop.lookups)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_predictions_are_in_order(model: Predictor) -> None:
    found = predict(model, SHOP)
    np.testing.assert_allclose(found.distribution.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(found.distribution @ np.arange(1, 6), found.rating, atol=1e-5)
    assert (found.distribution > 0).all()
    assert (found.rating >= np.float32(LOWEST)).all()
    assert (found.rating <= np.float32(HIGHEST)).all()
    assert ((found.low >= 1) & (found.low < found.rating)).all()
    assert ((found.high <= 5) & (found.high > found.rating)).all()
    assert found.rating.std() > 0.05  # never a constant


@pytest.mark.parametrize("name", ["untrained", "ladder"])
def test_before_any_training_the_rating_is_the_bias(name: str) -> None:
    bias = SHOP.observation.features[:, INDEX["bias"]]
    np.testing.assert_array_equal(
        predict(MODELS[name], SHOP).rating, bias.clip(np.float32(LOWEST), np.float32(HIGHEST))
    )


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=50)
@given(rows=st.lists(st.integers(0, len(SHOP.events) - 1), min_size=1, max_size=150))
def test_same_alone_and_in_any_batch(model: str, rows: list[int]) -> None:
    whole, some, alone = (
        predict(MODELS[model], shop)
        for shop in (SHOP, SHOP.take(np.array(rows)), SHOP.take(np.array(rows[:1])))
    )
    for column in ("rating", "distribution", "low", "high", "tier"):
        expected = getattr(whole, column)[rows]
        np.testing.assert_array_equal(getattr(some, column), expected)
        np.testing.assert_array_equal(getattr(alone, column), expected[:1])


@pytest.mark.parametrize("threads", [2, 4, 5, 7, 16])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_same_with_any_number_of_threads(model: Predictor, threads: int) -> None:
    """Also in a batch so large that threads share what each row passes."""
    many = SHOP.take(np.arange(2_000) % len(SHOP.events))
    one = predict(model, many)
    torch.set_num_threads(threads)
    try:
        several = predict(model, many)
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(one.distribution, several.distribution)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_says_the_same() -> None:
    network = copy.deepcopy(trained().network)
    assert network is not None
    model = replace(trained(), network=network.to("cuda"))
    expected, found = predict(MODELS["trained"], SHOP), predict(model, SHOP)
    np.testing.assert_allclose(found.distribution, expected.distribution, atol=1e-4)
    alone = predict(model, SHOP.take(np.array([7])))
    np.testing.assert_array_equal(alone.distribution[0], found.distribution[7])


def test_a_row_says_the_same_on_a_device_whatever_its_neighbours_remember() -> None:
    """The first row remembers 64 ratings that are not recent any more, the others none."""
    torch.manual_seed(0)
    network = FusedNetwork(default_config(vector=WIDTH, heads=0, identity=0, factors=8)).eval()
    assert network.taste is not None
    nn.init.normal_(network.taste.factors)
    network.taste.trust.fill_(0.5)
    rows = gather(SHOP.events, SHOP.observation, SHOP.lookups, WIDTH)
    older, stars = rows.older.copy(), rows.older_ratings.copy()
    older[0], stars[0] = np.arange(1, OLDER + 1), 4 * RATING_STEPS
    rows = replace(rows, older=older, older_ratings=stars)
    whole, _ = _outputs_on_device(network, rows)
    for row in range(1, 20):
        alone, _ = _outputs_on_device(network, rows.take(slice(row, row + 1)))
        assert alone[0] == whole[row]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_no_rows(model: Predictor) -> None:
    found = predict(model, SHOP.take(np.zeros(0, np.intp)))
    assert found.rating.shape == (0,)
    assert found.distribution.shape == (0, 5)


def test_the_rating_that_came_is_not_read() -> None:
    told = SHOP.take(np.arange(len(SHOP.events)))
    told.events["rating"] = 6 - told.events["rating"]
    np.testing.assert_array_equal(
        predict(MODELS["trained"], told).rating, predict(MODELS["trained"], SHOP).rating
    )


def test_vectors_of_another_encoder_are_refused() -> None:
    network = FusedNetwork(default_config(vector=WIDTH + 1)).eval()
    with pytest.raises(ValueError, match="vectors of"):
        predict(Predictor("test", network, Calibration(), None), SHOP)


def test_a_batch_costs_little() -> None:
    """15 µs a row on a core is the aim; four times that fails even on a busy machine."""
    network = FusedNetwork(default_config(vector=WIDTH)).eval()
    model = Predictor("test", network, Calibration(), None)
    many = SHOP.take(np.arange(2000) % len(SHOP.events))
    predict(model, many)
    begin = time.thread_time()
    predict(model, many)
    assert (time.thread_time() - begin) / 2000 < 60e-6


@given(
    arrays(np.float64, 9, elements=st.floats(0, 6)),
    arrays(np.float64, (9, 5), elements=st.floats(-9, 9)),
    st.builds(
        Calibration,
        intercept=st.floats(-1, 1),
        slope=st.floats(0, 2),
        temperature=st.floats(0.1, 10),
        interval=st.floats(0, 5),
    ),
)
def test_calibration(means: np.ndarray, logits: np.ndarray, calibration: Calibration) -> None:
    rating, shares, low, high = calibrate(means, logits, calibration)
    wanted = (calibration.intercept + calibration.slope * means).clip(LOWEST, HIGHEST)
    np.testing.assert_allclose(rating, wanted, atol=1e-5)
    np.testing.assert_allclose(shares @ np.arange(1, 6), rating, atol=1e-5)
    assert ((low <= rating) & (rating <= high) & (low >= 1) & (high <= 5)).all()


def test_a_higher_temperature_spreads_the_distribution() -> None:
    mean, logits = np.array([3.0]), np.array([[0.0, 1, 4, 1, 0]])
    _, _, low, high = calibrate(mean, logits, Calibration())
    _, _, lower, higher = calibrate(mean, logits, Calibration(temperature=3))
    assert lower < low < high < higher


def test_tiers() -> None:
    cases = {
        "global": {},
        "item_text": {"text_known": 1},
        "item_state": {"text_known": 1, "item_events": 0.7},
        "user_state": {"user_events": 0.7, "item_known": 1},
        "full": {"user_events": 0.7, "item_events": 0.7},
    }
    features = np.full((len(cases), len(NAMES)), np.nan, np.float32)
    features[:, [INDEX[name] for name in ("user_events", "item_events", "item_known")]] = 0
    for row, known in zip(features, cases.values(), strict=True):
        for name, value in known.items():
            row[INDEX[name]] = value
    assert [ladder.TIERS[tier] for tier in ladder.tiers(features)] == list(cases)
    assert tuple(cases) == ladder.TIERS


def test_the_ladder_keeps_the_shape_of_the_items_ratings() -> None:
    features = np.zeros((2, len(NAMES)), np.float32)
    features[:, INDEX["bias"]] = 3
    features[0, [INDEX[f"item_share_{k}"] for k in range(1, 6)]] = [0.45, 0.04, 0.02, 0.04, 0.45]
    features[1, [INDEX[f"item_share_{k}"] for k in range(1, 6)]] = [0.05, 0.1, 0.7, 0.1, 0.05]
    mean, logits = ladder.outputs(features)
    _, shares, _, _ = calibrate(mean, logits, Calibration())
    assert shares[0].argmin() == 2
    assert shares[1].argmax() == 2


AFTER_WARMTH = """
from model.calibration import Calibration
from model.predict import Predictor, warm
from tests.unit.model.shop import compiled_kinds, observe
from tests.unit.model.test_serving import trained

predictor = Predictor("test", trained(3, factors=4), Calibration(), None)
warm(predictor)
known = compiled_kinds()
for count in (1, 2, 9, 300):
    shop = observe(count)
    predictor.predict(shop.events, shop.observation, shop.lookups)
print(*(name for name, _ in compiled_kinds() - known))
"""


def test_no_batch_waits_for_loops_to_compile_once_a_predictor_is_warm() -> None:
    """Nor one of a single event, whose arrays numba takes for others: it took a second."""
    command = [sys.executable, "-c", AFTER_WARMTH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
