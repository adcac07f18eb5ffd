"""Commands about which model serves: `models list | promote | rollback | canary | …`.

What they call imports torch, which takes seconds, so they import it only when they run.
"""

import getpass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from schemas.exceptions import StarcastError
from schemas.records import ModelUpdate, Stage
from schemas.urls import hide_password
from starcast.commands.context import AsJson, fail, notes, output, plain, print_json, settings_of
from starcast.settings import Settings
from streams.config import KafkaConfig, RedisConfig
from streams.producer import outgoing, play

if TYPE_CHECKING:
    from model.bundle import Bundle
    from model.registry import Entry, Registry
    from streams.windows import Trial

app = typer.Typer(help="Which model serves.")

Reason = Annotated[str, typer.Option(help="Why; it stands in the registry's history.")]


@app.command("list")
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """List the bundles, newest first, and which of them serves."""
    from model import bundle, registry

    url = settings_of(context).models.url
    now, versions = registry.read(url), bundle.versions(url)
    if as_json:
        document = {"versions": versions, "registry": now.model_dump(mode="json")}
        print_json(document)
        return
    named = {entry.version for entry in (now.stable, now.canary) if entry is not None}
    if not versions and not named:
        place = hide_password(url)
        notes.print(f"There is no bundle in {place} yet; `starcast train FILE` makes one.")
        return
    table = Table("version", "stage", "since", "by", "reason", box=None)
    for version in sorted({*versions, *named}, reverse=True):
        table.add_row(*map(plain, (version, *_place(now, version))))
    output.print(table, markup=False)
    for version in sorted(named.difference(versions)):
        notes.print(
            plain(f"{version} is not there any more, though the registry names it: ")
            + "no worker can load it. Copy it back, or promote another, or end its trial.",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _place(now: "Registry", version: str) -> tuple[str, ...]:
    """Stage, time, who and why of a version; empty when it does not serve."""
    trial = now.canary.role if now.canary else ""
    for stage, entry in (("stable", now.stable), (trial, now.canary)):
        if entry is not None and entry.version == version:
            return stage, f"{entry.at:%Y-%m-%d %H:%M}", entry.by, entry.reason
    return "", "", "", ""


@app.command()
def promote(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="As `models list` prints it.")],
    reason: Reason = "promoted by hand",
) -> None:
    """Make a bundle the stable one, after its checksums are checked. Workers swap to it.

    A canary of this version has ended with that.
    """
    from model import bundle, registry

    settings = settings_of(context)
    url = settings.models.url
    loaded = bundle.load(url, version)
    before = registry.read(url)
    after = registry.promote(url, version, loaded.sha256, who(), reason)
    announce(settings.kafka, before, after)
    output.print(f"{version} is stable.")


@app.command()
def rollback(context: typer.Context, reason: Reason = "rolled back by hand") -> None:
    """Make the bundle stable again that was stable before, after its checksums are checked."""
    from model import bundle, registry
    from model.exceptions import BundleError

    settings = settings_of(context)
    url = settings.models.url
    before = registry.read(url)
    for entry in registry.earlier(before)[:1]:
        try:
            bundle.load(url, entry.version, entry.sha256)
        except BundleError as error:
            raise fail(
                f"{error}. Workers could not serve it, so nothing is changed; `starcast models "
                "promote VERSION` makes another one stable."
            ) from error
    after = registry.rollback(url, who(), reason, before.stable_version)
    announce(settings.kafka, before, after)
    output.print(f"{after.stable_version} is stable.")


@app.command()
def canary(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="As `models list` prints it.")],
    share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Of users whom it answers; 0: a shadow, which answers nobody."
        ),
    ],
    reason: Reason = "tried by hand",
) -> None:
    """Try a bundle beside the stable one, on a share of users; again with another share changes it.

    It must have stable's encoder. `models compare` tells how both fare.
    """
    from model import bundle, registry

    settings = settings_of(context)
    url = settings.models.url
    loaded, before = bundle.load(url, version), registry.read(url)
    _check_encoder(settings, loaded, before.stable)
    after = registry.set_canary(
        url, version, loaded.sha256, share, who(), reason, before.stable_version
    )
    announce(settings.kafka, before, after)
    if share:
        output.print(f"{version} answers {100 * share:.3g}% of users.", soft_wrap=True)
    else:
        output.print(f"{version} is a shadow: it predicts, and answers nobody.", soft_wrap=True)


def _check_encoder(settings: Settings, loaded: "Bundle", stable: "Entry | None") -> None:
    from model.encoder import setting_hash

    served = bundle_of(settings.models.url, stable)
    hash_ = setting_hash(settings.models.encoder) if served is None else served.encoder_hash
    if (loaded.encoder_hash or "") != (hash_ or ""):
        name = "the cold-start ladder" if stable is None else stable.version
        raise fail(
            f"{loaded.version} cannot be tried beside {name}: it has another encoder, and a batch "
            "reads the vectors of one. `starcast retrain` keeps the encoder unless told otherwise; "
            f"`starcast models promote {loaded.version}` makes this one stable for all users."
        )


