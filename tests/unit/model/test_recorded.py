"""BERT encoders as a GPU has them, beside transformers' own; recorded where there is a GPU.

On a CPU Triton's kernels run in its interpreter, and in float32.
"""

import importlib
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model import recorded
from model.recorded import Graphs
from tests.unit.model.berts import (
    HIDDEN,
    LONGEST,
    WORDS,
    Tokens,
    one_by_one,
    poolings,
    small,
    token_lists,
)

MODEL = small()
HALF = 0.02  # of a component, by rounding to bfloat16


def check(tokens: Tokens, pooling: str, budget: int, fused: bool) -> None:
    graphs = Graphs(MODEL, pooling, LONGEST, fused)
    found = graphs.encode(tokens, budget)
    np.testing.assert_allclose(found, one_by_one(MODEL, tokens, pooling), atol=2e-5)
    again = graphs.encode(tokens[::-1], budget)  # what a batch leaves behind is not seen
    np.testing.assert_array_equal(again[::-1].shape, found.shape)
    np.testing.assert_allclose(again[::-1], found, atol=2e-5)


@given(token_lists, poolings, st.sampled_from([1, 256, 512]))
def test_recorded_batches_are_as_alone(tokens: Tokens, pooling: str, budget: int) -> None:
    check(tokens, pooling, budget, fused=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are compiled for the GPU")
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_so_they_are_by_kernels_of_our_own(pooling: str) -> None:
    """Texts within a block of 64 tokens, over its end, and one token that is alone."""
    random = np.random.default_rng(6)
    lengths = (1, 40, 17, 16, 3, 33, 40, 25, 40)
    tokens = [random.integers(1, WORDS, size).tolist() for size in lengths]
    check(tokens, pooling, budget=256, fused=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_on_a_gpu_they_are_as_near_as_rounding_lets_them(pooling: str, fused: bool) -> None:
    random = np.random.default_rng(5)
    tokens = [random.integers(1, WORDS, size).tolist() for size in random.integers(1, LONGEST, 200)]
    exact = small(initializer_range=0.1)
    model = nn.Module.to(small(initializer_range=0.1), "cuda", torch.bfloat16)
    graphs = Graphs(model, pooling, LONGEST, fused)
    graphs.warm(1_024)
    for some in (tokens, tokens[::-1], tokens[:3]):
        wanted = one_by_one(exact, some, pooling)
        np.testing.assert_allclose(graphs.encode(some, 1_024), wanted, atol=HALF)


def test_many_short_texts_fill_batches_by_their_number() -> None:
    graphs = Graphs(MODEL, "mean", LONGEST)
    tokens = [[1 + number % 7] for number in range(100)]  # 100 tokens, more than 16 texts
    found = graphs.encode(tokens, 256)
    np.testing.assert_allclose(found, one_by_one(MODEL, tokens, "mean"), atol=2e-5)
    few = graphs.encode(tokens[:17], 512)  # 17 tokens of more texts than the least batch holds
    np.testing.assert_allclose(few, found[:17], atol=2e-5)


def test_no_texts_are_no_vectors() -> None:
    assert Graphs(MODEL, "mean", LONGEST).encode([], 256).shape == (0, HIDDEN)


def test_on_a_cpu_kernels_are_pytorchs() -> None:
    assert not Graphs(MODEL, "mean", LONGEST).fused


def test_kernels_of_our_own_need_triton_a_compiler_and_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    can_fuse = recorded._can_fuse  # pyright: ignore[reportPrivateUsage]
    gpu = torch.device("cuda")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    assert not can_fuse(gpu, 32)
    (tmp_path / "Python.h").touch()
    assert can_fuse(gpu, 32)
    assert not can_fuse(gpu, 24)
    assert not can_fuse(torch.device("cpu"), 32)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not can_fuse(gpu, 32)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not can_fuse(gpu, 32)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model import gpu_kernels

half, whole = "*bf16", "*i64"
attend = {"heads": 12, "width": 32, "block": 64, "keys": 64}
normed = {"hidden": 384, "wide": 512, "block": 4}
lying = {"given_rows": None, "other_rows": None}
for kernel, given, fixed in [
    (gpu_kernels._attend, [half] * 3 + ["*i32", half, "i32", "i32", "fp32"], attend),
    (gpu_kernels._sum_normed, [half] * 2 + [whole] * 2 + [half] * 3 + ["fp32"], normed),
    (gpu_kernels._sum_normed, [half] * 2 + [None] * 2 + [half] * 3 + ["fp32"], lying | normed),
    (gpu_kernels._mean_normed, [half, "*i32", "*fp32"], normed),
]:
    names = kernel.arg_names
    types = dict(zip(names, given)) | dict.fromkeys(fixed, "constexpr")
    values = {(names.index(name),): value for name, value in fixed.items()}
    made = compile(ASTSource(kernel, types, values), GPUTarget("cuda", 90, 32))
    assert made.asm["ptx"]
print("compiled")
"""


def test_kernels_of_our_own_compile_without_a_gpu(tmp_path: Path) -> None:
    """What Triton's interpreter takes, its compiler may refuse."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": "."}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE]
    found = run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "compiled", found.stderr
