"""The fused network as it serves on a CPU: what `FusedNetwork.forward` says, several times faster.

Weights are fixed, so what depends on them and an id or a vector alone is made once: the part of a
recent item's token that comes from its hashed id is a table by bucket, a text's vector is
multiplied when it is first met, trees lose the nodes that ask nothing. What is row by row (taste,
trees, attention, standardising) is compiled loops; dense layers are matrix products of blocks of
one size, the last one padded, since products of another size may add in another order, and an
event must score the same alone and in any batch.

Cost of a row and a member, with the default sizes: 31,000 products in the dense layers (fewer by
those of the vector: 61,000 more each time a new one is met), 10,000 in the attention; an average
path of four questions for each tree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.compiled import compiled
from model.ids import low_half
from model.lookups import Source
from model.network import FusedNetwork, Inputs, Member, NetworkConfig, bucket, check
from model.state import RATING_STEPS
from model.taste import COLUMNS, RIDGE, Taste
from model.trees import Trees

Singles = NDArray[np.float32]

_BLOCK = 128  # rows of a matrix product
# Outputs of one come in so many: of six, MKL's AVX2 code rounds every second row another way, as
# its place in memory begins, and a row would not be the same alone and in any batch.
_WIDTH = 8
_CHUNK = 8 * _BLOCK  # rows at a time, so that a long test fits in memory
_NOTHING = np.empty((0, 0), np.float32)
_BITS = 8  # of a recent item's actions


@dataclass(frozen=True)
class _Dense:
    """A linear layer."""

    weight: Tensor  # (inputs, outputs)
    bias: Tensor  # (outputs,)

    def __call__(self, rows: Tensor, begun: Tensor | None = None) -> Tensor:
        """Of rows (n, inputs), n a multiple of the block; `begun` (at most n, outputs) is added."""
        weight, bias = self._padded
        made = torch.empty((len(rows), len(bias)))
        for first in range(0, len(rows), _BLOCK):
            block = slice(first, first + _BLOCK)
            torch.addmm(bias, rows[block], weight, out=made[block])
        if begun is not None:
            made[: len(begun), : len(self.bias)] += begun
        return made[:, : len(self.bias)]

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """With outputs up to a multiple of `_WIDTH`."""
        more = -len(self.bias) % _WIDTH
        pad = torch.nn.functional.pad
        return pad(self.weight, (0, more)), pad(self.bias, (0, more))


class _Products:
    """What vectors give in linear layers without a bias, multiplied when first asked for."""

    def __init__(self, layers: Sequence[_Dense]) -> None:
        self._layers = layers
        self._done = np.zeros(0, np.bool_)
        self._made = [np.empty((0, len(layer.bias)), np.float32) for layer in layers]

    def of(self, inputs: Inputs) -> Sequence[Singles]:
        """By layer, the products (m, outputs) of the vectors that rows name; others' are junk."""
        vectors, old = inputs.vectors, len(self._done)
        if len(vectors) > old:
            size = max(len(vectors), 2 * old)
            self._done = np.concatenate([self._done, np.zeros(size - old, np.bool_)])
            self._made = [
                np.concatenate([made, np.empty((size - old, made.shape[1]), np.float32)])
                for made in self._made
            ]
        wanted = np.zeros(len(vectors), np.bool_)
        wanted[inputs.item_vectors] = True
        wanted[inputs.recent_vectors] = True
        new = np.flatnonzero(wanted & ~self._done[: len(vectors)])
        for first in range(0, len(new), _CHUNK):
            rows = new[first : first + _CHUNK]
            block = np.zeros((-(-len(rows) // _BLOCK) * _BLOCK, vectors.shape[1]), np.float32)
            block[: len(rows)] = vectors[rows]
            for layer, made in zip(self._layers, self._made, strict=True):
                made[rows] = layer(torch.from_numpy(block))[: len(rows)].numpy()
        self._done[new] = True
        return self._made


class _Begun(NamedTuple):
    """A member's products of a batch's vectors."""

    hidden: Singles  # (m, width)
    query: Singles  # (m, heads · token); without attention nothing, like `tokens`
    tokens: Singles  # (m, token)


@dataclass(frozen=True)
class _Attention:
    query: _Dense  # scaled; of all but the item's vector
    query_by_vector: _Dense
    by_vector: _Dense  # from a recent item's vector to its share of a token; without a bias
    by_item: Singles  # (buckets, token): an id's share
    by_feedback: Singles  # (10, token): rating, whether there is one, action bits 0 to 7
    by_position: Singles  # (16, token): and what every token has
    output: _Dense


class _Pruned(NamedTuple):
    """Trees without the nodes that ask nothing.

    The right child follows the left one. Where a missing value goes right, F + feature is asked.
    A leaf goes left to itself, whatever it asks: so a path needs no look at whether it has ended.
    """

    roots: NDArray[np.int32]  # (T)
    depths: NDArray[np.int32]  # (T)
    asked: NDArray[np.int32]  # of each node: the feature,
    thresholds: Singles
    left: NDArray[np.int32]  # the left child,
    values: Singles  # and of a leaf what it says


@dataclass(frozen=True)
class _Served:
    """One member."""

    users: Singles  # (buckets, identity)
    items: Singles
    categories: Singles  # (name_buckets, identity)
    brands: Singles
    attention: _Attention | None
    by_vector: _Dense  # from the item's vector to its share of what the first hidden layer gets
    hidden: Sequence[_Dense]  # the first of all but the item's vector
    last: _Dense
    linear: _Dense

    def by_vectors(self) -> Sequence[_Dense | None]:
        """Layers over vectors, in the order of `_Begun`."""
        if (attention := self.attention) is None:
            return self.by_vector, None, None
        return self.by_vector, attention.query_by_vector, attention.by_vector


class Served:
    """A network's weights, ready for `outputs`; changes of the network after that are not seen."""

    def __init__(self, network: FusedNetwork) -> None:
        self._config = network.config
        self._members = [_member(each, network.config) for each in network.networks]
        self._scaling = np.stack(
            [
                _array(network.feature_mean),
                _array(network.feature_scale),
                _array(network.feature_low),
                _array(network.feature_high),
                _array(network.feature_used),
            ]
        )
        self._prior, self._shrink = _array(network.prior), np.float32(network.shrink)
        self._taste = None if network.taste is None else _taste(network.taste)
        self._trees = None if network.trees is None else _pruned(network.trees)
        # By whose the vectors are: each reader of a worker has its own, and asks in its own thread.
        self._products = WeakKeyDictionary[Source, _Products]()

    @torch.inference_mode()
    def outputs(self, inputs: Inputs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean (n,) and logits (n, 5), not calibrated.

        Raises ValueError when the inputs do not fit the network's configuration.
        """
        config, count = self._config, len(inputs)
        check(config, inputs)
        mean, logits = np.empty(count), np.empty((count, 5))
        begun = self._begun(inputs)
        for first in range(0, count, _CHUNK):
            rows = slice(first, first + _CHUNK)
            mean[rows], logits[rows] = self._chunk(inputs.take(rows), begun)
        return mean, logits

    def _begun(self, inputs: Inputs) -> list[_Begun]:
        if inputs.source not in self._products:
            layers = [layer for each in self._members for layer in each.by_vectors() if layer]
            self._products[inputs.source] = _Products(layers)
        made = iter(self._products[inputs.source].of(inputs))
        return [
            _Begun(*(next(made) if layer else _NOTHING for layer in each.by_vectors()))
            for each in self._members
        ]

    def _chunk(self, inputs: Inputs, begun: Sequence[_Begun]) -> tuple[NDArray[Any], NDArray[Any]]:
        config, count = self._config, len(inputs)
        ids = _Ids(config, inputs)
        columns = self._columns(inputs, ids)
        rows = -(-count // _BLOCK) * _BLOCK
        joined = np.zeros((rows, len(self._members[0].hidden[0].weight)), np.float32)
        _standardise(columns, self._scaling, joined)
        output = np.zeros((rows, 6), np.float32)
        for member, products in zip(self._members, begun, strict=True):
            output += _head(member, config, joined, inputs, ids, products)
        output = output[:count] / np.float32(len(self._members))
        correction = output[:, 0].copy()
        if self._trees is not None:
            said = np.zeros(count, np.float32)
            _climb(columns, self._trees, said)
            correction += said
        bias = inputs.features[:, config.bias_column]
        return bias + self._shrink * correction, self._prior + output[:, 1:]

    def _columns(self, inputs: Inputs, ids: "_Ids") -> Singles:
        """Features, then what the taste says (n, C)."""
        if self._taste is None:
            return np.ascontiguousarray(inputs.features)
        columns = np.empty((len(inputs), self._config.columns), np.float32)
        told = np.empty((len(inputs), len(COLUMNS)), np.float32)
        columns[:, : self._config.features] = inputs.features
        user_bias = inputs.features[:, self._config.user_bias_column].copy()
        rated = (ids.recent, inputs.recent_ratings, ids.older, inputs.older_ratings)
        _fold_in(*self._taste, ids.item, *rated, user_bias, told)
        columns[:, self._config.features :] = told
        return columns


class _Ids:
    """Ids as buckets."""

    def __init__(self, config: NetworkConfig, inputs: Inputs) -> None:
        self.user = bucket(inputs.users, config.buckets).astype(np.int64)
        self.item = bucket(low_half(inputs.items), config.buckets)
        self.recent = bucket(low_half(inputs.recents), config.buckets)
        some = slice(int(np.count_nonzero(inputs.older, axis=1).max(initial=0)))
        self.older = bucket(inputs.older[:, some], config.buckets)
        self.categories = bucket(inputs.categories, config.name_buckets)
        self.brand = bucket(inputs.brands, config.name_buckets)


def _array(tensor: Tensor) -> Singles:
    return np.array(tensor.detach().cpu().numpy(), np.float32, order="C")


def _dense(layer: Any) -> _Dense:
    weight = layer.weight.detach().cpu().T.clone(memory_format=torch.contiguous_format)
    none = torch.zeros(weight.shape[1])
    return _Dense(weight, none if layer.bias is None else layer.bias.detach().cpu().clone())


def _member(member: Member, config: NetworkConfig) -> _Served:
    by_vector, first = _without(_dense(member.hidden[0]), 2 * config.columns, config.vector)
    return _Served(
        _array(member.users.table.weight),
        _array(member.items.table.weight),
        _array(member.categories.table.weight),
        _array(member.brands.table.weight),
        None if member.attention is None else _attention(member, config),
        by_vector,
        [first, _dense(member.hidden[3])],
        _dense(member.last),
        _dense(member.linear),
    )


def _attention(member: Member, config: NetworkConfig) -> _Attention:
    attention = member.attention
    assert attention is not None
    query, recent = _dense(attention.query), _dense(attention.recent)
    scale = config.token**-0.5
    sizes = (config.vector, config.identity, 2, _BITS)
    by_vector, by_identity, by_rating, by_bit = recent.weight.split(sizes)
    query_by_vector, query = _without(
        _Dense(query.weight * scale, query.bias * scale), 0, config.vector
    )
    return _Attention(
        query,
        query_by_vector,
        _Dense(by_vector.contiguous(), torch.zeros(config.token)),
        _array(member.items.table.weight.detach().cpu() @ by_identity),
        _array(torch.cat([by_rating, by_bit.flip(0)])),  # training unpacks the highest bit first
        _array(attention.position.detach().cpu() + recent.bias),
        _dense(attention.output),
    )


def _without(layer: _Dense, first: int, count: int) -> tuple[_Dense, _Dense]:
    """A layer of `count` inputs alone, without a bias, and one of all others."""
    before, these, after = layer.weight.split((first, count, len(layer.weight) - first - count))
    alone = _Dense(these.contiguous(), torch.zeros_like(layer.bias))
    return alone, _Dense(torch.cat([before, after]), layer.bias)


def _taste(taste: Taste) -> tuple[Singles, Singles, float]:
    return _array(taste.factors), _array(taste.offsets), float(taste.level)


def _pruned(trees: Trees) -> _Pruned:
    feature, threshold, value = (
        each.cpu().numpy() for each in (trees.feature, trees.threshold, trees.value)
    )
    nodes: list[tuple[int, float, int, float]] = []

    def place(tree: int, node: int, at: int) -> int:
        """Put a node and all below it; gives how many levels there are below."""
        below = _leaves(value[tree], node)
        if (below == below[0]).all():
            nodes[at] = (0, math.inf, at, float(below[0]))
            return 0
        left = len(nodes)
        nodes[at] = (int(feature[tree, node]), float(threshold[tree, node]), left, 0.0)
        nodes.extend([nodes[at], nodes[at]])
        return 1 + max(place(tree, 2 * node + 1 + side, left + side) for side in range(2))

    roots: list[int] = []
    depths: list[int] = []
    for tree in range(len(value)):
        roots.append(len(nodes))
        nodes.append((0, 0.0, 0, 0.0))
        depths.append(place(tree, 0, roots[-1]))
    asked, thresholds, left, values = zip(*nodes, strict=True)
    return _Pruned(
        np.array(roots, np.int32),
        np.array(depths, np.int32),
        np.array(asked, np.int32),
        np.array(thresholds, np.float32),
        np.array(left, np.int32),
        np.array(values, np.float32),
    )


def _leaves(value: Singles, node: int) -> Singles:
    """Values (at least one) of the lowest nodes below a node of a heap."""
    first = last = node
    while 2 * last + 2 < len(value):
        first, last = 2 * first + 1, 2 * last + 2
    return value[first : last + 1]


def _of_items(products: Singles, inputs: Inputs) -> Tensor:
    """What each row's item gives (n, outputs)."""
    return torch.from_numpy(products.take(inputs.item_vectors, axis=0))


def _head(
    member: _Served,
    config: NetworkConfig,
    joined: Singles,
    inputs: Inputs,
    ids: _Ids,
    begun: _Begun,
) -> Singles:
    """Correction in stars and logits of one member (rows, 6); fills its part of `joined`."""
    at = wide = 2 * config.columns
    end = at + 3 * config.identity
    tables = (member.items, member.categories, member.brands, member.users)
    _embed(*tables, ids.item, ids.categories, ids.brand, ids.user, joined[:, at:])
    rows = torch.from_numpy(joined)
    if (attention := member.attention) is not None:
        heard = np.zeros((len(joined), config.heads * config.token), np.float32)
        _attend(
            attention.query(rows[:, wide:end], _of_items(begun.query, inputs)).numpy(),
            begun.tokens,
            inputs.recent_vectors,
            attention.by_item,
            ids.recent,
            inputs.recent_ratings,
            inputs.recent_actions,
            attention.by_feedback,
            attention.by_position,
            heard,
        )
        rows[:, end + config.identity :] = attention.output(torch.from_numpy(heard))
    first, second = member.hidden
    hidden = torch.nn.functional.silu(first(rows, _of_items(begun.hidden, inputs)), inplace=True)
    hidden = torch.nn.functional.silu(second(hidden), inplace=True)
    made = member.last(hidden)
    made[:, :1] += member.linear(rows[:, :wide])
    return made.numpy()


@compiled
def _embed(
    items: Any,
    categories: Any,
    brands: Any,
    users: Any,
    item: Any,
    category: Any,
    brand: Any,
    user: Any,
    joined: Any,
) -> None:
    """Fill the first 4 widths of `joined` with the embeddings of n rows' ids."""
    width = items.shape[1]
    for row in range(len(item)):
        for at in range(width):
            total = np.float32(0)
            for level in range(category.shape[1]):
                total += categories[category[row, level], at]
            joined[row, at] = items[item[row], at]
            joined[row, width + at] = total
            joined[row, 2 * width + at] = brands[brand[row], at]
            joined[row, 3 * width + at] = users[user[row], at]


@compiled
def _standardise(columns: Any, scaling: Any, joined: Any) -> None:
    """Columns (n, C) to values and missing flags in the first 2 C of `joined`."""
    width = columns.shape[1]
    mean, scale, low, high, used = scaling
    for row in range(len(columns)):
        for at in range(width):
            value = columns[row, at]
            if np.isnan(value):
                joined[row, width + at] = used[at]
            else:
                value = (value - mean[at]) / scale[at]
                joined[row, at] = max(min(value, high[at]), low[at]) * used[at]


@compiled
def _fold_in(
    factors: Any,
    offsets: Any,
    level: float,
    item: Any,
    recent: Any,
    recent_rating: Any,
    older: Any,
    older_rating: Any,
    user_bias: Any,
    said: Any,
) -> None:
    """The columns of `model.taste` (n, 4)."""
    count = factors.shape[1]
    gram, person = np.empty((count, count)), np.empty(count)
    for row in range(len(item)):
        gram[:], person[:] = 0.0, 0.0
        bias = 0.0 if np.isnan(user_bias[row]) else user_bias[row]
        known = 0
        for slot in range(recent.shape[1]):
            stars = recent_rating[row, slot]
            if not np.isnan(stars):
                bucket = recent[row, slot]
                left = stars - (level + offsets[bucket] + bias)
                known += _rate(factors[bucket], left, gram, person)
        for slot in range(older.shape[1]):
            bucket = older[row, slot]
            if bucket:
                stars = older_rating[row, slot] / np.float32(RATING_STEPS)
                left = stars - (level + offsets[bucket] + bias)
                known += _rate(factors[bucket], left, gram, person)
        if known:
            _solve(gram, person)
        wanted = factors[item[row]]
        taste = strength = wanted_strength = 0.0
        for at in range(count):
            taste += person[at] * wanted[at]
            strength += person[at] * person[at]
            wanted_strength += np.float64(wanted[at]) * wanted[at]
        said[row, 0], said[row, 1] = taste, known
        said[row, 2], said[row, 3] = strength, wanted_strength


@compiled
def _rate(known: Any, left: float, gram: Any, person: Any) -> int:
    """Add one rated item to the normal equations; 0 where its factors are not known."""
    some = 0
    for at in range(len(known)):
        if known[at] != 0:
            some = 1
        person[at] += known[at] * left
        for other in range(at + 1):
            gram[at, other] += np.float64(known[at]) * known[other]
    return some


@compiled
def _solve(gram: Any, right: Any) -> None:
    """(gram + RIDGE I)^-1 right, in place, by Cholesky; of gram the lower half is read."""
    count = len(right)
    for at in range(count):
        gram[at, at] += RIDGE
        for other in range(at):
            total = gram[at, other]
            for inner in range(other):
                total -= gram[at, inner] * gram[other, inner]
            gram[at, other] = total / gram[other, other]
        total = gram[at, at]
        for inner in range(at):
            total -= gram[at, inner] * gram[at, inner]
        gram[at, at] = np.sqrt(total)
        total = right[at]
        for inner in range(at):
            total -= gram[at, inner] * right[inner]
        right[at] = total / gram[at, at]
    for at in range(count - 1, -1, -1):
        total = right[at]
        for inner in range(at + 1, count):
            total -= gram[inner, at] * right[inner]
        right[at] = total / gram[at, at]


@compiled
def _climb(columns: Any, trees: Any, said: Any) -> None:
    """Add what trees say of each row: a tree at a time for as many rows as a core's cache holds."""
    roots, depths, asked, thresholds, left, values = trees
    count, width = columns.shape
    nodes = np.empty(_BLOCK, np.int32)
    asked_of = np.empty((2 * width, _BLOCK), np.float32)  # a missing value goes left, then right
    for first in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - first)
        for row in range(rows):
            for at in range(width):
                value = columns[first + row, at]
                missing = np.isnan(value)
                asked_of[at, row] = -np.inf if missing else value
                asked_of[width + at, row] = np.inf if missing else value
        for tree in range(len(roots)):
            for row in range(rows):
                nodes[row] = roots[tree]
            for _ in range(depths[tree]):
                for row in range(rows):
                    node = nodes[row]
                    nodes[row] = left[node] + (asked_of[asked[node], row] > thresholds[node])
            for row in range(rows):
                said[first + row] += values[nodes[row]]


@compiled
def _attend(
    query: Any,
    by_vector: Any,
    vector_rows: Any,
    by_item: Any,
    recent: Any,
    rating: Any,
    actions: Any,
    by_feedback: Any,
    by_position: Any,
    heard: Any,
) -> None:
    """What each head hears (n, heads · token) of the recent items; see `network.Attention`."""
    slots, width = by_position.shape
    heads = query.shape[1] // width
    tokens = np.empty((slots, width), np.float32)
    scores = np.empty(slots, np.float32)
    places = np.empty(slots, np.int64)
    for row in range(len(recent)):
        count = 0
        for slot in range(slots):
            if recent[row, slot] == 0:
                continue
            token = tokens[count]
            vector, item = by_vector[vector_rows[row, slot]], by_item[recent[row, slot]]
            for at in range(width):
                token[at] = by_position[slot, at] + vector[at] + item[at]
            stars = rating[row, slot]
            if not np.isnan(stars):
                high = (stars - np.float32(3)) / np.float32(2)
                for at in range(width):
                    token[at] += high * by_feedback[0, at] + by_feedback[1, at]
            for bit in range(_BITS):
                if actions[row, slot] >> bit & 1:
                    for at in range(width):
                        token[at] += by_feedback[2 + bit, at]
            places[count] = slot
            count += 1
        for head in range(heads):
            begin = head * width
            highest = np.float32(0)  # of the score of nothing
            for at in range(count):
                score = np.float32(0)
                for inner in range(width):
                    score += query[row, begin + inner] * tokens[at, inner]
                scores[at] = score
                highest = max(highest, score)
            total = np.exp(-highest)
            for at in range(count):
                scores[at] = np.exp(scores[at] - highest)
                total += scores[at]
            for at in range(count):
                weight = scores[at] / total
                for inner in range(width):
                    heard[row, begin + inner] += weight * tokens[at, inner]
