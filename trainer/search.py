"""The search for settings: of the rating network, or of the fine-tuned text model.

Tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for Hyper-Parameter
Optimization", section 4); a trial of the network whose validation error lies above the median of
earlier trials at the same epoch is cut short. Trials stand in a journal file, so a search of the
same data, settings and encoder goes on where it was left, and several processes share one. The
settings in force are the first trial: what is found is never worse than they are, on validation.
The newest rows, which judge a model, are not looked at.
"""

import hashlib
import json
import logging
import math
import os
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Literal

import altair
import numpy as np
import optuna
import polars as pl
import torch
import vl_convert
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.progress import Progress

from model import encoder as encoders
from trainer import fit, text
from trainer.config import TrainerConfig
from trainer.data import Log
from trainer.exceptions import DivergedError, TrainerError
from trainer.metrics import rmse
from trainer.prepare import Prepared, cleaned, item_vectors, prepared, review_texts
from trainer.progress import tracker
from trainer.text import ReviewTexts
from trainer.train import base_encoder, fit_network

logger = logging.getLogger(__name__)

What = Literal["rating", "text"]
"""Which model settings are searched for."""

_DRAWN = 10  # trials by chance, before the sampler learns from them
_EPOCHS_SPARED = 3  # no trial is cut short before
_LOOK_SECONDS = 10.0  # between looks at how many trials other processes have made
_JOURNAL = b'{"op_code"'  # how a study's file begins
_IN_FORCE = "in force"  # an attribute of the trial of the settings that are there already


@dataclass(frozen=True)
class Range:
    """Where a setting is looked for; `name` is its path below `trainer`."""

    name: str
    low: float
    high: float
    whole: bool = False
    log: bool = False
    only_with: str | None = None  # the setting whose zero leaves this one without use

    def suggest(self, trial: Trial) -> float | int:
        """A value for a trial."""
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


_IDS = "fit.sizes.identity"

SPACES: Mapping[What, tuple[Range, ...]] = {
    "rating": (
        Range("fit.learning_rate", 1e-4, 1e-2, log=True),
        Range("fit.weight_decay", 1e-3, 1.0, log=True),
        Range("fit.identity_decay", 0.1, 30.0, log=True, only_with=_IDS),
        Range("fit.squared_error", 0.1, 10.0, log=True),
        Range("fit.batch_rows", 128, 2_048, whole=True, log=True),
        Range("fit.sizes.width", 16, 256, whole=True, log=True),
        Range(_IDS, 2, 32, whole=True, log=True),
        Range("fit.sizes.dropout", 0.0, 0.6),
        Range("fit.sizes.unknown", 0.0, 0.5, only_with=_IDS),
    ),
    "text": (
        Range("text.fine_tune.learning_rate", 1e-5, 3e-4, log=True),
        Range("text.fine_tune.adapter_learning_rate", 1e-4, 5e-3, log=True),
        Range("text.fine_tune.head_learning_rate", 1e-4, 1e-2, log=True),
        Range("text.fine_tune.layer_decay", 0.6, 1.0),
        Range("text.fine_tune.batch_texts", 8, 64, whole=True, log=True),
        Range("text.fine_tune.epochs", 1, 4, whole=True),
        Range("text.fine_tune.label_smoothing", 0.0, 0.2),
        Range("text.fine_tune.squared_error", 0.0, 2.0),
        Range("text.fine_tune.weight_decay", 1e-3, 0.3, log=True),
    ),
}
"""What is searched for each model."""


@dataclass(frozen=True)
class Searched:
    """What a search found."""

    settings: Mapping[str, float | int]  # by path below `trainer`; empty: those in force are best
    rmse: float  # on validation
    default_rmse: float  # of the settings in force
    trials: int
    importance: Mapping[str, float]  # shares of the error's variance; empty with few trials


@dataclass(frozen=True)
class _Place:
    """Where trials stand."""

    journal: Path
    name: str  # of the study


@dataclass(frozen=True)
class _Rating:
    """The network's validation error under some settings."""

    data: Prepared

    def __call__(self, config: TrainerConfig, trial: Trial) -> float:
        def watched(epoch: int, error: float) -> None:
            trial.report(error, epoch)
            if trial.should_prune() and _IN_FORCE not in trial.user_attrs:
                raise optuna.TrialPruned

        fitted, _ = fit_network(self.data, config, None, watched)
        rows = self.data.split.validation
        predicted = fit.mean(fitted.network, self.data.examples.inputs, rows)
        return rmse(self.data.examples.rating[rows], predicted)


