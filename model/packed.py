"""BERT encoders without padding: the tokens of several texts end to end, as one matrix.

A padded batch computes every product for padding too, and has to be sorted by length to lose
little. Here only attention looks at where a text begins and ends. With tokens x (tokens, hidden),
a layer is that of Devlin et al. 2019 ("BERT", section 3):

    a = norm(x + W_o · attention(W_q x, W_k x, W_v x)),    x' = norm(a + W_2 · gelu(W_1 a))

On a CPU the model's own weights are used as they lie, in float32 or in eight bits (`int8`), and
what a layer makes goes into memory that is taken once for all layers, but where oneDNN multiplies
(`products`), which takes its own. In float32 whoever reads a product next adds its offset, but for
those of attention: a query's is part of the product, a key's
adds the same to all scores of a query, which softmax does not see, and a value's comes through as
it is, since weights add up to one, so it is added with the next. `recorded` is the same on a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import attention, between, int8, products

_PLAIN = {nn.Embedding, nn.LayerNorm}  # all that holds weights in a plain BERT but for products

Vectors = NDArray[np.float32]
Weight = tuple[Tensor, Tensor]  # weight and offset
Product = TypeVar("Product", Weight, int8.Linear)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (tokens, heads, width) to what each token attends to, likewise."""


@dataclass(frozen=True)
class Layer(Generic[Product]):
    """Weights of one layer."""

    attention: tuple[Product, ...]  # queries, keys and values, one by one or as one product
    mixed: Product
    mixed_norm: Weight
    inner: Product
    outer: Product
    outer_norm: Weight


@dataclass(frozen=True)
class Bert:
    """What a BERT encoder multiplies."""

    words: Tensor  # (vocabulary, hidden)
    positions: Tensor  # (longest, hidden)
    norm: Weight
    layers: tuple[Layer[Any], ...]
    heads: int
    epsilon: float

    @property
    def hidden(self) -> int:
        """Width of a token."""
        return self.words.shape[1]

    @property
    def quantized(self) -> bool:
        """Whether its products are in eight bits."""
        return isinstance(self.layers[0].inner, int8.Linear)


@dataclass(frozen=True)
class Room:
    """Memory for what a layer makes, taken once for all layers."""

    parts: tuple[Tensor, Tensor, Tensor]  # (tokens, hidden) each
    mixed: Tensor  # (tokens, hidden)
    inner: Tensor  # (tokens, inner)

    @classmethod
    def of(cls, bert: Bert, tokens: int) -> "Room":
        """Room for so many tokens."""
        first, second, third, mixed = torch.empty(4, tokens, bert.hidden).unbind()
        inner = torch.empty(tokens, bert.layers[0].inner[0].shape[0])
        return cls((first, second, third), mixed, inner)

    def first(self, tokens: int) -> "Room":
        """The beginning of it."""
        first, second, third = (each[:tokens] for each in self.parts)
        return Room((first, second, third), self.mixed[:tokens], self.inner[:tokens])


def fits(model: nn.Module) -> bool:
    """Whether `read` finds in a model all that it does: a BERT, unchanged, that nobody watches."""
    settings: Any = getattr(model, "config", None)
    if type(model).__name__ != "BertModel" or settings.hidden_act != "gelu" or settings.is_decoder:
        return False
    if getattr(settings, "position_embedding_type", "absolute") != "absolute":
        return False
    modules = list(model.modules())
    # Who watches would not be called; torch has no public way to ask whether anybody does.
    if any(each._forward_hooks for each in modules):  # pyright: ignore[reportPrivateUsage]
        return False
    kinds = {type(each) for each in modules if hasattr(each, "weight")} - _PLAIN
    if not kinds <= {nn.Linear, products.Linear} and kinds != {int8.Linear}:
        return False
    layers: list[Any] = list(cast(Any, model).encoder.layer)
    if any(type(each).__name__ != "BertLayer" for each in layers):
        return False
    square = (settings.hidden_size, settings.hidden_size)
    return all(each.attention.self.query.weight.shape == square for each in layers)


def read(model: nn.Module, joined: bool = False) -> Bert:
    """The weights of a model that `fits`; `joined`: a layer's first three products as one copy."""
    found: Any = model
    settings, embeddings = found.config, found.embeddings

    def of(each: Any) -> Any:
        if isinstance(each, int8.Linear):
            return each
        return each.weight.detach(), each.bias.detach()

    def layer(each: Any) -> Layer[Any]:
        own = each.attention.self
        parts = of(own.query), of(own.key), of(own.value)
        if joined:
            weights, offsets = zip(*parts, strict=True)
            parts = ((torch.cat(weights), torch.cat(offsets)),)
        output = each.attention.output
        return Layer(
            parts,
            of(output.dense),
            of(output.LayerNorm),
            of(each.intermediate.dense),
            of(each.output.dense),
            of(each.output.LayerNorm),
        )

    kind = embeddings.token_type_embeddings.weight[0]  # of all tokens: texts come alone
    return Bert(
        words=embeddings.word_embeddings.weight.detach(),
        positions=(embeddings.position_embeddings.weight + kind).detach(),
        norm=of(embeddings.LayerNorm),
        layers=tuple(layer(each) for each in found.encoder.layer),
        heads=settings.num_attention_heads,
        epsilon=settings.layer_norm_eps,
    )


