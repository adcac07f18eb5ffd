"""The fused network as it serves on a CPU: what `FusedNetwork.forward` says, several times faster.

Weights are fixed, so what depends on them and an id or a vector alone is made once: the part of a
recent item's token that comes from its hashed id is a table by bucket, a text's vector is
multiplied when it is first met, trees lose the nodes that ask nothing. What is row by row (taste,
trees, attention, standardising) is compiled (`serving_loops`); dense layers are matrix products of
blocks of one size, the last one padded, since products of another size may add in another order,
and an event must score the same alone and in any batch. Members stand side by side as one network,
whose layers between them hold zeros: few large products take less time than many small ones.

Cost of a row of one member, with the trainer's default sizes: 17,000 products in the dense layers
(4,096 more each time a new vector is met); of each tree, as many questions as its deepest leaf lies
below its root. Of k members side by side, k times that, and as many zeros again for three.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.lookups import Source
from model.network import (
    ACTION_BITS,
    FusedNetwork,
    Ids,
    Inputs,
    Member,
    NetworkConfig,
    blocks,
    check,
)
from model.serving_loops import BLOCK, attend, climb, embed, fold_in, standardise
from model.taste import COLUMNS, Taste
from model.trees import Trees

Singles = NDArray[np.float32]

# Outputs of one come in so many, which an AVX-512 register holds, or a row would not be the same
# alone and in any batch: of six, MKL's AVX2 code rounds every second row another way, as its place
# in memory begins, and of 104 its AVX-512 code (on Zen 5) some columns, by how many threads share.
_WIDTH = 16
_CHUNK = 8 * BLOCK  # rows at a time, so that a long test fits in memory
_NOTHING = np.empty((0, 0), np.float32)
_TOGETHER = 4  # members side by side: among more, zeros would cost more than calls
_ALONE = 2**15 - 1  # most numbers that PyTorch leaves to one thread


@dataclass(frozen=True)
class _Dense:
    """A linear layer."""

    weight: Tensor  # (inputs, outputs)
    bias: Tensor  # (outputs,)

    def __call__(self, rows: Tensor, begun: Tensor | None = None) -> Tensor:
        """Outputs (n, outputs) of rows (n, inputs), n a multiple of the block.

        `begun` is added to as many first rows and first outputs as it has.
        """
        weight, bias = self._padded
        made = torch.empty((len(rows), len(bias)))
        for first in range(0, len(rows), BLOCK):
            block = slice(first, first + BLOCK)
            torch.addmm(bias, rows[block], weight, out=made[block])
        if begun is not None:
            made[: len(begun), : begun.shape[1]] += begun
        return made[:, : len(self.bias)]

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """With outputs up to a multiple of `_WIDTH`."""
        more = -len(self.bias) % _WIDTH
        pad = torch.nn.functional.pad
        return pad(self.weight, (0, more)), pad(self.bias, (0, more))


class _Products:
    """What vectors give in linear layers without a bias, multiplied when first asked for."""

    def __init__(self, layers: Sequence[_Dense], *, of_recents: bool) -> None:
        self._layers, self._of_recents = layers, of_recents
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
        if self._of_recents:
            wanted[inputs.recent_vectors] = True
        new = np.flatnonzero(wanted & ~self._done[: len(vectors)])
        for first in range(0, len(new), _CHUNK):
            rows = new[first : first + _CHUNK]
            block = np.zeros((-(-len(rows) // BLOCK) * BLOCK, vectors.shape[1]), np.float32)
            block[: len(rows)] = vectors[rows]
            for layer, made in zip(self._layers, self._made, strict=True):
                made[rows] = layer(torch.from_numpy(block))[: len(rows)].numpy()
        self._done[new] = True
        return self._made


class _Begun(NamedTuple):
    """Products of a batch's vectors with k members' weights."""

    hidden: Singles  # (m, k · width)
    query: Singles  # (m, k · heads · token); without attention nothing, like `tokens`
    tokens: Singles  # (m, k · token)


@dataclass(frozen=True)
class _Attention:
    """Of k members."""

    query: _Dense  # scaled; of all but the item's vector
    query_by_vector: _Dense
    by_vector: _Dense  # from a recent item's vector to its share of a token; without a bias
    by_item: Singles  # (buckets, k · token): an id's share
    by_rating: Singles  # (2, k · token): of what the stars are, and that there are any
    by_actions: Singles  # (256, k · token)
    by_position: Singles  # (16, k · token): and what every token has
    output: _Dense


class _Pruned(NamedTuple):
    """Trees without the nodes that ask nothing.

    The right child follows the left one. Where a missing value goes right, F + feature is asked.
    A leaf goes left to itself, whatever it asks: so a path needs no look at whether it has ended.
    """

    # Numbers that are never negative are told so: an index that may be is looked at twice.
    roots: NDArray[np.uint32]  # (T)
    depths: NDArray[np.uint32]  # (T)
    asked: NDArray[np.uint32]  # of each node: where the feature begins in a block of columns,
    thresholds: Singles
    left: NDArray[np.uint32]  # the left child,
    values: Singles  # and of a leaf what it says


@dataclass(frozen=True)
class _Served:
    """Members, k of them, as one network; outputs are their sums."""

    users: Singles  # (buckets, k · identity)
    items: Singles
    categories: Singles  # (name_buckets, k · identity)
    brands: Singles
    attention: _Attention | None
    by_vector: _Dense  # from the item's vector to its share of what the first hidden layer gets
    first: _Dense  # of all but the item's vector to k · width, and the linear path beside them
    second: _Dense
    last: _Dense

    def by_vectors(self) -> Sequence[_Dense | None]:
        """Layers over vectors, in the order of `_Begun`."""
        if (attention := self.attention) is None:
            return self.by_vector, None, None
        return self.by_vector, attention.query_by_vector, attention.by_vector


class Served:
    """A network's weights, ready for `outputs`; changes of the network after that are not seen."""

    def __init__(self, network: FusedNetwork) -> None:
        self._config = network.config
        members = network.networks
        self._served = [
            _together(members[at : at + _TOGETHER], network.config)
            for at in range(0, len(members), _TOGETHER)
        ]
        scaling = ("mean", "scale", "low", "high", "used")
        self._scaling = np.stack([_array(getattr(network, f"feature_{each}")) for each in scaling])
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
            layers = [layer for each in self._served for layer in each.by_vectors() if layer]
            of_recents = self._config.heads > 0
            self._products[inputs.source] = _Products(layers, of_recents=of_recents)
        made = iter(self._products[inputs.source].of(inputs))
        return [
            _Begun(*(next(made) if layer else _NOTHING for layer in each.by_vectors()))
            for each in self._served
        ]

    def _chunk(self, inputs: Inputs, begun: Sequence[_Begun]) -> tuple[NDArray[Any], NDArray[Any]]:
        config, count = self._config, len(inputs)
        ids = Ids.of(config, inputs)
        columns = self._columns(inputs, ids)
        rows = -(-count // BLOCK) * BLOCK
        features = np.zeros((rows, 2 * config.columns), np.float32)
        standardise(columns, self._scaling, features)
        output = np.zeros((rows, 6), np.float32)
        for served, products in zip(self._served, begun, strict=True):
            output += _head(served, config, features, inputs, ids, products)
        output = output[:count] / np.float32(config.members)
        correction = output[:, 0].copy()
        if self._trees is not None:
            said = np.zeros(count, np.float32)
            climb(columns, self._trees, said)
            correction += said
        bias = columns[:, config.bias_column]
        return bias + self._shrink * correction, self._prior + output[:, 1:]

    def _columns(self, inputs: Inputs, ids: Ids) -> Singles:
        """Features, then what the taste says (n, C)."""
        if self._taste is None:
            return np.ascontiguousarray(inputs.features)
        columns = np.empty((len(inputs), self._config.columns), np.float32)
        told = np.empty((len(inputs), len(COLUMNS)), np.float32)
        columns[:, : self._config.features] = inputs.features
        running = np.nan_to_num(inputs.features[:, self._config.running_columns])
        rated = (ids.recents, inputs.recent_ratings, ids.older, inputs.older_ratings)
        fold_in(*self._taste, ids.item, *rated, running, told)
        columns[:, self._config.features :] = told
        return columns


def _array(tensor: Tensor) -> Singles:
    return np.array(tensor.detach().cpu().numpy(), np.float32, order="C")


def _dense(layer: Any) -> _Dense:
    weight = layer.weight.detach().cpu().T.clone(memory_format=torch.contiguous_format)
    none = torch.zeros(weight.shape[1])
    return _Dense(weight, none if layer.bias is None else layer.bias.detach().cpu().clone())


def _together(members: Sequence[Member], config: NetworkConfig) -> _Served:
    """Members side by side: first all features, then what each makes of the items' ids, and so on.

    `joined` is (n, 2 C + k · (item, category, brand, user, recent items)), kind by kind.
    """
    sizes = list(blocks(config).values())
    hidden = [_dense(member.hidden[0]) for member in members]
    kinds = zip(*(layer.weight.split(sizes) for layer in hidden), strict=True)
    features, missing, text, *others = kinds
    first = torch.cat([torch.cat(features, 1), torch.cat(missing, 1), *map(_diagonal, others)])
    linear = torch.zeros((len(first), 1))
    linear[: 2 * config.columns] = torch.stack(
        [_dense(member.linear).weight for member in members]
    ).sum(0)
    bias = torch.cat([*(layer.bias for layer in hidden), torch.zeros(1)])
    last = [_dense(member.last) for member in members]
    return _Served(
        _side_by_side(member.users.table for member in members),
        _side_by_side(member.items.table for member in members),
        _side_by_side(member.categories.table for member in members),
        _side_by_side(member.brands.table for member in members),
        _attention(members, config) if config.heads else None,
        _unbiased(torch.cat(text, 1)),
        _Dense(torch.cat([first, linear], 1), bias),
        _apart([_dense(member.hidden[3]) for member in members]),
        _Dense(
            torch.cat([layer.weight for layer in last]),
            torch.stack([layer.bias for layer in last]).sum(0),
        ),
    )


def _attention(members: Sequence[Member], config: NetworkConfig) -> _Attention:
    attentions = [member.attention for member in members if member.attention is not None]
    scale = config.token**-0.5
    query = [_dense(each.query) for each in attentions]
    ids = (config.identity,) * 3
    text, *others = zip(
        *((layer.weight * scale).split((config.vector, *ids)) for layer in query), strict=True
    )
    recent = [_dense(each.recent) for each in attentions]
    by_vector, by_identity, by_rating, by_bit = zip(
        *(layer.weight.split((config.vector, config.identity, 2, ACTION_BITS)) for layer in recent),
        strict=True,
    )
    tables = [member.items.table.weight.detach().cpu() for member in members]
    by_item = [table @ weight for table, weight in zip(tables, by_identity, strict=True)]
    actions = np.unpackbits(np.arange(2**ACTION_BITS, dtype=np.uint8)[:, None], axis=1)
    positions = [each.position.detach().cpu() for each in attentions]
    return _Attention(
        _Dense(torch.cat([*map(_diagonal, others)]), torch.cat([q.bias * scale for q in query])),
        _unbiased(torch.cat(text, 1)),
        _unbiased(torch.cat(by_vector, 1)),
        _array(torch.cat(by_item, 1)),
        _array(torch.cat(by_rating, 1)),
        _array(torch.from_numpy(actions).float() @ torch.cat(by_bit, 1)),
        _array(torch.cat(positions, 1) + torch.cat([layer.bias for layer in recent])),
        _apart([_dense(each.output) for each in attentions]),
    )


def _side_by_side(tables: Iterable[Any]) -> Singles:
    return _array(torch.cat([table.weight for table in tables], 1))


def _apart(layers: Sequence[_Dense]) -> _Dense:
    """Layers, each of inputs of its own that stand side by side."""
    weights = _diagonal([layer.weight for layer in layers])
    return _Dense(weights, torch.cat([layer.bias for layer in layers]))


def _diagonal(weights: Sequence[Tensor]) -> Tensor:
    return torch.block_diag(*weights)  # pyright: ignore[reportUnknownMemberType]


def _unbiased(weight: Tensor) -> _Dense:
    return _Dense(weight.contiguous(), torch.zeros(weight.shape[1]))


def _taste(
    taste: Taste,
) -> tuple[Singles, Singles, Singles, Singles, float, Singles, float, Singles]:
    items = (taste.factors, taste.offsets, taste.corrections, taste.ratings)
    factors, offsets, corrections, ratings = (_array(table) for table in items)
    shop = float(taste.level), _array(taste.ridge), float(taste.damping), _array(taste.trust)
    return factors, offsets, corrections, ratings, *shop


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
        np.array(roots, np.uint32),
        np.array(depths, np.uint32),
        np.array(asked, np.uint32) * np.uint32(BLOCK),
        np.array(thresholds, np.float32),
        np.array(left, np.uint32),
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


def _silu(rows: Tensor) -> Tensor:
    """SiLU (n, width), in place.

    By so few rows that threads do not share them: one's share may end within a row, where PyTorch
    rounds the last numbers another way.
    """
    for some in rows.split(max(1, _ALONE // rows.shape[1])):
        torch.nn.functional.silu(some, inplace=True)
    return rows


def _head(
    served: _Served,
    config: NetworkConfig,
    features: Singles,
    inputs: Inputs,
    ids: Ids,
    begun: _Begun,
) -> Singles:
    """Correction in stars and logits (rows, 6), summed over the members."""
    begin, identity = features.shape[1], served.items.shape[1]
    joined = np.zeros((len(features), len(served.first.weight)), np.float32)
    joined[:, :begin] = features
    tables = (served.items, served.categories, served.brands, served.users)
    embed(
        *tables, ids.item, ids.categories, ids.brand, ids.user.astype(np.int64), joined[:, begin:]
    )
    rows = torch.from_numpy(joined)
    if (attention := served.attention) is not None:
        heard = np.zeros((len(joined), len(attention.output.weight)), np.float32)
        asking = rows[:, begin : begin + 3 * identity]
        attend(
            attention.query(asking, _of_items(begun.query, inputs)).numpy(),
            config.token,
            begun.tokens,
            inputs.recent_vectors,
            attention.by_item,
            ids.recents,
            inputs.recent_ratings,
            inputs.recent_actions,
            attention.by_rating,
            attention.by_actions,
            attention.by_position,
            heard,
        )
        rows[:, begin + 4 * identity :] = attention.output(torch.from_numpy(heard))
    made = served.first(rows, _of_items(begun.hidden, inputs))
    hidden, linear = made[:, :-1], made[:, -1:]
    made = served.last(_silu(served.second(_silu(hidden))))
    made[:, :1] += linear
    return made.numpy()
