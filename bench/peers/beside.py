"""Peers beside the scoring loop: which can run here, their runs, and ratios and table of these."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import report
from bench.peers.launch import PEERS, PeerError, python

Figures = Mapping[str, Any]  # of one run of a peer


def installed(names: Sequence[str], console: Console) -> dict[str, Path]:
    """The Pythons that run the peers named; says which cannot be installed here, and why."""
    found: dict[str, Path] = {}
    for name in names:
        try:
            found[name] = python(PEERS[name])
        except PeerError as error:
            console.print(f"{name} could not be installed: {error}", markup=False)
    if missing := [name for name in names if name not in found]:
        console.print(f"Left out, since they could not be installed here: {', '.join(missing)}")
    return found


def measure(
    peers: Iterable[str], rounds: int, run: Callable[[str], Figures], console: Console
) -> dict[str, list[Figures]]:
    """The runs of each peer, in turn; says which failed."""
    runs = defaultdict[str, list[Figures]](list)
    for name in [*peers] * rounds:
        try:
            figures = run(name)
        except PeerError as error:
            console.print(f"{name} is left out: {error}", markup=False)
            continue
        runs[name].append(figures)
        console.print(f"{name}: {figures['events_per_second']:,.0f} events/s")
    return runs


def summary(ours: Figures, runs: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    """Our median rate over that of each peer, and of the fastest; their processor time over ours.

    `ours`: `events_per_second` of the runs and `cpu_us_per_event`.
    """
    if not runs:
        return {}
    ratios = {
        name: round(
            median(ours["events_per_second"]) / median(each["events_per_second"] for each in mine),
            2,
        )
        for name, mine in runs.items()
    }
    best = min(ratios, key=lambda name: ratios[name])
    return {
        **{f"ratio_to_{name}": ratio for name, ratio in ratios.items()},
        **{
            f"cpu_ratio_to_{name}": round(
                median(each["cpu_us_per_event"] for each in mine) / ours["cpu_us_per_event"], 2
            )
            for name, mine in runs.items()
        },
        "ratio_to_best_peer": ratios[best],
        "best_peer": best,
        "peers": dict(runs),
    }


def table(figures: Figures) -> Table:
    """The peers of a `summary`, one a row."""
    peers = [PEERS[name] for name in figures["peers"]]
    apart = [f"{peer.title}: {peer.apart}" for peer in peers if peer.apart]
    shown = report.table(
        *("", "events/s", "ratio", "CPU µs", "CPU ratio", "a call", "exactly-once"),
        title="Peers: the same work, the same bundle",
        caption="\n".join(["medians over the runs", *apart]),
    )
    for name, runs in figures["peers"].items():
        rate, processor, call = (
            median(each[key] for each in runs)
            for key in ("events_per_second", "cpu_us_per_event", "events_per_call")
        )
        shown.add_row(
            PEERS[name].title,
            f"{rate:,.0f}",
            f"{figures[f'ratio_to_{name}']:.2f}",
            f"{processor:,.1f}",
            f"{figures[f'cpu_ratio_to_{name}']:.2f}",
            f"{call:,.0f}",
            "yes" if PEERS[name].exactly_once else "no",
        )
    return shown
