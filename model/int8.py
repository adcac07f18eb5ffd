"""Products in eight bits on a CPU: what linear layers of an encoder become.

A row x of numbers is held as codes c, x ≈ lowest + step · c, by a lowest number and a step of its
own (as it comes) or of all rows (as was seen before); a row of weights as codes v times a scale. So

    W x + b ≈ scale · (step · V c + lowest · V 1) + b

where V c alone is a product of matrices. Codes of numbers have eight bits, of weights seven:
processors without VNNI add pairs of products in sixteen bits, and 2 · 255 · 64 fits in there, so
that no sum is cut and every machine finds the same.

Rows hang on nothing beside them, so neither does a text's vector. What lies between two products
is one loop over rows, each of which stays in a core's nearest cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.compiled import compiled, summing

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

_HIGHEST = 255  # code of a number
_WEIGHT = 64  # largest code of a weight, without its sign
_LEAST_STEP = np.float32(1e-20)  # of a row of equal numbers
_AS_IT_COMES = np.zeros(2, np.float32)


@dataclass(frozen=True)
class Rows:
    """Numbers as codes."""

    codes: Codes  # (rows, width)
    steps: Floats  # (rows)
    lowest: Floats  # (rows)

    @classmethod
    def room(cls, rows: int, width: int) -> "Rows":
        """Room for so many."""
        steps, lowest = np.empty((2, rows), np.float32)
        return cls(np.empty((rows, width), np.uint8), steps, lowest)


class Linear(nn.Module):
    """A linear layer in eight bits.

    `seen`: the least and the largest number that went in; without it each row is scaled as it
    comes.
    """

    def __init__(self, layer: nn.Linear, seen: Sequence[float] | None = None) -> None:
        """Take over a layer's weights."""
        super().__init__()
        weight = layer.weight.detach().float()
        scales = (weight.abs().amax(1) / _WEIGHT).clamp(min=float(_LEAST_STEP))
        self.weight: Tensor
        self.register_buffer("weight", (weight / scales[:, None]).round().to(torch.int8))
        self.given = _AS_IT_COMES
        if seen is not None:
            least, largest = seen
            step = max((largest - least) / _HIGHEST, float(_LEAST_STEP))
            self.given = np.array([least, step], np.float32)
        self.sums: Floats = (self.weight.sum(1) * scales).numpy()
        bias = layer.bias
        self.bias: Floats = (torch.zeros_like(scales) if bias is None else bias.detach()).numpy()
        self._multiply = _product(self.weight, scales)

    def multiplied(self, rows: Rows) -> Floats:
        """scale · V c: to be opened by each row's step and lowest number."""
        return self._multiply(torch.from_numpy(rows.codes)).numpy()

    def of(self, rows: Rows) -> Tensor:
        """What the layer makes of rows (rows, width)."""
        made = self.multiplied(rows)
        _open_rows(made, rows.steps, rows.lowest, self.sums, self.bias)
        return torch.from_numpy(made)

    def forward(self, given: Tensor) -> Tensor:
        """What the layer makes of numbers (..., width)."""
        x = given.detach().reshape(-1, given.shape[-1]).float().contiguous()
        rows = Rows.room(*x.shape)
        take(x, self, rows)
        return self.of(rows).view(*given.shape[:-1], -1)


def take(x: Tensor, layer: Linear, to: Rows) -> None:
    """Numbers (rows, width) as the codes that a layer takes."""
    _take_rows(x.numpy(), layer.given, to.codes, to.steps, to.lowest)


def add_normed(
    x: Tensor, rows: Rows, layer: Linear, gain: Tensor, shift: Tensor, epsilon: float
) -> None:
    """Add what a layer makes of rows to x, and normalise."""
    made = layer.multiplied(rows)
    _add_normed_rows(
        made, rows.steps, rows.lowest, layer.sums, layer.bias,
        x.numpy(), gain.numpy(), shift.numpy(), np.float32(epsilon),
    )  # fmt: skip


def take_gelu(rows: Rows, layer: Linear, following: Linear, to: Rows) -> None:
    """GELU of what a layer makes of rows, as the codes that the following layer takes."""
    made = layer.multiplied(rows)
    _take_gelu_rows(
        made, rows.steps, rows.lowest, layer.sums, layer.bias,
        following.given, to.codes, to.steps, to.lowest,
    )  # fmt: skip


