"""Vectors of eight numbers, as a compiled loop uses them."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from numba import types
from numba.extending import intrinsic

from model import lanes
from model.attention import Singles
from model.compiled import compiled
from tests.unit.model.processors import with_avx2

pytestmark = with_avx2


def _turned(_: Any, square: Any, limit: Any) -> Any:
    """A square (8, 8) becomes its transpose, each number `limit` at least and 2.1 at most."""

    def build(context: Any, builder: Any, _: Any, given: Any) -> Any:
        square, limit = given
        code = lanes.Code(builder)
        rows = [code.read(code.after(square, lanes.SIZE * row), lanes.NUMBERS) for row in range(8)]
        for row, turned in enumerate(code.transposed(rows)):
            least = code.call("maxnum.v8f32", lanes.NUMBERS, turned, code.spread(limit))
            most = code.call("minnum.v8f32", lanes.NUMBERS, least, lanes.same(lanes.NUMBERS, 2.1))
            code.write(most, code.after(square, lanes.SIZE * row))
        return context.get_dummy_value()

    return types.void(lanes.ADDRESS, types.float32), build


_turn = cast(Callable[[int, np.float32], None], intrinsic(_turned))


@compiled
def turn(square: Singles, limit: np.float32) -> None:
    _turn(square.ctypes.data, limit)


def test_a_square_is_turned() -> None:
    square = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    expected = np.clip(square.T, np.float32(-0.5), np.float32(2.1))
    turn(square, np.float32(-0.5))
    np.testing.assert_array_equal(square, expected)


def test_one_value_in_all_lanes_is_of_their_kind() -> None:
    assert str(lanes.same(lanes.SHORTS, 1)).count("i16 1") == 16
    numbers = [each.constant for each in lanes.same(lanes.NUMBERS, 0.1).constant]
    assert numbers == [float(np.float32(0.1))] * 8  # which LLVM would not round


@pytest.mark.parametrize(
    ("capability", "threads", "usable", "widest"),
    [
        ("AVX2", 1, True, True),
        ("AVX2", 2, False, True),
        ("AVX512", 1, True, False),
        ("AVX512", 2, False, False),
        ("DEFAULT", 1, False, False),
    ],
)
def test_where_eight_at_once_run_and_are_all_that_there_is(
    monkeypatch: pytest.MonkeyPatch, capability: str, threads: int, usable: bool, widest: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert lanes.usable() is usable
    assert lanes.widest() is widest
