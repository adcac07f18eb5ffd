"""Bottleneck adapters: a small network after each layer of an encoder that stays as it is.

h + up(gelu(down(h))), a hidden state h before the next layer (Houlsby et al. 2019,
"Parameter-Efficient Transfer Learning for NLP", section 2.1; one a layer, after its output, as in
Pfeiffer et al. 2021, "AdapterFusion", section 3). `up` starts at zero, so that at first nothing
changes.
"""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.exceptions import EncoderError

ADAPTERS = "adapters.safetensors"


class Adapted(nn.Module):
    """A layer with its adapter."""

    def __init__(self, layer: nn.Module, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def __getattr__(self, name: str) -> Any:
        """The layer's own, too: some models ask a layer of which kind it is."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the layer's own, its hidden states (n, tokens, hidden) adapted."""
        found: Any = self.layer(*inputs, **options)
        if isinstance(found, tuple):
            first, *rest = found  # pyright: ignore[reportUnknownVariableType]
            return (self._adapt(first), *rest)  # pyright: ignore[reportUnknownArgumentType]
        return self._adapt(found)

    def _adapt(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(nn.functional.gelu(self.down(hidden)))


def layers(model: nn.Module) -> nn.ModuleList:
    """A model's stack of layers: its longest list of modules.

    Raises EncoderError when it has none.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise EncoderError(
            f"{type(model).__name__} has no stack of layers, so neither top layers nor adapters "
            "can be fitted; choose another text.method"
        )
    return max(stacks, key=len)


def add(model: nn.Module, bottleneck: int) -> None:
    """Put an adapter after each layer of a transformers' model."""
    stack = layers(model)
    hidden = int(cast(Any, model).config.hidden_size)  # of layers; OPT-350m says less
    for number, layer in enumerate(stack):
        stack[number] = Adapted(layer, hidden, bottleneck)


def remove(model: nn.Module) -> dict[str, Tensor]:
    """Take the adapters away; their weights by name."""
    stack = layers(model)
    found: dict[str, Tensor] = {}
    for number, adapted in enumerate(stack):
        if isinstance(adapted, Adapted):
            for name in ("down", "up"):
                for kind, weight in getattr(adapted, name).named_parameters():
                    found[f"{number}.{name}.{kind}"] = weight.detach().cpu().contiguous()
            stack[number] = adapted.layer
    return found


def write(folder: Path, weights: dict[str, Tensor]) -> None:
    """Make adapters part of the encoder in `folder`."""
    save_file(weights, folder / ADAPTERS)


def read(folder: Path, model: nn.Module) -> None:
    """Add the adapters of an encoder's directory, where there are any.

    Raises EncoderError when they do not fit.
    """
    file = folder / ADAPTERS
    if not file.is_file():
        return
    try:
        weights = load_file(file)
        add(model, len(weights["0.down.bias"]))
        with torch.no_grad():
            for number, adapted in enumerate(layers(model)):
                for name in ("down", "up"):
                    for kind, weight in getattr(adapted, name).named_parameters():
                        weight.copy_(weights[f"{number}.{name}.{kind}"])
    except Exception as error:  # safetensors and torch raise several kinds
        raise EncoderError(f"{file} does not fit its encoder: {error}") from error
