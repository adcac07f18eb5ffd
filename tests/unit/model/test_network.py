"""The fused network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from model.features import INDEX
from model.lookups import Source
from model.network import (
    FusedNetwork,
    Inputs,
    Output,
    bucket,
    concatenate,
    gather,
    tensors,
)
from model.taste import COLUMNS
from tests.unit.model.networks import default_config
from tests.unit.model.shop import WIDTH, Observed


@pytest.fixture
def inputs(observed: Observed) -> Inputs:
    """What a network reads of the shop's events."""
    return gather(observed.events, observed.observation, observed.lookups, WIDTH)


def network(seed: int = 0, **changes: object) -> FusedNetwork:
    """A network whose every weight matters, unlike an untrained one's."""
    torch.manual_seed(seed)
    built = FusedNetwork(default_config(vector=WIDTH, **changes))
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.1)
    return built.eval()


def run(model: FusedNetwork, inputs: Inputs, member: int | None = None) -> Output:
    with torch.no_grad():
        return model(tensors(model.config, inputs), member)


def test_untrained_says_the_bias_exactly(inputs: Inputs) -> None:
    output = run(FusedNetwork(default_config(vector=WIDTH)).eval(), inputs)
    np.testing.assert_array_equal(output.mean, inputs.features[:, INDEX["bias"]])
    assert not output.logits.any()


def test_missing_features_are_told_by_a_flag(inputs: Inputs) -> None:
    model = network()
    column = INDEX["user_price"]
    average = inputs.features.copy()
    average[:, column] = model.feature_mean[column]
    missing = inputs.features.copy()
    missing[:, column] = np.nan
    outputs = [run(model, replace(inputs, features=f)) for f in (average, missing)]
    assert all(torch.isfinite(output.mean).all() for output in outputs)
    assert (outputs[0].mean != outputs[1].mean).all()


def test_an_unused_feature_says_nothing(inputs: Inputs) -> None:
    model = network()
    column = INDEX["user_price"]
    model.feature_used[column] = 0
    changed = inputs.features.copy()
    changed[::2, column] = 7
    changed[1::2, column] = np.nan
    before, after = run(model, inputs), run(model, replace(inputs, features=changed))
    assert torch.equal(before.mean, after.mean)


def test_features_are_clipped(inputs: Inputs) -> None:
    model = network()
    column = INDEX["user_events"]
    model.feature_high[column] = 2
    outputs: list[Output] = []
    for value in (2.5, 1e6):
        features = inputs.features.copy()
        features[:, column] = value
        outputs.append(run(model, replace(inputs, features=features)))
    assert torch.equal(outputs[0].mean, outputs[1].mean)


def test_an_id_that_training_never_met_is_an_unknown_one(inputs: Inputs) -> None:
    model = FusedNetwork(default_config(vector=WIDTH)).eval()
    for name, parameter in model.named_parameters():
        if ".table." not in name:
            nn.init.normal_(parameter, std=0.1)
    known = inputs.recents != 0
    unknown = replace(
        inputs,
        users=np.zeros_like(inputs.users),
        items=np.zeros_like(inputs.items),
        recents=np.where(known, inputs.recents + np.uint64(1), 0).astype(np.uint64),
    )
    assert torch.equal(run(model, inputs).mean, run(model, unknown).mean)


def test_unknown_stays_zero_while_others_learn(inputs: Inputs) -> None:
    model = FusedNetwork(default_config(vector=WIDTH, unknown=0.5)).train()
    for name, parameter in model.named_parameters():
        if ".table." not in name:
            nn.init.normal_(parameter, std=0.1)
    model(tensors(model.config, inputs)).mean.sum().backward()
    gradient = dict(model.named_parameters())["members.0.users.table.weight"].grad
    assert gradient is not None
    assert not gradient[0].any()
    users = np.unique(bucket(inputs.users, model.config.buckets))
    learnt = gradient.any(1).nonzero()[:, 0].numpy()
    assert set(learnt) <= set(users)
    assert len(learnt) > len(users) / 2


def test_ids_become_unknown_in_training_only(inputs: Inputs) -> None:
    always = network(unknown=1.0, dropout=0.0)
    nobody = replace(inputs, users=np.zeros_like(inputs.users))
    assert not torch.equal(run(always, inputs).mean, run(always, nobody).mean)
    always.train()
    assert torch.equal(run(always, inputs).mean, run(always, nobody).mean)


def test_slots_without_a_recent_item_say_nothing(inputs: Inputs) -> None:
    model = network()
    empty = inputs.recents == 0
    assert empty.any()
    noise = replace(
        inputs,
        recent_ratings=np.where(empty, np.float32(5), inputs.recent_ratings),
        recent_actions=np.where(empty, np.uint8(255), inputs.recent_actions),
        recent_vectors=np.where(empty, 0, inputs.recent_vectors),
    )
    assert torch.equal(run(model, inputs).mean, run(model, noise).mean)
    assert torch.isfinite(
        run(model, replace(inputs, recents=inputs.recents * np.uint64(0))).mean
    ).all()


