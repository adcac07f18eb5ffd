"""Commands that make and measure models: `train`, `retrain`, `evaluate`, `search`, `compress`.

What they call imports torch, which takes seconds, so they import it only when they run.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, cast

import orjson
import typer
from rich.progress import Progress
from rich.table import Table

from starcast.commands.context import (
    check_output,
    chosen_of,
    fail,
    notes,
    output,
    progress_bar,
    settings_of,
    stopping,
    write_json,
)
from starcast.commands.models import announce, chosen_bundle, who
from starcast.settings import Settings, file_in_force

if TYPE_CHECKING:
    from trainer.compress import Compressed
    from trainer.data import Log

_NO_PEERS = "none"
_PLOT = ".svg"  # beside a command's figures


class What(StrEnum):
    """As `trainer.search.What`."""

    RATING = "rating"
    TEXT = "text"


class TiesOption(StrEnum):
    """As `trainer.data.Ties`."""

    INSTANT = "instant"
    ARRIVAL = "arrival"


RecordFile = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A record file.")]
FileOrArchive = Annotated[
    Path | None,
    typer.Argument(exists=True, dir_okay=False, help="A record file; else the archive."),
]


def _alone(context: typer.Context) -> None:
    """End a command that processes of one launcher would all do, over each other's work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise fail(
            f"starcast {context.info_name} is not shared among processes, as `starcast train` is: "
            "run it without torchrun or accelerate launch."
        )


def train(
    context: typer.Context,
    file: FileOrArchive = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Let it serve if the gate lets it through.")
    ] = False,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            exists=True,
            file_okay=False,
            help="Another shop's bundle, to start from; the report says what was carried over.",
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="What `evaluate --json` wrote, for the model card."
        ),
    ] = None,
) -> None:
    """Fit a model from a record file or the archive, and report how good it is.

    After `torchrun` or `accelerate launch` several processes fine-tune the encoder together.
    """
    from model import bundle, registry
    from trainer.assess import summary
    from trainer.fine_tune import is_first
    from trainer.retrain import in_service
    from trainer.train import train as fit

    evaluated = None if evaluation is None else _evaluation(evaluation)
    settings = settings_of(context)
    models = settings.models
    before = registry.read(models.url)
    with progress_bar() as progress, TemporaryDirectory(prefix="starcast-") as scratch:
        log = _history(settings, file, progress)
        result = fit(
            log,
            models.url if is_first() else scratch,  # all fit the same, one keeps it
            settings.trainer,
            encoder=models.encoder,
            stable=in_service(models.url, before.stable),
            other=None if start is None else bundle.open_folder(start),
            evaluated=evaluated,
            progress=progress,
            source=f"the archive at {settings.archive.url}" if file is None else file.name,
        )
    if not is_first():
        return
    output.print(summary(result))
    if not promote:
        notes.print(f"To let it serve: starcast models promote {result.version}")
        return
    if not result.verdict.passed:
        raise fail(f"{result.version} is not promoted: {result.verdict.reason}")
    reason, expected = result.verdict.reason, before.stable_version
    after = registry.promote(models.url, result.version, result.sha256, who(), reason, expected)
    announce(settings.kafka, before, after)
    output.print(f"{result.version} is stable.")


def _evaluation(path: Path) -> dict[str, Any]:
    """The document of an evaluation."""
    try:
        document = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise fail(
            f"{path} is not JSON: {error}; give what `starcast evaluate --json` wrote."
        ) from None
    if not isinstance(document, dict):
        raise fail(f"{path} is no evaluation; give what `starcast evaluate --json` wrote.")
    return cast(dict[str, Any], document)


def retrain(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Once, now; so it is by default.")] = False,
    every: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Now and then every 45s, 30m, 6h or 1d.")
    ] = None,
    on_drift: Annotated[
        bool,
        typer.Option("--on-drift", help="Only if features, predictions or errors have changed."),
    ] = False,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Then delete old versions, as `models prune --keep`; else none."),
    ] = None,
) -> None:
    """Fit a model from the archive and let it serve if it passes the gate."""
    if once and every:
        raise typer.BadParameter("take --once or --every, not both")
    _alone(context)
    from model import registry
    from trainer.retrain import parse_every, retrain_every

    settings = settings_of(context)
    if every is None:
        _retrain_once(settings, on_drift, keep)
        return
    span = parse_every(every)
    with stopping() as stop:
        retrain_every(
            span,
            lambda: _retrain_once(settings, on_drift, keep),
            stop.event,
            is_served=lambda: registry.read(settings.models.url).stable is not None,
        )


