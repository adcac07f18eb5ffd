"""Products of numbers with a layer's weights on a CPU, by the library that is faster there.

PyTorch has MKL multiply in single precision, and that takes AVX-512 on Intel's processors alone.
oneDNN, which PyTorch has as well, takes it on AMD's too, and makes twice as many products a second
there, with weights as they lie: to lay them out anew costs a twentieth of a product of 250 rows.
"""

from functools import cache
from typing import Any

import llvmlite.binding
import torch
from torch import Tensor, nn

_AMD = "znver"  # begins LLVM's names of AMD's processors since 2017


@cache
def by_onednn() -> bool:
    """Whether oneDNN is the faster one here."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    named = llvmlite.binding.get_host_cpu_name()  # pyright: ignore[reportUnknownVariableType]
    return wide and torch.backends.mkldnn.is_available() and str(named).startswith(_AMD)


def multiply(x: Tensor, weight: Tensor, offset: Tensor | None = None, gelu: bool = False) -> Tensor:
    """By oneDNN x Wᵀ + offset (..., out) of x (..., in) and W (out, in), or GELU of that.

    All are float32 and on the CPU; nothing has gradients.
    """
    product: Any = torch.ops.mkldnn._linear_pointwise  # what PyTorch's compiler makes of a layer
    return product(x, weight, offset, "gelu" if gelu else "none", [], "none" if gelu else "")


class Linear(nn.Linear):
    """A linear layer that has oneDNN multiply in single precision on a CPU, back too."""

    def forward(self, input: Tensor) -> Tensor:
        """What a layer makes of numbers (..., in): (..., out)."""
        weight, offset = self.weight, self.bias
        single = input.dtype is weight.dtype is torch.float32
        rows = input.dim() > 1 and input.numel() > 0 and input.device.type == "cpu"
        if not rows or not single or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if not torch.is_grad_enabled():
            return multiply(input, weight, offset)
        # As rows: what a function of ours gives may be added to in place, a view of it may not.
        made: Tensor = _Product.apply(input.flatten(0, -2), weight, offset)
        return made.view(*input.shape[:-1], len(weight))


def take_over(model: nn.Module) -> None:
    """Have a model's plain linear layers multiply so, where that is faster."""
    if by_onednn():
        for each in model.modules():
            if type(each) is nn.Linear:
                each.__class__ = Linear


class _Product(torch.autograd.Function):
    """x Wᵀ + offset of rows (n, in), whose gradients are products too."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        context.save_for_backward(x, weight)
        return multiply(x, weight, offset)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, above: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = context.saved_tensors
        for_x, for_weight, for_offset = context.needs_input_grad
        return (
            multiply(above, weight.t()) if for_x else None,
            multiply(above.t(), x.t()) if for_weight else None,
            above.sum(0) if for_offset else None,
        )
