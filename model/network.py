"""The fused network: what is known of a user and an item, to a distribution over stars.

Its mean is a bias plus a correction: the running bias (a feature), or with a taste (`model.taste`)
what that makes of it. An untrained network corrects nothing: the last layers start at zero. Boosted
trees of the features (`model.trees`) may add to the correction. What the user's taste says is read
with the features.

Two parts are left out by default, since they are of no use beside a taste (docs/decisions/0034).
Ids have embeddings, which start at zero, so that one that training never met is the same as an
unknown one. The item attends to the user's recent items (Vaswani et al. 2017); one query needs no
keys and values of its own, so both projections are folded into the query's and the output's, and
sixteen recent items cost little more than one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from model.events import Rows
from model.features import FEATURES, INDEX
from model.ids import low_half
from model.lookups import Lookups, Source
from model.replay import Observation
from model.state import RATING_STEPS, RECENT
from model.taste import COLUMNS, RUNNING, Taste
from model.trees import Trees

ACTION_BITS = 8  # of a recent item's actions: a byte


class NetworkConfig(BaseModel):
    """Sizes of a fused network; they stand in its bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: int = Field(ge=1, description="columns of the feature table")
    bias_column: int = Field(ge=0, description="the column that is corrected")
    running_columns: tuple[int, ...] = Field(
        default=(0,) * len(RUNNING),
        min_length=len(RUNNING),
        max_length=len(RUNNING),
        description="the columns of the features that the taste reads",
    )
    factors: int = Field(ge=0, le=64, description="of the user's taste; 0: none")
    vector: int = Field(ge=0, le=4096, description="width of projected vectors; 0: no texts")
    width: int = Field(ge=1, le=4096, description="of the two hidden layers")
    token: int = Field(ge=1, le=1024, description="width of a recent item")
    heads: int = Field(
        ge=0, le=64, description="of the attention over recent items; 0: there is none"
    )
    identity: int = Field(
        ge=0, le=256, description="width of the embedding of a hashed id; 0: none"
    )
    buckets: int = Field(
        default=2**14, ge=2, le=2**26, description="of hashed user ids, and of item ids"
    )
    name_buckets: int = Field(
        default=2**11, ge=2, le=2**26, description="of hashed categories and brands"
    )
    dropout: float = Field(ge=0, lt=1, description="of hidden units, in training")
    unknown: float = Field(ge=0, le=1, description="share of ids made unknown in training")
    members: int = Field(ge=1, le=32, description="independent networks that are averaged")
    trees: int = Field(default=0, ge=0, le=4096, description="boosted trees beside the networks")
    tree_depth: int = Field(default=4, ge=1, le=8, description="levels of a tree's questions")

    @property
    def columns(self) -> int:
        """Columns that members and trees read: the features, then what the taste says."""
        return self.features + (len(COLUMNS) if self.factors else 0)


def network_config(**sizes: Any) -> NetworkConfig:
    """The configuration of a network of these sizes over the feature table."""
    folded = sizes["factors"] > 0
    return NetworkConfig(
        features=len(FEATURES),
        bias_column=len(FEATURES) + COLUMNS.index("taste_bias") if folded else INDEX["bias"],
        running_columns=tuple(INDEX[name] for name in RUNNING),
        **sizes,
    )


