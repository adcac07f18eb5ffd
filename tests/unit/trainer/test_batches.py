"""Steps of texts at random, and their parts of like length."""

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer import batches


def cost(tokens: list[int], parts: list[list[int]], overhead: int) -> int:
    return sum(len(part) * max(tokens[row] for row in part) + overhead for part in parts)


def test_parts_by_hand() -> None:
    tokens = np.array([3, 100, 4, 90, 5])
    found = [part.tolist() for part in batches.parts(tokens, 4_096, overhead=10)]
    assert found == [[4, 2, 0], [1, 3]]  # 3 · 5 + 10 and 2 · 100 + 10: one part costs 510


def test_a_part_that_costs_much_is_not_made() -> None:
    tokens = np.array([3, 100, 4, 90, 5])
    assert len(list(batches.parts(tokens, 4_096, overhead=300))) == 1


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=7),
    st.integers(1, 120),
    st.integers(0, 60),
)
def test_parts_hold_every_row_once_within_the_budget_and_none_cost_less(
    tokens: list[int], budget: int, overhead: int
) -> None:
    found = [part.tolist() for part in batches.parts(np.array(tokens), budget, overhead)]
    assert sorted(row for part in found for row in part) == list(range(len(tokens)))

    billed = [max(each, 1) for each in tokens]

    def allowed(part: list[int]) -> bool:
        return len(part) == 1 or len(part) * max(billed[row] for row in part) <= budget

    assert all(allowed(part) for part in found)
    ranked = sorted(range(len(tokens)), key=lambda row: -tokens[row])
    costs: list[int] = []
    for cuts in itertools.product([False, True], repeat=len(tokens) - 1):
        ends = [at + 1 for at, cut in enumerate(cuts) if cut] + [len(tokens)]
        every = [ranked[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        if all(allowed(part) for part in every):
            costs.append(cost(billed, every, overhead))
    assert cost(billed, found, overhead) == min(costs)


def test_steps_hold_every_row_once_in_random_order() -> None:
    steps = batches.shuffled(50, 16, np.random.default_rng(1))
    rows = np.concatenate(steps).tolist()
    assert [len(each) for each in steps] == [16, 16, 16, 2]
    assert sorted(rows) == list(range(50))
    assert rows != list(range(50))
    again = batches.shuffled(50, 16, np.random.default_rng(1))
    assert np.concatenate(again).tolist() == rows


def test_a_gpu_is_asked_for_few_parts() -> None:
    tokens = np.arange(1, 17)
    few = batches.parts(tokens, 4_096, batches.overhead(torch.device("cuda")))
    many = batches.parts(tokens * 16, 4_096, batches.overhead(torch.device("cpu")))
    assert len(list(few)) == 1 < len(list(many))
