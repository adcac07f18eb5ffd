"""`python -m tests.faults`: events, faults, checks. Ends with 1 on damage.

A run that finds damage prints how to replay it; its folder with all logs stays.
"""

import argparse
import shutil
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import structlog
from rich.console import Console

from schemas.exceptions import StarcastError
from starcast.log import LogConfig, configure
from tests.faults import report, schedule
from tests.faults.kinds import BY_KIND
from tests.faults.protections import SWITCHES
from tests.faults.run import Load, run
from tests.faults.servers import start_servers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the schedule")
    parser.add_argument("--events", type=int, default=1_000_000, help="of all shops together")
    parser.add_argument("--users", type=int, default=2_000, help="of each shop")
    parser.add_argument("--each", type=int, default=7, help="faults of every kind")
    parser.add_argument("--rate", type=float, default=380, help="events a second to each shop")
    parser.add_argument("--kinds", nargs="*", choices=[*BY_KIND], default=[*BY_KIND])
    parser.add_argument("--shops", nargs="*", choices=["a", "b"], default=["a", "b"])
    parser.add_argument("--mixed", action="store_true", help="no faults alone, all in mixture")
    parser.add_argument("--without", nargs="*", choices=[*SWITCHES], default=[])
    parser.add_argument("--schedule", type=Path, help="replay a run's schedule.json")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--folder", type=Path, help="of data and logs; else a temporary one")
    arguments = parser.parse_args()
    console = Console()
    configure(LogConfig(level="error"))
    structlog.contextvars.clear_contextvars()
    planned = (
        schedule.load(arguments.schedule)
        if arguments.schedule
        else schedule.make_schedule(
            arguments.seed,
            arguments.shops,
            arguments.each,
            arguments.kinds,
            alone=not arguments.mixed,
        )
    )
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="starcast-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    schedule.save(planned, folder / "schedule.json")
    console.print(f"{planned.count} faults planned, seed {planned.seed}, folder {folder}")
    load = Load(
        tuple(arguments.shops),
        arguments.events // len(arguments.shops),
        arguments.users,
        arguments.rate,
    )
    try:
        with closing(start_servers(folder)) as servers:
            result = run(
                servers,
                planned,
                load,
                folder,
                lambda line: console.print(line, markup=False, highlight=False),
                tuple(arguments.without),
            )
    except StarcastError as error:
        console.print(f"The harness itself failed: {error}", style="red", markup=False)
        console.print(f"Logs are in {folder}.")
        return 2
    report.show(result, console)
    if arguments.json:
        report.write(result, arguments.json)
    if result.clean:
        if not arguments.folder:
            shutil.rmtree(folder, ignore_errors=True)
        return 0
    report.write(result, folder / "report.json")
    console.print(
        f"Replay: python -m tests.faults --schedule {folder}/schedule.json --events "
        f"{arguments.events} --users {arguments.users} --rate {arguments.rate:g}",
        markup=False,
        soft_wrap=True,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
