"""Eight numbers at once, in LLVM's language: what compiled loops cannot say in Python.

Functions that `numba.extending.intrinsic` makes of such code take addresses and lengths in bytes.
They run on processors with AVX2.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
NUMBER = ir.FloatType()
BYTES, SHORTS = ir.VectorType(BYTE, 32), ir.VectorType(SHORT, 16)
WORDS, NUMBERS = ir.VectorType(WORD, 8), ir.VectorType(NUMBER, 8)
LANES = 8
SIZE = 32  # bytes of eight numbers
_KNOWN = ("AVX2", "AVX512")  # PyTorch's names of processors that have AVX2
ADDRESS: Any = types.intp


def usable() -> bool:
    """Whether they run here, and on one thread: libraries share their work among several."""
    return torch.get_num_threads() == 1 and torch.backends.cpu.get_cpu_capability() in _KNOWN


def widest() -> bool:
    """Whether the processor works on no more than eight numbers at once."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def same(kind: Any, value: float) -> Any:
    """One value in all lanes."""
    rounded = float(np.float32(value)) if kind is NUMBERS else value
    return ir.Constant(kind, [rounded] * kind.count)


class Code:
    """Writes the body of a function."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def call(self, name: str, gives: Any, *given: Any) -> Any:
        """What an instruction with a name of its own makes of vectors."""
        kind = ir.FunctionType(gives, [each.type for each in given])
        called = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}")
        return self.builder.call(called, given)

    def after(self, address: Any, *lengths: Any) -> Any:
        """An address so many bytes on."""
        for each in lengths:
            address = self.builder.add(address, LONG(each) if isinstance(each, int) else each)
        return address

    def times(self, number: Any, count: int) -> Any:
        """A length so many times."""
        return self.builder.mul(number, LONG(count))

    def read(self, address: Any, kind: Any) -> Any:
        """What lies at an address."""
        place = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(place, align=1)

    def write(self, value: Any, address: Any) -> None:
        """Put a value there."""
        place = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, place, align=1)

    def spread(self, value: Any) -> Any:
        """A number or a word in all lanes."""
        kind = ir.VectorType(value.type, LANES)
        one = self.builder.insert_element(kind(ir.Undefined), value, WORD(0))
        return self.builder.shuffle_vector(one, one, same(WORDS, 0))

    def sums(self, kind: Any, rows: int, vectors: int) -> dict[tuple[int, int], Any]:
        """Places for the sums of a tile, by row and vector, zero at first."""
        return {
            (row, vector): cgutils.alloca_once_value(self.builder, same(kind, 0))
            for row in range(rows)
            for vector in range(vectors)
        }

    def first(self, address: Any, between: Any, rows: Any, most: int) -> Sequence[Any]:
        """Where each of `rows` rows begins, and for those from there to `most` the last one."""
        last = self.builder.sub(rows, LONG(1))
        places = [self.least(LONG(row), last) for row in range(most)]
        return [self.after(address, self.builder.mul(between, place)) for place in places]

    def least(self, one: Any, other: Any) -> Any:
        """The smaller of two lengths."""
        return self.builder.select(self.builder.icmp_signed("<", one, other), one, other)

    def transposed(self, square: Sequence[Any]) -> Sequence[Any]:
        """Eight rows of eight numbers as columns: of each two rows `half` apart, halves swapped."""
        rows = list(square)
        for half in (4, 2, 1):
            lower = [lane if not lane & half else lane + LANES - half for lane in range(LANES)]
            upper = [lane + half if not lane & half else lane + LANES for lane in range(LANES)]
            for one in range(LANES):
                if one & half:
                    continue
                pair = rows[one], rows[one + half]
                rows[one] = self.builder.shuffle_vector(*pair, ir.Constant(WORDS, lower))
                rows[one + half] = self.builder.shuffle_vector(*pair, ir.Constant(WORDS, upper))
        return rows
