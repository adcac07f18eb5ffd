"""Loops between products say what PyTorch says."""

import numpy as np
import torch
from torch import nn

from model import between


def test_gelu_by_values() -> None:
    values = np.linspace(-6, 6, 4_001, dtype=np.float32)
    offset = np.linspace(1, -1, 4_001, dtype=np.float32)
    found = np.stack([values - offset, values[::-1] - offset])
    between.gelu(found, offset)
    expected = nn.functional.gelu(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(found, np.stack([expected, expected[::-1]]), atol=2e-6)


def test_a_sum_is_normed() -> None:
    torch.manual_seed(0)
    x, made = torch.randn(7, 40), torch.randn(7, 40)
    offset, gain, shift = torch.randn(3, 40)
    expected = nn.functional.layer_norm(x + made + offset, (40,), gain, shift, 1e-6)
    added = (offset.numpy(), gain.numpy(), shift.numpy())
    between.add_normed(x.numpy(), made.numpy(), *added, np.float32(1e-6))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