@dataclass(frozen=True)
class Inputs:
    """What a network reads of n rows.

    Vectors are one table and rows name positions in it, so a text that many rows share is held
    once; no vector is a row of zeros.
    """

    features: NDArray[np.float32]  # (n, F); nan: missing
    users: NDArray[np.uint64]  # (n,) hashes; 0: unknown
    items: NDArray[np.uint64]  # (n,)
    categories: NDArray[np.uint32]  # (n, 4) hashes of the path's prefixes; 0: none
    brands: NDArray[np.uint32]  # (n,) hashes; 0: none
    recents: NDArray[np.uint64]  # (n, 16) hashes of the user's last items, newest first; 0: none
    recent_ratings: NDArray[np.float32]  # (n, 16) stars; nan: none
    recent_actions: NDArray[np.uint8]  # (n, 16) bit k: action k was done with the item
    older: NDArray[np.uint32]  # (n, 64) low halves, items rated before, newest first; 0: none
    older_ratings: NDArray[np.uint8]  # (n, 64) in 1/32 star
    item_vectors: NDArray[np.intp]  # (n,) rows of `vectors`
    recent_vectors: NDArray[np.intp]  # (n, 16)
    vectors: NDArray[np.float32]  # (m, d) as `TextEncoder.project` gives them
    source: Source  # of the vectors; other vectors need another

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: NDArray[np.intp] | slice) -> Self:
        """The same of these rows, over the same vectors."""
        named = {name: getattr(self, name)[rows] for name in _PER_ROW}
        return replace(self, **named)

    def without_vectors(self, width: int) -> Self:
        """The same, with no vector anywhere; those that there are not have a width all the same."""
        return replace(
            self,
            item_vectors=np.zeros_like(self.item_vectors),
            recent_vectors=np.zeros_like(self.recent_vectors),
            vectors=np.zeros((1, width), np.float32),
            source=Source(),
        )


_PER_ROW = tuple(field.name for field in fields(Inputs) if field.name not in ("vectors", "source"))


def gather(events: Rows, observation: Observation, lookups: Lookups, width: int) -> Inputs:
    """Inputs of EVENT rows (n) for a network that reads vectors of `width` (0: none)."""
    attributes = observation.item_attributes
    item_vectors, recent_vectors = observation.item_vectors, observation.recent_vectors
    if width and lookups.vectors is not None:
        vectors, source = lookups.vectors.rows, lookups.vectors.source
    else:
        vectors, source = np.zeros((1, width), np.float32), Source()
        item_vectors, recent_vectors = np.zeros_like(item_vectors), np.zeros_like(recent_vectors)
    return Inputs(
        features=observation.features,
        users=events["user"],
        items=events["item"],
        categories=attributes["category"],
        brands=attributes["brand"],
        recents=observation.recents,
        recent_ratings=observation.recent_ratings,
        recent_actions=observation.recent_actions,
        older=observation.older,
        older_ratings=observation.older_ratings,
        item_vectors=item_vectors,
        recent_vectors=recent_vectors,
        vectors=vectors,
        source=source,
    )


def concatenate(parts: Sequence[Inputs]) -> Inputs:
    """The rows of several batches, one after another; a table that batches share is held once."""
    by_length = sorted(parts, key=lambda part: len(part.vectors))  # of a source the longest is all
    tables = {part.source: part.vectors for part in by_length}
    starts = dict(zip(tables, np.cumsum([0, *map(len, tables.values())]), strict=False))
    shifted = [
        replace(
            part,
            item_vectors=part.item_vectors + starts[part.source],
            recent_vectors=part.recent_vectors + starts[part.source],
        )
        for part in parts
    ]
    columns = {name: np.concatenate([getattr(p, name) for p in shifted]) for name in _PER_ROW}
    return Inputs(**columns, vectors=np.concatenate(list(tables.values())), source=Source())