def _retrain_once(settings: Settings, on_drift: bool, keep: int | None) -> None:
    from model import bundle, registry
    from trainer import tracking
    from trainer.assess import summary
    from trainer.retrain import retrain_once

    before = registry.read(settings.models.url)
    with progress_bar() as progress:
        done = retrain_once(
            settings.archive.url,
            settings.models.url,
            settings.trainer,
            archive_options=settings.archive.storage_options,
            encoder=settings.models.encoder,
            by=who(),
            on_drift=on_drift,
            progress=progress,
            on_promoted=lambda after: announce(settings.kafka, before, after),
        )
    if done.drift is not None and done.drift.reasons:
        output.print(f"The shop has changed: {'; '.join(done.drift.reasons)}.", soft_wrap=True)
    if done.result is None:
        output.print(f"{done.previous} serves on: {done.reason}.", soft_wrap=True)
        return
    output.print(summary(done.result))
    said = "is promoted" if done.promoted else "is not promoted"
    output.print(f"{done.result.version} {said}: {done.reason}", markup=False, soft_wrap=True)
    if keep is not None:
        bundle.prune(settings.models.url, keep)
        tracking.prune(settings.trainer.tracking, keep)


def evaluate(
    context: typer.Context,
    events: RecordFile,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="Of a bundle, or `stable`, or `ladder`; "
            "else one is fitted to the older rows and not kept.",
        ),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the figures, and a reliability plot by it.")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another model on the same rows (extra `peers`), several times for several, or "
            "`none`; else all.",
        ),
    ] = None,
    ties: Annotated[
        TiesOption, typer.Option(help="What rows of one time know of each other.")
    ] = TiesOption.INSTANT,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Measure though an alarm is raised.")
    ] = False,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="What each part of the network is worth, too.")
    ] = False,
    folder: Annotated[
        Path, typer.Option(help="Where parts are kept; a run that was cut short goes on there.")
    ] = Path(".starcast/evaluate"),
) -> None:
    """Measure a model beside its peers on the newest rows of a record file."""
    check_output(json_out, events)
    _leave_plot(json_out)
    if model is not None and (ablations or (peers and peers != [_NO_PEERS])):
        raise typer.BadParameter("--peers and --ablations fit models; with --model nothing is")
    _alone(context)
    from trainer import data
    from trainer import evaluate as evaluation
    from trainer.figures import summary

    settings = settings_of(context)
    config, encoder = settings.trainer, settings.models.encoder
    with progress_bar() as progress:
        log = data.from_file(events)
        if model is None:
            found = evaluation.evaluate(
                log,
                evaluation.folder_of(events, config, encoder, ties.value, folder),
                config,
                encoder=encoder,
                ties=ties.value,
                peers=() if peers == [_NO_PEERS] else peers,
                allow_leaks=allow_leaks,
                ablate=ablations,
                progress=progress,
            )
        else:
            chosen = chosen_bundle(settings.models.url, model)
            found = evaluation.measure(
                log,
                chosen,
                config,
                ties=ties.value,
                allow_leaks=allow_leaks,
                progress=progress,
            )
    output.print(summary(found))
    if json_out is not None:
        write_json({"events": str(events), **found.document}, json_out)
        json_out.with_suffix(_PLOT).write_text(found.plot, encoding="utf-8")


def _leave_plot(out: Path | None) -> None:
    """Refuse a file whose place the plot beside it would take."""
    if out is not None and out.suffix == _PLOT:
        raise typer.BadParameter(f"{out} is where the plot goes; give the file another end")


