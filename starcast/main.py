"""The `starcast` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from confluent_kafka import KafkaError, KafkaException

from schemas.exceptions import StarcastError
from starcast import __version__, log
from starcast.commands import (
    contract,
    dead_letters,
    explain,
    forget,
    models,
    records,
    running,
    state,
    training,
)
from starcast.commands.context import Chosen, fail
from streams.clients import error_of, refused_option

app = typer.Typer(
    help="Events in, predicted ratings out, a model trained from the stream.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RUNNING, RECORDS, MODELS, LOOKING = "Run", "Move records", "Models", "Look and repair"

app.command(rich_help_panel=RUNNING)(running.demo)
app.command(rich_help_panel=RUNNING)(running.run)
app.command(rich_help_panel=RUNNING)(running.backfill)
app.add_typer(running.topics_app, name="topics", rich_help_panel=RUNNING)

app.command(rich_help_panel=RECORDS)(records.produce)
app.command(rich_help_panel=RECORDS)(records.consume)
app.command(rich_help_panel=RECORDS)(records.sample)
app.command(rich_help_panel=RECORDS)(records.export)
app.add_typer(records.import_app, name="import", rich_help_panel=RECORDS)

app.command(rich_help_panel=MODELS)(training.train)
app.command(rich_help_panel=MODELS)(training.retrain)
app.command(rich_help_panel=MODELS)(training.evaluate)
app.command(rich_help_panel=MODELS)(training.search)
app.command(rich_help_panel=MODELS)(training.compress)
app.add_typer(models.app, name="models", rich_help_panel=MODELS)

app.command(rich_help_panel=LOOKING)(running.doctor)
app.command(rich_help_panel=LOOKING)(explain.explain)
app.add_typer(dead_letters.app, name="dead-letters", rich_help_panel=LOOKING)
app.command(rich_help_panel=LOOKING)(state.verify_replay)
app.add_typer(state.app, name="state", rich_help_panel=LOOKING)
app.command(rich_help_panel=LOOKING)(forget.forget)
app.command(rich_help_panel=LOOKING)(contract.config)
app.command(rich_help_panel=LOOKING)(contract.asyncapi)
app.command(rich_help_panel=LOOKING)(contract.schema)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"starcast {__version__}")
        raise typer.Exit


@app.callback()
def choose(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="The settings file; starcast.toml here, if there is one, by default."),
    ] = None,
    log_level: Annotated[
        log.Level | None, typer.Option(help="What is logged; else as settings say.")
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """What holds for every command."""
    context.obj = Chosen(config, log_level)


def main() -> None:
    """Runs the command line. Errors raised on purpose are told in one message, without a trace.

    So are those of the system, as of a full disk, and of a broker that went away between two
    questions: they are no bugs either.
    """
    try:
        app()
    except StarcastError as problem:
        sys.exit(fail(str(problem)).exit_code)
    except KafkaException as problem:
        said = f"Kafka failed meanwhile: {error_of(problem).str()}. Run the command again."
        if error_of(problem).code() == KafkaError._INVALID_ARG:  # pyright: ignore[reportPrivateUsage]
            said = str(refused_option(problem))
        sys.exit(fail(said).exit_code)
    except OSError as problem:
        said = problem.strerror or str(problem) or type(problem).__name__
        where = "" if problem.filename is None else f": {problem.filename}"
        advice = "Check that it is there, that you may use it, and that its disk has room."
        sys.exit(fail(f"{said}{where}. {advice}").exit_code)
