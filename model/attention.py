"""Attention of short texts on a CPU, head by head, by tiles that stay in registers.

With queries Q, keys K and values V (n, width) of a head, each token attends to

    softmax(Q Kᵀ / √width) V

Six queries at a time: their products with all keys, 16 keys in a tile, stay in a core's nearest
cache until they are weights of values. PyTorch's way asks a library for each product of a block,
which for a width of 32 and few tokens takes longer than the product, and copies what it is given.
"""

import math
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

Singles = NDArray[np.float32]

_ROWS, _COLUMNS = 6, 16  # of a tile
_VECTORS = _COLUMNS // lanes.LANES
# Of 2^x for x from -1/2 to 1/2, highest power first: ln(2)^k / k!, off by 1.2e-7.
_POWERS = [math.log(2) ** k / math.factorial(k) for k in range(6, -1, -1)]


def suits(width: int) -> bool:
    """Whether `by_head` takes heads of this width, and is the faster way here."""
    return width % _COLUMNS == 0 and lanes.usable()


def by_head(lengths: NDArray[np.int64]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of texts of these lengths, end to end, with (tokens, heads, width) each."""
    tiles = -(-int(lengths.max()) // _COLUMNS)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tokens, heads, width = queries.shape
        found = torch.empty(tokens, heads, width)
        turned = np.empty((tiles, width, _COLUMNS), np.float32)
        weights = np.empty((_ROWS, tiles * _COLUMNS), np.float32)
        scales = np.full((2, _ROWS), 1 / (math.log(2) * math.sqrt(width)), np.float32)
        _attend(
            _flat(queries), _flat(keys), _flat(values), heads, lengths, _flat(found),
            turned, weights, scales,
        )  # fmt: skip
        return found

    return attend


def _flat(each: Tensor) -> Singles:
    return each.reshape(len(each), -1).contiguous().numpy()


@compiled
def _attend(
    queries: Singles,
    keys: Singles,
    values: Singles,
    heads: int,
    lengths: NDArray[np.int64],
    found: Singles,
    turned: Singles,
    weights: Singles,
    scales: Singles,
) -> None:
    """What tokens of texts attend to: all (tokens, heads · width), texts end to end.

    Room: `turned` (tiles, width, 16) for a text's keys of one head, `weights` (6, tiles · 16);
    `scales` (2, 6) has those of scores, as powers of two, and room for those of sums. It is the
    caller's, since compiled loops give up what is read by its address alone.
    """
    hidden = queries.shape[1]
    width = hidden // heads
    between = 4 * hidden  # bytes from token to token
    column, line = 4 * _COLUMNS, 4 * weights.shape[1]
    query, key, value = queries.ctypes.data, keys.ctypes.data, values.ctypes.data
    tile, weight, to = turned.ctypes.data, weights.ctypes.data, found.ctypes.data
    scale, share = scales[0].ctypes.data, scales[1].ctypes.data
    first = 0
    for length in lengths:
        count = -(-length // _COLUMNS)
        for head in range(heads):
            start = between * first + 4 * width * head
            for token in range(0, count * _COLUMNS, lanes.LANES):
                _turn(key + start, between, token, length, width, tile)
            for row in range(0, length, _ROWS):
                rows = min(_ROWS, length - row)
                given = query + start + between * row
                for at in range(count):
                    _multiply(
                        given, between, rows, tile + column * width * at, column, width,
                        scale, weight + column * at, line,
                    )  # fmt: skip
                for each in range(rows):
                    scales[1, each] = np.float32(1) / _raise(weight + line * each, length)
                for at in range(start, start + 4 * width, column):
                    _multiply(
                        weight, line, rows, value + at, between, length,
                        share, to + at + between * row, between,
                    )  # fmt: skip
        first += length


# -- tiles ---------------------------------------------------------------------------------------


def _turned(_: Any, keys: Any, between: Any, first: Any, count: Any, width: Any, to: Any) -> Any:
    """8 of `count` keys from `first` on as columns of tiles (width, 16); after the last, itself."""

    def build(context: Any, builder: Any, _: Any, given: Sequence[Any]) -> Any:
        keys, between, first, count, width, to = given
        code = lanes.Code(builder)
        last = builder.sub(count, lanes.LONG(1))
        starts = [
            code.after(keys, builder.mul(between, code.least(code.after(first, lane), last)))
            for lane in range(lanes.LANES)
        ]
        tile = builder.udiv(first, lanes.LONG(_COLUMNS))
        column = code.times(builder.urem(first, lanes.LONG(_COLUMNS)), 4)
        place = code.after(to, builder.mul(tile, code.times(width, 4 * _COLUMNS)), column)
        with cgutils.for_range(builder, builder.udiv(width, lanes.LONG(lanes.LANES))) as loop:
            at = code.times(loop.index, lanes.SIZE)
            square = [code.read(code.after(start, at), lanes.NUMBERS) for start in starts]
            down = code.after(place, code.times(at, _COLUMNS))
            for number, row in enumerate(code.transposed(square)):
                code.write(row, code.after(down, 4 * _COLUMNS * number))
        return context.get_dummy_value()

    return types.void(*[lanes.ADDRESS] * 6), build


def _multiplied(
    _: Any, a: Any, a_row: Any, rows: Any, b: Any, b_row: Any, depth: Any,
    scales: Any, to: Any, to_row: Any,
) -> Any:  # fmt: skip
    """6 rows of a (rows, depth) times b (depth, 16), times a scale of each; after the last, itself.

    `_row`: bytes from row to row.
    """

    def build(context: Any, builder: Any, _: Any, given: Sequence[Any]) -> Any:
        a, a_row, rows, b, b_row, depth, scales, to, to_row = given
        code = lanes.Code(builder)
        starts = code.first(a, a_row, rows, _ROWS)
        factors = code.first(scales, lanes.LONG(4), rows, _ROWS)
        places = code.first(to, to_row, rows, _ROWS)
        sums = code.sums(lanes.NUMBERS, _ROWS, _VECTORS)
        with cgutils.for_range(builder, depth) as loop:
            line = code.after(b, builder.mul(b_row, loop.index))
            read = [
                code.read(code.after(line, lanes.SIZE * vector), lanes.NUMBERS)
                for vector in range(_VECTORS)
            ]
            for row, start in enumerate(starts):
                at = code.after(start, code.times(loop.index, 4))
                same = code.spread(code.read(at, lanes.NUMBER))
                for vector, each in enumerate(read):
                    total = sums[row, vector]
                    more = code.call("fma.v8f32", lanes.NUMBERS, same, each, builder.load(total))
                    builder.store(more, total)
        for row, place in enumerate(places):
            scale = code.spread(code.read(factors[row], lanes.NUMBER))
            for vector in range(_VECTORS):
                scaled = builder.fmul(builder.load(sums[row, vector]), scale)
                code.write(scaled, code.after(place, lanes.SIZE * vector))
        return context.get_dummy_value()

    return types.void(*[lanes.ADDRESS] * 9), build


def _raised(_: Any, row: Any, length: Any) -> Any:
    """Numbers of a row become powers of two, the largest 1, and their sum is given.

    What is between its length and a multiple of 8 must not be larger, and is not in the sum.
    """

    def build(_: Any, builder: Any, __: Any, given: Sequence[Any]) -> Any:
        row, length = given
        code = lanes.Code(builder)
        vectors = builder.udiv(code.after(length, lanes.LANES - 1), lanes.LONG(lanes.LANES))
        places = ir.Constant(lanes.WORDS, list(range(lanes.LANES)))

        def larger(one: Any, other: Any) -> Any:  # the other, where one of both is no number
            return code.call("x86.avx.max.ps.256", lanes.NUMBERS, one, other)

        def across(two: Callable[[Any, Any], Any], vector: Any) -> Any:
            for half in (4, 2, 1):
                places = [(lane + half) % lanes.LANES for lane in range(lanes.LANES)]
                turned = builder.shuffle_vector(vector, vector, ir.Constant(lanes.WORDS, places))
                vector = two(vector, turned)
            return builder.extract_element(vector, lanes.WORD(0))

        largest = cgutils.alloca_once_value(builder, lanes.same(lanes.NUMBERS, -math.inf))
        with cgutils.for_range(builder, vectors) as loop:
            at = code.after(row, code.times(loop.index, lanes.SIZE))
            builder.store(larger(builder.load(largest), code.read(at, lanes.NUMBERS)), largest)
        top = code.spread(across(larger, builder.load(largest)))
        total = cgutils.alloca_once_value(builder, lanes.same(lanes.NUMBERS, 0))
        with cgutils.for_range(builder, vectors) as loop:
            at = code.after(row, code.times(loop.index, lanes.SIZE))
            below = builder.fsub(code.read(at, lanes.NUMBERS), top)
            below = larger(lanes.same(lanes.NUMBERS, -126), below)  # the least exponent
            whole = builder.fptosi(builder.fsub(below, lanes.same(lanes.NUMBERS, 0.5)), lanes.WORDS)
            part = builder.fsub(below, builder.sitofp(whole, lanes.NUMBERS))
            power = lanes.same(lanes.NUMBERS, _POWERS[0])
            for each in _POWERS[1:]:
                factor = lanes.same(lanes.NUMBERS, each)
                power = code.call("fma.v8f32", lanes.NUMBERS, power, part, factor)
            exponent = builder.add(whole, lanes.same(lanes.WORDS, 127))
            bits = builder.shl(exponent, lanes.same(lanes.WORDS, 23))
            power = builder.fmul(power, builder.bitcast(bits, lanes.NUMBERS))
            code.write(power, at)
            left = builder.sub(length, code.times(loop.index, lanes.LANES))
            within = builder.icmp_signed("<", places, code.spread(builder.trunc(left, lanes.WORD)))
            counted = builder.select(within, power, lanes.same(lanes.NUMBERS, 0))
            builder.store(builder.fadd(builder.load(total), counted), total)
        return across(builder.fadd, builder.load(total))

    return types.float32(lanes.ADDRESS, lanes.ADDRESS), build


_turn = cast(Callable[..., None], intrinsic(_turned))
_multiply = cast(Callable[..., None], intrinsic(_multiplied))
_raise = cast(Callable[..., np.float32], intrinsic(_raised))
