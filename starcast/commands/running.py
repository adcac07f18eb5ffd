"""Commands that run Starcast and look at what it runs on.

`demo`, `run`, `backfill`, `topics`, `doctor`. What some of them call imports torch, which takes
seconds, so they import it only when they run.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import stamina
import typer
from rich.table import Table
from rich.text import Text

from schemas.exceptions import StarcastError, UnreachableError
from starcast.commands.context import (
    AsJson,
    AsJsonLines,
    SentBar,
    Skip,
    check_output,
    fail,
    how_to_go_on,
    notes,
    output,
    print_counts,
    print_json,
    print_marked,
    progress_bar,
    settings_of,
    stopping,
    write_json,
)
from streams.admin import TopicReport, apply_topics, show_topics
from streams.clients import reach
from streams.config import KafkaConfig

FIRST_WAIT_SECONDS = 1.0  # a broker that is starting is asked again this soon,
LAST_WAIT_SECONDS = 10.0  # and later this often
NAMES = "scorer, answers, items, catalog, texts, archiver, insights, dashboard"

topics_app = typer.Typer(help="The topics of the contract on the cluster.")


def demo(
    context: typer.Context,
    once: Annotated[
        bool, typer.Option("--once", help="Play a record file, train once, end when it is scored.")
    ] = False,
    events: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The record file to play, with --once."),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write what came of it, with --once.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=1, help="Events a second, with --once.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Of the dashboard, without --once.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the generated shop, without --once; else 7.")
    ] = None,
) -> None:
    """Show everything at work on this machine alone: broker, store, a shop, training, dashboard."""
    if once != (events is not None):
        raise typer.BadParameter("--once and --events FILE go together")
    if not once and (json_out is not None or rate is not None):
        raise typer.BadParameter("--json and --rate are of --once")
    if once and (port is not None or seed is not None):
        raise typer.BadParameter("--port and --seed are not of --once")
    check_output(json_out, events)
    settings = settings_of(context)
    if port is not None:
        settings.web.port = port
    from starcast.demo import RATE, SEED, run_demo, run_once

    with stopping() as stop:
        if events is None:
            run_demo(settings, notes, stop.event, SEED if seed is None else seed)
            return
        summary = run_once(settings, notes, stop.event, events, rate or RATE)
    document = asdict(summary)
    print_json(document)
    if json_out is not None:
        write_json(document, json_out)
    if stop.event.is_set():
        raise typer.Exit(stop.code)
    if summary.lost or summary.duplicated:
        raise fail(f"{summary.lost} events were lost, {summary.duplicated} were duplicated.")


def run(
    context: typer.Context,
    processors: Annotated[list[str], typer.Argument(help=NAMES)],
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a broker that does not answer.")
    ] = 60.0,
) -> None:
    """Run processors, several in one process if you like, until Ctrl-C or SIGTERM."""
    settings = settings_of(context)
    from streams.run import run_processors

    _check_names(processors)
    if set(processors) - {"dashboard"}:  # the dashboard waits by itself, and says so on its page
        _wait_for_broker(settings.kafka, wait)
    with stopping() as stop:
        run_processors(processors, settings, stop.event)


def _check_names(processors: list[str]) -> None:
    from streams.run import check_names

    try:
        check_names(processors)
    except StarcastError as problem:
        raise typer.BadParameter(str(problem)) from None


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
    as_json: AsJson = False,
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
        print_json(lines)
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


def backfill(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, readable=True)],
    skip: Skip = 0,
) -> None:
    """Bring a shop's history into states and archive, before it goes live.

    The files are played into the topics, and processors run here until all of it is in.
    """
    settings = settings_of(context)
    reach(settings.kafka)
    from starcast.backfill import BackfillError
    from starcast.backfill import backfill as bring_in

    with stopping() as stop, progress_bar() as progress:
        bar = SentBar(progress, "Playing")
        try:
            sent = bring_in(
                settings,
                files,
                stop.event,
                bar.tell,
                lambda stage: bar.say(f"Waiting for {stage}"),
                skip,
            )
        except BackfillError:  # which says what to do
            raise
        except StarcastError as problem:
            if not bar.delivered:
                raise
            raise fail(f"{problem}\n{how_to_go_on(skip + bar.delivered)}") from None
    print_counts(sent.delivered)
    if stop.event.is_set():
        raise fail(how_to_go_on(skip + sent.delivered.total()), stop.code)


def doctor(
    context: typer.Context,
    processors: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Those that are to have workers, of {NAMES}. Unless some are named: scorer, "
            "items, catalog and archiver.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJsonLines = False,
) -> None:
    """Check what is reachable, what is not, what to do; ends with 1 if something is wrong."""
    settings, named = settings_of(context), processors or []
    from starcast.doctor import examine

    _check_names(named)
    wrong = 0
    for finding in examine(settings, named):
        wrong += finding.state == "wrong"
        if as_json:
            print_json(asdict(finding))
            continue
        print_marked(finding.state, f"{finding.name}: {finding.found}")
        if finding.advice:
            output.print(f"  {finding.advice}", markup=False, soft_wrap=True)
    if wrong:
        raise fail(f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong.")
