"""Small bundles with weights by chance."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model import bundle as bundles
from model import registry
from model.bundle import Written
from model.calibration import Calibration
from model.card import ModelCard
from model.encoder import StarHead
from model.network import FusedNetwork
from tests.unit.model.encoders import HIDDEN
from tests.unit.model.networks import default_config
from tests.unit.model.shop import WIDTH

CARD = ModelCard(
    data="a | generated shop",
    data_from=datetime(2026, 1, 1, tzinfo=UTC),
    data_to=datetime(2026, 2, 1, tzinfo=UTC),
    rows={"train": 12_345},
    settings={"dropout": 0.1},
    metrics={"model": {"rmse": 0.9, "mae": 0.7}, "bias": {"rmse": 0.95}},
    limits=["Not for people."],
    notes="Made by a test.",
)


def network(seed: int = 0, vector: int = WIDTH) -> FusedNetwork:
    torch.manual_seed(seed)
    built = FusedNetwork(default_config(vector=vector, members=2, buckets=64, name_buckets=32))
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.07)
    return built


def write(url: str, seed: int = 0, vector: int = WIDTH, **parts: Any) -> Written:
    return bundles.write(
        url,
        network=network(seed, vector),
        calibration=Calibration(slope=0.9, intercept=0.4),
        metrics={"model": {"rmse": 0.9}},
        card=CARD,
        **parts,
    )


def serve_reader(url: str, encoder: Path) -> None:
    """Make a bundle stable that has an encoder and a star head."""
    random = np.random.default_rng(3)
    head = StarHead(random.normal(size=(5, HIDDEN)).astype(np.float32), np.zeros(5, np.float32))
    written = write(url, encoder=encoder, star_head=head)
    registry.promote(url, written.version, written.sha256, "a test", "to see")
