"""BERT encoders on a GPU: kernels recorded once for each size of batch, as CUDA graphs.

Texts of one batch lie end to end, as `packed` says. What is between products are kernels of our
own (`gpu_kernels`) where Triton can make them, else PyTorch's.
"""

import importlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.packed import (
    Attend,
    Steps,
    Vectors,
    batches,
    end_to_end,
    grouped,
    positions_of,
    read,
    states,
)

SIZES = (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
"""Tokens of the batches that are recorded."""
LEAST_TOKENS = 16  # a text in a recorded batch is taken for at least as long, so texts are bounded

_COMPILERS = ("gcc", "clang")  # that Triton looks for
_WIDTHS = (16, 32, 64, 128)  # of heads, that its products can have


@dataclass(frozen=True)
class _Recorded:
    """Kernels of one size of batch, with the memory that they read and write."""

    ids: Tensor  # (tokens)
    positions: Tensor  # (tokens)
    spans: Tensor  # (2, tokens): where each token's text begins and ends; its end if of no text
    bounds: Tensor  # (texts + 1); from the last text on all the same
    vectors: Tensor  # (texts, hidden)
    replay: Callable[[], None]


class Graphs:
    """A BERT encoder on a GPU in bfloat16, its kernels recorded for each of `SIZES`.

    Batches of any kind fit: one has at most its size in tokens and a sixteenth of it in texts, and
    what is left over belongs to no text. Copies to and from the GPU overlap its work. Elsewhere
    than on a GPU nothing is recorded, and what is computed is the same.
    """

    def __init__(
        self, model: nn.Module, pooling: str, longest: int, fused: bool | None = None
    ) -> None:
        """Take over a model that `packed.fits`, whose texts have at most `longest` tokens.

        `fused`: whether with kernels of our own, by default where they can be made.
        """
        self._bert = read(model, joined=True)
        self._pooling = pooling
        self._longest = longest
        self._device = self._bert.words.device
        width = self._bert.hidden // self._bert.heads
        self.fused = _can_fuse(self._device, width) if fused is None else fused
        self._recorded: dict[int, _Recorded] = {}

    def encode(self, tokens: Sequence[Sequence[int]], budget: int) -> Vectors:
        """Unit vectors (n, hidden) of n texts of at least one token, in any order.

        At most `budget` tokens are in a batch; one that is no size of a batch is taken as the
        next smaller that is.
        """
        lengths = np.array([len(each) for each in tokens], np.int64)
        several = batches(np.maximum(lengths, LEAST_TOKENS), _sizes(budget)[-1])
        with torch.inference_mode():
            parts = [self._batch(tokens[rows]) for rows in several]
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        none = np.empty((0, self._bert.hidden), np.float32)
        return np.concatenate([none, *(each.numpy() for each in parts)])

    def warm(self, budget: int) -> None:
        """Record all sizes up to a budget, so that no text waits for it."""
        with torch.inference_mode():
            for size in _sizes(budget):
                self._of(size)

    @torch.inference_mode()
    def filled(self, tokens: Sequence[Sequence[int]]) -> Callable[[], Tensor]:
        """Bring texts that fit one batch to the GPU.

        What is returned makes their vectors (n, hidden), which lie there until it makes others.
        """
        lengths = np.array([len(each) for each in tokens], np.int64)
        bounds = np.concatenate([[0], lengths.cumsum()])
        count, texts = int(bounds[-1]), len(lengths)
        least = max(count, texts * LEAST_TOKENS)
        size = next(each for each in SIZES if least <= each)
        recorded = self._of(size)
        self._put(end_to_end(tokens, count), recorded.ids)
        self._put(positions_of(bounds), recorded.positions)
        spans = np.full((2, size), count, np.int32)
        spans[:, :count] = np.repeat([bounds[:-1], bounds[1:]], lengths, axis=1)
        self._put(spans, recorded.spans)
        ends = np.full(len(recorded.bounds), count, np.int32)
        ends[: texts + 1] = bounds
        self._put(ends, recorded.bounds)

        def make() -> Tensor:
            recorded.replay()
            return recorded.vectors[:texts]

        return make

    def _batch(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        made = self.filled(tokens)()
        if self._device.type != "cuda":
            return made.clone()
        kept = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        return kept.copy_(made, non_blocking=True)

    def _put(self, values: NDArray[Any], to: Tensor) -> None:
        given = torch.from_numpy(values)
        if self._device.type == "cuda":
            given = given.pin_memory()
        to[: len(values)].copy_(given, non_blocking=True)

    def _of(self, size: int) -> _Recorded:
        if size not in self._recorded:
            self._recorded[size] = self._record(size)
        return self._recorded[size]

    def _record(self, size: int) -> _Recorded:
        texts = size // LEAST_TOKENS
        ids = torch.zeros(size, dtype=torch.int64, device=self._device)
        positions = torch.zeros_like(ids)
        spans = torch.zeros(2, size, dtype=torch.int32, device=self._device)
        bounds = torch.zeros(texts + 1, dtype=torch.int32, device=self._device)
        vectors = torch.zeros(texts, self._bert.hidden, device=self._device)
        steps = self._steps(spans, bounds)

        def work() -> None:
            x = states(self._bert, ids, positions, steps)
            vectors.copy_(steps.pooled(x, bounds, self._pooling))

        def recorded(replay: Callable[[], None]) -> _Recorded:
            return _Recorded(ids, positions, spans, bounds, vectors, replay)

        if self._device.type != "cuda":
            return recorded(work)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work()  # what is set up at first is not recorded
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return recorded(graph.replay)

    def _steps(self, spans: Tensor, bounds: Tensor) -> Steps:
        if self.fused:  # imports Triton, which torch for a CPU comes without
            return importlib.import_module("model.gpu_kernels").steps(spans)
        on_gpu = self._device.type == "cuda"
        return Steps(_varlen(bounds, self._longest) if on_gpu else _looked_up(bounds))


def _sizes(budget: int) -> tuple[int, ...]:
    """Those of `SIZES` that a budget allows, at least the first."""
    return tuple(each for each in SIZES if each <= max(budget, SIZES[0]))


def _can_fuse(device: torch.device, width: int) -> bool:
    """Whether kernels of our own can be made, for heads of that width.

    Triton builds a part of itself at first, for which it needs a C compiler and Python's headers.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return compiler is not None and headers and width in _WIDTHS


def _varlen(bounds: Tensor, longest: int) -> Attend:
    """Attention within bounds (texts + 1) on a GPU, of texts of at most `longest` tokens."""
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return varlen.varlen_attn(queries, keys, values, bounds, bounds, longest, longest)

    return attend


def _looked_up(bounds: Tensor) -> Attend:
    """Attention within bounds as they are when it is called."""

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        lengths = np.diff(bounds.numpy()).astype(np.int64)
        rest = np.array([len(queries) - lengths.sum()])  # of no text
        return grouped(np.concatenate([lengths[lengths > 0], rest[rest > 0]]))(
            queries, keys, values
        )

    return attend
