"""Retraining from the archive against the model in service, once or on a schedule."""

import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from apscheduler.schedulers.background import BackgroundScheduler
from rich.progress import Progress

from model import bundle as bundles
from model import registry
from model.bundle import Bundle
from model.exceptions import BundleError
from model.registry import Entry, Registry
from schemas.exceptions import StarcastError
from schemas.spans import LONGEST_SECONDS
from trainer import drift
from trainer.archived import from_archive
from trainer.config import TrainerConfig
from trainer.data import Log
from trainer.drift import Drift
from trainer.exceptions import TrainerError
from trainer.progress import tracker
from trainer.train import TrainResult, train

logger = logging.getLogger(__name__)

FIRST_RETRY = timedelta(minutes=1)  # of a new shop, whose archive is empty when the trainer starts

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}  # seconds


@dataclass(frozen=True)
class Retrained:
    """The outcome of one retraining."""

    result: TrainResult | None  # none: there was no reason to train
    promoted: bool
    previous: str  # the version that was stable; "" for none
    reason: str  # why it was promoted, or not
    drift: Drift | None = None  # since the stable one was fitted, where it was asked for


def retrain_once(
    archive_url: str,
    models_url: str,
    config: TrainerConfig,
    *,
    archive_options: Mapping[str, str] | None = None,
    encoder: str = "auto",
    by: str = "retrain",
    on_drift: bool = False,
    progress: Progress | None = None,
    on_promoted: Callable[[Registry], None] | None = None,
) -> Retrained:
    """Train from the archive; promote the new bundle when it passes the gate, and only then.

    Args:
        archive_url: where the archived topics lie.
        models_url: the models folder, with the registry.
        config: settings of the trainer.
        archive_options: storage options of the archive.
        encoder: as `models.encoder`.
        by: who promotes, for the registry.
        on_drift: train only if the shop has changed since the stable model was fitted.
        progress: where bars are shown.
        on_promoted: called with the new registry after a promotion, to tell the workers.

    Raises:
        TrainerError: too little to learn from.
        RegistryError: another model became stable meanwhile.
    """
    registered = registry.read(models_url)
    previous = registered.stable_version
    served = in_service(models_url, registered.stable)
    log = from_archive(archive_url, archive_options, tracker(progress, "reading the archive"))
    changed = None
    if on_drift and served is not None:
        changed = _drift(log, served, archive_url, archive_options, config)
        if changed is not None and not changed.reasons:
            reason = f"nothing has changed in the {changed.rows:,} ratings since it was fitted"
            return Retrained(None, False, previous, reason, changed)
    result = train(
        log,
        models_url,
        config,
        encoder=encoder,
        stable=served,
        progress=progress,
        source=f"the archive at {archive_url}",
    )
    if result.verdict.passed:
        new = registry.promote(
            models_url, result.version, result.sha256, by, result.verdict.reason, previous
        )
        if on_promoted is not None:
            on_promoted(new)
    return Retrained(result, result.verdict.passed, previous, result.verdict.reason, changed)


def _drift(
    log: Log,
    served: Bundle,
    archive_url: str,
    options: Mapping[str, str] | None,
    config: TrainerConfig,
) -> Drift | None:
    """What has changed since a bundle was fitted; None when it does not know what it knew."""
    kept, window = served.metrics.get("drift"), served.metrics.get("window")
    if not kept or not window:
        return None
    end = datetime.fromisoformat(window[1])
    features, joined = drift.since(log, archive_url, options, served.version, end)
    return drift.measure(drift.Reference.model_validate(kept), features, joined, config.drift)


def in_service(models_url: str, stable: Entry | None) -> Bundle | None:
    """The stable bundle; None when there is none, or none that this release can serve."""
    if stable is None:
        return None
    try:
        return bundles.load(models_url, stable.version, stable.sha256)
    except BundleError as error:
        # Workers cannot serve it either, so the ladder is what the new model is judged against.
        logger.warning("the stable bundle is left out of the comparison: %s", error)
        return None


def retrain_every(
    every: timedelta,
    once: Callable[[], object],
    stop: threading.Event,
    is_served: Callable[[], bool] = lambda: True,
    first_retry: timedelta = FIRST_RETRY,
) -> None:
    """Call `once` now and then every so often until `stop` is set.

    A run that is due while another is going on is left out. A StarcastError or OSError of a run, as
    of a full disk, goes to the log, and the schedule goes on; a run that is going on at the stop is
    waited for. While no model `is_served`, the next run follows after `first_retry`, doubled by
    each run without an error: a model that the gate refuses took work and keeps its space.
    """
    wait = min(first_retry, every)

    def try_once() -> bool:
        """Whether the schedule is soon enough for the next run."""
        nonlocal wait
        try:
            once()
            wait = min(2 * wait, every)
        except (StarcastError, OSError) as error:
            logger.error("retraining failed: %s", error)
        try:
            return wait >= every or is_served()
        except (StarcastError, OSError) as error:
            logger.error("retraining failed: %s", error)
            return True

    def run() -> None:
        # Waits here: a job that changes its own schedule can hang a scheduler that shuts down.
        while not try_once() and not stop.wait(wait.total_seconds()):
            pass

    scheduler = BackgroundScheduler(timezone=UTC)
    scheduler.add_job(
        run,
        "interval",
        seconds=every.total_seconds(),
        next_run_time=datetime.now(UTC),
        max_instances=1,
        coalesce=True,
        misfire_grace_time=None,  # late, as after a machine slept: better than an interval later
    )
    scheduler.start()
    try:
        stop.wait()
        logger.info("stopping; a training that is under way is waited for, Ctrl-C again ends it")
    finally:
        scheduler.shutdown(wait=True)


def parse_every(text: str) -> timedelta:
    """An interval such as 45s, 30m, 6h or 1d, of a century at most; TrainerError for another."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= LONGEST_SECONDS:
        raise TrainerError(f"{text!r} is no interval; write 45s, 30m, 6h or 1d")
    return timedelta(seconds=seconds)
