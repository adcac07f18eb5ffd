"""What the encoder's benchmark counts, on cases worked out by hand."""

from typing import Any

import pytest
import torch

from bench import text
from bench.text import best_rate, buckets
from bench.ways import FP32, INT8, Shape


def test_operations_of_real_tokens() -> None:
    # A token costs 2 · (4 · 2² + 2 · 2 · 4) = 64 in linear layers; n tokens attend for 4 · n² · 2.
    assert Shape(hidden=2, inner=4, layers=1).operations([3]) == 3 * 64 + 4 * 9 * 2
    assert Shape(hidden=2, inner=4, layers=5).operations([1, 2]) == 5 * (3 * 64 + 8 + 32)
    assert Shape(hidden=384, inner=1536, layers=6).operations([1]) == 21_233_664 + 9_216


def test_buckets_by_length() -> None:
    assert buckets([3, 17, 16, 256, 300]) == {
        "1 to 16": [0, 2],
        "17 to 32": [1],
        "129 to 256": [3],
    }


def test_the_limit_is_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1_024: 140e9, 8_192: 128e9}  # as a core with caches has them

    def matrix_rate(sizes: Shape, rows: int, *_: Any) -> float:
        return rates[rows]

    monkeypatch.setattr(text, "matrix_rate", matrix_rate)
    sizes, cpu = Shape(384, 1_536, 6), torch.device("cpu")
    assert (best_rate(FP32, sizes, cpu), best_rate(INT8, sizes, cpu)) == (140e9, 140e9)
    rates[8_192] = 160e9
    assert (best_rate(FP32, sizes, cpu), best_rate(INT8, sizes, cpu)) == (160e9, 140e9)
