"""What is taken away is gone, and what it was worth is found."""

from pathlib import Path

import numpy as np
import pytest

from model.features import INDEX
from trainer.ablations import INPUTS, SETTINGS, ablate, changed, compare
from trainer.config import FitConfig, SizesConfig, TrainerConfig
from trainer.data import from_file
from trainer.prepare import Prepared, cleaned, prepared
from trainer.train import fit_network

CONFIG = TrainerConfig(
    threads=1,
    fit=FitConfig(
        epochs=6, batch_rows=128, learning_rate=3e-3, sizes=SizesConfig(members=2, width=16)
    ),
)


@pytest.fixture(scope="module")
def data(shop_file: Path) -> Prepared:
    log = from_file(shop_file)
    reviews = cleaned(log, CONFIG).reviews
    return prepared(log, reviews, None, "", CONFIG, lambda done, total: None)


@pytest.mark.parametrize("part", [*INPUTS])
def test_an_input_that_is_gone_says_nothing(part: str, data: Prepared) -> None:
    before = data.examples.inputs
    left = INPUTS[part](before)
    bias, was = (each.features[:, INDEX["bias"]] for each in (left, before))
    assert (bias == was).all() == (part != "newcomers' level")
    assert np.abs(bias - was).max() < 0.2  # the shop has no storm
    assert len(left) == len(before)
    again = INPUTS[part](left)
    for name in ("features", "users", "items", "recents", "vectors"):
        np.testing.assert_array_equal(getattr(again, name), getattr(left, name))


def test_what_tells_tastes_is_worth_something(data: Prepared) -> None:
    """Stars follow a user's taste for a category, which without factors cross features tell."""
    config = changed(CONFIG, SETTINGS["taste of recent ratings"])
    whole = ablate(data, config, None)
    without = {part: ablate(data, config, part) for part in ("cross features", "text vectors")}
    rating = data.examples.rating[data.split.test]
    found = compare(rating, whole, without, config)
    assert found["nothing"].cost is None
    cross, vectors = found["cross features"], found["text vectors"]
    assert cross.cost is not None
    assert vectors.cost is not None
    assert cross.cost.mean > 0.2
    assert cross.rmse > found["nothing"].rmse
    assert abs(vectors.cost.mean) < 0.02  # there are none


@pytest.mark.parametrize("part", [*SETTINGS])
def test_a_part_of_the_model_can_be_left_out_or_put_in(part: str, data: Prepared) -> None:
    fitted, _ = fit_network(data, changed(CONFIG, SETTINGS[part]), None)
    network, member = fitted.network, fitted.network.networks[0]
    there = {
        "taste of recent ratings": network.taste is not None,
        "boosted trees": network.trees is not None,
        "+ hashed ids": member.items.table.weight.numel() > 0,
        "+ attention to recent items": member.attention is not None,
    }
    assert there[part] == part.startswith("+")
    assert [*there] == [*SETTINGS]
    assert np.isfinite(ablate(data, CONFIG, part)).all()
