"""A run's verdict as JSON and as a table: a row a fault kind, and what was checked."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median

import orjson
from rich.console import Console
from rich.table import Table

from tests.faults.kinds import BY_KIND
from tests.faults.run import Result


def write(result: Result, path: Path) -> None:
    """All of it as JSON, schedule included."""
    content = {
        "clean": result.clean,
        "injected": dict(result.injected),
        "faults_injected": result.injected.total(),
        **asdict(result),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


def show(result: Result, console: Console) -> None:
    """Print it."""
    faults = Table("fault", "injected", "median s", "what it is", title="Faults")
    for kind, count in sorted(result.injected.items()):
        seconds = [each.seconds for each in result.faults if each.kind == kind and each.happened]
        faults.add_row(kind, str(count), f"{median(seconds):.1f}", BY_KIND[kind].meaning)
    console.print(faults)
    checks = Table("check", *(f"shop {name}" for name in result.verdicts), title="Checks")
    names = sorted({name for each in result.verdicts.values() for name in each.checked})
    for name in names:
        cells: list[str] = []
        for verdict in result.verdicts.values():
            wrong, checked = verdict.wrong.get(name, 0), verdict.checked.get(name, 0)
            cells.append(f"[red]{wrong:,} of {checked:,}[/]" if wrong else f"{checked:,} ✓")
        checks.add_row(name, *cells)
    console.print(checks)
    for name, verdict in result.verdicts.items():
        if verdict.late:
            console.print(f"shop {name}: {verdict.late} repetitions came too late to be told")
        if verdict.doubled:
            console.print(f"shop {name}: {verdict.doubled} inputs lie in Kafka twice, sent once")
        for example in verdict.examples:
            console.print(f"shop {name}: {example}", markup=False)
    for stuck in result.stuck:
        console.print(stuck, style="red", markup=False)
    ends = Counter[str]()
    for exits in result.exits.values():
        ends.update(exits)
    missed = Counter(each.kind for each in result.faults if not each.happened)
    seconds = {name: round(each) for name, each in result.seconds.items()}
    console.print(f"workers ended: {dict(ends)}", markup=False)
    if missed:
        console.print(f"planned faults that did not happen: {dict(missed)}", markup=False)
    if result.hanging:
        console.print(
            f"transactions that Kafka left hanging, ended by kafka-transactions: {result.hanging}"
        )
    console.print(
        f"{result.events:,} events, {result.injected.total()} faults of "
        f"{len(result.injected)} kinds, seed {result.seed}, seconds {seconds}: "
        f"{'clean' if result.clean else 'DAMAGE'}",
        markup=False,
    )
