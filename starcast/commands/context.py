"""What all commands share: settings, consoles, and a clean end on a signal."""

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import Annotated, Any, Literal, cast

import orjson
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from starcast import log
from starcast.settings import Settings, load
from streams.producer import Sent

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"\w{2,}:/")  # what a path makes of s3://…; a single letter is a drive
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

WIDTH = 120  # of tables that go to a file or a pipe

LOOK_SECONDS = 2.0  # between looks at how far a command is, where no bar can show it
TOLD_SECONDS = 30.0  # until a stage that goes on is told again
SPEED_SECONDS = 300.0  # over which the time that is left is estimated

_MARKS = {"fine": ("✓", "green"), "wrong": ("✗", "red"), "note": ("–", "yellow")}

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
Skip = Annotated[
    int, typer.Option(min=0, help="Records at the beginning to leave out, since they were sent.")
]

output = Console(
    highlight=False,
    emoji=False,  # `:id:` within an id is no picture
    width=None if sys.stdout.isatty() else WIDTH,
)
"""Where what was asked for is printed."""

notes = Console(
    stderr=True,
    highlight=False,
    emoji=False,
    width=None if sys.stderr.isatty() else WIDTH,
)
"""Where is told how it is going."""


@dataclass(frozen=True)
class Chosen:
    """What was chosen before the command's name."""

    config: Path | None = None
    log_level: log.Level | None = None


def chosen_of(context: typer.Context) -> Chosen:
    """What was chosen before the command's name."""
    return cast(Chosen, context.obj)


def settings_of(context: typer.Context) -> Settings:
    """The settings in force, with the log set up as they say."""
    chosen = chosen_of(context)
    settings = load(chosen.config)
    if chosen.log_level is not None:
        settings.log.level = chosen.log_level
    log.configure(settings.log)
    return settings


@dataclass
class Stop:
    """Whether a signal has asked for an end, and the exit code of who ends before it is done."""

    event: threading.Event
    code: int = 0


@contextmanager
def stopping() -> Generator[Stop]:
    """What SIGINT and SIGTERM set; a second SIGINT ends the process at once."""
    stop = Stop(threading.Event())

    def ask(number: int, _: FrameType | None) -> None:
        if stop.event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.code = 128 + number  # as a shell has it of who is ended by it
        stop.event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar() -> Generator[Progress]:
    """Progress bars on stderr; where that is no terminal, log lines: of each stage, and in between.

    A stage that is over before it is looked at is not told.
    """
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=notes,
        disable=not notes.is_terminal,
        speed_estimate_period=SPEED_SECONDS,
    )
    done = threading.Event()

    def tell() -> None:
        told: TaskID | None = None
        due = 0.0
        while not done.wait(LOOK_SECONDS):
            task = bars.tasks[-1] if bars.tasks else None
            if task is None or task.finished:  # one before it may never have begun
                continue
            if task.id != told or time.monotonic() >= due:
                logger.info(how_far(task))
                told, due = task.id, time.monotonic() + TOLD_SECONDS

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    with bars:
        if bars.disable:
            teller.start()
        try:
            yield bars
        finally:
            done.set()


class SentBar:
    """A bar of the records of files that Kafka has taken."""

    def __init__(self, bars: Progress, said: str) -> None:
        self._bars = bars
        self._task = bars.add_task(said, total=None)
        self.delivered = 0

    def tell(self, sent: Sent) -> None:
        """Show what became of the records so far."""
        self.delivered = sent.delivered.total()
        self._bars.update(self._task, completed=self.delivered)

    def say(self, said: str) -> None:
        """Show other words beside it."""
        self._bars.update(self._task, description=said)


def how_far(task: Task) -> str:
    """What a task is at, as `reading texts: 340 of 2,000 in 0:03:00, about 0:14:00 left`."""
    total, left = task.total, task.time_remaining
    counted = f": {task.completed:,.0f}" + (f" of {total:,.0f}" if total else "")
    said = task.description + (counted if task.completed or total else "")
    said += f" in {timedelta(seconds=round(task.elapsed or 0))}"
    return said + (f", about {timedelta(seconds=round(left))} left" if left else "")


def check_output(out: Path | None, *inputs: Path | None) -> None:
    """Refuse a file that cannot be written or is an input, before work is done for it.

    The folder it goes to is made.
    """
    if out is None:
        return
    if _ADDRESS.match(str(out)):
        raise typer.BadParameter(f"{out} is an address; name a file of this machine, and copy it")
    try:
        if out.exists():
            if not out.is_file():
                raise typer.BadParameter(f"{out} is not a file; name one to write")
            if any(each is not None and out.samefile(each) for each in inputs):
                raise typer.BadParameter(f"{out} is read as well; name another to write")
            if not os.access(out, os.W_OK):
                raise typer.BadParameter(f"{out} may not be written; name another")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):  # rights alone do not tell, as in /proc
            pass
    except OSError as problem:
        raise typer.BadParameter(
            f"{out} cannot be written: {problem.strerror}; name another"
        ) from None


def print_json(document: Any) -> None:
    """Print a document on one line."""
    output.print(orjson.dumps(document).decode(), markup=False, soft_wrap=True)


def write_json(document: Any, out: Path) -> None:
    """Write a document as people read it."""
    out.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")


def print_marked(state: Literal["fine", "wrong", "note"], said: str) -> None:
    """Print a line with a mark that says how it is meant."""
    output.print(Text.assemble(_MARKS[state], f" {plain(said)}"), soft_wrap=True)


def how_to_go_on(sent: int) -> str:
    """What to do where so many records of files were sent, and not all."""
    return (
        f"Stopped: {sent:,} records were sent. To go on, add --skip {sent} to the command: what "
        "is sent again may count twice."
    )


def print_counts(counts: Mapping[str, int]) -> None:
    """Print how many records there are of each topic."""
    for topic, count in sorted(counts.items()):
        output.print(f"{count:>10,} {topic}", markup=False)


def parse_time(text: str) -> datetime:
    """An RFC 3339 time or a date; UTC where no offset is given."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no time; write 2026-11-24T10:15:00Z or 2026-11-24"
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def plain(text: str) -> str:
    """Text from outside, for a terminal: what would steer it, as ESC does, is written out."""
    return _STEERING.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def fail(message: str, code: int = 1) -> typer.Exit:
    """Says what went wrong on stderr; raise what it gives back."""
    notes.print(plain(message), style="red", markup=False, soft_wrap=True)
    return typer.Exit(code)
