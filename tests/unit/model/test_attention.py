"""Attention by tiles beside softmax as it is written."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model import attention
from tests.unit.model.processors import with_avx2

pytestmark = with_avx2

lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=4)


def written(queries: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
    """softmax(Q Kᵀ / √width) V of each text and head, in double precision."""
    parts = [each.double().transpose(0, 1).split(lengths, 1) for each in (queries, keys, values)]
    found = [
        torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]), 2) @ v
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(found, 1).transpose(0, 1)


def drawn(seed: int, tokens: int, width: int = 16) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(3, tokens, 2, width, generator=random)


@given(st.integers(0, 2**32 - 1), lengths_lists, st.sampled_from([16, 32, 64]))
def test_it_is_what_is_written(seed: int, lengths: list[int], width: int) -> None:
    queries, keys, values = drawn(seed, sum(lengths), width).unbind()
    found = attention.by_head(np.array(lengths))(queries, keys, values)
    expected = written(queries, keys, values, lengths)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_by_hand() -> None:
    """Keys 0 and ln 3 · √16 by a query of 1: weights 1/4 and 3/4 of values 4 and 8."""
    queries, keys, values = torch.zeros(3, 2, 1, 16)
    queries[:, 0, 0] = 1
    keys[1, 0, 0] = math.log(3) * 4
    values[0], values[1] = 4, 8
    found = attention.by_head(np.array([2]))(queries, keys, values)
    torch.testing.assert_close(found, torch.full((2, 1, 16), 7.0))


@pytest.mark.parametrize("size", [1e3, 1e-30, 1e18])
def test_scores_of_any_size(size: float) -> None:
    """The largest weight is a power of nought, however large the scores."""
    queries, keys, values = drawn(5, 37).unbind()
    found = attention.by_head(np.array([37]))(size * queries, keys, values)
    expected = written(size * queries, keys, values, [37])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_what_is_no_number_stays_in_its_text_and_head() -> None:
    queries, keys, values = drawn(6, 20).unbind()
    keys[3, 0, 0] = math.nan
    found = attention.by_head(np.array([10, 10]))(queries, keys, values)
    assert found[:10, 0].isnan().all()
    assert found[10:].isfinite().all()
    assert found[:, 1].isfinite().all()


@given(st.integers(0, 2**32 - 1), lengths_lists)
def test_a_text_hangs_on_no_other(seed: int, lengths: list[int]) -> None:
    drawn_ones = drawn(seed, sum(lengths))
    whole = attention.by_head(np.array(lengths))(*drawn_ones)
    last = drawn_ones[:, -lengths[-1] :]
    alone = attention.by_head(np.array(lengths[-1:]))(*last)
    assert torch.equal(whole[-lengths[-1] :], alone)