class Tensors(NamedTuple):
    """`Inputs` on a device, ids as buckets."""

    features: Tensor  # (n, F)
    user: Tensor  # (n,) buckets
    item: Tensor
    categories: Tensor  # (n, 4)
    brand: Tensor
    recents: Tensor  # (n, 16)
    feedback: Tensor  # (n, 16, 10): rating, whether there is one, the bits of the actions
    older: Tensor  # (n, o) buckets, as many as the batch's fullest row has, or a row may have
    older_stars: Tensor  # (n, o)
    item_vector: Tensor  # (n, d)
    recent_vectors: Tensor  # (n, 16, d); without attention (n, 0, d)

    def rows(self, first: int, end: int) -> "Tensors":
        """Rows first to end."""
        return Tensors(*(tensor[first:end] for tensor in self))

    def folded(self, config: NetworkConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `model.taste.Taste` reads."""
        recents = torch.cat([self.recents, self.older], 1)
        stars = torch.cat([2 * self.feedback[..., 0] + 3, self.older_stars], 1)
        rated = torch.cat([self.feedback[..., 1], (self.older > 0).to(stars.dtype)], 1)
        return self.item, recents, stars, rated, self.features[:, config.running_columns]


class Output(NamedTuple):
    """What a network says of n rows; `distribution.tilt(logits, mean)` makes it a distribution."""

    mean: Tensor  # (n,) stars: bias plus correction, not clipped
    logits: Tensor  # (n, 5) before the tilt


def check(config: NetworkConfig, inputs: Inputs) -> None:
    """Raise ValueError when inputs do not fit a network's configuration."""
    if inputs.features.shape[1] != config.features:
        raise ValueError(f"{inputs.features.shape[1]} features given, {config.features} expected")
    if inputs.vectors.shape[1] != config.vector:
        raise ValueError(f"vectors of {inputs.vectors.shape[1]} given, {config.vector} expected")


def tensors(
    config: NetworkConfig,
    inputs: Inputs,
    device: torch.device | str = "cpu",
    all_older: bool = False,
) -> Tensors:
    """Inputs on a device; raises ValueError when they do not fit the network's configuration.

    `all_older`: with places for as many older ratings as a user may have, so that what a row's
    come to is added up in one order whatever rows are beside it.
    """
    check(config, inputs)

    def send(array: NDArray[np.generic], kind: type[np.generic]) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array, kind)).to(device)

    rated = ~np.isnan(inputs.recent_ratings)
    stars = np.where(rated, (inputs.recent_ratings - 3) / 2, 0)[..., None]  # -1 to 1
    bits = np.unpackbits(inputs.recent_actions[..., None], axis=-1)
    ids = Ids.of(config, inputs, all_older)
    recents = inputs.recent_vectors if config.heads else inputs.recent_vectors[:, :0]
    older_stars = inputs.older_ratings[:, : ids.older.shape[1]] / RATING_STEPS
    return Tensors(
        features=send(inputs.features, np.float32),
        user=send(ids.user, np.int64),
        item=send(ids.item, np.int64),
        categories=send(ids.categories, np.int64),
        brand=send(ids.brand, np.int64),
        recents=send(ids.recents, np.int64),
        feedback=send(np.concatenate([stars, rated[..., None], bits], -1), np.float32),
        older=send(ids.older, np.int64),
        older_stars=send(older_stars, np.float32),
        item_vector=send(inputs.vectors[inputs.item_vectors], np.float32),
        recent_vectors=send(inputs.vectors[recents], np.float32),
    )


def bucket(hashes: NDArray[np.unsignedinteger], buckets: int) -> NDArray[np.unsignedinteger]:
    """Hashes to 1..buckets-1; the hash 0 (none, unknown) to 0."""
    return np.where(hashes == 0, hashes, hashes % hashes.dtype.type(buckets - 1) + 1)


class Ids(NamedTuple):
    """The ids of n rows of `Inputs` as buckets."""

    user: NDArray[np.unsignedinteger]  # (n,)
    item: NDArray[np.unsignedinteger]
    categories: NDArray[np.unsignedinteger]  # (n, 4)
    brand: NDArray[np.unsignedinteger]  # (n,)
    recents: NDArray[np.unsignedinteger]  # (n, 16)
    older: NDArray[np.unsignedinteger]  # (n, o), as many as the fullest row has

    @classmethod
    def of(cls, config: NetworkConfig, inputs: Inputs, all_older: bool = False) -> Self:
        """Of these inputs; `all_older`: o is as many as a row may have."""
        fullest = int(np.count_nonzero(inputs.older, axis=1).max(initial=0))
        most = inputs.older.shape[1] if all_older else fullest
        return cls(
            user=bucket(inputs.users, config.buckets),
            item=bucket(low_half(inputs.items), config.buckets),
            categories=bucket(inputs.categories, config.name_buckets),
            brand=bucket(inputs.brands, config.name_buckets),
            recents=bucket(low_half(inputs.recents), config.buckets),
            older=bucket(inputs.older[:, :most], config.buckets),
        )


