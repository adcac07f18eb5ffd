"""What a user's recent ratings say of an item."""

import numpy as np
import pytest
import torch

from model.features import ITEM_DAMPING
from model.taste import COLUMNS, FADE, MOOD, Taste

SLOTS = 16
STEADY = 1e9  # the ridge of users without moods


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
    running: tuple[float, float, float, float] = (3.0, 0.0, 0.0, 0.0),
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
    made = taste([[0.0], [1.0], [2.0]], [0.0, 0.5, 0.0], 3.0, [4.0, STEADY, 2.0])
    found = told(made, 2, {1: 5.0}, (3.0, 0.25, 0.0, 0.0))
    level, person = 1.5 / 7, 3 / 7
    assert found["taste_level"] == pytest.approx(level - 0.25)
    assert found["taste_mood"] == pytest.approx(0, abs=1e-6)
    assert found["taste"] == pytest.approx(2 * person)
    assert found["taste_known"] == 1
    assert found["taste_strength"] == pytest.approx(person**2)
    assert found["item_strength"] == 4


def test_a_correction_holds_for_the_ratings_it_was_learnt_from() -> None:
    """Of 6 ratings damped by 4, by itself, and where there are 16 by now: 10 in 20 parts."""
    made = taste([[0.0], [0.0]], [0.0, 0.0], 3.0, [STEADY, STEADY, 1.0])
    made.damping.fill_(4)
    made.corrections[1], made.ratings[1] = 0.5, 6
    more = 0.2 * (ITEM_DAMPING - 4)  # of a running bias of 0.2
    for count, share in ((6.0, 1.0), (0.0, 1.0), (16.0, 0.5)):
        found = told(made, 1, {}, (3.0, 0.0, 0.2, float(np.log1p(count))))
        assert found["item_level"] == pytest.approx(more / (count + 4) + 0.5 * share)


def test_a_mood_by_hand() -> None:
    """Of two ratings of 5, with mood's parts x and x² of them; level and factors are none."""
    made = taste([[0.0], [0.0]], [0.0, 0.0], 3.0, [STEADY, 2.0, 1.0])
    found = told(made, 1, {1: 5.0})
    part = np.exp(-1 / MOOD)
    mood = 2 * part / (part**2 + 2)
    assert found["taste_mood"] == pytest.approx(mood)
    assert found["taste_level"] == pytest.approx(mood)
    recents, twice = torch.tensor([[1, 1]]), torch.full((1, 2), 5.0)
    running = torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    row = made(torch.tensor([1]), recents, twice, torch.ones(1, 2), running)[0]
    older = FADE / (FADE + 1)
    mood = 2 * (part + older * part**2) / (part**2 + older * part**4 + 2)
    assert row[COLUMNS.index("taste_mood")].item() == pytest.approx(mood)


def test_the_bias_is_moved_as_far_as_it_is_believed_and_within_the_stars() -> None:
    made = taste([[0.0], [1.0], [2.0]], [0.0, 0.5, 0.0], 3.0, [4.0, STEADY, 2.0])
    made.trust.copy_(torch.tensor([0.5, 1.0, 2.0]))
    made.damping.fill_(3.0)
    running = (3.5, 0.25, 1.0, float(np.log1p(9)))
    found = told(made, 2, {1: 5.0}, running)
    added = 0.5 * found["taste_level"] + found["item_level"] + 2 * found["taste"]
    assert found["item_level"] == pytest.approx(1.0)
    assert found["taste_bias"] == pytest.approx(5.0)
    assert 3.5 + added > 5
    found = told(made, 1, {2: 3.5}, running)
    added = 0.5 * found["taste_level"] + found["item_level"] + 2 * found["taste"]
    assert found["taste_bias"] == pytest.approx(3.5 + added)


def test_several_ratings_are_a_ridge_regression_in_which_older_ones_fade() -> None:
    random = np.random.default_rng(1)
    factors = random.normal(size=(6, 3))
    factors[0] = 0
    ridge = [4.0, 3.0, 2.0, 2.0, 2.0]
    made = taste(factors.tolist(), [0.0] * 6, 3.0, ridge)
    stars = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0}  # the newest first
    known = np.column_stack([np.ones(4), np.exp(-np.arange(1, 5) / MOOD), factors[1:5]])
    weight = FADE / (FADE + np.arange(4))
    gram = known.T @ np.diag(weight) @ known + np.diag(ridge)
    person = np.linalg.solve(gram, known.T @ (weight * (np.array(list(stars.values())) - 3)))
    found = told(made, 5, {**stars})
    assert found["taste_level"] == pytest.approx(person[0] + person[1], abs=1e-5)
    assert found["taste_mood"] == pytest.approx(person[1], abs=1e-5)
    assert found["taste"] == pytest.approx(person[2:] @ factors[5], abs=1e-5)


def test_what_is_not_rated_makes_nothing_older() -> None:
    made = taste([[0.0], [1.0], [2.0]], [0.0] * 3, 3.0, [1.0, 1.0, 1.0])
    assert told(made, 2, {2: None, 1: 5.0}) == told(made, 2, {1: 5.0})


def test_what_is_not_known_says_nothing() -> None:
    made = taste([[0.0], [1.0], [0.0]], [0.0] * 3, 3.0, [3.0, STEADY, 5.0])
    nothing = dict.fromkeys(COLUMNS, 0.0) | {"taste_bias": 3.0, "item_strength": 1.0}
    assert told(made, 1, {}) == nothing
    assert told(made, 1, {1: None}) == nothing  # met, but not rated
    found = told(made, 1, {2: 5.0})  # an item without factors
    assert found == pytest.approx(nothing | {"taste_level": 0.5}, abs=1e-6)
    assert told(made, 2, {1: 5.0})["taste"] == 0
    assert told(made, 1, {}, (np.nan, np.nan, np.nan, np.nan)) == nothing | {"taste_bias": 1.0}


def test_an_items_running_bias_is_damped_as_the_shop_is() -> None:
    """Of nine ratings that lie 24 stars above in sum, the damping is 3 in place of 15."""
    made = taste([[0.0], [1.0]], [0.0, 0.0], 3.0, [1.0, 1.0, 1.0])
    made.damping.fill_(3.0)
    found = told(made, 1, {}, (3.0, 0.0, 24 / (9 + ITEM_DAMPING), float(np.log1p(9))))
    assert found["item_level"] == pytest.approx(24 / (9 + 3) - 24 / (9 + ITEM_DAMPING))
