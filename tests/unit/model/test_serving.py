"""What serves on a CPU says what the network says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model.features import INDEX
from model.lookups import Source
from model.network import FusedNetwork, Inputs, gather, tensors
from model.serving import Served
from model.trees import Trees
from tests.unit.model.networks import default_config
from tests.unit.model.shop import WIDTH, observe

SHOP = observe()


def inputs(width: int = WIDTH) -> Inputs:
    """Rows of a shop, some with ratings that are not recent any more."""
    found = gather(SHOP.events, SHOP.observation, SHOP.lookups, width)
    random = np.random.default_rng(5)
    older, stars = found.older.copy(), found.older_ratings.copy()
    older[::3, :9] = random.integers(1, 2**32, (len(older[::3]), 9))
    stars[::3, :9] = random.integers(32, 161, (len(older[::3]), 9))
    return replace(found, older=older, older_ratings=stars)


def trained(trees: int = 0, **sizes: Any) -> FusedNetwork:
    """A network that looks at all that it is given."""
    torch.manual_seed(2)
    network = FusedNetwork(default_config(**{"vector": WIDTH, **sizes})).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    network.feature_scale.fill_(1.5)
    network.feature_used[::7] = 0
    network.prior.copy_(torch.arange(5.0))
    network.shrink.fill_(0.8)
    if network.taste is not None:
        nn.init.normal_(network.taste.factors)
        nn.init.normal_(network.taste.offsets, std=0.3)
        nn.init.normal_(network.taste.corrections, std=0.3)
        nn.init.uniform_(network.taste.ratings, 0, 9)
        network.taste.level.fill_(3.5)
        nn.init.uniform_(network.taste.ridge, 0.5, 5)
        network.taste.damping.fill_(4)
        nn.init.uniform_(network.taste.trust)
    if trees:
        network.plant(grown(trees, network.config.columns))
    return network


def grown(count: int, columns: int) -> Trees:
    """Trees that ask every feature; some end early."""
    trees = Trees(count, 4)
    random = torch.Generator().manual_seed(3)
    trees.feature.copy_(torch.randint(0, 2 * columns, trees.feature.shape, generator=random))
    trees.threshold.copy_(torch.randn(trees.threshold.shape, generator=random))
    trees.value.copy_(torch.randn(trees.value.shape, generator=random) / 10)
    trees.value[::2, 1] = trees.value[::2, 3:5] = 0.25  # the left child of every second root
    for first, last in ((7, 11), (15, 23)):
        trees.value[::2, first:last] = 0.25
    return trees


@pytest.mark.parametrize(
    "network",
    [
        trained(),
        trained(members=2, factors=3, trees=9),
        trained(heads=0, factors=8),
        trained(identity=0, trees=2),
        trained(vector=0, heads=1, token=16),
        trained(heads=0, identity=0, factors=8, trees=2),
    ],
    ids=["one", "whole", "no attention", "no ids", "no texts", "neither attention nor ids"],
)
def test_what_serves_says_what_the_network_says(network: FusedNetwork) -> None:
    rows = inputs(network.config.vector)
    with torch.no_grad():
        expected = network(tensors(network.config, rows))
    mean, logits = Served(network).outputs(rows)
    np.testing.assert_allclose(mean, expected.mean.numpy(), atol=2e-5)
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=2e-5)
    assert np.std(mean - rows.features[:, INDEX["bias"]]) > 0.01


def test_a_table_of_vectors_may_grow() -> None:
    """Each row, alone and in order, with no more of the table than rows so far have named."""
    rows = inputs()
    named = np.maximum(rows.item_vectors, rows.recent_vectors.max(1))
    lengths = np.maximum.accumulate(named) + 1
    served = Served(network := trained(members=2))
    whole = Served(network).outputs(rows)
    for row, length in enumerate(lengths.tolist()):
        one = replace(rows.take(slice(row, row + 1)), vectors=rows.vectors[:length])
        mean, logits = served.outputs(one)
        assert mean == whole[0][row]
        np.testing.assert_array_equal(logits[0], whole[1][row])


def test_tables_of_vectors_are_told_apart() -> None:
    rows, served = inputs(), Served(trained())
    before = served.outputs(rows)
    other = replace(rows, vectors=-rows.vectors, source=Source())
    assert not np.array_equal(served.outputs(other)[0], before[0])
    np.testing.assert_array_equal(served.outputs(rows)[0], before[0])


def test_it_serves_what_it_was_made_of() -> None:
    network, rows = trained(), inputs()
    served = Served(network)
    before = served.outputs(rows)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    np.testing.assert_array_equal(served.outputs(rows)[0], before[0])


def test_rows_beyond_a_chunk() -> None:
    network, rows = trained(), inputs()
    many = rows.take(np.arange(2_500) % len(rows))
    served = Served(network)
    np.testing.assert_array_equal(
        served.outputs(many)[0], served.outputs(rows)[0][np.arange(2_500) % len(rows)]
    )
