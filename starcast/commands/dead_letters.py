"""Commands about dead letters: `dead-letters list | show | redrive`."""

import base64
from collections import Counter
from datetime import datetime
from typing import Annotated, Literal

import orjson
import typer
from rich.table import Table
from rich.text import Text

from schemas.codec import encode
from schemas.records import format_time
from starcast.commands.context import (
    AsJsonLines,
    fail,
    notes,
    output,
    parse_time,
    plain,
    print_json,
    settings_of,
)
from streams.dead_letters import Letter, Wanted, read_letters
from streams.redrive import redrive

PREVIEW = 60  # characters of a value in a list

app = typer.Typer(help="Records that could not be used: look at them, send them again.")

Reason = Annotated[str | None, typer.Option(help="Part of the reason.")]
Topic = Annotated[str | None, typer.Option(help="The topic that the record came from.")]
Processor = Annotated[str | None, typer.Option(help="The processor that refused it.")]
Since = Annotated[
    datetime | None,
    typer.Option(parser=parse_time, metavar="TIME", help="First failed then or later (RFC 3339)."),
]
Until = Annotated[
    datetime | None,
    typer.Option(parser=parse_time, metavar="TIME", help="First failed before then."),
]


@app.command("list")
def list_(
    context: typer.Context,
    reason: Reason = None,
    topic: Topic = None,
    processor: Processor = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="Most letters to print.")] = 100,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that were sent again.")
    ] = False,
    as_json: AsJsonLines = False,
) -> None:
    """List dead letters that wait, oldest first."""
    wanted = Wanted(reason, topic, processor, since, until)
    table = Table("position", "source", "processor", "attempts", "reason", "value", box=None)
    if everything:
        table.add_column("sent again")
    found = 0
    for letter in read_letters(settings_of(context).kafka, wanted, everything):
        found += 1
        if found > limit:
            continue
        if as_json:
            _print_line(letter)
        else:
            sent_again = ("yes" if letter.redriven else "",) if everything else ()
            table.add_row(*map(Text, map(plain, _row(letter) + sent_again)))
    if not as_json and found:
        output.print(table)
    more = f", {found - limit} of them not shown (--limit)" if found > limit else ""
    notes.print(f"{found} dead letters{more}.")


@app.command()
def show(
    context: typer.Context,
    position: Annotated[str, typer.Argument(help="PARTITION/OFFSET, as `list` prints it.")],
    as_json: AsJsonLines = False,
) -> None:
    """Show one dead letter with its key, value and headers."""
    wanted = Wanted(positions=frozenset([position]))
    letter = next(read_letters(settings_of(context).kafka, wanted, redriven=True), None)
    if letter is None:
        raise _missing(position)
    if as_json:
        _print_line(letter)
        return
    about = letter.letter
    source = about.source
    for name, value in (
        ("source", f"{source.topic} partition {source.partition} offset {source.offset}"),
        ("processor", about.processor),
        ("reason", about.reason),
        ("field", about.field or ""),
        ("first failed", format_time(about.first_failed_at)),
        ("attempts", str(about.attempts)),
        ("sent again", "yes" if letter.redriven else "no"),
        ("key", _part(letter, "key")),
        *((f"header {header.key}", _readable(header.value)) for header in about.headers),
        ("value", _part(letter, "value")),
    ):
        output.print(Text(f"{plain(name):<14}", style="bold") + Text(plain(value)), soft_wrap=True)


@app.command("redrive")
def redrive_(
    context: typer.Context,
    positions: Annotated[
        list[str] | None, typer.Argument(help="PARTITION/OFFSET; all that match when left out.")
    ] = None,
    reason: Reason = None,
    topic: Topic = None,
    processor: Processor = None,
    since: Since = None,
    until: Until = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be sent.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also those that were sent again before.")
    ] = False,
) -> None:
    """Send records of dead letters to their topics again, with their keys and headers.

    A letter is sent once, however often this runs.
    """
    kafka = settings_of(context).kafka
    wanted = Wanted(reason, topic, processor, since, until, frozenset(positions or ()))
    if positions:
        there = read_letters(kafka, Wanted(positions=wanted.positions), redriven=True)
        if missing := sorted(wanted.positions - {letter.position for letter in there}):
            raise _missing(", ".join(missing))
    if dry_run:
        counts, lacking = Counter[str](), 0
        for letter in read_letters(kafka, wanted, again):
            if letter.left_out:
                lacking += 1
            else:
                counts[letter.letter.source.topic] += 1
        output.print(f"Would send {_counted(counts)}.")
        if lacking:
            notes.print(f"{lacking} letters lack a part of their record and cannot be sent.")
        return
    sent = redrive(kafka, wanted, again)
    output.print(f"Sent {_counted(sent.delivered)}.")
    if sent.failed:
        raise fail("".join(f"{count} failed: {why}\n" for why, count in sent.failed.items()))


def _missing(positions: str) -> typer.Exit:
    return fail(
        f"There is no dead letter at {positions}; `starcast dead-letters list --all` has all."
    )


def _counted(counts: Counter[str]) -> str:
    by_topic = ", ".join(f"{count} to {topic}" for topic, count in sorted(counts.items()))
    return f"{counts.total()} records" + (f" ({by_topic})" if by_topic else "")


def _row(letter: Letter) -> tuple[str, ...]:
    about = letter.letter
    value = _part(letter, "value")
    return (
        letter.position,
        f"{about.source.topic} {about.source.partition}/{about.source.offset}",
        about.processor,
        str(about.attempts),
        f"{about.field}: {about.reason}" if about.field else about.reason,
        value if len(value) <= PREVIEW else f"{value[:PREVIEW]}… ({len(value):,} characters)",
    )


def _print_line(letter: Letter) -> None:
    line = {
        "position": letter.position,
        "redriven": letter.redriven,
        **orjson.loads(encode(letter.letter)),
    }
    print_json(line)


def _part(letter: Letter, part: Literal["key", "value"]) -> str:
    return "(left out)" if part in letter.left_out else _readable(getattr(letter.letter, part))


def _readable(encoded: str | None) -> str:
    """A key or value as text; bytes that are not UTF-8 are escaped."""
    if encoded is None:
        return "(null)"
    return base64.b64decode(encoded).decode("utf-8", errors="backslashreplace")
