"""Runs processors in one process: a thread each, one store, one model, one set of metrics.

Each is imported as it is made: torch, which only those that predict need, is half a gigabyte and
seconds.
"""

import fcntl
import gc
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

import structlog
from confluent_kafka import KafkaException

from model.state import LAYOUT_HASH
from schemas.exceptions import StarcastError
from streams import coverage
from streams.admin import check_topics
from streams.clients import error_of, reach, reader, topic_name
from streams.config import (
    ArchiveConfig,
    InsightsConfig,
    KafkaConfig,
    ModelsConfig,
    RedisConfig,
    ScorerConfig,
    StatesConfig,
    TextsConfig,
    WebConfig,
)
from streams.health import serve_health
from streams.loop import Loop
from streams.memory import GIVE_BACK_SECONDS, KEPT, give_back, settle
from streams.metrics import Metrics, make_metrics
from streams.processor import Processor
from streams.store import Store

if TYPE_CHECKING:
    from streams.models import Models

LOOPS = ("scorer", "answers", "items", "catalog", "texts", "archiver")
PROCESSORS = (*LOOPS, "insights", "dashboard")
STOP_SECONDS = 25.0  # a processor that hangs must not keep the process; Kafka may answer late
ASK_SECONDS = 3.0  # a broker that takes longer to answer is none
SLOTS = 1_000  # workers of one processor on one host


class Settings(Protocol):
    """The part of the settings tree that processors read."""

    kafka: KafkaConfig
    redis: RedisConfig
    archive: ArchiveConfig
    models: ModelsConfig
    states: StatesConfig
    scorer: ScorerConfig
    texts: TextsConfig
    insights: InsightsConfig
    web: WebConfig


@dataclass
class _Shared:
    """What the processors of one process have in common."""

    settings: Settings
    store: Store
    models: "Callable[[], Models]"  # the same each time, loaded for the first that asks
    metrics: Metrics


