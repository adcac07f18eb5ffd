"""Fixtures of the model's tests."""

import pytest
import torch

from tests.unit.model.shop import Observed, observe


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share few cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def observed() -> Observed:
    """Events of a small shop, observed."""
    return observe()