class Embedding(nn.Module):
    """Embeddings of hashed ids, zero for bucket 0; in training a share of ids becomes unknown."""

    def __init__(self, buckets: int, width: int, unknown: float) -> None:
        super().__init__()
        weight = torch.empty(buckets, width)
        if not weight.is_meta:  # there it takes PyTorch's compiler, and seconds
            nn.init.normal_(weight)  # as nn.Embedding does, so that what is drawn next stays
        self.table = nn.Embedding(buckets, width, padding_idx=0, _weight=nn.init.zeros_(weight))
        self.unknown = unknown

    def forward(self, buckets: Tensor) -> Tensor:
        """Embeddings (..., width) of buckets (...)."""
        if self.training and self.unknown:
            swapped = torch.rand(buckets.shape, device=buckets.device) < self.unknown
            buckets = buckets.masked_fill(swapped, 0)
        return self.table(buckets)


class Attention(nn.Module):
    """The item's attention over the user's recent items, and over nothing (a score of zero)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.heads, self.token = config.heads, config.token
        self.query = nn.Linear(config.vector + 3 * config.identity, config.heads * config.token)
        self.recent = nn.Linear(config.vector + config.identity + 2 + ACTION_BITS, config.token)
        self.position = nn.Parameter(torch.zeros(RECENT, config.token))
        self.output = nn.Linear(config.heads * config.token, config.token, bias=False)

    def forward(self, item: Tensor, identities: Tensor, tensors: Tensors) -> Tensor:
        """What the recent items say (n, token) to an item (n, query); identities (n, 16, i)."""
        recents = torch.cat([tensors.recent_vectors, identities, tensors.feedback], -1)
        recents = self.recent(recents) + self.position
        query = self.query(item).view(-1, self.heads, self.token) / self.token**0.5
        scores = query @ recents.transpose(1, 2)  # (n, heads, 16)
        scores = scores.masked_fill((tensors.recents == 0)[:, None], -torch.inf)
        weights = torch.softmax(nn.functional.pad(scores, (0, 1)), -1)[..., :RECENT]
        return self.output((weights @ recents).flatten(1))


class Member(nn.Module):
    """One network of the ensemble: joined blocks of inputs, two hidden layers, a linear path."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.users = Embedding(config.buckets, config.identity, config.unknown)
        self.items = Embedding(config.buckets, config.identity, config.unknown)
        self.categories = Embedding(config.name_buckets, config.identity, config.unknown)
        self.brands = Embedding(config.name_buckets, config.identity, config.unknown)
        self.attention = Attention(config) if config.heads else None
        width = sum(blocks(config).values())
        self.hidden = nn.Sequential(
            nn.Linear(width, config.width),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            nn.Dropout(config.dropout),
        )
        self.last = nn.Linear(config.width, 6)
        self.linear = nn.Linear(2 * config.columns, 1, bias=False)
        for layer in (self.last, self.linear):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def join(self, features: Tensor, tensors: Tensors) -> Tensor:
        """All that is known of n rows, side by side as in `blocks`; features (n, 2 C)."""
        item = torch.cat(
            [
                tensors.item_vector,
                self.items(tensors.item),
                self.categories(tensors.categories).sum(1),
                self.brands(tensors.brand),
            ],
            1,
        )
        joined = [features, item, self.users(tensors.user)]
        if self.attention is not None:
            joined.append(self.attention(item, self.items(tensors.recents), tensors))
        return torch.cat(joined, 1)

    def head(self, joined: Tensor) -> Tensor:
        """From joined blocks: correction in stars, and logits of five stars; (n, 6)."""
        output = self.last(self.hidden(joined))
        linear = self.linear(joined[:, : self.linear.in_features])
        return output + nn.functional.pad(linear, (0, 5))


