"""What a BERT encoder does on a GPU between its products, each step once through memory.

PyTorch's own kernels read and write all of a layer's numbers several times for one step, which
with MiniLM on an H100 takes twice as long as the products. These are written in Triton (Tillet et
al. 2019), which torch for CUDA comes with. Numbers are read as they lie (bfloat16), worked on in
float32 and rounded once.
"""

from __future__ import annotations

import importlib
from math import e, log2
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from model.packed import Bert, Steps, Weight, pooled

if TYPE_CHECKING:  # a kernel is called with other types than it sees
    constexpr: TypeAlias = Any
    tensor: TypeAlias = Any
else:
    from triton.language import constexpr, tensor

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

# What was fastest of a dozen on an H100, with 8,192 to 32,768 tokens at once.
_ATTEND = {"block": 64, "keys": 64, "num_warps": 4, "num_stages": 3}
_NORM = {"block": 4, "num_warps": 2}
_POOL = {"block": 16, "num_warps": 2}

_OF_E = log2(e)  # powers of two are faster than those of e


def steps(spans: Tensor) -> Steps:
    """All that `packed.Steps` has.

    `spans` (2, tokens, int32): where the text of each token begins and ends, as they are when the
    kernels run. Heads must be 16, 32, 64 or 128 wide and tokens a multiple of 64.
    """

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tokens, heads, width = queries.shape
        found = torch.empty(tokens, heads, width, dtype=queries.dtype, device=queries.device)
        grid = (tokens // _ATTEND["block"], heads)
        scale = _OF_E * width**-0.5
        stride = queries.stride(0)
        _attend[grid](
            queries, keys, values, spans, found, tokens, stride, scale, heads, width, **_ATTEND
        )
        return found

    return Steps(attend, _embed, _add_normed, _times_gelu, _pooled)


def _embed(bert: Bert, ids: Tensor, positions: Tensor) -> Tensor:
    found = bert.words.new_empty(len(ids), bert.hidden)
    _normed(bert.words, bert.positions, ids, positions, bert.norm, found, bert.epsilon)
    return found


def _add_normed(made: Tensor, x: Tensor, norm: Weight, epsilon: float) -> Tensor:
    _normed(made, x, None, None, norm, made, epsilon)
    return made


def _normed(
    given: Tensor,
    others: Tensor,
    given_rows: Tensor | None,
    other_rows: Tensor | None,
    norm: Weight,
    found: Tensor,
    epsilon: float,
) -> None:
    rows, hidden = found.shape
    wide = triton.next_power_of_2(hidden)
    grid = (rows // _NORM["block"],)
    _sum_normed[grid](
        given, others, given_rows, other_rows, *norm, found, epsilon, hidden, wide, **_NORM
    )


def _times_gelu(x: Tensor, weight: Weight) -> Tensor:
    """By the product's own last step, which is GELU by tanh on a GPU: nearer than bfloat16 is."""
    return torch.ops.aten._addmm_activation(weight[1], x, weight[0].t(), use_gelu=True)


def _pooled(x: Tensor, bounds: Tensor, pooling: str) -> Tensor:
    if pooling != "mean":
        return pooled(x, bounds, pooling)
    texts, hidden = len(bounds) - 1, x.shape[1]
    found = torch.empty(texts, hidden, device=x.device)
    _mean_normed[(texts,)](x, bounds, found, hidden, triton.next_power_of_2(hidden), **_POOL)
    return found


@triton.jit
def _attend(
    queries: tensor, keys_of: tensor, values_of: tensor, spans: tensor,
    found: tensor, tokens: tensor, stride: tensor, scale: tensor,
    heads: constexpr, width: constexpr, block: constexpr, keys: constexpr,
) -> None:  # fmt: skip
    """Softmax attention of a block of tokens to those of their own texts.

    Source: Dao 2023, FlashAttention-2, algorithm 1; but a block holds tokens of several texts.
    """
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.program_id(1) * width + tl.arange(0, width)
    first, last = tl.load(spans + rows), tl.load(spans + tokens + rows)
    end = tl.max(last)
    query = tl.load(queries + rows[:, None] * stride + columns[None, :])  # (block, width)
    highest = tl.full((block,), -1e30, tl.float32)  # finite: of no text comes no NaN
    total = tl.zeros((block,), tl.float32)
    mixed = tl.zeros((block, width), tl.float32)
    for at in range(tl.min(first), end, keys):
        others = at + tl.arange(0, keys)
        there = others < end
        across = keys_of + others[None, :] * stride + columns[:, None]
        down = values_of + others[:, None] * stride + columns[None, :]
        key = tl.load(across, mask=there[None, :], other=0.0)  # (width, keys)
        value = tl.load(down, mask=there[:, None], other=0.0)  # (keys, width)
        own = (others[None, :] >= first[:, None]) & (others[None, :] < last[:, None])
        score = tl.where(own, tl.dot(query, key) * scale, float("-inf"))  # (block, keys)
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(weight, 1)
        mixed = mixed * kept[:, None] + tl.dot(weight.to(value.dtype), value)
        highest = higher
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    to = found + rows[:, None] * (heads * width) + columns[None, :]
    tl.store(to, mixed.to(found.dtype.element_ty))


@triton.jit
def _sum_normed(
    given: tensor, others: tensor, given_rows: tensor, other_rows: tensor,
    weights: tensor, offsets: tensor, found: tensor, epsilon: tensor,
    hidden: constexpr, wide: constexpr, block: constexpr,
) -> None:  # fmt: skip
    """The norm (Ba et al. 2016) of sums of rows, as they lie or, where numbers are given, of those.

    `wide`: the next power of two from `hidden`, since a block is that wide.
    """
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.arange(0, wide)
    inside = columns < hidden
    mask = inside[None, :]
    left = rows if given_rows is None else tl.load(given_rows + rows)
    right = rows if other_rows is None else tl.load(other_rows + rows)
    one = tl.load(given + left[:, None] * hidden + columns[None, :], mask=mask, other=0.0)
    two = tl.load(others + right[:, None] * hidden + columns[None, :], mask=mask, other=0.0)
    x = one.to(tl.float32) + two.to(tl.float32)  # (block, wide)
    x = tl.where(mask, x - tl.sum(x, 1)[:, None] / hidden, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 1) / hidden + epsilon)[:, None]
    weight = tl.load(weights + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(offsets + columns, mask=inside, other=0.0).to(tl.float32)
    x = x * weight[None, :] + offset[None, :]
    to = found + rows[:, None] * hidden + columns[None, :]
    tl.store(to, x.to(found.dtype.element_ty), mask=mask)


@triton.jit
def _mean_normed(
    x: tensor, bounds: tensor, found: tensor, hidden: constexpr, wide: constexpr, block: constexpr
) -> None:  # fmt: skip
    """The mean of a text's rows, of unit length; zero where there are none."""
    text = tl.program_id(0)
    last = tl.load(bounds + text + 1)
    columns = tl.arange(0, wide)
    inside = columns < hidden
    total = tl.zeros((wide,), tl.float32)
    for at in range(tl.load(bounds + text), last, block):
        rows = at + tl.arange(0, block)
        mask = (rows < last)[:, None] & inside[None, :]
        part = tl.load(x + rows[:, None] * hidden + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    length = tl.sqrt(tl.sum(total * total, 0))
    total /= tl.where(length > 0, length, 1.0)  # a sum is as long as a mean then
    tl.store(found + text * hidden + columns, total, mask=inside)
