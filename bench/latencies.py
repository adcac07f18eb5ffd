"""What is told of latencies: percentiles by rate, ratios, a table and a plot."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair
import numpy as np
import polars as pl
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from bench import report

LOOPS = ("scorer", "bare")
PERCENTILES = (50.0, 99.0, 99.9)


@dataclass(frozen=True)
class Measured:
    """One loop at one rate; latencies in seconds, after the warm-up."""

    latencies: NDArray[np.float64]  # in the order in which events were due
    late: NDArray[np.float64]  # of the sender, and part of the above
    sustained: bool
    events: int  # the warm-up's too, as in what follows
    transactions: int
    phases: Mapping[str, float]  # seconds; none of the bare loop


def histogram_of(latencies: NDArray[np.float64]) -> HdrHistogram:
    """Microseconds up to an hour, to three digits."""
    histogram = HdrHistogram(1, 3_600_000_000, 3)
    values, counts = np.unique(np.rint(latencies * 1e6).astype(np.int64), return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram.record_value(max(value, 1), count)
    return histogram


def percentiles(histogram: HdrHistogram) -> dict[str, float]:
    """Milliseconds by name."""
    values = {_name(each): histogram.get_value_at_percentile(each) for each in PERCENTILES}
    return {name: round(value / 1_000, 2) for name, value in values.items()}


def highest_sustained(runs: Mapping[int, Sequence[Measured]]) -> int:
    """The highest rate that every run sustained; 0 when there is none."""
    good = [rate for rate, each in runs.items() if all(run.sustained for run in each)]
    return max(good, default=0)


def figures_of(runs: Mapping[str, Mapping[int, Sequence[Measured]]]) -> dict[str, Any]:
    """Ratios by name, and each loop's percentiles in milliseconds, over all rounds of a rate."""
    rows = {
        loop: {str(rate): _row(each) for rate, each in sorted(by_rate.items())}
        for loop, by_rate in runs.items()
    }
    ratios: dict[str, float] = {}
    for rate, row in rows["scorer"].items():
        bare = rows["bare"].get(rate)
        if bare and row["sustained"] and bare["sustained"]:
            for name in map(_name, PERCENTILES):
                ratios[f"ratio_{name}_at_{rate}"] = round(row[name] / bare[name], 2)
    return {
        **ratios,
        "highest_sustained": highest_sustained(runs["scorer"]),
        "highest_sustained_bare": highest_sustained(runs["bare"]),
        **rows,
    }


def _row(runs: Sequence[Measured]) -> dict[str, Any]:
    histogram = histogram_of(np.concatenate([run.latencies for run in runs]))
    alone = [percentiles(histogram_of(run.latencies)) for run in runs]
    late = np.concatenate([run.late for run in runs])
    transactions = sum(run.transactions for run in runs)
    phases = Counter[str]()
    for run in runs:
        phases.update(run.phases)  # pyright: ignore[reportArgumentType]
    return {
        "sustained": all(run.sustained for run in runs),
        "events": histogram.get_total_count(),
        **percentiles(histogram),
        "rounds": {name: [each[name] for each in alone] for name in alone[0]},
        "max": round(histogram.get_max_value() / 1_000, 2),
        "sender_late_p99": round(float(np.percentile(late, 99)) * 1_000, 2) if len(late) else None,
        "events_per_transaction": round(sum(run.events for run in runs) / transactions, 1),
        "ms_per_transaction": {
            phase: round(spent / transactions * 1_000, 2) for phase, spent in phases.items()
        },
    }


def _name(percentile: float) -> str:
    return f"p{percentile:g}"


def words(measured: Measured) -> str:
    """One run, as it is told while others go on."""
    row = _row([measured])
    found = ", ".join(f"{name} {row[name]:.1f} ms" for name in map(_name, PERCENTILES))
    return found if measured.sustained else f"not sustained ({found})"


def table(figures: Mapping[str, Any]) -> Table:
    """A Markdown table: milliseconds by rate, the loops side by side."""
    names = [_name(each) for each in PERCENTILES]
    shown = report.table(
        "events/s",
        *(f"{name} ms" for name in names),
        *(f"bare {name} ms" for name in names),
        *(f"ratio {name}" for name in names),
        box=box.MARKDOWN,
    )
    rates = {rate for loop in LOOPS for rate in figures[loop]}
    for rate in sorted(rates, key=int):
        cells = [
            f"{row[name]:.1f}" if row and row["sustained"] else "breaks" if row else ""
            for row in (figures[loop].get(rate) for loop in LOOPS)
            for name in names
        ]
        ratios = [figures.get(f"ratio_{name}_at_{rate}") for name in names]
        shown.add_row(
            f"{int(rate):,}", *cells, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        )
    return shown


def plot(runs: Mapping[str, Mapping[int, Sequence[Measured]]], path: Path) -> None:
    """Latency by how rare it is, for each rate that was sustained."""
    rows: list[dict[str, Any]] = []
    for loop, by_rate in runs.items():
        for rate, each in by_rate.items():
            if not all(run.sustained for run in each):
                continue
            histogram = histogram_of(np.concatenate([run.latencies for run in each]))
            rows += [
                {
                    "loop": loop,
                    "events/s": rate,
                    "rarity": rarity,
                    "ms": histogram.get_value_at_percentile(100 - 100 / rarity) / 1_000,
                }
                for rarity in np.geomspace(1.05, 1_000, 60).tolist()
            ]
    if not rows:
        return
    chart = altair.Chart(pl.DataFrame(rows)).mark_line()
    chart = chart.encode(
        x=altair.X(
            "rarity:Q", title="slower than this is one event in", scale=altair.Scale(type="log")
        ),
        y=altair.Y("ms:Q", scale=altair.Scale(type="log")),
        color=altair.Color("loop:N", sort=list(LOOPS)),
    )
    chart = chart.properties(width=260, height=200).facet("events/s:N", columns=3)
    chart.save(path)