def blocks(config: NetworkConfig) -> Mapping[str, int]:
    """Widths of the blocks that `Member.join` puts side by side, in order."""
    return {
        "features": config.columns,
        "missing": config.columns,
        "item text": config.vector,
        "item": config.identity,
        "category": config.identity,
        "brand": config.identity,
        "user": config.identity,
        "recent items": config.token if config.heads else 0,
    }


class FusedNetwork(nn.Module):
    """Members over the same standardised features, averaged; see the module's text."""

    feature_mean: Tensor  # (C,) standardisation, fitted on training rows
    feature_scale: Tensor
    feature_low: Tensor  # standardised features are clipped: counts grow on after training
    feature_high: Tensor
    feature_used: Tensor  # 0: constant or missing in training, so it says nothing
    prior: Tensor  # (5,) logits of the stars of training rows
    shrink: Tensor  # () factor of the correction

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        if config.bias_column >= config.columns:
            raise ValueError(f"bias column {config.bias_column} of {config.columns} columns")
        self.config = config
        self.members = nn.ModuleList(Member(config) for _ in range(config.members))
        for name, value in (
            ("feature_mean", 0.0),
            ("feature_scale", 1.0),
            ("feature_low", -5.0),
            ("feature_high", 5.0),
            ("feature_used", 1.0),
        ):
            self.register_buffer(name, torch.full((config.columns,), value))
        self.taste = Taste(config.buckets, config.factors) if config.factors else None
        self.trees = Trees(config.trees, config.tree_depth) if config.trees else None
        self.register_buffer("prior", torch.zeros(5))
        self.register_buffer("shrink", torch.ones(()))

    @property
    def networks(self) -> list[Member]:
        """The members, as what they are."""
        return [member for member in self.members if isinstance(member, Member)]

    def columns(self, tensors: Tensors) -> Tensor:
        """Features, then what the taste says (n, C); nan: missing."""
        if self.taste is None:
            return tensors.features
        return torch.cat([tensors.features, self.taste(*tensors.folded(self.config))], 1)

    def standardise(self, columns: Tensor) -> Tensor:
        """Columns (n, C) with nan to values and missing flags (n, 2 C)."""
        missing = torch.isnan(columns)
        scaled = (columns - self.feature_mean) / self.feature_scale
        scaled = torch.maximum(torch.minimum(scaled, self.feature_high), self.feature_low)
        flags = missing.to(columns.dtype) * self.feature_used
        return torch.cat([scaled.masked_fill(missing, 0.0) * self.feature_used, flags], 1)

    def forward(self, tensors: Tensors, member: int | None = None) -> Output:
        """Mean (n,) and logits (n, 5) of one member, or averaged over all."""
        columns = self.columns(tensors)
        features = self.standardise(columns)
        chosen = self.networks if member is None else [self.networks[member]]
        heads = [network.head(network.join(features, tensors)) for network in chosen]
        output = torch.stack(heads).mean(0)
        bias = columns[:, self.config.bias_column]
        correction = output[:, 0]
        if self.trees is not None:
            correction = correction + self.trees(columns)
        return Output(bias + self.shrink * correction, self.prior + output[:, 1:])

    def fold(self, taste: Taste) -> None:
        """Read what a taste says in place of the last columns of the features."""
        self.taste = taste
        features = self.config.columns - len(COLUMNS)
        sizes = {"features": features, "factors": taste.factors.shape[1]}
        self.config = self.config.model_copy(update=sizes)

    def plant(self, trees: Trees | None) -> None:
        """Take these trees in place of those that there are."""
        self.trees = trees
        sizes = (
            {"trees": 0}
            if trees is None
            else {"trees": len(trees.value), "tree_depth": trees.depth}
        )
        self.config = self.config.model_copy(update=sizes)
