"""The scorer in a process of its own, as `starcast run scorer` has it, with what it does noted."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.clients import WAIT_SECONDS
from bench.flame import recorded
from bench.watch import Run, Transaction, Watched
from model.state import LAYOUT_HASH
from schemas.exceptions import StarcastError
from starcast.log import LogConfig, configure
from streams.config import (
    ArchiveConfig,
    KafkaConfig,
    ModelsConfig,
    RedisConfig,
    ScorerConfig,
    StatesConfig,
)
from streams.loop import Loop
from streams.memory import settle
from streams.metrics import Metrics, make_metrics
from streams.models import Models
from streams.processor import Processor
from streams.reader import Reader
from streams.scorer import Scorer
from streams.store import Store
from streams.user_states import UserStates


@dataclass(frozen=True)
class Scored:
    """What a run of the scorer gave."""

    run: Run
    transactions: Sequence[Transaction]
    bytes_out: int
    memory_mb: float  # resident at the end, without the transactions noted


def score(
    kafka: KafkaConfig,
    redis: RedisConfig,
    models_config: ModelsConfig,
    config: ScorerConfig,
    events: int,
    flame: Path | None = None,
) -> Scored:
    """Score the next events; the process that calls this has nothing else to do.

    With `flame` a flame graph is written there.
    """
    configure(LogConfig(level="warning"))
    store = Store(redis, LAYOUT_HASH, kafka.partitions)
    states = UserStates(store, kafka, ArchiveConfig(), StatesConfig())

    def make(metrics: Metrics) -> Scorer:
        models = Models(models_config, metrics).start()
        return Scorer(
            config, kafka.topic_prefix, states, Reader(store), models, metrics, "scorer-0"
        )

    watched = work(make, kafka, events, flame)
    memory = psutil.Process().memory_info().rss
    transactions = watched.transactions()
    bytes_out = sum(each.bytes_out for each in transactions)
    return Scored(watched.run(), transactions, bytes_out, (memory - bytes_out) / 2**20)


def work(
    make: Callable[[Metrics], Processor],
    kafka: KafkaConfig,
    records: int,
    flame: Path | None = None,
) -> Watched:
    """Run a processor until it has worked on so many records.

    Raises StarcastError when nothing has come of the rest for a while: the loop itself waits for
    servers that are gone for as long as it takes.
    """
    stop, metrics = threading.Event(), make_metrics()
    watched = Watched(make(metrics), metrics, records, stop)
    loop = Loop(watched, kafka, metrics, stop)
    settle()  # as `streams.run` does
    threading.Thread(target=_stop_when_stuck, args=(watched, stop), daemon=True).start()
    with recorded(flame, f"One scorer, {records:,} events"):
        loop.run()
    if watched.left > 0:
        raise StarcastError(
            f"{watched.left:,} of {records:,} records were left when the {watched.name} worked on "
            f"none for {WAIT_SECONDS:.0f} s: are Kafka and the store there?"
        )
    return watched


def _stop_when_stuck(watched: Watched, stop: threading.Event) -> None:
    before = -1
    while not stop.wait(WAIT_SECONDS) and before != watched.left:
        before = watched.left
    stop.set()
