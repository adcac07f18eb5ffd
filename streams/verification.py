"""What was compared with what it should be, and what did not agree."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.events import Rows
from model.ids import Hashes

EXAMPLES = 20  # differences that are told in full


@dataclass
class Verification:
    """What was compared, and what did not agree."""

    compared: Counter[str] = field(default_factory=Counter[str])
    differences: Counter[str] = field(default_factory=Counter[str])
    examples: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    passed_over: int = 0  # journal rows of users who were erased

    @property
    def clean(self) -> bool:
        """Whether everything agreed and there was something to compare."""
        return not self.differences and bool(self.compared)

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "compared": dict(self.compared),
            "differences": dict(self.differences),
            "examples": self.examples,
            "notes": self.notes,
        }

    def check(self, what: str, same: NDArray[np.bool_], name: Callable[[int], str]) -> None:
        """Count n comparisons; `name` tells of the one at a position."""
        self.compared[what] += len(same)
        wrong = np.flatnonzero(~same)
        if len(wrong):
            self.differences[what] += len(wrong)
            room = max(EXAMPLES - len(self.examples), 0)
            self.examples += [f"{what}: {name(int(at))}" for at in wrong[:room]]

    def check_states(self, whose: str, hashes: Hashes, stored: Rows, expected: Rows) -> None:
        """Compare n stored states bit for bit; `whose` is user or item."""
        self.check(
            f"{whose} state",
            _bits(stored) == _bits(expected),
            lambda at: f"{whose} hash {int(hashes[at]):#x} in the store",
        )


def _bits(rows: Rows) -> NDArray[np.void]:
    """Rows (n) that are equal where all their bytes are."""
    return np.ascontiguousarray(rows).view(f"V{rows.dtype.itemsize}")
