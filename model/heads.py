"""Attention heads taken out of an encoder of the BERT family.

The files of such an encoder keep their shapes, with zeros where what a missing head said went in,
so any reader takes it for what it is. Here `heads.json` names the heads that are left in each
layer, and the others are cut out of the weights when it is loaded.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.adapters import layers
from model.exceptions import EncoderError

HEADS = "heads.json"


@dataclass(frozen=True)
class Attention:
    """The attention of one layer: `own` has query, key and value, `output` reads all heads."""

    own: Any
    output: Any  # its `dense` is the linear layer

    @property
    def count(self) -> int:
        """How many heads there are."""
        return self.own.query.out_features // self.own.attention_head_size

    def columns(self, heads: Sequence[int]) -> Tensor:
        """Which outputs of query, key and value belong to heads."""
        size = self.own.attention_head_size
        return torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads])


def attentions(model: nn.Module) -> list[Attention]:
    """The attention of each layer.

    Raises EncoderError where a layer's attention is not laid out as BERT's.
    """
    found: list[Attention] = []
    for layer in layers(model):
        attention: Any = getattr(layer, "attention", None)
        own, output = getattr(attention, "self", None), getattr(attention, "output", None)
        named = all(hasattr(own, each) for each in ("attention_head_size", "query", "key", "value"))
        if not named or not hasattr(output, "dense"):
            raise EncoderError(
                f"{type(model).__name__} has no attention as BERT's, so no head can be taken out"
            )
        found.append(Attention(own, output))
    return found


@torch.no_grad()
def silence(model: nn.Module, kept: Sequence[Sequence[int]]) -> None:
    """Let nothing come of the heads that are not kept, one list for each layer."""
    for attention, heads in zip(attentions(model), kept, strict=True):
        gone = sorted(set(range(attention.count)) - set(heads))
        if gone:
            attention.output.dense.weight[:, attention.columns(gone)] = 0


def trim(model: nn.Module, kept: Sequence[Sequence[int]]) -> None:
    """Cut out the heads that are not kept, one list for each layer."""
    for attention, heads in zip(attentions(model), kept, strict=True):
        rows = attention.columns(heads)
        for name in ("query", "key", "value"):
            whole: nn.Linear = getattr(attention.own, name)
            setattr(attention.own, name, _linear(whole.weight[rows], whole.bias[rows]))
        output: nn.Linear = attention.output.dense
        attention.output.dense = _linear(output.weight[:, rows], output.bias)


def write(folder: Path, kept: Sequence[Sequence[int]]) -> None:
    """Name the heads that are left of the encoder in `folder`."""
    content = json.dumps({"kept": [list(heads) for heads in kept]})
    (folder / HEADS).write_text(content + "\n", encoding="utf-8")


def read(folder: Path, model: nn.Module) -> None:
    """Trim a model as its directory says, where it does.

    Raises EncoderError when the heads named are not its own.
    """
    file = folder / HEADS
    if not file.is_file():
        return
    try:
        trim(model, json.loads(file.read_text("utf-8"))["kept"])
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise EncoderError(f"{file} does not fit its encoder: {error}") from error


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
