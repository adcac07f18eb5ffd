"""Commands that run Starcast and look at what it runs on: `run`, `topics`, `doctor`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import orjson
import stamina
import typer
from rich.table import Table
from rich.text import Text

from schemas.exceptions import UnreachableError
from starcast.commands.context import fail, notes, output, settings_of, stopping
from streams.admin import TopicReport, apply_topics, reach, show_topics
from streams.config import KafkaConfig

FIRST_WAIT_SECONDS = 1.0  # a broker that is starting is asked again this soon,
LAST_WAIT_SECONDS = 10.0  # and later this often

topics_app = typer.Typer(help="The topics of the contract on the cluster.")


def run(
    context: typer.Context,
    processors: Annotated[
        list[str],
        typer.Argument(
            help="scorer, answers, items, catalog, texts, archiver, insights, dashboard"
        ),
    ],
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a broker that does not answer.")
    ] = 60.0,
) -> None:
    """Run processors, several in one process if you like, until Ctrl-C or SIGTERM."""
    settings = settings_of(context)
    if set(processors) - {"dashboard"}:  # the dashboard waits by itself, and says so on its page
        _wait_for_broker(settings.kafka, wait)
    from streams.run import run_processors  # imports torch, which takes seconds

    with stopping() as stop:
        run_processors(processors, settings, stop)


def _wait_for_broker(kafka: KafkaConfig, seconds: float) -> None:
    for attempt in stamina.retry_context(
        on=UnreachableError,
        attempts=None,
        timeout=seconds,
        wait_initial=FIRST_WAIT_SECONDS,
        wait_max=LAST_WAIT_SECONDS,
    ):
        with attempt:
            reach(kafka)


@topics_app.command("apply")
def apply_(context: typer.Context) -> None:
    """Make topics that are missing, and give all of them the settings of the contract."""
    done = apply_topics(settings_of(context).kafka)
    for report, change in done:
        if change != "unchanged":
            output.print(f"{change} {report.name}", markup=False)
    unchanged = sum(change == "unchanged" for _, change in done)
    notes.print(f"{unchanged} of {len(done)} topics were as they should be.")


@topics_app.command()
def show(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the topics on the cluster beside what they should be; ends with 1 if they differ."""
    reports = show_topics(settings_of(context).kafka)
    if as_json:
        lines = [
            {
                "topic": report.name,
                "partitions": report.partitions,
                "replication": report.replication,
                "records": report.records,
                "problem": report.problem,
            }
            for report in reports
        ]
        output.print(orjson.dumps(lines).decode(), markup=False, soft_wrap=True)
    else:
        output.print(_topics_table(reports))
    if any(report.problem for report in reports):
        raise fail("Topics are not as they should be: run `starcast topics apply`.")


def _topics_table(reports: Sequence[TopicReport]) -> Table:
    table = Table("topic", "partitions", "replicas", "records", "cleanup", "problem", box=None)
    for report in reports:
        table.add_row(
            report.name,
            str(report.partitions or "-"),
            str(report.replication or "-"),
            "-" if report.records is None else f"{report.records:,}",
            report.topic.cleanup,
            Text(report.problem, style="red"),
        )
    return table


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Check what is reachable, what is not, and say what to do; ends with 1 if something is wrong."""
    from starcast.doctor import examine  # imports what it checks, which takes seconds

    marks = {"fine": ("✓", "green"), "wrong": ("✗", "red"), "note": ("–", "yellow")}
    wrong = 0
    for finding in examine(settings_of(context)):
        wrong += finding.state == "wrong"
        if as_json:
            output.print(orjson.dumps(asdict(finding)).decode(), markup=False, soft_wrap=True)
            continue
        line = Text.assemble(marks[finding.state], f" {finding.name}: {finding.found}")
        output.print(line, soft_wrap=True)
        if finding.advice:
            output.print(f"  {finding.advice}", markup=False, soft_wrap=True)
    if wrong:
        raise fail(f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong.")
