"""Commands that move records: `import`, `export`, `sample`, `produce`, `consume`."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer
from confluent_kafka import Message
from rich.text import Text

from schemas.archive import tables
from schemas.codec import decode, encode
from schemas.exceptions import ContractError, UnreachableError
from schemas.files import FileValue, read_values, write_records
from schemas.history import history
from schemas.records import PredictedRating, Record
from schemas.topics import BY_NAME
from starcast import importers, shop
from starcast.commands.context import (
    AsJsonLines,
    SentBar,
    Skip,
    check_output,
    fail,
    how_to_go_on,
    notes,
    output,
    parse_time,
    plain,
    print_counts,
    progress_bar,
    settings_of,
    stopping,
)
from streams.producer import Outgoing, play
from streams.tail import Start, read_topic

Files = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, readable=True)]
Out = Annotated[Path, typer.Option("--out", help="The record file: .jsonl, .jsonl.gz or .parquet.")]

import_app = typer.Typer(help="Turn public data sets into record files.")


@import_app.command()
def amazon(files: Files, out: Out) -> None:
    """Amazon reviews of 2014, 2018 or 2023: CSV or JSON lines, packed or not, with metadata."""
    _import(importers.import_amazon, files, out)


@import_app.command()
def rees46(files: Files, out: Out) -> None:
    """REES46 store logs: CSV, zipped or gzipped or not."""
    _import(importers.import_rees46, files, out)


@import_app.command()
def movielens(files: Files, out: Out) -> None:
    """MovieLens: u.data/u.item/u.user, .dat or .csv files, or RecBole's; half a star becomes 1."""
    _import(importers.import_movielens, files, out)


def _import(
    read: Callable[[Sequence[Path], Path], importers.ImportReport], files: list[Path], out: Path
) -> None:
    check_output(out, *files)
    with progress_bar() as progress:
        progress.add_task(f"Reading {', '.join(file.name for file in files)}", total=None)
        report = read(files, out)
    print_counts(report.counts)
    for reason, (count, where) in report.skipped.items():
        notes.print(f"{count:>10,} left out: {reason} (first: {where})", markup=False)
    for reason, (count, where) in report.changed.items():
        notes.print(f"{count:>10,} written as {reason} (first: {where})", markup=False)
    notes.print(f"Wrote {out}", markup=False)


def sample(
    out: Out,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 7,
    users: Annotated[int, typer.Option(min=1)] = 300,
    items: Annotated[int, typer.Option(min=1)] = 240,
    events: Annotated[int, typer.Option(min=1)] = 20_000,
    end: Annotated[
        datetime | None,
        typer.Option(parser=parse_time, metavar="TIME", help="Of the last event; now by default."),
    ] = None,
) -> None:
    """Write the record file of a generated shop: invented users, items, behaviour and reviews."""
    check_output(out)
    counts = write_records(out, shop.shop(seed, users, items, events, end))
    print_counts(counts)
    notes.print(f"Wrote {out} (generated, nothing in it is real)", markup=False)


def export(
    context: typer.Context,
    out: Out,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=parse_time, metavar="TIME", help="Events that Kafka took then or later."
        ),
    ] = None,
    before: Annotated[
        datetime | None,
        typer.Option(parser=parse_time, metavar="TIME", help="Events that Kafka took before then."),
    ] = None,
) -> None:
    """Write what the archive has of items, users, reviews and behavior as a record file.

    `backfill` brings it into topics of other names or partition counts, or under another release.
    """
    check_output(out)
    if since and before and since >= before:
        raise typer.BadParameter("nothing is between them: --since has to be earlier than --before")
    settings = settings_of(context)
    archive = settings.archive
    if not tables(archive.url, archive.storage_options):
        raise UnreachableError(
            f"The archive at {archive.url} has no table yet. Point STARCAST_ARCHIVE__URL at the "
            "archive of this shop."
        )
    with progress_bar() as progress:
        task = progress.add_task("Writing", total=None)
        records = history(
            archive.url,
            archive.storage_options,
            since=since,
            before=before,
            longest_future_seconds=settings.scorer.longest_future_seconds,
        )
        counts = write_records(out, progress.track(records, task_id=task))
    print_counts(counts)
    notes.print(f"Wrote {out}", markup=False)