def search(
    context: typer.Context,
    what: Annotated[What, typer.Argument(help="The rating network, or the text model.")],
    events: FileOrArchive = None,
    trials: Annotated[int, typer.Option(min=2, help="In all, those of earlier runs too.")] = 50,
    workers: Annotated[int, typer.Option(min=1, help="Processes that try at a time.")] = 1,
    study: Annotated[
        Path, typer.Option(help="Where trials are kept; a search that was cut short goes on there.")
    ] = Path(".starcast/search.journal"),
    out: Annotated[Path, typer.Option(help="The settings found, for --config.")] = Path(
        "searched.toml"
    ),
) -> None:
    """Look for better settings of a model, on validation rows."""
    check_output(out, events)
    _leave_plot(out)
    _alone(context)
    from trainer import search as searching

    settings = settings_of(context)
    with progress_bar() as progress:
        found = searching.search(
            _history(settings, events, progress),
            what.value,
            settings.trainer,
            study,
            trials,
            encoder=settings.models.encoder,
            workers=workers,
            progress=progress,
        )
    searching.write_settings(found, out)
    table = Table("setting", "value", "importance")
    for name, value in found.settings.items():
        share = found.importance.get(name)
        table.add_row(f"trainer.{name}", f"{value:.4g}", "" if share is None else f"{share:.1%}")
    output.print(table)
    output.print(
        f"validation RMSE {found.rmse:.4f}, {found.default_rmse:.4f} of the settings in force; "
        f"{found.trials} trials"
    )
    if found.importance:
        plot = out.with_suffix(_PLOT)
        searching.plot_importance(found, plot)
        output.print(f"What matters: {plot}")
    notes.print(_how_to_take(out, file_in_force(chosen_of(context).config)), markup=False)


def _how_to_take(found: Path, before: Path | None) -> str:
    """What to do with a file of settings that were found, beside the one that is in force."""
    if before is None:
        return f"To train with it: starcast --config {found} train"
    return (
        f"To train with it, add its lines to {before}: by --config it would take that one's place."
    )


def compress(
    context: typer.Context,
    events: FileOrArchive = None,
    max_rmse_loss: Annotated[
        float, typer.Option(min=0.0, help="Share by which the error of read stars may grow.")
    ] = 0.01,
    folder: Annotated[
        Path, typer.Option(help="Where smaller encoders are kept; what is there is not made again.")
    ] = Path(".starcast/compressed"),
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Make the text encoder smaller and faster, and train a model with the one chosen."""
    check_output(json_out, events)
    _alone(context)
    from model import registry
    from trainer import compress as compressing
    from trainer.prepare import cleaned, review_texts
    from trainer.progress import tracker
    from trainer.retrain import in_service
    from trainer.text import untouched
    from trainer.train import base_encoder
    from trainer.train import train as fit

    settings = settings_of(context)
    models, config = settings.models, settings.trainer
    stable = in_service(models.url, registry.read(models.url).stable)
    with progress_bar() as progress:
        log = _history(settings, events, progress)
    parent = base_encoder(models.encoder, stable, config)
    frozen = config.model_copy(update={"text": untouched(config.text)})
    reviews = review_texts(cleaned(log, config).reviews, frozen.text, config.split)
    if parent is None or reviews is None:
        raise fail("There is no text encoder, or there are too few review texts to judge it by.")
    with progress_bar() as progress:
        bar = tracker(progress, "making encoders smaller")
        found = compressing.compress(reviews, parent, config, folder / parent.hash, bar)
    chosen = compressing.choose(found, max_rmse_loss)
    output.print(_compressed_table(found, chosen))
    if json_out is not None:
        rows = [asdict(each) | {"folder": str(each.folder)} for each in found]
        document = {"chosen": chosen.name, "encoders": rows}
        write_json(document, json_out)
    if chosen.name == "parent":
        output.print(f"Nothing faster is within {max_rmse_loss:.1%} of the parent's error.")
        return
    with progress_bar() as progress:
        result = fit(
            log,
            models.url,
            frozen,
            encoder=str(chosen.folder),
            stable=stable,
            progress=progress,
            source="the archive" if events is None else events.name,
        )
    output.print(f"{result.version} reads with {chosen.name}: {result.verdict.reason}")
    notes.print(f"To let it serve: starcast models promote {result.version}")


def _compressed_table(found: "Sequence[Compressed]", chosen: "Compressed") -> Table:
    table = Table("encoder", "RMSE", "accuracy", "MB", "texts/s")
    for each in found:
        table.add_row(
            each.name,
            f"{each.scores.rmse:.4f}",
            f"{each.scores.accuracy:.1%}",
            f"{each.size_bytes / 2**20:.1f}",
            f"{each.texts_per_second:.0f}",
            style="bold" if each is chosen else None,
        )
    return table


def _history(settings: Settings, file: Path | None, progress: Progress) -> "Log":
    """A record file's events, or the archive's."""
    from trainer.archived import from_archive
    from trainer.data import from_file
    from trainer.progress import tracker

    if file is not None:
        return from_file(file)
    bar, archive = tracker(progress, "reading the archive"), settings.archive
    return from_archive(archive.url, archive.storage_options, bar)
