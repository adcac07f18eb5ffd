"""What a user's recent ratings say of an item."""

import numpy as np
import pytest
import torch

from model.features import ITEM_DAMPING
from model.taste import COLUMNS, FADE, Taste

SLOTS = 16


def taste(
    factors: list[list[float]], offsets: list[float], level: float, ridge: list[float]
) -> Taste:
    """Of these buckets; the first is no item."""
    made = Taste(len(factors), len(factors[0]))
    made.factors.copy_(torch.tensor(factors))
    made.offsets.copy_(torch.tensor(offsets))
    made.level.fill_(level)
    made.ridge.copy_(torch.tensor(ridge))
    return made


def told(
    made: Taste,
    item: int,
    recent: dict[int, float | None],
    running: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> dict[str, float]:
    """The columns of one row; `recent` holds buckets and their stars."""
    recents = torch.zeros(1, SLOTS, dtype=torch.int64)
    rating, rated = torch.zeros(1, SLOTS), torch.zeros(1, SLOTS)
    for slot, (bucket, stars) in enumerate(recent.items()):
        recents[0, slot] = bucket
        if stars is not None:
            rating[0, slot], rated[0, slot] = stars, 1
    row = made(torch.tensor([item]), recents, rating, rated, torch.tensor([running]))
    return dict(zip(COLUMNS, row[0].tolist(), strict=True))


def test_one_factor_by_hand() -> None:
    """(d + p + 4 d, d + p + 2 p) = (1.5, 1.5): twice d, p being three times d."""
    made = taste([[0.0], [1.0], [2.0]], [0.0, 0.5, 0.0], 3.0, [4.0, 2.0])
    found = told(made, 2, {1: 5.0}, (0.25, 0.0, 0.0))
    level, person = 1.5 / 7, 3 / 7
    assert found["taste_level"] == pytest.approx(level - 0.25)
    assert found["taste"] == pytest.approx(2 * person)
    assert found["taste_known"] == 1
    assert found["taste_strength"] == pytest.approx(person**2)
    assert found["item_strength"] == 4


def test_several_ratings_are_a_ridge_regression_in_which_older_ones_fade() -> None:
    random = np.random.default_rng(1)
    factors = random.normal(size=(6, 3))
    factors[0] = 0
    made = taste(factors.tolist(), [0.0] * 6, 3.0, [4.0, 2.0, 2.0, 2.0])
    stars = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0}  # the newest first
    known = np.column_stack([np.ones(4), factors[1:5]])
    weight = FADE / (FADE + np.arange(4))
    gram = known.T @ np.diag(weight) @ known + np.diag([4.0, 2.0, 2.0, 2.0])
    person = np.linalg.solve(gram, known.T @ (weight * (np.array(list(stars.values())) - 3)))
    found = told(made, 5, {**stars})
    assert found["taste_level"] == pytest.approx(person[0], abs=1e-5)
    assert found["taste"] == pytest.approx(person[1:] @ factors[5], abs=1e-5)


def test_what_is_not_rated_makes_nothing_older() -> None:
    made = taste([[0.0], [1.0], [2.0]], [0.0] * 3, 3.0, [1.0, 1.0])
    assert told(made, 2, {2: None, 1: 5.0}) == told(made, 2, {1: 5.0})


def test_what_is_not_known_says_nothing() -> None:
    made = taste([[0.0], [1.0], [0.0]], [0.0] * 3, 3.0, [3.0, 5.0])
    nothing = dict(zip(COLUMNS, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0], strict=True))
    assert told(made, 1, {}) == nothing
    assert told(made, 1, {1: None}) == nothing  # met, but not rated
    assert told(made, 1, {2: 5.0}) == nothing | {"taste_level": 0.5}  # an item without factors
    assert told(made, 2, {1: 5.0})["taste"] == 0
    assert told(made, 1, {}, (np.nan, np.nan, np.nan)) == nothing


def test_an_items_running_bias_is_damped_as_the_shop_is() -> None:
    """Of nine ratings that lie 24 stars above in sum, the damping is 3 in place of 15."""
    made = taste([[0.0], [1.0]], [0.0, 0.0], 3.0, [1.0, 1.0])
    made.damping.fill_(3.0)
    found = told(made, 1, {}, (0.0, 24 / (9 + ITEM_DAMPING), float(np.log1p(9))))
    assert found["item_level"] == pytest.approx(24 / (9 + 3) - 24 / (9 + ITEM_DAMPING))
