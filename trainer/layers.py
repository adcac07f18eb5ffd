"""Dropout and attention as a fit of an encoder computes them: as they come they take a third of it.

PyTorch draws a mask's numbers one by one, in one thread, and where attention's weights are dropped
too it computes them by single products, which it does in one kernel otherwise. So masks are drawn
in bulk, and attention's weights are not dropped; units still are (docs/decisions/0037).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from model import products

LEVELS = 256  # a mask's share is a multiple of one by this
_ATTENTION = "starcast_fit"  # how `transformers` knows our attention


class Dropout(nn.Dropout):
    """`nn.Dropout` whose masks are drawn eight numbers at a time; for a processor."""

    def forward(self, input: Tensor) -> Tensor:
        """Units (any shape) of which a share is zero and the rest larger for that, in training."""
        dropped = round(self.p * LEVELS)
        if not self.training or not dropped:
            return input
        if dropped == LEVELS:
            return input * 0
        words = torch.randint(-(2**63), 2**63 - 1, (-(-input.numel() // 8),))
        drawn = words.view(torch.uint8)[: input.numel()].view(input.shape)  # any of `LEVELS`
        return input * ((drawn >= dropped).to(input.dtype) * (LEVELS / (LEVELS - dropped)))


def lighten(model: nn.Module, device: torch.device) -> None:
    """Have a model's layers computed like this.

    Attention is, where a model asks `transformers` for it; dropout on a processor alone, since a
    GPU draws masks as fast as it reads them.
    """
    if device.type == "cpu":
        for module in [*model.modules()]:
            for name, child in module.named_children():
                if type(child) is nn.Dropout:
                    setattr(module, name, Dropout(child.p))
        products.take_over(model)  # what was added to it, too
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa":
        _register()
        cast(Any, model).set_attn_implementation(_ATTENTION)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """`transformers`' own, of single precision on a processor: its way back is slow in half."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given["dropout"] = 0.0
    attend: Any = sdpa_attention_forward
    if query.device.type != "cpu" or query.dtype is torch.float32:
        return attend(module, query, key, value, mask, **given)
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        attended, _ = attend(module, query.float(), key.float(), value.float(), mask, **given)
    return attended.to(query.dtype), None
