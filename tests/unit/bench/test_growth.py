"""The verdict of a soak on series made by hand."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench.growth import HIGHEST_BOUND, Floats, judge, trend

HOUR = np.arange(0, 3_600, 10.0)
RANDOM = np.random.default_rng(3)


def test_a_straight_line_has_its_own_slope_and_no_doubt() -> None:
    # From 90 to 110 in an hour: 20 percent of the mean 100.
    found = trend(np.append(HOUR, 3_600.0), 90 + 20 * np.append(HOUR, 3_600.0) / 3_600)
    assert found.mean == pytest.approx(100)
    assert found.slope == pytest.approx(20)
    assert found.bound == pytest.approx(20)
    assert found.blocks == 60


def test_steady_memory_is_bounded_closely() -> None:
    found = trend(HOUR, 1_000 + RANDOM.normal(0, 10, len(HOUR)))
    assert abs(found.slope) < 1
    assert found.slope < found.bound < 2


def test_the_bound_is_that_of_a_regression_when_blocks_are_independent() -> None:
    # Block means 1, 3, 1, 3, …: residuals alternate, so nothing is added for correlation.
    values = np.where(HOUR // 60 % 2, 3.0, 1.0)
    found = trend(HOUR, values)
    assert found.correlation == 0
    minutes = np.arange(len(HOUR) // 6 - 1)
    line: Any = stats.linregress(minutes / 60, np.where(minutes % 2, 3.0, 1.0))
    assert found.blocks == len(minutes)
    bound = line.slope + stats.t.ppf(0.95, len(minutes) - 2) * line.stderr
    assert found.bound == pytest.approx(100 / values.mean() * bound)


def test_memory_that_wanders_is_doubted_more_than_memory_that_trembles() -> None:
    steps = RANDOM.normal(0, 1, len(HOUR))
    wandering = np.zeros(len(HOUR))
    for at in range(1, len(HOUR)):
        wandering[at] = 0.98 * wandering[at - 1] + steps[at]
    trembling = RANDOM.permutation(wandering)
    assert trend(HOUR, 1_000 + wandering).correlation > 0.4
    doubts = [each.bound - each.slope for each in map(_trend, (wandering, trembling))]
    assert doubts[0] > 2 * doubts[1]


def test_the_bound_holds_where_neighbours_are_much_alike() -> None:
    # 49 minutes, as an hour leaves, of memory that wanders and does not grow: slope 0.
    random = np.random.default_rng(1)
    seconds, held = np.arange(0, 49 * 60 + 1, 10.0), 0
    for _ in range(300):
        wandering = random.normal(0, 1, 149)
        for at in range(1, len(wandering)):
            wandering[at] += 0.9 * wandering[at - 1]
        minutes = 1_000 + wandering[-49:]
        held += trend(seconds, np.append(np.repeat(minutes, 6), minutes[-1])).bound >= 0
    assert held / 300 > 0.9


def test_too_short_a_run_decides_nothing() -> None:
    assert trend(HOUR[:3], np.ones(3)).bound == np.inf


@pytest.mark.parametrize(
    ("growth", "good"), [(0.0, True), (2.0, True), (8.0, False)]
)  # percent an hour
def test_memory_that_grows_is_not_good(growth: float, good: bool) -> None:
    rss = 1e9 * (1 + growth / 100 * HOUR / 3_600) + RANDOM.normal(0, 5e6, len(HOUR))
    (judged,) = judge(_samples(rss=rss))
    assert judged.good == good
    assert (judged.resident.bound < HIGHEST_BOUND) == good


def test_memory_that_swings_too_much_is_not_called_growth() -> None:
    middle = (600 + HOUR[-1]) / 2  # of the time that is judged: the swing has no slope
    swinging = 1e9 * (1 + 0.3 * np.cos((HOUR - middle) / 200))
    (judged,) = judge(_samples(rss=swinging))
    assert (judged.good, judged.word) == (False, "too unsteady to tell")
    (judged,) = judge(_samples(rss=1e9 * (1 + 0.1 * HOUR / 3_600)))
    assert judged.word == "grows"


def test_growth_while_it_warms_up_does_not_count() -> None:
    rss = 1e9 * np.minimum(HOUR / 600, 1.0)
    (judged,) = judge(_samples(rss=rss))
    assert judged.good
    assert judged.resident.mean == 1e9


def test_handles_that_stay_open_are_not_good() -> None:
    assert not judge(_samples(handles=40 + HOUR // 300))[0].good


def test_files_that_are_open_for_a_moment_are_good() -> None:
    handles = np.where(np.arange(len(HOUR)) % 25 == 24, 90.0, 40.0)
    assert judge(_samples(handles=handles))[0].good


def _trend(values: Floats) -> Any:
    return trend(HOUR, 1_000 + values)


def _samples(**changes: Floats) -> list[dict[str, Any]]:
    series = {
        "rss": np.full(len(HOUR), 1e9),
        "uss": np.full(len(HOUR), 9e8),
        "handles": np.full(len(HOUR), 40.0),
        "threads": np.full(len(HOUR), 12.0),
    } | changes
    return [
        {
            "seconds": float(seconds),
            "processes": {"worker": {name: float(each[at]) for name, each in series.items()}},
        }
        for at, seconds in enumerate(HOUR)
    ]