def test_recent_items_matter(inputs: Inputs) -> None:
    model = network()
    turned = replace(inputs, recent_ratings=6 - inputs.recent_ratings)
    rated = ((inputs.recents != 0) & ~np.isnan(inputs.recent_ratings)).any(1)
    changed = (run(model, inputs).mean != run(model, turned).mean).numpy()
    assert changed[rated].mean() > 0.9


def test_members_are_averaged(inputs: Inputs) -> None:
    model = network(members=3)
    singles = [run(model, inputs, member) for member in range(3)]
    together = run(model, inputs)
    means = torch.stack([single.mean for single in singles]).mean(0)
    np.testing.assert_allclose(together.mean, means, atol=1e-5)
    assert not torch.equal(singles[0].mean, singles[1].mean)


def test_shrink_scales_the_correction(inputs: Inputs) -> None:
    model = network()
    bias = inputs.features[:, INDEX["bias"]]
    whole = run(model, inputs).mean.numpy() - bias
    model.shrink.fill_(0.25)
    np.testing.assert_allclose(run(model, inputs).mean.numpy() - bias, whole / 4, atol=1e-5)


def test_the_taste_reads_older_ratings(inputs: Inputs) -> None:
    model = FusedNetwork(default_config(vector=WIDTH, factors=2)).eval()
    assert model.taste is not None
    model.taste.factors.fill_(1.0)
    model.taste.level.fill_(3.0)
    none = replace(inputs, older=np.zeros_like(inputs.older))
    some = replace(none, older=none.older.copy(), older_ratings=none.older_ratings.copy())
    some.older[::2, :3], some.older_ratings[::2, :3] = 7, 160
    with torch.no_grad():
        before, after = (
            dict(
                zip(
                    COLUMNS,
                    model.columns(tensors(model.config, each))[:, -len(COLUMNS) :].numpy().T,
                    strict=True,
                )
            )
            for each in (none, some)
        )
    more = after["taste_known"] - before["taste_known"]
    np.testing.assert_array_equal(more, np.tile([3, 0], len(inputs))[: len(inputs)])
    assert (after["taste"][::2] > before["taste"][::2]).all()
    np.testing.assert_allclose(after["taste"][1::2], before["taste"][1::2], atol=1e-6)


def test_without_texts(observed: Observed) -> None:
    inputs = gather(observed.events, observed.observation, observed.lookups, 0)
    model = FusedNetwork(default_config(vector=0)).eval()
    np.testing.assert_array_equal(run(model, inputs).mean, inputs.features[:, INDEX["bias"]])


def test_foreign_inputs_are_refused(inputs: Inputs) -> None:
    config = default_config(vector=WIDTH)
    with pytest.raises(ValueError, match="expected"):
        tensors(config, replace(inputs, features=inputs.features[:, 1:]))
    with pytest.raises(ValueError, match="vectors of"):
        tensors(default_config(vector=WIDTH + 1), inputs)
    with pytest.raises(ValueError, match="bias column"):
        FusedNetwork(config.model_copy(update={"bias_column": config.columns}))


def test_parts_put_together_are_the_whole(inputs: Inputs) -> None:
    model = network()
    first, second = inputs.take(slice(0, 100)), inputs.take(np.arange(100, len(inputs)))
    second = replace(second, vectors=second.vectors.copy(), source=Source())
    whole = concatenate([first, second, first])
    assert len(whole) == len(inputs) + 100
    assert len(whole.vectors) == 2 * len(inputs.vectors)
    outputs = run(model, inputs).mean, run(model, whole).mean[: len(inputs)]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


def test_it_learns_what_only_attention_can_know(inputs: Inputs) -> None:
    """Stars: the bias, and what the user gave the recent item whose vector is most like this."""
    vectors = inputs.vectors
    alike = np.einsum("nd,nrd->nr", vectors[inputs.item_vectors], vectors[inputs.recent_vectors])
    alike = np.where(np.isnan(inputs.recent_ratings), -np.inf, alike)
    best = np.take_along_axis(inputs.recent_ratings, alike.argmax(1)[:, None], 1)[:, 0]
    effect = torch.tensor(np.where(np.isfinite(alike.max(1)), best - 3, 0), dtype=torch.float32)
    torch.manual_seed(0)
    model = FusedNetwork(default_config(vector=WIDTH, dropout=0, unknown=1.0)).train()
    rows = tensors(model.config, inputs)
    bias = rows.features[:, INDEX["bias"]]
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.tensor(torch.inf)
    for _ in range(120):
        loss = ((model(rows).mean - bias - effect) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05 * effect.square().mean().item()


def test_buckets() -> None:
    hashes = np.array([0, 1, 2**64 - 1], np.uint64)
    found = bucket(hashes, 8)
    assert found[0] == 0
    assert (found[1:] > 0).all()
    assert (bucket(np.arange(1, 10_000, dtype=np.uint64), 8) < 8).all()