@dataclass(frozen=True)
class _Text:
    """The text model's validation error under some settings."""

    reviews: ReviewTexts
    encoder: Path

    def __call__(self, config: TrainerConfig, trial: Trial) -> float:
        encoder = encoders.load(self.encoder, config.device)
        with TemporaryDirectory(prefix="starcast-search-") as folder:
            place = Path(folder) / "encoder"
            try:
                told = text.validate(self.reviews, encoder, config.text, place, config.seed)
            except DivergedError:
                return math.nan  # which says enough of these settings; the search goes on
        return rmse(self.reviews.rating[self.reviews.span == text.VALIDATION], told)


Judge = Callable[[TrainerConfig, Trial], float]


def search(
    log: Log,
    what: What,
    config: TrainerConfig,
    study: Path,
    trials: int,
    *,
    encoder: str = "auto",
    workers: int = 1,
    progress: Progress | None = None,
) -> Searched:
    """Settings with a lower validation error than `config`'s.

    Args:
        log: the history.
        what: the model.
        config: the settings to start from.
        study: the journal file; a search of the same that was cut short goes on there.
        trials: how many there shall be in all.
        encoder: as `models.encoder`.
        workers: processes that try at the same time.
        progress: where bars are shown.

    Raises:
        TrainerError: too few rated rows or texts; no method to tune; `study` is something else.
    """
    judge = _judge(log, what, config, encoder, progress)
    bar = tracker(progress, "trying settings")
    place = _Place(study, f"{what} {_digest(log, config, encoder)}")
    try:
        _cut(study)
        opened = _open(place, config.seed)
    except ValueError as error:
        raise TrainerError(
            f"{study} holds no trials of a search: name another by --study, or delete it"
        ) from error
    left = trials - _finished(opened)
    if not _in_force(opened):
        values = {each.name: _value(config, each.name) for each in space(what, config)}
        opened.enqueue_trial(values, {_IN_FORCE: True})
        left = max(left, 1)
    seed = config.seed + len(opened.trials)  # the same one would draw the same trials again
    if workers > 1 and left > 1:
        shares = [left // workers + (number < left % workers) for number in range(workers)]
        with _processes(workers) as pool:
            with _deaf():
                jobs = [
                    pool.submit(_work, judge, what, config, place, share, seed + number)
                    for number, share in enumerate(shares)
                ]
            while wait(jobs, _LOOK_SECONDS).not_done:
                bar(_finished(_open(place, seed)), trials)
            for job in jobs:
                job.result()
    elif left > 0:
        _work(judge, what, config, place, left, seed, lambda study: bar(_finished(study), trials))
    return _found(_open(place, seed))


def space(what: What, config: TrainerConfig) -> Sequence[Range]:
    """What is searched for: nothing that a zero switches off (a log scale has no place for it)."""

    def of_use(each: Range) -> bool:
        switches = ([each.name] if each.log else []) + ([each.only_with] if each.only_with else [])
        return all(_value(config, name) > 0 for name in switches)

    return [each for each in SPACES[what] if of_use(each)]


def write_settings(found: Searched, path: Path) -> None:
    """The settings as a TOML file that `--config` takes."""
    tables: dict[str, list[str]] = {}
    for name, value in found.settings.items():
        table, _, setting = f"trainer.{name}".rpartition(".")
        tables.setdefault(table, []).append(f"{setting} = {json.dumps(value)}")
    head = (
        f"# Validation RMSE {found.rmse:.4f}, of the settings in force {found.default_rmse:.4f}, "
        f"{found.trials} trials.\n"
    )
    body = "".join(f"\n[{table}]\n" + "\n".join(rows) + "\n" for table, rows in tables.items())
    path.write_text(head + body, encoding="utf-8")


def plot_importance(found: Searched, path: Path) -> None:
    """What settings matter, as SVG."""
    rows = [{"setting": name, "importance": share} for name, share in found.importance.items()]
    chart = (
        altair.Chart(pl.DataFrame(rows))
        .mark_bar()
        .encode(
            x=altair.X("importance:Q", title="share of the error's variance"),
            y=altair.Y("setting:N", sort="-x", title=None),
        )
        .properties(width=480)
    )
    path.write_text(vl_convert.vegalite_to_svg(chart.to_json(), allowed_base_urls=[]))


@contextmanager
def _processes(count: int) -> Generator[ProcessPoolExecutor]:
    """Processes that end with this one, whatever ends it."""
    context = get_context("spawn")
    with ProcessPoolExecutor(count, context, _end_with_parent) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise TrainerError(
                "a process of the search was killed, as for want of memory: with fewer --workers "
                "it goes on where it was"
            ) from error
        except BaseException:  # as of Ctrl-C: their trials may take hours
            for each in context.active_children():
                each.terminate()
            raise


def _end_with_parent() -> None:
    """End this process where its parent ends by a signal, which leaves it no time to tell."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def _deaf() -> Generator[None]:
    """Processes that are begun meanwhile leave Ctrl-C, which a terminal sends to all, to us."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _judge(
    log: Log, what: What, config: TrainerConfig, encoder: str, progress: Progress | None
) -> Judge:
    reviews = cleaned(log, config).reviews
    base = base_encoder(encoder, None, config)
    if what == "rating":
        vectors = item_vectors(log, base, tracker(progress, "encoding item texts"))
        name = base.hash if base else ""
        words = tracker(progress, "replaying events")
        return _Rating(prepared(log, reviews, vectors, name, config, words))
    texts = review_texts(reviews, config.text, config.split)
    if texts is None or base is None:
        raise TrainerError("there are too few review texts, or no encoder, to search with")
    if config.text.method in ("none", "frozen"):
        raise TrainerError(
            f"trainer.text.method {config.text.method} has nothing to search for; "
            "choose one that fits the encoder, such as full or lora"
        )
    return _Text(texts, base.folder)


