"""How long from an event to its prediction, at rates that stay, beside the bare Kafka loop.

Starts an Apache Kafka and a Valkey of its own, fills them as `bench.loop` does, and runs
`starcast run scorer` with default settings and the default bundle. At each rate events come at
constant intervals whatever becomes of them (an open loop), and a read_committed reader notes when
each prediction becomes visible; the latency counts from when the event was due. After it the same
with the bare loop, which waits for its batches as the scorer does and writes as much. Goes on to
the next rate until the scorer does not keep up, then looks for the highest rate in between.
Prints a table and writes `results/latency.json` and `results/latency.svg`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr
from rich.console import Console

from bench import report
from bench.command import exit_code
from bench.events import make_world
from bench.latencies import LOOPS, Measured, figures_of, highest_sustained, plot, table, words
from bench.loop import Bench, Sizes
from bench.model import default_models
from bench.open_loop import (
    OTHER_OUTPUTS,
    PREDICTIONS,
    Plan,
    Sample,
    Seen,
    Sent,
    echo,
    ends_of,
    sample_of,
    send,
    watch,
)
from bench.pool import Template, make_pool
from bench.processes import Worker, started
from schemas.exceptions import StarcastError
from starcast.log import LogConfig, configure
from starcast.settings import Settings
from streams.config import ArchiveConfig, KafkaConfig, ModelsConfig, RedisConfig, ScorerConfig
from tests.servers import servers

TRANSACTIONS = "transactions"
RATES = (1_000, 5_000, 10_000, 20_000)
POOL = 50_000  # events made once and sent again and again, with new ids and times
FIRST_NUMBER = 1 << 40  # of the events that are measured: others have filled the store
LEAD_SECONDS = 1.0  # the sender has found the topics' leaders by then
BEHIND_SECONDS = 2.0  # a loop that is later with the last event does not keep up
GIVE_UP_SECONDS = 6.0  # and one so late will not; more would only have to be worked off
GROWTH = 0.02  # seconds that a loop may fall behind in a second: more is no noise
DRAIN_SECONDS = 120.0  # a loop that loses events would never end
READY_SECONDS = 60.0  # a bare loop that is given no partitions would hang the benchmark
TABLE_WIDTH = 160  # Markdown whose lines are cut is none
WARM_RATE = 5_000  # events a second while the broker's JVM compiles what runs often
PACKAGES = ("confluent-kafka", "hdrhistogram", "numpy", "orjson", "redis", "torch")


@dataclass(frozen=True)
class Options:
    """How fast, how long, and of how much."""

    rates: Sequence[int]
    seconds: float
    warm_up: float
    broker: float
    rounds: int
    halvings: int
    users: int
    items: int
    partitions: int


class Course:
    """Both loops, running or ready to, and what is needed to measure them."""

    def __init__(
        self,
        options: Options,
        kafka: KafkaConfig,
        scorer: Worker,
        pool: Sequence[Template],
        executors: Mapping[str, ProcessPoolExecutor],
        manager: SyncManager,
    ) -> None:
        self._options = options
        self._kafka = kafka
        self._bare = kafka.model_copy(update={"topic_prefix": "bare."})
        self._worker = scorer
        self._pool = pool
        self._executors = executors
        self._manager = manager
        self._number = FIRST_NUMBER
        self._predictions: Sequence[bytes] = ()
        self._samples: Mapping[str, Sample] = {}
        # A broker that has just begun spends half a core on its compiler, and more on what it has
        # not compiled yet: whoever is measured first would pay for it.
        rate = min(max(options.rates), WARM_RATE)
        self._scorer(rate, options.broker)
        self._echo(rate, options.broker)

    def measure(self, loop: str, rate: int) -> Measured:
        """One loop at one rate. The bare loop writes what the scorer wrote at its last rate."""
        seconds = self._options.warm_up + self._options.seconds
        return self._scorer(rate, seconds) if loop == "scorer" else self._echo(rate, seconds)

    def _scorer(self, rate: int, seconds: float) -> Measured:
        starts = {topic: ends_of(self._kafka, topic) for topic in OTHER_OUTPUTS}
        plan = self._plan(rate, seconds)
        before = batch_seconds(self._worker)
        sent, seen = self._play(self._kafka, plan)
        spent = {
            phase: value - before.get(phase, 0.0)
            for phase, value in batch_seconds(self._worker).items()
        }
        self._predictions = seen.values
        self._samples = {
            topic: sample_of(self._kafka, topic, start, sent.count)
            for topic, start in starts.items()
        }
        transactions = int(spent.pop(TRANSACTIONS))
        return judged(plan, sent, seen, self._options.warm_up, transactions, spent)

    def _echo(self, rate: int, seconds: float) -> Measured:
        is_ready, stop = self._manager.Event(), self._manager.Event()
        running = self._executors["bare"].submit(
            echo, self._bare, ScorerConfig(), self._predictions, self._samples, is_ready, stop
        )
        try:
            if not is_ready.wait(READY_SECONDS):
                raise StarcastError("The bare loop was given no partitions.")
            plan = self._plan(rate, seconds)
            sent, seen = self._play(self._bare, plan, running)
        finally:
            stop.set()
        return judged(plan, sent, seen, self._options.warm_up, running.result(), {})

    def _plan(self, rate: int, seconds: float) -> Plan:
        """New events that begin to come soon."""
        plan = Plan(self._number, round(rate * seconds), rate, time.monotonic() + LEAD_SECONDS)
        self._number += plan.count
        return plan

    def _play(
        self, kafka: KafkaConfig, plan: Plan, running: Future[Any] | None = None
    ) -> tuple[Sent, Seen]:
        stop = self._manager.Event()
        ends = ends_of(kafka, PREDICTIONS)
        sending = self._executors["sender"].submit(send, kafka, self._pool, plan, stop)

        def sent() -> int | None:
            self._worker.check()
            if running is not None and running.done():
                running.result()
                raise StarcastError("The bare loop has ended.")
            return sending.result().count if sending.done() else None

        try:
            seen = watch(kafka, plan, ends, stop, sent, GIVE_UP_SECONDS, DRAIN_SECONDS)
        finally:
            stop.set()
        return sending.result(), seen


def batch_seconds(worker: Worker) -> dict[str, float]:
    """The worker's seconds by phase so far, and how many batches there were."""
    found: dict[str, float] = {}
    for sample in worker.samples():
        phase = sample.labels.get("phase", "")
        if sample.name == "starcast_batch_seconds_sum":
            found[phase] = sample.value
        elif sample.name == "starcast_batch_seconds_count" and phase == "process":
            found[TRANSACTIONS] = sample.value
    return found


