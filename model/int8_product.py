"""Products of codes in eight bits, for processors with AVX2 but without VNNI.

Such a processor has one instruction that multiplies 32 codes by 32 weights and adds neighbours in
sixteen bits, and one that adds those in 32 bits; it starts two of either in a cycle. Libraries do
the second after each first, so that it does 32 products in a cycle, twice what it does in float32.
Here sums stay in sixteen bits for eight products, which a third instruction adds, of which it
starts four. For 128 products that is

    4 multiplications + 1 widening = 5 of 2 a cycle,    3 + 1 sums,    so 51 in a cycle.

Nothing is cut, since weights are scaled by `limit`: of those that meet in one sum neither the
positive nor the negative ones come to more than 128. Weights are about as finely rounded by that as
by seven bits for the largest of a row, which pairs alone would ask for.

A tile of 3 rows by 16 columns has six sums of sixteen bits and six of 32 in the 16 registers.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from model import lanes
from model.compiled import compiled

_ROWS, _COLUMNS = 3, 16  # of a tile
_STEPS, _DEPTH = 4, 4  # multiplications before sums widen, and codes of a row in each
_BLOCK = _STEPS * _DEPTH  # codes of a row until then
_GROUP = _BLOCK // 2  # products that meet in a sum of sixteen bits
_MOST = 128  # to which weights of one sign in a group may add up: 255 · 128 fits into sixteen bits
_ALIGNED = 64  # bytes


def suits(weight: Tensor) -> bool:
    """Whether `multiply` takes weights (out, in), and is the fastest way here."""
    out, width = weight.shape
    fits = out % _COLUMNS == 0 and width % _BLOCK == 0
    return fits and lanes.usable() and lanes.widest()


def limit(weight: Tensor) -> Tensor:
    """The least scale (out) of weights (out, in) by which no sum of a group is cut."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % _BLOCK))
    groups = padded.reshape(len(weight), -1, _STEPS, 2, 2)  # of a block: steps, groups, neighbours
    above = groups.clamp(min=0).sum((2, 4)).flatten(1).amax(1)
    below = groups.clamp(max=0).sum((2, 4)).flatten(1).amin(1).neg()
    return torch.maximum(above, below) / (_MOST - _GROUP / 2)  # each may be rounded up by a half


def pack(weight: Tensor) -> NDArray[np.int8]:
    """Weights (out, in) in the order in which `multiply` reads them."""
    out, width = weight.shape
    tiles = weight.numpy().reshape(out // _COLUMNS, _COLUMNS, width // _DEPTH, _DEPTH)
    ordered = tiles.transpose(0, 2, 1, 3).ravel()
    room = np.empty(ordered.size + _ALIGNED, np.int8)
    first = -room.ctypes.data % _ALIGNED
    packed = room[first : first + ordered.size]
    packed[:] = ordered
    return packed


@compiled
def multiply(
    codes: NDArray[np.uint8],
    packed: NDArray[np.int8],
    scales: NDArray[np.float32],
    made: NDArray[np.float32],
) -> None:
    """`made` (rows, out) becomes codes (rows, in) times packed weights, times their scales (out).

    All lie without gaps.
    """
    rows, width = codes.shape
    out = len(scales)
    for column in range(0, out, _COLUMNS):
        for row in range(0, rows, _ROWS):
            _tile(
                codes.ctypes.data + row * width, width, min(_ROWS, rows - row),
                packed.ctypes.data + column * width, width // _BLOCK,
                scales.ctypes.data + column * 4,
                made.ctypes.data + (row * out + column) * 4, 4 * out,
            )  # fmt: skip


# -- a tile -------------------------------------------------------------------------------------

_VECTORS = _COLUMNS // lanes.LANES  # of a step's weights: 8 columns, 4 codes of each


def _multiplied(
    _: Any, codes: Any, width: Any, rows: Any, weights: Any, blocks: Any,
    scales: Any, made: Any, made_row: Any,
) -> Any:  # fmt: skip
    """3 rows of codes (rows, width) times 16 columns of weights; after the last, itself."""

    def build(context: Any, builder: Any, _: Any, given: Sequence[Any]) -> Any:
        codes, width, rows, weights, blocks, scales, made, made_row = given
        code = lanes.Code(builder)
        # LLVM would add in pairs, for which there are too few registers: an empty instruction
        # that takes a sum in its register keeps their order.
        kept = ir.InlineAsm(ir.FunctionType(lanes.SHORTS, [lanes.SHORTS]), "", "=x,0")
        starts = code.first(codes, width, rows, _ROWS)
        places = code.first(made, made_row, rows, _ROWS)
        totals = code.sums(lanes.WORDS, _ROWS, _VECTORS)
        with cgutils.for_range(builder, blocks) as loop:
            block = code.times(loop.index, _BLOCK)
            packed = code.after(weights, code.times(block, _COLUMNS))
            sums: dict[tuple[int, int], Any] = {}
            for step in range(_STEPS):
                first = step * _DEPTH * _COLUMNS
                read = [
                    code.read(code.after(packed, first + lanes.SIZE * vector), lanes.BYTES)
                    for vector in range(_VECTORS)
                ]
                for row, start in enumerate(starts):
                    four = code.read(code.after(start, block, step * _DEPTH), lanes.WORD)
                    same = builder.bitcast(code.spread(four), lanes.BYTES)
                    for vector, each in enumerate(read):
                        product = code.call("x86.avx2.pmadd.ub.sw", lanes.SHORTS, same, each)
                        if step:
                            product = builder.add(sums[row, vector], product)
                            product = builder.call(kept, [product])
                        sums[row, vector] = product
            ones = lanes.same(lanes.SHORTS, 1)
            for each, total in totals.items():
                more = code.call("x86.avx2.pmadd.wd", lanes.WORDS, sums[each], ones)
                builder.store(builder.add(builder.load(total), more), total)
        for (row, vector), total in totals.items():
            scale = code.read(code.after(scales, lanes.SIZE * vector), lanes.NUMBERS)
            scaled = builder.fmul(builder.sitofp(builder.load(total), lanes.NUMBERS), scale)
            code.write(scaled, code.after(places[row], lanes.SIZE * vector))
        return context.get_dummy_value()

    return types.void(*[lanes.ADDRESS] * 8), build


_tile = cast(Callable[..., None], intrinsic(_multiplied))
