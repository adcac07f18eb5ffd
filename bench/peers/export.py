"""What the Kafka Streams peer reads: rows of the store as files, and a bundle's network in ONNX."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn

from model.bundle import Bundle
from model.features import FEATURE_HASH, ITEM_DAMPING
from model.ids import NONE, Hashes
from model.lookups import Table, empty, table
from model.network import FusedNetwork, Member, NetworkConfig
from model.state import ITEM, ITEM_ATTRIBUTES, LAYOUT_HASH, PARTITION, USER, USER_ATTRIBUTES
from model.state_bytes import from_bytes
from model.taste import FADE, MOOD
from model.trees import Trees
from schemas.exceptions import StarcastError
from streams.reader import (
    ITEM_KIND,
    ITEM_STATE,
    USER_KIND,
    USER_STATE,
    VECTOR_DTYPE,
    vector_keys,
)
from streams.store import Store
from streams.user_states import decode_header

PORTED = ("f5036779", "9a089c3b")  # the layout and the features that the Java was written for

_OPSET = 17


@dataclass(frozen=True)
class Rows:
    """What the peer begins with, by hash."""

    items: Table
    item_attributes: Table
    user_attributes: Table
    vectors: Table  # float32, by hash of the text
    users: Table
    partitions: Table  # by number

    def write(self, folder: Path) -> None:
        """A file of each table: rows with their hash before them, what a missing one gets last."""
        for name, each in vars(self).items():
            rows = np.zeros(
                len(each.rows), [("hash", "<u8"), ("row", each.rows.dtype, each.rows.shape[1:])]
            )
            rows["hash"] = np.append(each.hashes, np.uint64(NONE))
            rows["row"] = each.rows
            (folder / name.replace("_", "-")).write_bytes(rows.tobytes())


def from_store(store: Store, bundle: Bundle) -> Rows:
    """All that the store has, with the vectors that a bundle reads."""
    attributes = _rows(store, ITEM_KIND, ITEM_ATTRIBUTES)
    headers = [
        decode_header(store.header(USER_STATE, partition))["partition"]
        for partition in range(store.partitions)
    ]
    return Rows(
        items=_rows(store, ITEM_STATE, ITEM),
        item_attributes=attributes,
        user_attributes=_rows(store, USER_KIND, USER_ATTRIBUTES),
        vectors=_vectors(store, bundle, np.unique(attributes.rows["text"])),
        users=_rows(store, USER_STATE, USER),
        partitions=table(
            np.arange(store.partitions, dtype=np.uint64), np.stack(headers).astype(PARTITION)
        ),
    )


def write(folder: Path, bundle: Bundle, rows: Rows) -> dict[str, Any]:
    """Fill a folder with a bundle and rows; what is to be said of them in its settings.

    Raises StarcastError where the Java would compute something else than we do now.
    """
    if (LAYOUT_HASH, FEATURE_HASH) != PORTED:
        raise StarcastError(
            f"The Kafka Streams peer computes layout and features {PORTED}, and these are "
            f"{(LAYOUT_HASH, FEATURE_HASH)}: bring its Java up to date, then PORTED."
        )
    network, config = bundle.network, bundle.network.config
    as_default = not config.heads and not config.identity and config.vector
    if network.taste is None or network.trees is None or not as_default:
        raise StarcastError(
            "The Kafka Streams peer takes a bundle with taste, trees and texts, "
            "without attention and hashed ids."
        )
    rows.write(folder)
    told = network.taste
    taste = [told.offsets, told.corrections, told.ratings, told.factors]
    (folder / "taste").write_bytes(b"".join(each.numpy().tobytes() for each in taste))
    _write_network(folder / "network.onnx", network, torch.from_numpy(rows.vectors.rows))
    sizes = ("features", "buckets", "vector")
    return {
        "version": bundle.version,
        **{size: getattr(config, size) for size in sizes},
        "taste": {
            "level": float(network.taste.level),
            "ridge": network.taste.ridge.tolist(),
            "damping": float(network.taste.damping),
            "item_damping": ITEM_DAMPING,
            "fade": FADE,
            "mood": MOOD,
            "trust": network.taste.trust.tolist(),
            "running": config.running_columns,
        },
        **bundle.calibration.model_dump(),
    }


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """What the program is told."""
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def _rows(store: Store, kind: bytes, dtype: np.dtype[Any]) -> Table:
    keys = [key for number in range(store.partitions) for key in set(store.scan(kind, number))]
    if not keys:
        return empty(dtype)
    size = None if dtype == USER else dtype.itemsize  # a title may follow
    values = [value and value[:size] for value in store.read(keys)]
    hashes = np.frombuffer(b"".join(key[-8:] for key in keys), "<u8")
    return table(hashes, from_bytes(values, dtype))


def _vectors(store: Store, bundle: Bundle, texts: Hashes) -> Table:
    texts = texts[texts != NONE]
    found = store.read(vector_keys(store, bundle.encoder_hash or "", texts))
    known = np.array([each is not None for each in found], bool)
    data = np.frombuffer(b"".join(each for each in found if each is not None), VECTOR_DTYPE)
    rows = data.astype(np.float32).reshape(-1, bundle.network.config.vector)
    return table(texts[known], rows)


class _Network(nn.Module):
    """A fused network after its taste, its item's vector by number; trees come as an input."""

    def __init__(self, network: FusedNetwork, vectors: Tensor) -> None:
        super().__init__()
        self.network = network
        self.members = nn.ModuleList(
            _Member(each, network.config, vectors) for each in network.networks
        )

    def forward(self, columns: Tensor, trees: Tensor, vector: Tensor) -> Tensor:
        """Mean and logits (n, 6)."""
        network = self.network
        features = network.standardise(columns)
        output = torch.stack([each(features, vector) for each in self.members]).mean(0)
        bias = columns[:, network.config.bias_column, None]
        mean = bias + network.shrink * (output[:, :1] + trees)
        return torch.cat([mean, network.prior + output[:, 1:]], 1)


