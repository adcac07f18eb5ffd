"""Products of codes beside those of NumPy's whole numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import int8_product
from tests.unit.model.processors import with_avx2

GROUPS = ((0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15))


@pytest.mark.parametrize(
    ("places", "largest"),
    [
        ([3], 1),
        ([0, 1, 2, 3], 2),  # two of each group
        (GROUPS[0], 8),
        (GROUPS[1], 8),
        (range(16), 8),
        ([12, 16 + 12], 1),  # of two blocks
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weights_of_one_sign_in_a_group_set_the_scale(
    places: list[int], largest: int, sign: float
) -> None:
    weight = torch.zeros(1, 32)
    weight[0, list(places)] = sign
    torch.testing.assert_close(int8_product.limit(weight), torch.tensor([largest / 124]))


def test_signs_do_not_make_up_for_each_other() -> None:
    """For codes of zero may stand beside one of them."""
    weight = torch.zeros(1, 16)
    weight[0, list(GROUPS[0])] = torch.tensor([1.0, -1.0] * 4)
    torch.testing.assert_close(int8_product.limit(weight), torch.tensor([4 / 124]))


def test_a_width_that_is_no_whole_block() -> None:
    torch.testing.assert_close(int8_product.limit(torch.ones(1, 17)), torch.tensor([8 / 124]))


@with_avx2
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 8),
    st.sampled_from([(16, 16), (32, 48), (48, 384)]),
    st.booleans(),
)
def test_it_is_the_product(seed: int, rows: int, shape: tuple[int, int], extreme: bool) -> None:
    """Of codes anywhere, and of the largest and least alone, which come nearest to being cut."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random)
    if extreme:
        weight = weight.sign()
    scales = int8_product.limit(weight)
    rounded = (weight / scales[:, None]).round().to(torch.int8)
    codes = torch.randint(0, 256, (rows, shape[1]), generator=random, dtype=torch.uint8)
    if extreme:
        codes = torch.where(codes < 128, 0, 255).to(torch.uint8)
    made = np.full((rows, shape[0]), np.nan, np.float32)
    int8_product.multiply(codes.numpy(), int8_product.pack(rounded), scales.numpy(), made)
    exact = (codes.double() @ rounded.double().T * scales.double()).numpy()
    np.testing.assert_allclose(made, exact, rtol=1e-6, atol=1e-6)


@with_avx2
def test_the_largest_sums_of_both_signs() -> None:
    """All codes 255, and a group's weights up to what may be: 255 · 128."""
    weight = torch.zeros(16, 32)
    weight[:8, list(GROUPS[0])] = 1.0
    weight[8:, list(GROUPS[1])] = -1.0
    scales = int8_product.limit(weight)
    rounded = (weight / scales[:, None]).round().to(torch.int8)
    assert rounded.abs().sum(1).tolist() == [128] * 16  # 8 of 15.5, rounded to 16
    made = np.empty((1, 16), np.float32)
    codes = np.full((1, 32), 255, np.uint8)
    int8_product.multiply(codes, int8_product.pack(rounded), np.ones(16, np.float32), made)
    np.testing.assert_array_equal(made[0], [255.0 * 128] * 8 + [-255.0 * 128] * 8)