@app.command("end-canary")
def end_canary(context: typer.Context, reason: Reason = "ended by hand") -> None:
    """End the trial of a canary or shadow; stable answers all users."""
    from model import registry

    settings = settings_of(context)
    before = registry.read(settings.models.url)
    after = registry.clear_canary(settings.models.url, who(), reason)
    announce(settings.kafka, before, after)
    if before.canary is not None:
        output.print(f"{before.canary.version} is not tried any more.", soft_wrap=True)


@app.command()
def prune(
    context: typer.Context,
    keep: Annotated[
        int, typer.Option(min=1, help="Newest versions, and of those that a rollback goes back to.")
    ],
) -> None:
    """Delete old versions and their reports. What serves or is on trial stays."""
    from model import bundle

    url = settings_of(context).models.url
    gone = bundle.prune(url, keep)
    output.print(f"{len(gone):,} versions are deleted, {len(bundle.versions(url)):,} are left.")


@app.command()
def compare(context: typer.Context, as_json: AsJson = False) -> None:
    """Tell how the canary or shadow fares beside stable, as insights has counted it."""
    from model import registry

    settings = settings_of(context)
    registered = registry.read(settings.models.url)
    named, since = registered.canary, registered.tried_since
    if named is None:
        raise fail(
            "No version is on trial; `starcast models canary VERSION --share 0.05` sets one."
        )
    trial = _trial(settings.redis)
    if trial is None or not trial.is_of(named.version, since):
        raise fail(
            f"Nothing is counted of {named.version} yet: scorer and insights must run. A worker "
            "that has refused the bundle says so in its log."
        )
    if as_json:
        output.print(trial.model_dump_json(), markup=False, soft_wrap=True)
        return
    table = Table("", "version", "predicted", "ratings", "RMSE", "MAE", "off by", box=None)
    for stage, version, scored in (
        ("stable", "", trial.stable),
        (named.role, trial.version, trial.canary),
    ):
        sums = scored.sums
        figures = [sums.rmse, sums.mae]
        off = "" if not sums.rated else f"{(sums.predicted - sums.rating) / sums.rated:+.3f}"
        table.add_row(
            stage,
            version,
            f"{sums.count:,}",
            f"{sums.rated:,}",
            *("" if each is None else f"{each:.3f}" for each in figures),
            off,
        )
    output.print(table, markup=False)
    since = f"{datetime.fromtimestamp(trial.start_ms / 1_000, UTC):%Y-%m-%d %H:%M}"
    apart = "too few ratings to tell them apart"
    if trial.standard_errors is not None:
        apart = f"the canary's MAE is {trial.standard_errors:+.1f} standard errors from stable's"
    output.print(f"Since {since} UTC; {apart}.", markup=False, soft_wrap=True)


def _trial(redis: RedisConfig) -> "Trial | None":
    """What the newest window says of the newest trial."""
    from streams.store import STORE_ERRORS, connect
    from streams.windows import WINDOWS_KEY, last_window

    client = connect(redis)
    try:
        window = last_window(client, f"{redis.key_prefix}:{WINDOWS_KEY}")
    except STORE_ERRORS as error:
        raise fail(
            f"The store does not answer: {str(error).rstrip('.')}. Set STARCAST_REDIS__URL."
        ) from error
    finally:
        client.close()
    return window.trial if window else None


def bundle_of(url: str, entry: "Entry | None") -> "Bundle | None":
    """The bundle that an entry of the registry names; none for the ladder."""
    from model import bundle

    return None if entry is None else bundle.load(url, entry.version, entry.sha256)


def chosen_bundle(url: str, model: str) -> "Bundle | None":
    """The bundle that a version, `stable` or `ladder` (none) names."""
    from model import bundle, registry
    from model.ladder import VERSION

    if model == VERSION:
        return None
    if model != "stable":
        return bundle.load(url, model)
    stable = registry.read(url).stable
    if stable is None:
        raise fail(
            f"No model in {hide_password(url)} is promoted yet, so the ladder serves: "
            "`--model ladder`. `starcast models list` has all."
        )
    return bundle_of(url, stable)


def announce(kafka: KafkaConfig, before: "Registry", after: "Registry") -> None:
    """Nudges the workers through `model-updates`; they look at the registry anyway."""
    old, new = before.canary, after.canary
    changed: list[tuple[Stage, float, Entry]] = []
    if after.stable != before.stable and after.stable is not None:
        changed.append(("stable", 1.0, after.stable))
    if new is not None and new != old:
        changed.append(("canary" if new.share else "shadow", new.share, new))
    serve = {entry.version for entry in (after.stable, new) if entry is not None}
    gone = (before.stable, old)
    changed.extend(("retired", 0.0, each) for each in gone if each and each.version not in serve)
    updates = [
        ModelUpdate(
            version=entry.version,
            sha256=entry.sha256,
            stage=stage,
            share=share,
            at=after.history[-1].at,
            by=entry.by,
            reason=entry.reason,
        )
        for stage, share, entry in changed
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


def who() -> str:
    """Who changes the registry."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "starcast"