class _Member(nn.Module):
    """What `network.Member` says; vectors are multiplied beforehand, as in `model.serving`."""

    hiddens: Tensor  # (m + 1, width) by the item's vector
    hidden: Tensor  # (2 C, width)

    def __init__(self, member: Member, config: NetworkConfig, vectors: Tensor) -> None:
        super().__init__()
        self.member = member
        hidden = member.hidden[0]
        assert isinstance(hidden, nn.Linear)
        features, text = hidden.weight.split([2 * config.columns, config.vector], 1)
        made = {"hiddens": vectors @ text.T + hidden.bias, "hidden": features.T}
        for name, tensor in made.items():
            self.register_buffer(name, tensor.detach().contiguous())

    def forward(self, features: Tensor, vector: Tensor) -> Tensor:
        """Correction and logits (n, 6)."""
        member = self.member
        rest = member.hidden[1:]
        output = member.last(rest(self.hiddens[vector[:, 0]] + features @ self.hidden))
        return output + nn.functional.pad(member.linear(features), (0, 5))


def _write_network(file: Path, network: FusedNetwork, vectors: Tensor) -> None:
    assert network.trees is not None
    width = network.config.columns
    example = (torch.zeros(2, width), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    names = ["columns", "trees", "vector"]
    with torch.no_grad():
        torch.onnx.export(
            _Network(network, vectors).eval(),
            example,
            str(file),
            dynamo=False,
            opset_version=_OPSET,
            input_names=names,
            output_names=["outputs"],
            dynamic_axes={name: {0: "rows"} for name in (*names, "outputs")},
        )
    whole = onnx.load(str(file))
    [given] = [each for each in whole.graph.input if each.name == "trees"]
    whole.graph.input.remove(given)
    whole.graph.node.insert(0, _trees(network.trees, width))
    whole.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))
    onnx.checker.check_model(whole)
    onnx.save(whole, str(file))


def _trees(trees: Trees, width: int) -> Any:
    """The node that reads `columns` and gives `trees`: full trees, leaves after inner nodes."""
    feature, threshold, value = (
        each.numpy() for each in (trees.feature, trees.threshold, trees.value)
    )
    count, inner = feature.shape
    nodes = value.shape[1]
    leaves = np.zeros((count, nodes - inner))
    tree = np.repeat(np.arange(count), nodes)
    node = np.tile(np.arange(nodes), count)
    leaf = node >= inner
    below = np.where(leaf, 0, 2 * node + 1)
    asked = np.hstack([feature, leaves]).ravel().astype(np.int64)
    return onnx.helper.make_node(
        "TreeEnsembleRegressor",
        ["columns"],
        ["trees"],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_treeids=tree,
        nodes_nodeids=node,
        nodes_featureids=asked % width,
        nodes_modes=["LEAF" if each else "BRANCH_LEQ" for each in leaf],
        nodes_values=np.hstack([threshold, leaves]).ravel().astype(np.float32),
        nodes_truenodeids=below,
        nodes_falsenodeids=np.where(leaf, 0, below + 1),
        nodes_missing_value_tracks_true=(asked < width).astype(np.int64) * ~leaf,
        target_treeids=tree[leaf],
        target_nodeids=node[leaf],
        target_ids=np.zeros(int(leaf.sum()), np.int64),
        target_weights=value[:, inner:].ravel(),
    )