def _embed(bert: Bert, ids: Tensor, positions: Tensor) -> Tensor:
    x = bert.words[ids] + bert.positions[positions]
    return nn.functional.layer_norm(x, (bert.hidden,), *bert.norm, bert.epsilon)


def _add_normed(made: Tensor, x: Tensor, norm: Weight, epsilon: float) -> Tensor:
    return nn.functional.layer_norm(made.add_(x), x.shape[1:], *norm, epsilon)


def _times_gelu(x: Tensor, weight: Weight) -> Tensor:
    return torch.ops.aten.gelu_(nn.functional.linear(x, *weight))


def pooled(x: Tensor, bounds: Tensor, pooling: str) -> Tensor:
    """Unit vectors (texts, hidden) of states (tokens, hidden) by `bounds` (texts + 1).

    `pooling` is that of an encoder: mean, cls or last.
    """
    x = x.float()
    if pooling == "mean":
        means: Any = torch.segment_reduce(x, "mean", offsets=bounds, axis=0, unsafe=True)
        return nn.functional.normalize(means, dim=1)
    at = bounds[:-1] if pooling == "cls" else (bounds[1:] - 1).clamp(min=0)
    return nn.functional.normalize(x[at], dim=1)


@dataclass(frozen=True)
class Steps:
    """What is done between products; PyTorch's own kernels but where others are given."""

    attend: Attend  # knows where texts end
    embed: Callable[[Bert, Tensor, Tensor], Tensor] = _embed
    add_normed: Callable[[Tensor, Tensor, Weight, float], Tensor] = _add_normed
    times_gelu: Callable[[Tensor, Weight], Tensor] = _times_gelu
    pooled: Callable[[Tensor, Tensor, str], Tensor] = pooled


def states(bert: Bert, ids: Tensor, positions: Tensor, steps: Steps) -> Tensor:
    """The last layer's states (tokens, hidden).

    Args:
        bert: the weights, a layer's first three products as one.
        ids: (tokens) of all texts, end to end.
        positions: (tokens) of each in its text.
        steps: what is done between products.
    """
    tokens = len(ids)
    x = steps.embed(bert, ids, positions)
    for layer in bert.layers:
        made = nn.functional.linear(x, *layer.attention[0])
        split = (each.view(tokens, bert.heads, -1) for each in made.split(bert.hidden, 1))
        attended = steps.attend(*split).reshape(tokens, bert.hidden)
        mixed = nn.functional.linear(attended, *layer.mixed)
        x = steps.add_normed(mixed, x, layer.mixed_norm, bert.epsilon)
        outer = nn.functional.linear(steps.times_gelu(x, layer.inner), *layer.outer)
        x = steps.add_normed(outer, x, layer.outer_norm, bert.epsilon)
    return x


def _through_floats(bert: Bert, x: Tensor, attend: Attend, room: Room) -> None:
    """Take x (tokens, hidden) through the layers, in place."""
    layers: tuple[Layer[Weight], ...] = bert.layers
    for layer in layers:
        (query, query_offset), (key, _), (value, value_offset) = layer.attention
        offsets = query_offset, None, None
        parts = map(_multiplied, (x, x, x), (query, key, value), offsets, room.parts)
        split = (each.view(len(x), bert.heads, -1) for each in parts)
        attended = attend(*split).view(x.shape)
        weight, offset = layer.mixed
        made = _multiplied(attended, weight, None, room.mixed)
        offset = torch.addmv(offset, weight, value_offset)
        _add_normed_on_cpu(x, made, offset, layer.mixed_norm, bert.epsilon)
        inner = _gelu_on_cpu(x, *layer.inner, room.inner)
        weight, offset = layer.outer
        made = _multiplied(inner, weight, None, room.mixed)
        _add_normed_on_cpu(x, made, offset, layer.outer_norm, bert.epsilon)


def _multiplied(x: Tensor, weight: Tensor, offset: Tensor | None, room: Tensor) -> Tensor:
    """x Wᵀ + offset, in memory of its own or in that which there is."""
    if products.by_onednn():
        return products.multiply(x, weight, offset)
    if offset is None:
        return torch.mm(x, weight.t(), out=room)
    return torch.addmm(offset, x, weight.t(), out=room)