def produce(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)],
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Records a second; else as fast as it goes.")
    ] = None,
    speed: Annotated[
        float | None, typer.Option(min=0.001, help="Times the pace of the records' own times.")
    ] = None,
    skip: Skip = 0,
) -> None:
    """Play a record file into its topics; ends with 1 when a record was not acknowledged."""
    if rate is not None and speed is not None:
        raise typer.BadParameter("take --rate or --speed, not both")
    kafka = settings_of(context).kafka
    bad: list[str] = []
    with stopping() as stop, progress_bar() as progress:
        bar = SentBar(progress, f"Playing {file.name}")
        try:
            sent = play(
                map(
                    _outgoing,
                    islice(read_values(file, lambda error: bad.append(str(error))), skip, None),
                ),
                kafka,
                rate=rate,
                speed=speed,
                stop=stop.event,
                on_progress=bar.tell,
            )
        except ContractError as problem:  # as of a file that is cut off
            before = skip + bar.delivered
            raise fail(
                f"{problem}. {before:,} records before that were sent: leave them out by "
                f"--skip {before} when you play the file again."
            ) from None
    print_counts(sent.delivered)
    pace = sent.delivered.total() / sent.seconds if sent.seconds else 0.0
    notes.print(f"{sent.delivered.total():,} records in {sent.seconds:.1f} s, {pace:,.0f}/s")
    problems = [f"{count:,} failed: {why}" for why, count in sent.failed.items()]
    if bad:
        problems.append(f"{len(bad):,} lines are no records and were left out; the first: {bad[0]}")
    if stop.event.is_set():
        problems.append(how_to_go_on(skip + sent.sent.total()))
    if problems:
        raise fail("\n".join(problems), stop.code or 1)


def _outgoing(value: FileValue) -> Outgoing:
    return Outgoing(value.topic, value.key, value.value)


def consume(
    context: typer.Context,
    kind: Annotated[
        Literal["interaction", "review", "request"] | None,
        typer.Option(help="From the scorer, from review texts, or from score requests."),
    ] = None,
    user: Annotated[str | None, typer.Option(help="Only of this user_id.")] = None,
    start: Annotated[
        str, typer.Option("--from", metavar="WHERE", help="beginning, end, or a time.")
    ] = "end",
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Wait for more, or stop at the end.")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many.")] = None,
    as_json: AsJsonLines = False,
) -> None:
    """Follow the predicted ratings, committed ones only."""
    kafka = settings_of(context).kafka
    where: Start = start if start == "beginning" or start == "end" else parse_time(start)
    printed = 0
    with stopping() as stop:
        batches = read_topic(
            kafka, "predicted-ratings", start=where, follow=follow, stop=stop.event
        )
        for record in _predictions(batches):
            if (kind and record.kind != kind) or (user and record.user_id != user):
                continue
            if as_json:
                output.print(encode(record).decode(), markup=False, soft_wrap=True)
            else:
                output.print(_line(record), soft_wrap=True)
            printed += 1
            if printed == limit:
                return
        if stop.event.is_set():
            raise typer.Exit(stop.code)


def _predictions(batches: Iterator[list[Message]]) -> Iterator[PredictedRating]:
    """The predictions of batches; a record that is none is told on stderr."""
    topic = BY_NAME["predicted-ratings"]
    for batch in batches:
        positions = [(message.partition() or 0, message.offset() or 0) for message in batch]
        decoded = decode(topic, [message.value() for message in batch], positions)
        for rejection in decoded.rejections:
            notes.print(str(rejection), style="red", markup=False)
        records: Iterator[Record] = (record for record in decoded.records if record is not None)
        yield from (record for record in records if isinstance(record, PredictedRating))


def _line(record: PredictedRating) -> Text:
    """One prediction for people: time, user, item, stars, interval, tier and model."""
    rating = record.rating
    shade = "dim" if rating is None else "green" if rating >= 3.75 else "yellow"
    low, high = record.interval or (None, None)
    whole = round(rating or 0)
    by = ", ".join(plain(each) for each in (record.tier, record.model_version) if each)
    return Text.assemble(
        (f"{record.predicted_at.astimezone(UTC):%H:%M:%S} ", "dim"),
        f"{record.kind:<11} {plain(record.user_id):<16.16} {plain(record.item_id):<16.16} ",
        ("★" * whole + "☆" * (5 - whole), shade),
        (f" {rating:.2f}" if rating is not None else f" {record.status or '-'}", shade),
        (f" [{low:.1f}, {high:.1f}]" if low is not None and high is not None else "", "dim"),
        (f" #{record.rank} of {record.of}" if record.rank else ""),
        (f"  {by}" if by else "", "dim"),
    )