def _product(weight: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
    """Codes (rows, in) to their products (rows, out) with weights (out, in), times scales (out)."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx2_supported():
        own = (weight * scales[:, None]).float()
        return lambda codes: nn.functional.linear(codes.float(), own)
    onednn = cast(Any, torch.ops.onednn)
    packed = onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(len(weight), dtype=torch.int64)

    def multiply(codes: Tensor) -> Tensor:
        # Input scale 1 and zero 0, no bias, and out come float32 numbers with nothing done to them.
        return onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return multiply


# -- rows ----------------------------------------------------------------------------------------


@summing
def _open(row: Floats, step: Any, lowest: Any, sums: Floats, bias: Floats) -> None:
    for at in range(len(row)):
        row[at] = row[at] * step + lowest * sums[at] + bias[at]


@summing
def _take(row: Floats, given: Floats, codes: Codes) -> Any:
    """Step and lowest number by which a row became codes."""
    lowest, step = given
    if step == 0:
        lowest = highest = row[0]
        for at in range(len(row)):
            number = row[at]
            lowest = number if number < lowest else lowest
            highest = number if number > highest else highest
        step = max((highest - lowest) / np.float32(255), np.float32(1e-20))
    by = np.float32(1) / step
    for at in range(len(row)):
        code = (row[at] - lowest) * by + np.float32(0.5)
        codes[at] = np.uint8(min(max(code, np.float32(0)), np.float32(255)))
    return step, lowest


@summing
def _gelu(row: Floats) -> None:
    """GELU by an error function that is off by 3e-7 at most (Abramowitz and Stegun, 7.1.28)."""
    one, half = np.float32(1), np.float32(0.5)
    for at in range(len(row)):
        number = row[at]
        x = abs(number) * np.float32(0.7071067811865476)
        d = np.float32(0.0002765672) + x * np.float32(0.0000430638)
        d = np.float32(0.0092705272) + x * (np.float32(0.0001520143) + x * d)
        d = one + x * (np.float32(0.0705230784) + x * (np.float32(0.0422820123) + x * d))
        d *= d
        d *= d
        d *= d
        d *= d
        row[at] = half * (number + abs(number) * (one - one / d))


@summing
def _add_normed(row: Floats, x: Floats, gain: Floats, shift: Floats, epsilon: Any) -> None:
    width = np.float32(len(x))
    total = np.float32(0)
    for at in range(len(x)):
        x[at] += row[at]
        total += x[at]
    mean = total / width
    total = np.float32(0)
    for at in range(len(x)):
        apart = x[at] - mean
        total += apart * apart
    by = np.float32(1) / np.sqrt(total / width + epsilon)
    for at in range(len(x)):
        x[at] = (x[at] - mean) * by * gain[at] + shift[at]


@compiled
def _open_rows(made: Floats, steps: Floats, lowest: Floats, sums: Floats, bias: Floats) -> None:
    for row in range(len(made)):
        _open(made[row], steps[row], lowest[row], sums, bias)


@compiled
def _take_rows(x: Floats, given: Floats, codes: Codes, steps: Floats, lowest: Floats) -> None:
    for row in range(len(x)):
        steps[row], lowest[row] = _take(x[row], given, codes[row])


@compiled
def _take_gelu_rows(
    made: Floats,
    steps: Floats,
    lowest: Floats,
    sums: Floats,
    bias: Floats,
    given: Floats,
    codes: Codes,
    new_steps: Floats,
    new_lowest: Floats,
) -> None:
    for row in range(len(made)):
        _open(made[row], steps[row], lowest[row], sums, bias)
        _gelu(made[row])
        new_steps[row], new_lowest[row] = _take(made[row], given, codes[row])


@compiled
def _add_normed_rows(
    made: Floats,
    steps: Floats,
    lowest: Floats,
    sums: Floats,
    bias: Floats,
    x: Floats,
    gain: Floats,
    shift: Floats,
    epsilon: Any,
) -> None:
    for row in range(len(made)):
        _open(made[row], steps[row], lowest[row], sums, bias)
        _add_normed(made[row], x[row], gain, shift, epsilon)
