"""How a learning rate rises and falls."""

import numpy as np
import pytest
import torch

from trainer.rates import rate, schedule


def test_rates_by_hand() -> None:
    assert [rate(step, 10, 0.2, "linear") for step in (0, 1, 2, 6, 10)] == [0.5, 1, 1, 0.5, 0]
    assert rate(6, 10, 0.2, "cosine") == pytest.approx(0.5)
    assert rate(4, 10, 0.2, "cosine") == pytest.approx(0.5 * (1 - np.cos(np.pi * 0.75)))
    assert rate(9, 10, 0.2, "constant") == 1


def test_a_rate_that_does_not_rise_begins_at_the_highest() -> None:
    assert [rate(step, 5, 0.0, "linear") for step in (0, 1, 3, 5)] == [1, 1, 0.5, 0]


def test_each_group_has_its_share_of_its_own_rate() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": highest} for highest in (1.0, 0.1)]
    optimizer = torch.optim.AdamW(groups)
    rates = schedule(optimizer, 10, 0.2, "linear")
    assert rates.get_last_lr() == pytest.approx([0.5, 0.05])
    for _ in range(6):
        optimizer.step()
        rates.step()
    assert rates.get_last_lr() == pytest.approx([0.5, 0.05])
