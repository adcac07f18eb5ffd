"""What a user's recent ratings say of an item."""

import numpy as np
import pytest
import torch

from model.taste import COLUMNS, RIDGE, Taste

SLOTS = 16


def taste(factors: list[list[float]], offsets: list[float], level: float) -> Taste:
    """Of these buckets; the first is no item."""
    made = Taste(len(factors), len(factors[0]))
    made.factors.copy_(torch.tensor(factors))
    made.offsets.copy_(torch.tensor(offsets))
    made.level.fill_(level)
    return made


def told(
    made: Taste, item: int, recent: dict[int, float | None], user_bias: float = 0.0
) -> dict[str, float]:
    """The columns of one row; `recent` holds buckets and their stars."""
    recents = torch.zeros(1, SLOTS, dtype=torch.int64)
    rating, rated = torch.zeros(1, SLOTS), torch.zeros(1, SLOTS)
    for slot, (bucket, stars) in enumerate(recent.items()):
        recents[0, slot] = bucket
        if stars is not None:
            rating[0, slot], rated[0, slot] = stars, 1
    row = made(torch.tensor([item]), recents, rating, rated, torch.tensor([user_bias]))
    return dict(zip(COLUMNS, row[0].tolist(), strict=True))


def test_one_factor_by_hand() -> None:
    made = taste([[0.0], [1.0], [2.0]], [0.0, 0.5, 0.0], 3.0)
    found = told(made, 2, {1: 5.0}, user_bias=0.25)
    person = 1.0 * (5 - 3 - 0.5 - 0.25) / (1 + RIDGE)
    assert found["taste"] == pytest.approx(2 * person)
    assert found["taste_known"] == 1
    assert found["taste_strength"] == pytest.approx(person**2)
    assert found["item_strength"] == 4


def test_several_ratings_are_a_ridge_regression() -> None:
    random = np.random.default_rng(1)
    factors = random.normal(size=(6, 3))
    factors[0] = 0
    made = taste(factors.tolist(), [0.0] * 6, 3.0)
    stars = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0}
    known = factors[1:5]
    residual = np.array(list(stars.values())) - 3
    person = np.linalg.solve(known.T @ known + RIDGE * np.eye(3), known.T @ residual)
    assert told(made, 5, dict(stars))["taste"] == pytest.approx(person @ factors[5], abs=1e-5)


def test_what_is_not_known_says_nothing() -> None:
    made = taste([[0.0], [1.0], [0.0]], [0.0] * 3, 3.0)
    nothing = {"taste": 0.0, "taste_known": 0.0, "taste_strength": 0.0, "item_strength": 1.0}
    assert told(made, 1, {}) == nothing
    assert told(made, 1, {1: None}) == nothing  # met, but not rated
    assert told(made, 1, {2: 5.0}) == nothing  # an item without factors
    assert told(made, 2, {1: 5.0})["taste"] == 0
    assert told(made, 1, {1: 5.0}, float("nan"))["taste"] == pytest.approx(2 / (1 + RIDGE))