def _digest(log: Log, config: TrainerConfig, encoder: str) -> str:
    """Of all that a trial's error hangs on: trials of another shop say nothing of this one."""
    digest = hashlib.sha256(np.ascontiguousarray(log.events).data)
    for words in log.reviews.select("title", "text").iter_rows():
        digest.update(repr(words).encode())
    for known, record in (*log.items, *log.users):
        digest.update(f"{known} {record!r}".encode())
    digest.update(f"{config.model_dump_json()} {encoders.setting_hash(encoder)}".encode())
    return digest.hexdigest()[:16]


def _cut(journal: Path) -> None:
    """Take away what a full disk left of a last line, which would spoil the next.

    Raises ValueError where the file is something else.
    """
    if not journal.is_file():
        return
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        with journal.open("rb+") as file:
            content = file.read()
            if content and not content.startswith(_JOURNAL):
                raise ValueError("no journal of trials")
            file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _open(place: _Place, seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # else a trace of what is raised in a trial
    place.journal.parent.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        study_name=place.name,
        storage=JournalStorage(JournalFileBackend(str(place.journal))),
        sampler=TPESampler(n_startup_trials=_DRAWN, seed=seed, constant_liar=True),
        pruner=MedianPruner(n_startup_trials=_DRAWN, n_warmup_steps=_EPOCHS_SPARED),
        load_if_exists=True,
    )


def _work(
    judge: Judge,
    what: What,
    config: TrainerConfig,
    place: _Place,
    trials: int,
    seed: int,
    on_trial: Callable[[optuna.Study], None] = lambda study: None,
) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    opened = _open(place, seed)

    def objective(trial: Trial) -> float:
        values = {each.name: each.suggest(trial) for each in space(what, config)}
        error = judge(with_settings(config, values), trial)
        if math.isnan(error):
            logger.warning("trial %d comes to no number: %s", trial.number, values)
        return error

    opened.optimize(objective, trials, callbacks=[lambda study, trial: on_trial(study)])


def _finished(study: optuna.Study) -> int:
    return sum(each.state.is_finished() for each in study.trials)


def with_settings(config: TrainerConfig, values: Mapping[str, float | int]) -> TrainerConfig:
    """A configuration with other values, by path."""
    tree = config.model_dump()
    for name, value in values.items():
        *above, last = name.split(".")
        branch: dict[str, Any] = tree
        for part in above:
            branch = branch[part]
        branch[last] = value
    return TrainerConfig.model_validate(tree)


def _value(config: TrainerConfig, name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _in_force(study: optuna.Study) -> list[FrozenTrial]:
    """Trials of the settings in force that came to their end: one, unless a search was killed."""
    done = study.get_trials(states=(TrialState.COMPLETE,))
    return [each for each in done if _IN_FORCE in each.user_attrs]


def _found(study: optuna.Study) -> Searched:
    done = study.get_trials(states=(TrialState.COMPLETE,))
    if not done:
        raise TrainerError("no trial came to its end: see what was logged above")
    best = min(done, key=_error)
    importance: Mapping[str, float] = {}
    if len(done) > _DRAWN:
        importance = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return Searched(
        {} if _IN_FORCE in best.user_attrs else best.params,
        _error(best),
        min(map(_error, _in_force(study)), default=math.inf),  # they may have come to no number
        _finished(study),
        importance,
    )


def _error(trial: FrozenTrial) -> float:
    return math.inf if trial.value is None else trial.value
