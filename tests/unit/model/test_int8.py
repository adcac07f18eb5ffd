"""Linear layers in eight bits beside the layers that they were."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model import int8, int8_product

IN, OUT = 48, 32  # as `int8_product` takes them

seeds = st.integers(0, 2**32 - 1)
magnitudes = st.sampled_from([1e-3, 1.0, 300.0])


def linear(seed: int, bias: bool = True, width: int = IN) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, OUT, bias)


def numbers(seed: int, magnitude: float = 1.0, rows: int = 9, width: int = IN) -> Tensor:
    """Rows of unlike size and middle."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=random) + torch.randn(rows, 1, generator=random)
    return magnitude * x * torch.rand(rows, 1, generator=random)


def rounding(layer: nn.Linear, x: Tensor) -> Tensor:
    """The most that half a step of each number and half a step of each weight amount to."""
    weight = layer.weight.detach()
    half_numbers = (x.amax(1) - x.amin(1)) / 255 / 2
    half_weights = int8_product.limit(weight) / 2
    by_numbers = half_numbers[:, None] * (weight.abs().sum(1) + x.shape[1] * half_weights)
    return by_numbers + x.abs().sum(1)[:, None] * half_weights


@given(seeds, magnitudes, st.booleans(), st.sampled_from([IN, 40]))
def test_it_is_off_by_rounding_at_most(seed: int, magnitude: float, bias: bool, width: int) -> None:
    layer, x = linear(seed, bias, width), numbers(seed, magnitude, width=width)
    with torch.no_grad():
        exact, found = layer(x), int8.Linear(layer)(x)
    assert found.shape == exact.shape
    assert ((found - exact).abs() <= 1.001 * rounding(layer, x) + 1e-6).all()


@given(seeds)
def test_a_row_hangs_on_no_other(seed: int) -> None:
    layer, x = int8.Linear(linear(seed)), numbers(seed)
    alone = torch.cat([layer(each[None]) for each in x])
    torch.testing.assert_close(layer(x), alone, rtol=1e-6, atol=1e-6)
    beside = torch.cat([1e3 * numbers(seed + 1), x])
    torch.testing.assert_close(layer(beside)[-len(x) :], alone, rtol=1e-6, atol=1e-6)


def test_no_sum_is_cut() -> None:
    """The largest codes of one sign."""
    layer = linear(0, bias=False)
    signs = torch.where(torch.arange(OUT) % 2 == 0, 1.0, -1.0)[:, None]
    layer.weight.data = signs.expand(OUT, IN).contiguous()
    x = torch.ones(300, IN)
    x[:, -1] = 0
    expected = (signs * (IN - 1)).T.expand(300, OUT)
    assert ((int8.Linear(layer)(x) - expected).abs() <= 1.001 * rounding(layer, x)).all()


def test_equal_numbers_and_no_rows() -> None:
    layer = linear(1)
    made = int8.Linear(layer)
    for value in (0.0, 3.0):
        x = torch.full((2, 5, IN), value)
        with torch.no_grad():
            assert ((made(x) - layer(x)).abs() <= rounding(layer, x[0]).max() + 1e-6).all()
    assert made(torch.empty(0, IN)).shape == (0, OUT)


def test_what_was_seen_scales_all_rows() -> None:
    layer, x = linear(2), numbers(2)
    made = int8.Linear(layer, [float(x.min()), float(x.max())])
    rows = int8.Rows.room(*x.shape)
    int8.take(x, made, rows)
    assert len(set(rows.steps)) == len(set(rows.lowest)) == 1
    assert rows.codes.min() == 0
    assert rows.codes.max() == 255
    beyond = made(torch.cat([x, 100 * x]))
    torch.testing.assert_close(beyond[: len(x)], made(x))
    bounded = x.clone().mul_(100).clamp_(float(x.min()), float(x.max()))
    torch.testing.assert_close(beyond[len(x) :], made(bounded))


def test_whoever_multiplies_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(3), numbers(3)
    expected = int8.Linear(layer)(x)
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(int8.Linear(layer)(x), expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    torch.testing.assert_close(int8.Linear(layer)(x), expected, rtol=1e-4, atol=1e-5)


def test_many_rows_are_multiplied_in_parts() -> None:
    first, second = int8.Linear(linear(4)), int8.Linear(nn.Linear(OUT, IN))
    x = numbers(4, rows=5_000)
    rows, between = int8.Rows.room(len(x), IN), int8.Rows.room(len(x), OUT)
    int8.take(x, first, rows)
    int8.take_gelu(rows, first, second, between)
    last, few = rows[slice(4_990, None)], int8.Rows.room(10, OUT)
    int8.take_gelu(last, first, second, few)
    np.testing.assert_array_equal(between.codes[4_990:], few.codes)
    np.testing.assert_array_equal(between.lowest[4_990:], few.lowest)


@given(seeds, st.sampled_from([0.1, 1.0, 10.0]))
def test_what_lies_between_products(seed: int, magnitude: float) -> None:
    first, second = int8.Linear(linear(seed)), int8.Linear(nn.Linear(OUT, IN))
    x = numbers(seed, magnitude)
    rows, between = int8.Rows.room(len(x), IN), int8.Rows.room(len(x), OUT)
    int8.take(x, first, rows)
    int8.take_gelu(rows, first, second, between)
    curved = nn.functional.gelu(first(x))
    opened = torch.from_numpy(between.codes * between.steps[:, None] + between.lowest[:, None])
    half = torch.from_numpy(between.steps)[:, None] / 2
    assert ((opened - curved).abs() <= 1.01 * half + 1e-6 * (1 + curved.abs())).all()

    gain, shift = torch.rand(IN), torch.randn(IN)
    expected = nn.functional.layer_norm(x + second.of(between), (IN,), gain, shift, 1e-6)
    int8.add_normed(x, between, second, gain, shift, 1e-6)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
