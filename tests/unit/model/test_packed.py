"""BERT encoders without padding beside transformers' own, tiny and random."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertModel

from model import int8, packed, products
from tests.unit.model.berts import (
    HIDDEN,
    LONGEST,
    WORDS,
    Tokens,
    one_by_one,
    poolings,
    small,
    token_lists,
)


def in_int8(model: BertModel) -> BertModel:
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, int8.Linear(layer))
    return model


MODEL = small()
INT8 = in_int8(small())
FLIPPED = 0.02  # where rounding elsewhere makes a number another code, and that moves others


@given(token_lists, poolings, st.integers(1, 200))
def test_packed_texts_are_as_alone(tokens: Tokens, pooling: str, budget: int) -> None:
    with torch.inference_mode():
        made = list(packed.encode(MODEL, tokens, pooling, budget))
    rows = [row for some, _ in made for row in range(some.start, some.stop)]
    assert rows == list(range(len(tokens)))
    for some, _ in made:
        assert sum(map(len, tokens[some])) <= budget or some.stop == some.start + 1
    found = np.concatenate([vectors for _, vectors in made])
    np.testing.assert_allclose(found, one_by_one(MODEL, tokens, pooling), atol=2e-5)


@pytest.mark.parametrize("onednn", [True, False])
def test_whichever_library_multiplies_they_are_the_same(
    monkeypatch: pytest.MonkeyPatch, onednn: bool
) -> None:
    monkeypatch.setattr(products, "by_onednn", lambda: onednn)
    random = np.random.default_rng(2)
    tokens = [random.integers(1, WORDS, size).tolist() for size in (1, 3, 17, LONGEST)]
    with torch.inference_mode():
        ((_, found),) = packed.encode(MODEL, tokens, "mean", 256)
    np.testing.assert_allclose(found, one_by_one(MODEL, tokens, "mean"), atol=2e-5)


@pytest.mark.parametrize("onednn", [True, False])
def test_with_several_threads_they_are_the_same(
    monkeypatch: pytest.MonkeyPatch, onednn: bool
) -> None:
    monkeypatch.setattr(products, "by_onednn", lambda: onednn)
    tokens = [[1, 2, 3], [4, 5, 6, 7]]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            ((_, found),) = packed.encode(MODEL, tokens, "mean", 256)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, one_by_one(MODEL, tokens, "mean"), atol=2e-5)


@given(token_lists, poolings, st.integers(1, 200))
def test_in_int8_they_are_as_alone(tokens: Tokens, pooling: str, budget: int) -> None:
    """Neither does transformers' own model around the same layers make anything else of them."""
    with torch.inference_mode():
        found = np.concatenate(
            [vectors for _, vectors in packed.encode(INT8, tokens, pooling, budget)]
        )
        alone = np.concatenate(
            [
                vectors
                for each in tokens
                for _, vectors in packed.encode(INT8, [each], pooling, budget)
            ]
        )
    np.testing.assert_allclose(found, alone, atol=FLIPPED)
    np.testing.assert_allclose(found, one_by_one(INT8, tokens, pooling), atol=FLIPPED)


def test_int8_is_near_what_it_was() -> None:
    random = np.random.default_rng(4)
    tokens = [random.integers(1, WORDS, size).tolist() for size in (3, 17, LONGEST)]
    with torch.inference_mode():
        ((_, found),) = packed.encode(INT8, tokens, "mean", 256)
    assert ((found * one_by_one(MODEL, tokens, "mean")).sum(1) > 0.99).all()


def test_no_texts_are_no_vectors() -> None:
    assert list(packed.encode(MODEL, [], "mean", 256)) == []


def test_batches_by_hand() -> None:
    lengths = np.array([3, 3, 9, 1, 1, 1])
    found = [(each.start, each.stop) for each in packed.batches(lengths, 6)]
    assert found == [(0, 2), (2, 3), (3, 6)]


def test_new_weights_are_used() -> None:
    model = small()
    before = one_by_one(model, [[1, 2, 3]], "mean")
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(0.9)
    with torch.inference_mode():
        ((_, after),) = packed.encode(model, [[1, 2, 3]], "mean", 256)
    np.testing.assert_allclose(after, one_by_one(model, [[1, 2, 3]], "mean"), atol=2e-5)
    assert np.abs(after - before).max() > 1e-3


def test_layers_that_were_taken_over_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "by_onednn", lambda: True)
    model = small()
    products.take_over(model)
    assert packed.fits(model)


def watched(model: BertModel) -> None:
    layer = cast(Any, model).encoder.layer[0].output.dense
    layer.register_forward_hook(lambda *_: None)


def adapted(model: BertModel) -> None:
    class Adapted(nn.Linear):
        """A layer that does more than multiply."""

    cast(Any, model).encoder.layer[1].output.dense = Adapted(40, HIDDEN)


def wrapped(model: BertModel) -> None:
    layers = cast(Any, model).encoder.layer
    layers[0] = nn.Sequential(layers[0])


def quantized_in_part(model: BertModel) -> None:
    own = cast(Any, model).encoder.layer[0].attention.self
    own.query = int8.Linear(own.query)


def trimmed(model: BertModel) -> None:
    cast(Any, model).encoder.layer[1].attention.self.query = nn.Linear(HIDDEN, 16)


@pytest.mark.parametrize("change", [watched, adapted, wrapped, quantized_in_part, trimmed])
def test_changed_models_do_not_fit(change: Callable[[BertModel], None]) -> None:
    model = small()
    assert packed.fits(model)
    change(model)
    assert not packed.fits(model)


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"is_decoder": True}])
def test_other_kinds_do_not_fit(changes: dict[str, Any]) -> None:
    assert not packed.fits(small(**changes))
    assert not packed.fits(nn.Linear(2, 2))
