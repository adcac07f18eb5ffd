"""Commands about models: `train`, `retrain`, `evaluate`, `models list | promote | rollback`.

What they call imports torch, which takes seconds, so they import it only when they run.
"""

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.table import Table

from schemas.exceptions import StarcastError
from schemas.records import ModelUpdate, Stage
from starcast.commands.context import fail, notes, output, progress_bar, settings_of, stopping
from starcast.settings import Settings
from streams.config import KafkaConfig
from streams.producer import outgoing, play

if TYPE_CHECKING:
    from model.registry import Entry, Registry

app = typer.Typer(help="Which model serves.")

Reason = Annotated[str, typer.Option(help="Why; it stands in the registry's history.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """List the bundles, newest first, and which of them serves."""
    from model import bundle, registry

    url = settings_of(context).models.url
    now, versions = registry.read(url), bundle.versions(url)
    if as_json:
        document = {"versions": versions, "registry": now.model_dump(mode="json")}
        output.print(orjson.dumps(document).decode(), markup=False, soft_wrap=True)
        return
    if not versions:
        notes.print(f"There is no bundle in {url} yet; `starcast train FILE` makes one.")
        return
    table = Table("version", "stage", "since", "by", "reason", box=None)
    for version in reversed(versions):
        table.add_row(version, *_place(now, version))
    output.print(table, markup=False)


def _place(now: "Registry", version: str) -> tuple[str, ...]:
    """Stage, time, who and why of a version; empty when it does not serve."""
    for stage, entry in (("stable", now.stable), ("canary", now.canary)):
        if entry is not None and entry.version == version:
            return stage, f"{entry.at:%Y-%m-%d %H:%M}", entry.by, entry.reason
    return "", "", "", ""


@app.command()
def promote(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="As `models list` prints it.")],
    reason: Reason = "promoted by hand",
) -> None:
    """Make a bundle the stable one, after its checksums are checked. Workers swap to it."""
    from model import bundle, registry

    settings = settings_of(context)
    url = settings.models.url
    loaded = bundle.load(url, version)
    before = registry.read(url).stable
    after = registry.promote(url, version, loaded.sha256, _who(), reason)
    _announce(settings.kafka, before, after)
    output.print(f"{version} is stable.")


@app.command()
def rollback(context: typer.Context, reason: Reason = "rolled back by hand") -> None:
    """Make the bundle stable again that was stable before."""
    from model import registry

    settings = settings_of(context)
    before = registry.read(settings.models.url).stable
    after = registry.rollback(settings.models.url, _who(), reason)
    _announce(settings.kafka, before, after)
    output.print(f"{after.stable.version if after.stable else 'The cold-start ladder'} is stable.")


def _announce(kafka: KafkaConfig, before: "Entry | None", after: "Registry") -> None:
    """Nudges the workers through `model-updates`; they look at the registry anyway."""
    changed: list[tuple[Stage, Entry | None]] = [("stable", after.stable)]
    if before and after.stable and before.version != after.stable.version:
        changed.append(("retired", before))
    updates = [
        ModelUpdate(
            version=entry.version,
            sha256=entry.sha256,
            stage=stage,
            share=1.0 if stage == "stable" else 0.0,
            at=after.stable.at if after.stable else entry.at,
            by=entry.by,
            reason=entry.reason,
        )
        for stage, entry in changed
        if entry is not None
    ]
    try:
        sent = play(outgoing(("model-updates", update) for update in updates), kafka)
        problem = "; ".join(sent.failed)
    except StarcastError as error:
        problem = str(error)
    if problem:
        notes.print(
            f"Workers were not nudged, they find the registry's change when they next look at it: "
            f"{problem}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "starcast"
