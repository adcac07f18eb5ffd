"""When events are due, whether a loop keeps up, and which rates are tried."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from bench.latencies import Measured, figures_of, highest_sustained, histogram_of, table
from bench.latency import TABLE_WIDTH, Options, judged, keeps_up, run_rates
from bench.open_loop import Plan, Seen, Sent
from schemas.exceptions import StarcastError

PLAN = Plan(first=100, count=10, rate=2.0, start=50.0)  # due at 50.0, 50.5, … 54.5


@pytest.mark.parametrize(
    ("now", "due"),
    [(49.9, 0), (50.0, 1), (50.4, 1), (50.5, 2), (54.4, 9), (54.5, 10), (60.0, 10)],
)
def test_an_event_is_due_at_its_time_and_not_before(now: float, due: int) -> None:
    assert PLAN.due_by(now) == due


def test_the_last_event_is_due_one_interval_before_the_end() -> None:
    assert (PLAN.due(0), PLAN.due(9), PLAN.end) == (50.0, 54.5, 55.0)


def test_a_steady_loop_keeps_up() -> None:
    assert keeps_up(np.full(100, 1.5), rate=10.0)


def test_a_loop_that_falls_behind_does_not_keep_up() -> None:
    # 100 events in 10 s; the last quarter lies 7.5 s after the first and 0.3 s higher: 4% of it.
    assert not keeps_up(np.linspace(0.1, 0.5, 100), rate=10.0)
    assert keeps_up(np.linspace(0.1, 0.2, 100), rate=10.0)


def test_a_loop_that_is_far_behind_at_the_end_does_not_keep_up() -> None:
    assert not keeps_up(np.full(100, 2.5), rate=10.0)


def test_percentiles_are_those_of_the_latencies() -> None:
    histogram = histogram_of(np.arange(1, 1_001) / 1_000)  # 1 ms to 1 s
    assert histogram.get_total_count() == 1_000
    assert histogram.get_value_at_percentile(50) == pytest.approx(500_000, rel=1e-3)
    assert histogram.get_value_at_percentile(99) == pytest.approx(990_000, rel=1e-3)


def test_the_warm_up_is_not_measured_and_order_does_not_matter() -> None:
    seen = Seen(np.arange(10)[::-1], np.arange(10)[::-1] / 1_000, [])
    measured = judged(PLAN, Sent(10, np.zeros(10)), seen, 1.0, 5, {})
    assert measured.latencies.tolist() == [each / 1_000 for each in range(2, 10)]
    assert measured.sustained


def test_a_prediction_that_comes_twice_is_an_error() -> None:
    seen = Seen(np.array([0, 1, 1]), np.zeros(3), [])
    with pytest.raises(StarcastError, match="twice"):
        judged(PLAN, Sent(3, np.zeros(3)), seen, 0.0, 1, {})


def test_rates_rise_until_the_scorer_breaks_and_then_close_in() -> None:
    tried: list[tuple[str, int]] = []
    limits = {"scorer": 5_500, "bare": 9_000}

    def measure(loop: str, rate: int) -> Measured:
        tried.append((loop, rate))
        latencies = np.full(10, 0.03 if loop == "scorer" else 0.01)
        return Measured(latencies, np.zeros(10), rate <= limits[loop], 10, 2, {})

    options = Options((4_000, 8_000, 16_000), 1.0, 0.0, 0.0, 1, 2, 1, 1, 1)
    runs = run_rates(options, measure, Console(file=StringIO()))
    assert tried == [
        ("scorer", 4_000),
        ("bare", 4_000),
        ("scorer", 8_000),
        ("bare", 8_000),
        ("bare", 16_000),
        ("scorer", 6_000),
        ("scorer", 5_000),
    ]
    figures = figures_of(runs)
    assert figures["ratio_p50_at_4000"] == figures["ratio_p99_at_4000"] == 3.0
    assert "ratio_p50_at_8000" not in figures
    assert (figures["highest_sustained"], figures["highest_sustained_bare"]) == (5_000, 8_000)


def test_rounds_are_told_together_and_apart() -> None:
    rounds = [
        Measured(np.full(10, seconds), np.zeros(10), True, 10, 2, {}) for seconds in (0.01, 0.03)
    ]
    row = figures_of({"scorer": {4_000: rounds}, "bare": {}})["scorer"]["4000"]
    assert row["rounds"]["p99"] == pytest.approx([10, 30], rel=1e-3)
    assert (row["p50"], row["p99"]) == (row["rounds"]["p50"][0], row["rounds"]["p99"][1])


def test_the_table_is_markdown() -> None:
    slow = Measured(np.full(10, 12.3456), np.zeros(10), True, 10, 2, {})
    said = StringIO()
    runs = {loop: {20_000: [slow]} for loop in ("scorer", "bare")}
    Console(file=said, width=TABLE_WIDTH).print(table(figures_of(runs)))
    assert len(said.getvalue().strip().splitlines()) == 3  # a heading that is broken would be more


def test_no_rate_is_sustained_where_every_one_breaks() -> None:
    assert highest_sustained({}) == 0
