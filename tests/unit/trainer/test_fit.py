"""The fit of the fused network."""

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from model.features import INDEX
from model.network import FusedNetwork, tensors
from model.taste import ADDED, COLUMNS
from tests.unit.model.networks import default_config
from trainer.config import FitConfig
from trainer.data import Examples
from trainer.exceptions import TrainerError
from trainer.fit import (
    Fitted,
    Start,
    _begin,
    _believe,
    _fold,
    _shared,
    _spans,
    _tasted,
    _trusted,
    carry,
    fit,
    mean,
    refit,
)

CPU = torch.device("cpu")
SIZES = {"members": 2, "width": 16, "identity": 8, "heads": 2}  # with what defaults leave out
CONFIG = FitConfig.model_validate(
    {"epochs": 6, "batch_rows": 128, "learning_rate": 3e-3, "sizes": SIZES}
)


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


def test_a_refit_that_comes_to_no_number_is_told(examples: Examples) -> None:
    """Workers would refuse it, after it was promoted by what the model of before had shown."""
    fitted = replace(run(examples, examples.rating), belief=math.nan)
    rows, inputs = np.arange(len(examples)), examples.inputs
    with pytest.raises(TrainerError, match="came to no number"):
        refit(fitted, inputs, examples.rating, rows, CONFIG, 1, CPU, lambda epoch, error: None)


def test_what_another_shop_has_learnt_is_carried_over_but_for_its_users_and_items(
    examples: Examples,
) -> None:
    fitted = run(examples, examples.rating)
    sizes = CONFIG.sizes.model_dump()
    for same_shop in (False, True):
        network = FusedNetwork(default_config(vector=0, **sizes))
        carried = carry(Start(fitted.network, same_shop), network)
        theirs, ours = fitted.network.networks[1], network.networks[1]
        first = [cast(nn.Linear, each.hidden[0]).weight for each in (ours, theirs)]
        assert torch.equal(first[0], first[1])
        assert torch.equal(ours.last.weight, theirs.last.weight)
        assert float(ours.last.bias[0].detach()) == 0
        assert not ours.linear.weight.any()
        assert torch.equal(ours.users.table.weight, theirs.users.table.weight) == same_shop
        assert ("items" in carried) == same_shop
        assert carried["brands"] == 2 * theirs.brands.table.weight.numel()


def test_parts_of_another_size_are_not_carried_over(examples: Examples) -> None:
    fitted = run(examples, examples.rating)
    sizes = CONFIG.sizes.model_dump() | {"width": 8}
    network = FusedNetwork(default_config(vector=0, **sizes))
    assert "last" not in carry(Start(fitted.network, True), network)


def go_on(examples: Examples, before: Fitted) -> Fitted:
    """An epoch more of the same."""
    rows = np.arange(len(examples))
    return fit(
        before.network.config.model_copy(update={"trees": 0}),
        examples.inputs,
        examples.rating,
        rows[:500],
        rows[500:600],
        CONFIG.model_copy(update={"epochs": 1}),
        seed=2,
        device=CPU,
        on_epoch=lambda epoch, error: None,
        start=Start(before.network, same_shop=True),
    )


def test_a_fit_goes_on_from_its_start(examples: Examples) -> None:
    before = run(examples, examples.rating)
    fitted = go_on(examples, before)
    assert fitted.carried
    assert fitted.errors[0] < before.errors[0]


@pytest.mark.parametrize(
    ("rows", "asked", "spans"),
    [
        ((80, 10), [(60, 70), (70, 80), (80, 90)], "as long as validation, at most three"),
        ((25, 10), [(15, 25), (25, 35)], "which leave as many rows to learn from"),
        ((20, 10), [(20, 30)], "else none"),
        ((40_000, 3_000), [(37_000, 40_000), (40_000, 43_000)], "until there are enough"),
        ((40_000, 5_000), [(40_000, 45_000)], "which there are at once"),
    ],
)
def test_where_validation_is_short_spans_before_it_are_asked_too(
    rows: tuple[int, int], asked: list[tuple[int, int]], spans: str
) -> None:
    train, validation = rows
    every = np.arange(train + validation)
    found = _spans(every[:train], every[train:])
    assert [(each[0], each[-1] + 1) for _, each in found] == asked, spans
    for before, later in found:
        assert before.tolist() == list(range(later[0]))


