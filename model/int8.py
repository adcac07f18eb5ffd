"""Products in eight bits on a CPU: what the linear layers of a quantized encoder become.

A row x of numbers is held as codes c, x ≈ lowest + step · c, with a lowest number and a step of its
own, or with those of all rows that were seen before. A row of weights is held as codes v and a
scale. So

    W x + b ≈ scale · (step · V c + lowest · V 1) + b

where only V c is a product of matrices. Codes of numbers have eight bits. Those of weights have
about seven, since processors without VNNI add products in sixteen bits, and no sum may be cut:
`int8_product` says how, and multiplies on such a processor with one thread. Else oneDNN does.

A row hangs on no other, so a text's vector does not hang on the texts beside it. What is done
between two products is one loop over rows, each of which stays in a core's nearest cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import between, int8_product
from model.compiled import compiled, summing

Singles = NDArray[np.float32]
Codes = NDArray[np.uint8]

_HIGHEST = np.float32(255)  # code of a number
_LEAST = np.float32(1e-20)  # step of a row whose numbers are all the same
_OWN = np.zeros(2, np.float32)  # each row has a lowest number and a step of its own
_MULTIPLIED = ("AVX2", "AVX512")  # processors for which oneDNN's product is made
_CACHED = 2**16  # numbers that our product makes before they are read: a core's own cache has room


@dataclass(frozen=True)
class Rows:
    """Numbers as codes."""

    codes: Codes  # (rows, width)
    lowest: Singles  # (rows)
    steps: Singles  # (rows)

    @classmethod
    def room(cls, rows: int, width: int) -> "Rows":
        """Room for so many."""
        lowest, steps = np.empty((2, rows), np.float32)
        return cls(np.empty((rows, width), np.uint8), lowest, steps)

    def __getitem__(self, some: slice) -> "Rows":
        """Some of them."""
        return Rows(self.codes[some], self.lowest[some], self.steps[some])


class Linear(nn.Module):
    """A linear layer in eight bits, without gradients.

    `seen`: the least and the largest number that went in; without it rows go by their own.
    """

    weight: Tensor

    def __init__(self, layer: nn.Linear, seen: Sequence[float] | None = None) -> None:
        """Take over a layer's weights."""
        super().__init__()
        weight = layer.weight.detach().float()
        scales = int8_product.limit(weight).clamp(min=float(_LEAST))
        codes = (weight / scales[:, None]).round().to(torch.int8)
        self.register_buffer("weight", codes)
        self.taken = _OWN
        if seen is not None:
            least, largest = (np.float32(each) for each in seen)
            self.taken = np.array([least, max((largest - least) / _HIGHEST, _LEAST)], np.float32)
        offset = cast(Tensor | None, layer.bias)
        bias = torch.zeros_like(scales) if offset is None else offset.detach().float()
        self.added = np.stack([(codes.sum(1) * scales).numpy(), bias.numpy()])
        self._own = int8_product.suits(codes)
        product = _own_product if self._own else _library_product
        # scale · V c (rows, out) of codes, to be opened
        self.multiplied = product(codes, scales)

    def parts(self, rows: int) -> Iterator[slice]:
        """Rows by so many as are best multiplied together."""
        count = max(1, _CACHED // len(self.weight) if self._own else rows)
        return (slice(first, first + count) for first in range(0, rows, count))

    def of(self, rows: Rows) -> Tensor:
        """What the layer makes of rows: (rows, out)."""
        made = self.multiplied(rows.codes)
        _open_rows(made, rows.lowest, rows.steps, self.added)
        return torch.from_numpy(made)

    def forward(self, given: Tensor) -> Tensor:
        """What the layer makes of numbers (..., in)."""
        x = given.detach().float().reshape(-1, given.shape[-1]).contiguous()
        rows = Rows.room(*x.shape)
        take(x, self, rows)
        return self.of(rows).view(*given.shape[:-1], len(self.weight))


def take(x: Tensor, layer: Linear, to: Rows) -> None:
    """Numbers (rows, in) as the codes that a layer takes."""
    _take_rows(x.numpy(), layer.taken, to.codes, to.lowest, to.steps)


def take_gelu(rows: Rows, layer: Linear, following: Linear, to: Rows) -> None:
    """GELU of what a layer makes of rows, as the codes that the following layer takes."""
    for part in layer.parts(len(rows.codes)):
        some, into = rows[part], to[part]
        _gelu_rows(
            layer.multiplied(some.codes), some.lowest, some.steps, layer.added,
            following.taken, into.codes, into.lowest, into.steps,
        )  # fmt: skip


def add_normed(
    x: Tensor, rows: Rows, layer: Linear, gain: Tensor, shift: Tensor, epsilon: float
) -> None:
    """Add to x (rows, out) what a layer makes of rows, and normalise."""
    for part in layer.parts(len(rows.codes)):
        some = rows[part]
        _add_normed_rows(
            layer.multiplied(some.codes), some.lowest, some.steps, layer.added,
            x[part].numpy(), gain.numpy(), shift.numpy(), np.float32(epsilon),
        )  # fmt: skip


def _own_product(weight: Tensor, scales: Tensor) -> Callable[[Codes], Singles]:
    packed, by = int8_product.pack(weight), scales.numpy()

    def multiply(codes: Codes) -> Singles:
        made = np.empty((len(codes), len(by)), np.float32)
        int8_product.multiply(codes, packed, by, made)
        return made

    return multiply


def _library_product(weight: Tensor, scales: Tensor) -> Callable[[Codes], Singles]:
    if torch.backends.cpu.get_cpu_capability() not in _MULTIPLIED:
        own = weight * scales[:, None]
        return lambda codes: nn.functional.linear(torch.from_numpy(codes).float(), own).numpy()
    onednn: Any = torch.ops.onednn
    packed = onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    # Codes as they are (scale 1, zero at 0), no bias, float32 numbers out, nothing done to them.
    about = (packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return lambda codes: onednn.qlinear_pointwise(torch.from_numpy(codes), 1.0, 0, *about).numpy()


# -- loops over rows -----------------------------------------------------------------------------


@compiled
def _open_rows(made: Singles, lowest: Singles, steps: Singles, added: Singles) -> None:
    for row in range(len(made)):
        _open(made[row], lowest[row], steps[row], added[0], added[1])


@compiled
def _take_rows(x: Singles, taken: Singles, codes: Codes, lowest: Singles, steps: Singles) -> None:
    for row in range(len(x)):
        lowest[row], steps[row] = _take(x[row], taken, codes[row])


@compiled
def _gelu_rows(
    made: Singles,
    lowest: Singles,
    steps: Singles,
    added: Singles,
    taken: Singles,
    codes: Codes,
    new_lowest: Singles,
    new_steps: Singles,
) -> None:
    for row in range(len(made)):
        _open(made[row], lowest[row], steps[row], added[0], added[1])
        between.gelu_row(made[row])
        new_lowest[row], new_steps[row] = _take(made[row], taken, codes[row])


@compiled
def _add_normed_rows(
    made: Singles,
    lowest: Singles,
    steps: Singles,
    added: Singles,
    x: Singles,
    gain: Singles,
    shift: Singles,
    epsilon: np.float32,
) -> None:
    for row in range(len(made)):
        _open(made[row], lowest[row], steps[row], added[0], added[1])
        between.add_normed_row(x[row], made[row], gain, shift, epsilon)


@summing
def _open(row: Singles, lowest: np.float32, step: np.float32, sums: Singles, bias: Singles) -> None:
    for at in range(len(row)):
        row[at] = step * row[at] + lowest * sums[at] + bias[at]


@summing
def _take(row: Singles, taken: Singles, codes: Codes) -> tuple[np.float32, np.float32]:
    """A row as codes, with its lowest number and step."""
    lowest, step = taken
    if step == 0:
        lowest, highest = _extremes(row.view(np.int32))
        step = max((highest - lowest) / _HIGHEST, _LEAST)
    by, half = np.float32(1) / step, np.float32(0.5)
    for at in range(len(row)):
        code = (row[at] - lowest) * by + half
        codes[at] = np.uint8(min(max(code, np.float32(0)), _HIGHEST))
    return lowest, step


@compiled
def _extremes(bits: NDArray[np.int32]) -> tuple[np.float32, np.float32]:
    """The least and the largest of floats: whole numbers are compared several at once."""
    least = largest = _ordered(bits[0])
    for at in range(len(bits)):
        number = _ordered(bits[at])
        least, largest = min(least, number), max(largest, number)
    least, largest = np.int32(_ordered(least)), np.int32(_ordered(largest))
    return least.view(np.float32), largest.view(np.float32)


@compiled
def _ordered(bits: np.int32) -> np.int32:
    """The bits of a float as a whole number of the same order, and back."""
    sign = np.int32(bits >> np.int32(31))
    return np.int32(bits ^ np.int32(sign & np.int32(0x7FFFFFFF)))