def _add_normed_on_cpu(
    x: Tensor, made: Tensor, offset: Tensor, norm: Weight, epsilon: float
) -> None:
    """x becomes the norm of x + made + offset; loops take one core, PyTorch all of several."""
    if torch.get_num_threads() > 1:
        x.copy_(_add_normed(made.add_(offset), x, norm, epsilon))
    else:
        gain, shift = (each.numpy() for each in norm)
        given = (x.numpy(), made.numpy(), offset.numpy())
        between.add_normed(*given, gain, shift, np.float32(epsilon))


def _gelu_on_cpu(x: Tensor, weight: Tensor, offset: Tensor, room: Tensor) -> Tensor:
    """GELU of x Wᵀ + offset."""
    if products.by_onednn():
        return products.multiply(x, weight, offset, gelu=True)
    made = torch.mm(x, weight.t(), out=room)
    if torch.get_num_threads() > 1:
        return torch.ops.aten.gelu_(made.add_(offset))
    between.gelu(made.numpy(), offset.numpy())
    return made


def _through_int8(bert: Bert, x: Tensor, attend: Attend) -> None:
    """As floats go through the layers, but numbers become codes before each product."""
    layers: tuple[Layer[int8.Linear], ...] = bert.layers
    tokens, hidden = x.shape
    narrow = int8.Rows.room(tokens, hidden)
    wide = int8.Rows.room(tokens, len(layers[0].inner.weight))
    for layer in layers:
        int8.take(x, layer.attention[0], narrow)
        queries, keys, values = (
            each.of(narrow).view(tokens, bert.heads, -1) for each in layer.attention
        )
        int8.take(attend(queries, keys, values).view(tokens, hidden), layer.mixed, narrow)
        int8.add_normed(x, narrow, layer.mixed, *layer.mixed_norm, bert.epsilon)
        int8.take(x, layer.inner, narrow)
        int8.take_gelu(narrow, layer.inner, layer.outer, wide)
        int8.add_normed(x, wide, layer.outer, *layer.outer_norm, bert.epsilon)


def encode(
    model: nn.Module, tokens: Sequence[Sequence[int]], pooling: str, budget: int
) -> Iterator[tuple[slice, Vectors]]:
    """Unit vectors (some, hidden) of texts, with which these are, at most `budget` tokens at once.

    Texts of one length attend together, so sort them by length.
    """
    bert = read(model)
    lengths = np.array([len(each) for each in tokens])
    room: Room | None = None
    for rows in batches(lengths, budget):
        some = lengths[rows]
        bounds = np.concatenate([[0], some.cumsum()])
        if not bert.quantized and (room is None or len(room.mixed) < bounds[-1]):
            room = Room.of(bert, int(bounds[-1]))
        ids = torch.from_numpy(end_to_end(tokens[rows], int(bounds[-1])))
        x = _embed(bert, ids, torch.from_numpy(positions_of(bounds)))
        if room is None:
            _through_int8(bert, x, attended(bert, some))
        else:
            _through_floats(bert, x, attended(bert, some), room.first(len(x)))
        yield rows, pooled(x, torch.from_numpy(bounds), pooling).numpy()


def batches(lengths: NDArray[np.int64], budget: int) -> Iterator[slice]:
    """Texts in a row whose tokens fit a budget; a longer text is alone."""
    ends = lengths.cumsum()
    first = 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + budget, side="right")))
        yield slice(first, last)
        first = last


def end_to_end(tokens: Sequence[Sequence[int]], count: int) -> NDArray[np.int64]:
    """Token ids (count) of all texts."""
    return np.fromiter(chain.from_iterable(tokens), np.int64, count)


def positions_of(bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each token is in its text."""
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))


def attended(bert: Bert, lengths: NDArray[np.int64]) -> Attend:
    """Attention of texts of these lengths by whoever is faster at it."""
    own = attention.suits(bert.hidden // bert.heads)
    return attention.by_head(lengths) if own else grouped(lengths)


def grouped(lengths: NDArray[np.int64]) -> Attend:
    """Attention of neighbours of one length at once."""
    changes = np.flatnonzero(np.diff(lengths)) + 1
    firsts = np.concatenate([[0], changes])
    counts = np.diff(np.concatenate([firsts, [len(lengths)]])).tolist()
    groups = list(zip(counts, lengths[firsts].tolist(), strict=True))
    sizes = [count * length for count, length in groups]

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        found = torch.empty_like(queries)
        heads = queries.shape[1:]
        for (count, length), *parts, to in zip(
            groups, *(each.split(sizes) for each in (queries, keys, values, found)), strict=True
        ):
            q, k, v = (each.view(count, length, *heads).transpose(1, 2) for each in parts)
            one = nn.functional.scaled_dot_product_attention(q, k, v)
            to.view(count, length, *heads).copy_(one.transpose(1, 2))
        return found

    return attend
