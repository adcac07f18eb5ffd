"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest
import torch

from schemas.files import write_records
from tests.unit.trainer.shop import shop, write_encoder
from trainer.data import Examples, from_file, replay


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share few cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shop_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record file of the generated shop."""
    path = tmp_path_factory.mktemp("shop") / "shop.jsonl.gz"
    write_records(path, shop())
    return path


@pytest.fixture(scope="module")
def examples(shop_file: Path) -> Examples:
    """What a model learns from of it, without vectors."""
    return replay(from_file(shop_file), None, "", 0, lambda done, total: None)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def masking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder that knows a mask token."""
    return write_encoder(tmp_path_factory.mktemp("masking"), mask="[MASK]")