def check_names(names: Sequence[str]) -> None:
    """Raises StarcastError when there is no such processor, or one is named twice."""
    unknown = [name for name in names if name not in PROCESSORS]
    if unknown:
        raise StarcastError(
            f"There is no processor {', '.join(unknown)}. Choose from {', '.join(PROCESSORS)}."
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise StarcastError(
            f"{', '.join(twice)} is named twice, and a process runs one of each: start as many "
            "processes as you want workers."
        )


def run_processors(names: Sequence[str], settings: Settings, stop: threading.Event) -> None:
    """Run processors until `stop` is set or one of them fails; its error is raised.

    Raises `UnreachableError` when the broker does not answer at the start, and `TopicError` when
    its topics are not those that settings say. A store that is gone is waited for.
    """
    check_names(names)
    if set(names) & set(LOOPS):
        check_topics(settings.kafka)
    elif "insights" in names:  # which waits for its topics by itself
        reach(settings.kafka)
    metrics = make_metrics()
    checks: dict[str, Callable[[], str | None]] = {}
    with ExitStack() as stack:
        tasks: dict[str, Callable[[], None]] = {}
        if set(names) & set(LOOPS):
            store = Store(settings.redis, LAYOUT_HASH, settings.kafka.partitions)
            stack.callback(store.close)
            shared = _Shared(
                settings, store, _loaded(settings.models, store, metrics, stack), metrics
            )
            for name in names:
                if name in LOOPS:
                    slot = stack.enter_context(worker_slot(settings.kafka, name))
                    loop = Loop(_make(name, shared, slot), settings.kafka, metrics, stop, slot)
                    tasks[name] = loop.run
                    checks[name] = _readiness(loop)
        if "insights" in names:
            from streams.insights import Readiness, run_insights

            state = Readiness()
            tasks["insights"] = lambda: run_insights(
                settings.kafka, settings.redis, settings.insights, stop, metrics, state
            )
            checks["insights"] = lambda: state.reason
        if "dashboard" in names:
            from streams.dashboard import run_dashboard

            tasks["dashboard"] = lambda: run_dashboard(
                settings.kafka, settings.redis, settings.web, settings.models.url, stop, metrics
            )
        if settings.web.metrics_port and set(names) != {"dashboard"}:
            checks["kafka"] = _watched(settings.kafka, stop)
            stack.enter_context(
                serve_health(
                    settings.web.metrics_host,
                    settings.web.metrics_port,
                    metrics.registry,
                    checks,
                )
            )
        settle()
        failures = _run_threads(tasks, stop)
        gc.unfreeze()  # what Python's end does not collect, nanobind tells as leaked
    if failures:
        raise failures[0]


def _run_threads(
    tasks: Mapping[str, Callable[[], None]], stop: threading.Event
) -> list[BaseException]:
    """Run each task in a thread until `stop` is set, as by one that fails; what failed."""
    failures: list[BaseException] = []

    def guarded(name: str, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - what ends one processor ends the process
            structlog.get_logger(__name__).error("failed", processor=name, reason=str(error))
            failures.append(error)
            stop.set()

    threads = [
        threading.Thread(target=guarded, args=(name, task), name=name, daemon=True)
        for name, task in tasks.items()
    ]
    for thread in threads:
        thread.start()
    while not stop.wait(GIVE_BACK_SECONDS):
        give_back(keep=KEPT)
    until = time.monotonic() + STOP_SECONDS
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
        if thread.is_alive():
            failures.append(
                StarcastError(
                    f"The {thread.name} did not end within {STOP_SECONDS:.0f} s and was left "
                    f"{_where(thread)}; what it had not committed is read again."
                )
            )
    return failures


def _where(thread: threading.Thread) -> str:
    """Where a thread is now: the file, line and function of its innermost frame."""
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage] - documented, no other way
    frame = frames.get(thread.ident or 0)
    if frame is None:
        return "at its end"
    return f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _loaded(
    config: ModelsConfig, store: Store, metrics: Metrics, stack: ExitStack
) -> "Callable[[], Models]":
    """The models of one process, which `stack` is to close."""

    @cache
    def models() -> "Models":
        from streams.models import Models

        covered = partial(coverage.share, store)
        return stack.enter_context(closing(Models(config, metrics, covered).start()))

    return models


def _make(name: str, shared: _Shared, slot: int) -> Processor:
    settings, store, metrics = shared.settings, shared.store, shared.metrics
    prefix, worker = settings.kafka.topic_prefix, f"{name}-{gethostname()}-{slot}"
    match name:
        case "scorer":
            from streams.reader import Reader
            from streams.scorer import Scorer
            from streams.user_states import UserStates

            states = UserStates(store, settings.kafka, settings.archive, settings.states)
            return Scorer(
                settings.scorer, prefix, states, Reader(store), shared.models(), metrics, worker
            )
        case "answers":
            from streams.answers import Answers
            from streams.reader import Reader

            return Answers(
                settings.scorer, prefix, store, Reader(store), shared.models(), metrics, worker
            )
        case "items":
            from streams.items import Items

            return Items(store, settings.kafka, settings.archive, metrics)
        case "catalog":
            from streams.catalog import Catalog

            return Catalog(store, prefix, metrics)
        case "texts":
            from streams.texts import Texts

            return Texts(
                settings.texts,
                settings.models,
                prefix,
                store,
                shared.models(),
                metrics,
                worker,
                settings.scorer.digest_seconds,
            )
        case _:
            from streams.archiver import Archiver

            return Archiver(settings.archive, prefix, metrics)


def _watched(kafka: KafkaConfig, stop: threading.Event) -> Callable[[], str | None]:
    """Why Kafka does not answer, or None, asked again and again until `stop`.

    Neither a KIP-848 group nor insights gives partitions back while its broker is gone.
    """
    reason: str | None = None
    # Of one partition: an answer about all topics of a large cluster would be megabytes. By a
    # consumer: other clients would have brokers make a topic that is not there.
    topic = topic_name(kafka, "model-updates")

    def ask() -> None:
        nonlocal reason
        with reader(kafka, error_cb=lambda _: None) as consumer:
            while not stop.wait(ASK_SECONDS):
                consumer.poll(0)  # else it would keep all that it has to tell
                try:
                    consumer.list_topics(topic, ASK_SECONDS)
                    reason = None
                except KafkaException as error:
                    reason = f"Kafka does not answer: {error_of(error).str()}"

    threading.Thread(target=ask, name="kafka-watch", daemon=True).start()
    return lambda: reason


def _readiness(loop: Loop) -> Callable[[], str | None]:
    return lambda: "no partition yet, or one that is being recovered" if loop.waiting else None


@contextmanager
def worker_slot(kafka: KafkaConfig, name: str) -> Generator[int]:
    """The lowest number that no other worker of this processor on this host has.

    It makes the transactional id stable over restarts and different for each worker.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"starcast-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():  # anybody may make one, with links in it
            raise PermissionError(f"{folder} is another user's")
    except OSError as error:
        raise StarcastError(
            "This worker tells itself from others by a lock in the folder for temporary files, and "
            f"has none: {error}. Make space there, or set TMPDIR to another."
        ) from error
    for slot in range(SLOTS):
        worker = f"{kafka.topic_prefix}{kafka.group_id}-{name}-{slot}"
        path = folder / f"{quote(worker, safe='')}.lock"  # a group's name may have a slash
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield slot
            return
    raise StarcastError(f"{SLOTS} workers of {name} run on this host already; stop some first.")
