"""What each input added to a prediction."""

import numpy as np
import torch
from torch import nn

from model.explain import explain
from model.features import INDEX
from model.network import FusedNetwork, blocks, gather, tensors
from model.trees import Trees
from tests.unit.model.networks import default_config
from tests.unit.model.shop import WIDTH, Observed


def test_contributions_sum_to_the_correction(observed: Observed) -> None:
    torch.manual_seed(0)
    model = FusedNetwork(default_config(vector=WIDTH, members=2)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.07)
    model.shrink.fill_(0.5)
    inputs = gather(observed.events, observed.observation, observed.lookups, WIDTH)
    everything = explain(model, inputs, top=10_000)
    nothing = torch.zeros(1, sum(blocks(model.config).values()))
    with torch.no_grad():
        rows = tensors(model.config, inputs)
        correction = model(rows).mean - rows.features[:, INDEX["bias"]]
        base = torch.stack([member.head(nothing)[0, 0] for member in model.networks]).mean() / 2
    totals = [sum(part.stars for part in row) for row in everything]
    np.testing.assert_allclose(totals, correction - base, atol=0.01)
    assert np.abs(totals).max() > 0.1


def test_a_linear_network_is_explained_exactly(observed: Observed) -> None:
    model = FusedNetwork(default_config(vector=WIDTH)).eval()
    weights = model.networks[0].linear.weight.data
    factors = {"user_bias": 2.0, "item_bias": -3.0}
    for name, factor in factors.items():
        weights[0, INDEX[name]] = factor
    inputs = gather(observed.events, observed.observation, observed.lookups, WIDTH)
    for row, features in zip(explain(model, inputs, top=3), inputs.features, strict=True):
        assert len(row) == 3
        assert abs(row[0].stars) >= abs(row[1].stars) >= abs(row[2].stars) == 0
        found = {part.name: part.stars for part in row}
        expected = {name: factor * features[INDEX[name]] for name, factor in factors.items()}
        for name, stars in expected.items():
            np.testing.assert_allclose(found.get(name, 0), stars, rtol=1e-4, atol=1e-6)


def test_what_is_believed_of_a_taste_is_explained(observed: Observed) -> None:
    model = FusedNetwork(default_config(vector=WIDTH, factors=2)).eval()
    assert model.taste is not None
    nn.init.normal_(model.taste.factors)
    model.taste.trust.copy_(torch.tensor([3.0, 2.0, 5.0]))
    inputs = gather(observed.events, observed.observation, observed.lookups, WIDTH)
    with torch.no_grad():
        moved = model(tensors(model.config, inputs)).mean - torch.tensor(
            inputs.features[:, INDEX["bias"]]
        )
    assert moved.abs().max() > 0.5
    for row, expected in zip(explain(model, inputs, top=3), moved.tolist(), strict=True):
        named = {part.name for part in row if part.stars}
        assert named <= {"taste_level", "item_level", "taste"}
        np.testing.assert_allclose(sum(part.stars for part in row), expected, atol=1e-5)


def test_what_trees_add_is_explained_by_their_features(observed: Observed) -> None:
    model = FusedNetwork(default_config(vector=WIDTH)).eval()
    trees = Trees(1, 1)
    trees.feature[0, 0] = INDEX["item_bias"]
    trees.threshold[0, 0] = torch.inf
    trees.value[0] = torch.tensor([0.5, 0.75, -1.0])
    model.plant(trees)
    inputs = gather(observed.events, observed.observation, observed.lookups, WIDTH)
    for row in explain(model, inputs, top=1):
        assert (row[0].name, row[0].stars) == ("item_bias", 0.25)
