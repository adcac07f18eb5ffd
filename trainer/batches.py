"""What a step of fitting an encoder takes, and in which parts.

A step's texts are drawn at random. Texts of like length in a step would be padded less, but short
reviews are mostly praise: such steps pull one way and then another, and what is fitted is the worse
for it (docs/decisions/0023). So a step is taken in parts of like length, whose gradients add up.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def shuffled(count: int, size: int, random: np.random.Generator) -> list[Rows]:
    """All of `count` rows in random order, `size` at a time."""
    order = random.permutation(count)
    return [order[start : start + size] for start in range(0, count, size)]


def overhead(device: torch.device) -> int:
    """What one more part costs, in tokens.

    Forward and back, MiniLM takes 87 ms for 16 tokens and 1,034 ms for 1,024 on a core. A GPU with
    few tokens waits for its kernels to be launched.
    """
    return 64 if device.type == "cpu" else 4_096


def parts(tokens: NDArray[np.int64], budget: int, overhead: int) -> Iterator[Rows]:
    """Rows by number of tokens (n), in the parts of like length that cost least together.

    k rows cost k · (tokens of the longest) + `overhead`; their padded tokens are at most `budget`,
    but for a row that has more alone. Found exactly: the best parts of the e longest rows are the
    best of the s longest ones and one part of the rest, for some s < e.
    """
    order = np.argsort(-tokens, kind="stable")
    longest = np.maximum(tokens[order], 1)  # (n): of a part that starts here
    cost = np.zeros(len(order) + 1)  # (n + 1): least, of so many rows
    start = np.zeros(len(order) + 1, np.int64)  # (n + 1): of the last part of so many rows
    for end in range(1, len(order) + 1):
        first = np.arange(max(end - max(budget // int(longest[end - 1]), 1), 0), end)
        padded = (end - first) * longest[first]
        fits = (padded <= budget) | (first == end - 1)
        total = np.where(fits, cost[first] + padded + overhead, np.inf)
        start[end] = first[total.argmin()]
        cost[end] = total.min()
    end = len(order)
    while end:
        yield order[start[end] : end]
        end = int(start[end])
