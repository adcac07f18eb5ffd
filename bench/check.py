"""Whether the ratios of benchmarks still are what they were: `make bench-check`.

`baseline.json` has, by benchmark, the command's arguments and of some ratios what they `is`, and
which share of that is `noise`: what repeated runs of one version have shown. A ratio that is lower
than its baseline by more than its noise fails the check. Times are not compared, only ratios of
one run, so another machine may check too. The figures of the last runs, which came of more rounds
or peers, stay as they are; `--as-is` compares those.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, Field, TypeAdapter
from rich.console import Console
from rich.table import Table

from bench.command import exit_code
from bench.report import RESULTS
from schemas.exceptions import StarcastError

BASELINE = Path(__file__).parent / "baseline.json"


class Ratio(BaseModel):
    """What a ratio was; higher is better."""

    is_: float = Field(alias="is", gt=0)
    noise: float = Field(gt=0, lt=1, description="share of it by which runs of one version differ")

    @property
    def least(self) -> float:
        """What it may fall to."""
        return self.is_ * (1 - self.noise)


class Benchmark(BaseModel):
    """How a benchmark is run, and what it gave."""

    arguments: list[str]
    ratios: dict[str, Ratio]


def fallen(baseline: Mapping[str, Ratio], figures: Mapping[str, Any]) -> list[str]:
    """Ratios that are missing or lower than noise explains."""
    return [name for name, ratio in baseline.items() if not figures.get(name, 0) >= ratio.least]


def run(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """A benchmark's figures by a new run. Raises StarcastError where it wrote none."""
    path = RESULTS / f"{name}.json"
    kept = path.rename(path.with_suffix(".kept")) if path.exists() else None
    try:
        subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments], check=True)
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise StarcastError(f"bench.{name} did not write {path}.") from None
    finally:
        if kept is not None:
            kept.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare, print; 1 when a ratio has fallen."""
    baseline = TypeAdapter(dict[str, Benchmark]).validate_json(BASELINE.read_bytes())
    parser = argparse.ArgumentParser(prog="bench.check", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[*baseline], choices=[*baseline])
    parser.add_argument("--as-is", action="store_true", help="compare the figures of the last runs")
    chosen = parser.parse_args(arguments)
    table = Table("benchmark", "ratio", "was", "may fall to", "is", "")
    failed = False
    for name in chosen.only:
        benchmark = baseline[name]
        if chosen.as_is:
            figures = orjson.loads((RESULTS / f"{name}.json").read_bytes())
        else:
            figures = run(name, benchmark.arguments)
        gone = fallen(benchmark.ratios, figures)
        failed = failed or bool(gone)
        for ratio, was in benchmark.ratios.items():
            said = "fallen" if ratio in gone else "holds"
            numbers = (f"{was.is_:.3f}", f"{was.least:.3f}", str(figures.get(ratio, "missing")))
            table.add_row(name, ratio, *numbers, said)
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(exit_code(main))
