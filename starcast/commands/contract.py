"""Commands about the contract and the settings: `asyncapi`, `schema`, `config`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.table import Column, Table

from schemas.export import asyncapi as asyncapi_document
from schemas.export import json_schema
from schemas.topics import TOPICS
from starcast import __version__
from starcast.commands.context import (
    AsJson,
    check_output,
    chosen_of,
    notes,
    output,
    settings_of,
    write_json,
)
from starcast.settings import load_with_sources
from streams.clients import client_config

Out = Annotated[Path | None, typer.Option("--out", help="Write to this file.")]


def asyncapi(context: typer.Context, out: Out = None) -> None:
    """Print the contract as an AsyncAPI 3 document: every topic and record, as settings have it."""
    kafka = settings_of(context).kafka
    document = asyncapi_document(
        __version__,
        partitions=kafka.partitions,
        replication=kafka.replication,
        topic_prefix=kafka.topic_prefix,
        servers=kafka.bootstrap_servers,
        secure="SSL" in client_config(kafka).get("security.protocol", "").upper(),
    )
    _print_json(document, out)


def schema(
    record: Annotated[
        str | None, typer.Argument(help="A topic or a record, such as reviews or Review.")
    ] = None,
    out: Out = None,
) -> None:
    """Print a record's JSON Schema, or, without a name, which there are."""
    if record is not None:
        _print_json(json_schema(record), out)
        return
    table = Table("topic", "key", "record", "what it holds", box=None)
    for topic in TOPICS:
        kind = topic.record.__name__ if topic.record else "Arrow"
        table.add_row(topic.name, topic.key, kind, topic.meaning)
    output.print(table)


def config(
    context: typer.Context,
    as_json: AsJson = False,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not default.")] = False,
) -> None:
    """Print every setting with its value, where the value comes from, and what it means."""
    _, rows = load_with_sources(chosen_of(context).config)
    rows = [row for row in rows if not changed or row.source != "default"]
    if as_json:
        _print_json([asdict(row) for row in rows], None)
        return
    folded = (Column(name, overflow="fold") for name in ("value", "from", "meaning"))
    table = Table(Column("setting", no_wrap=True), *folded, box=None)
    for row in rows:
        table.add_row(row.name, row.shown, row.source, row.description)
    output.print(table, markup=False)


def _print_json(document: Any, out: Path | None) -> None:
    check_output(out)
    if out is None:
        text = orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()
        output.print(text, markup=False, soft_wrap=True)
        return
    write_json(document, out)
    notes.print(f"Wrote {out}", markup=False)