def test_a_start_is_asked_for_what_it_has_not_met_alone(
    examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model in service was fitted to would choose epochs by heart."""
    asked = list[tuple[int, int]]()

    def begin(*given: Any) -> Any:
        asked.append((int(given[4][0]), int(given[4][-1]) + 1))
        return _begin(*given)

    monkeypatch.setattr("trainer.fit._begin", begin)
    before = run(examples, examples.rating)
    assert asked == [(300, 400), (400, 500), (500, 600)]
    asked.clear()
    go_on(examples, before)
    assert asked == [(500, 600)]


def test_shares_by_hand_and_near_a_half_where_rows_say_little() -> None:
    random = np.random.default_rng(4)
    left = random.normal(size=4_000)
    wrong = random.normal(size=4_000)
    assert _shared(np.stack([left, wrong]), left) == pytest.approx((1, 0), abs=0.05)
    few = np.array([1.0, -1.0, 1.0, -1.0])  # power 4; doubt is 1 over 1/16
    assert _shared(np.stack([few, -few]), few) == pytest.approx((0.5 + 4 / 24, 0.5 - 4 / 24))
    assert _shared(np.stack([wrong, -left]), left)[1] == 0
    assert _shared(np.zeros((2, 4)), left[:4]) == (0.5, 0.5)
    assert _shared(np.zeros((2, 4)), np.full(4, 0.25)) == (0.5, 0.5)


def test_a_taste_is_trusted_as_far_as_it_held_good() -> None:
    random = np.random.default_rng(6)
    ahead = random.normal(0, 0.5, (3_000, len(COLUMNS))).astype(np.float32)
    ahead[:100] = np.nan  # before the first taste
    bias = np.full(3_000, 3.5, np.float32)
    rating = 3.5 + np.nan_to_num(ahead[:, ADDED]) @ [0.5, 1.0, -1.0] + random.normal(0, 0.1, 3_000)
    np.testing.assert_allclose(_trusted(ahead, bias, rating), [0.5, 1.0, 0.0], atol=0.1)
    none = np.full_like(ahead, np.nan)
    np.testing.assert_array_equal(_trusted(none, bias, rating), [0, 0, 0])


def test_training_starts_its_corrections_where_serving_does(examples: Examples) -> None:
    config = default_config(vector=0, factors=2, buckets=256)
    rows = np.arange(len(examples))
    train, later = rows[:500], rows[500:]
    taste, plain, given = _tasted(config, examples.inputs, examples.rating, train, later, seed=1)
    assert taste is not None
    assert taste.trust.any()
    network = FusedNetwork(plain).eval()
    _fold(network, taste)
    read = tensors(network.config, examples.inputs.take(later))
    with torch.no_grad():
        columns, start = network.columns(read), network(read).mean
    np.testing.assert_array_equal(columns, given.features[later])
    np.testing.assert_array_equal(start, given.features[later, plain.bias_column])
    bias = examples.inputs.features[:, INDEX["bias"]]
    began = given.features[train, plain.bias_column]
    np.testing.assert_array_equal(began[:75], bias[:75])  # before the first taste
    assert (began[75:] != bias[75:500]).any()
    assert ((began >= 1) & (began <= 5)).all()


def test_features_that_say_nothing_in_training_say_nothing_later(examples: Examples) -> None:
    network = run(examples, examples.rating).network
    column = INDEX["user_text_stars"]  # no text was read before this training
    assert np.isnan(examples.inputs.features[:, column]).all()
    assert network.feature_used[column] == 0
    later = examples.inputs.take(np.arange(20))
    before = mean(network, later, np.arange(20))
    later.features[:, column] = 1.0
    assert (mean(network, later, np.arange(20)) == before).all()


def test_belief_starts_at_three_quarters_and_follows_what_is_left() -> None:
    said = np.array([1.0, -1.0, 1.0, -1.0])  # power 4; doubt is 1 over 1/16
    assert _believe(said, said) == pytest.approx(0.75 + 0.25 * 4 / 20)
    assert _believe(said, -said) == pytest.approx(0.75 - 1.75 * 4 / 20)
    assert _believe(np.tile(said, 100), np.tile(-said, 100)) == 0  # 0.75 - 1.75 * 400 / 416
    assert _believe(np.zeros(4), said) == 0
