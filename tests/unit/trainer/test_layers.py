"""Layers as a fit computes them, beside PyTorch's and transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from trainer import layers
from trainer.layers import Dropout, lighten

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TOKENS = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


def states(model: Any) -> Tensor:
    return model(**TOKENS).last_hidden_state


def bert(**dropout: Any) -> Any:
    torch.manual_seed(3)
    return BertModel(BertConfig(**SIZES, **dropout)).train()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_a_share_is_dropped_and_the_mean_stays(share: float) -> None:
    torch.manual_seed(1)
    ones = torch.ones(301, 333, requires_grad=True)  # no multiple of eight
    dropped = Dropout(share)(ones)
    exact = round(share * 256) / 256
    assert (dropped == 0).float().mean().item() == pytest.approx(exact, abs=0.005)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - exact)])
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    dropped.sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert ones.grad is not None
    assert torch.equal(ones.grad, dropped.detach())


def test_neighbours_are_dropped_apart() -> None:
    """Eight of them come of one drawn number."""
    torch.manual_seed(1)
    zero = (Dropout(0.5)(torch.ones(20_000, 8)) == 0).float()
    correlated = torch.corrcoef(zero.T) - torch.eye(8)
    assert zero.mean(0).numpy() == pytest.approx(0.5, abs=0.02)
    assert correlated.abs().max() < 0.03


def test_masks_follow_the_seed() -> None:
    units = torch.rand(7, 9)
    drawn: list[Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(Dropout(0.5)(units))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_nothing_or_all_is_dropped() -> None:
    units = torch.rand(7, 9)
    assert torch.equal(Dropout(0)(units), units)
    assert torch.equal(Dropout(1)(units), torch.zeros(7, 9))
    assert torch.equal(Dropout(0.5).eval()(units), units)
    assert Dropout(0.5)(units.bfloat16()).dtype is torch.bfloat16


def test_attention_is_what_it_was_but_for_its_dropout() -> None:
    model = bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0.5)
    assert not torch.equal(states(model), states(model))
    lighten(model, CPU)
    assert torch.allclose(states(model), states(model.eval()), atol=1e-6)


def test_attention_in_half_precision_is_near() -> None:
    model = bert(hidden_dropout_prob=0)
    lighten(model, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        half = states(model)
    half.sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert torch.allclose(half.float(), states(model), atol=0.1)


def test_dropout_stays_where_it_stood() -> None:
    model = bert(hidden_dropout_prob=0.25)
    before = [name for name, each in model.named_modules() if isinstance(each, nn.Dropout)]
    lighten(model, CPU)
    after = {name: each for name, each in model.named_modules() if isinstance(each, nn.Dropout)}
    assert [*after] == before
    assert {type(each) for each in after.values()} == {Dropout}
    assert after["embeddings.dropout"].p == 0.25
    assert not torch.equal(states(model), states(model))


def test_an_encoder_with_an_attention_of_its_own_keeps_it() -> None:
    model: Any = MPNetModel(MPNetConfig(**SIZES)).train()
    lighten(model, CPU)
    assert model.config._attn_implementation == "eager"
    assert states(model).shape == (2, 4, 24)


def test_what_is_written_says_nothing_of_it(tmp_path: Path) -> None:
    model = bert()
    written: list[bytes] = []
    for change in (lambda: None, lambda: lighten(model, CPU)):
        change()
        model.save_pretrained(tmp_path)
        written.append((tmp_path / "config.json").read_bytes())
    assert written[0] == written[1]
    assert layers._ATTENTION not in written[1].decode()