def judged(
    plan: Plan,
    sent: Sent,
    seen: Seen,
    warm_up: float,
    transactions: int,
    phases: Mapping[str, float],
) -> Measured:
    """The latencies after the warm-up, and whether the loop kept up."""
    order = np.argsort(seen.index)
    index = seen.index[order]
    if not np.array_equal(index, np.arange(sent.count)):
        raise StarcastError("An event was answered twice, or one that was never sent.")
    measured = index >= round(plan.rate * warm_up)
    latencies = seen.latencies[order][measured]
    return Measured(
        latencies,
        sent.late[measured],
        sent.count == plan.count and keeps_up(latencies, plan.rate),
        sent.count,
        transactions,
        phases,
    )


def keeps_up(latencies: NDArray[np.float64], rate: float) -> bool:
    """Whether a loop kept up: near its input at the end, and no further behind by then.

    `latencies` (n) are those of all events in the order in which they were due.
    """
    quarter = max(len(latencies) // 4, 1)
    first, last = np.median(latencies[:quarter]), np.median(latencies[-quarter:])
    between = (len(latencies) - quarter) / rate  # seconds from one quarter to the other
    return bool(latencies[-1] <= BEHIND_SECONDS and last - first <= GROWTH * between)


def run_rates(
    options: Options, measure: Callable[[str, int], Measured], console: Console
) -> dict[str, dict[int, list[Measured]]]:
    """Each loop at each rate, up to the first that it does not sustain; then rates in between."""
    runs: dict[str, dict[int, list[Measured]]] = {loop: {} for loop in LOOPS}
    broken: dict[str, int] = {}

    def run(loop: str, rate: int) -> bool:
        measured = measure(loop, rate)
        runs[loop].setdefault(rate, []).append(measured)
        console.print(f"{loop} at {rate:,}/s: {words(measured)}")
        if not measured.sustained:
            broken[loop] = rate
        return measured.sustained

    for rate in sorted(options.rates):
        for _ in range(options.rounds):
            for loop in LOOPS:
                if loop not in broken:
                    run(loop, rate)
    if high := broken.get("scorer", 0):
        low = highest_sustained(runs["scorer"])
        for _ in range(options.halvings):
            middle = int(round((low + high) / 2, -2))
            if middle in (low, high):
                break
            low, high = (middle, high) if run("scorer", middle) else (low, middle)
    return runs


def measure_all(
    options: Options, folder: Path, console: Console
) -> dict[str, dict[int, list[Measured]]]:
    """Start everything and measure."""
    models = str(Path(default_models(console)).resolve())
    console.print("Filling Kafka and Valkey …")
    context = get_context("spawn")
    with (
        servers(folder / "servers") as endpoints,
        context.Manager() as manager,
        ProcessPoolExecutor(1, context) as sender,
        ProcessPoolExecutor(1, context) as bare,
    ):
        executors = {"sender": sender, "bare": bare}
        loaded = [executor.submit(os.getpid) for executor in executors.values()]
        kafka = KafkaConfig(
            bootstrap_servers=endpoints.bootstrap_servers, partitions=options.partitions
        )
        batch = ScorerConfig().batch_events
        sizes = Sizes(
            events=4 * options.users,
            rounds=0,
            users=options.users,
            items=options.items,
            partitions=options.partitions,
            batch=batch,
            peer_events=0,
        )
        redis = RedisConfig(url=SecretStr(endpoints.redis_url))
        Bench(sizes, kafka, redis, {"ladder": str(folder / "models")}, {})  # fills them
        world = make_world(options.users, options.items)
        pool = [each for each in make_pool(world, POOL) if each.topic != "score-requests"]
        settings = Settings(
            kafka=kafka,
            redis=redis,
            archive=ArchiveConfig(url=str(folder / "archive")),
            models=ModelsConfig(url=models),
        )
        with started("scorer", ["scorer"], settings, folder) as worker:
            wait(loaded)  # their modules, before anything is measured
            console.print("Warming the broker …")
            course = Course(options, kafka, worker, pool, executors, manager)
            return run_rates(options, course.measure, console)


def read_options(arguments: Sequence[str] | None) -> Options:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="bench.latency", description=__doc__)
    parser.add_argument("--rates", type=int, nargs="+", default=RATES, help="events a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured at each rate")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds before, at each rate")
    parser.add_argument(
        "--broker", type=float, default=40.0, help="seconds of both loops that warm the broker"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of both loops at each rate")
    parser.add_argument(
        "--halvings", type=int, default=3, help="rates tried between the highest and the broken one"
    )
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--partitions", type=int, default=8)
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = read_options(arguments)
    configure(LogConfig(level="warning"))
    console = Console()
    with tempfile.TemporaryDirectory(prefix="starcast-bench-") as name:
        runs = measure_all(options, Path(name), console)
    figures = figures_of(runs)
    Console(width=TABLE_WIDTH).print(table(figures))
    console.print(
        f"Highest rate sustained: {figures['highest_sustained']:,} events/s "
        f"(bare loop: {figures['highest_sustained_bare']:,} of those tried)"
    )
    path = report.write("latency", figures | {"settings": asdict(options)}, *PACKAGES)
    plot(runs, path.with_suffix(".svg"))
    console.print(f"written to {path}, plot beside it")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
