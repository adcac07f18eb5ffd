"""The scoring loop beside the bare consume-produce-commit of the same transactions.

Starts an Apache Kafka and a Valkey of its own and fills them: users, items, vectors, and the states
that a first part of the events leaves. Then measures in turn, each time on new events: the scoring
loop, exactly-once, with the default bundle; the bare loop, which reads the same input and writes
the records that the scoring loop wrote in the same transactions, and does nothing else; the scoring
loop with the cold-start ladder; the bare loop. A first round is not counted: the broker's JVM
compiles then, on the cores of whoever is first. After all these the peers of `bench.peers`, each on
new events in topics of its own. Prints tables and writes `results/loop.json`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from bench import report
from bench.clients import WAIT_SECONDS, bare_consumer, bare_producer, by_partition, produce
from bench.command import exit_code
from bench.events import World, make_events, make_world
from bench.model import default_models
from bench.peers import beside
from bench.peers.launch import PEERS, Peer, run
from bench.population import put_vectors
from bench.watch import PHASES, Run, Stopwatch, Transaction
from bench.worker import Scored, score, work
from model.state import LAYOUT_HASH
from schemas.exceptions import StarcastError
from starcast.log import LogConfig, configure
from streams.admin import apply_topics
from streams.catalog import Catalog
from streams.config import ArchiveConfig, KafkaConfig, ModelsConfig, RedisConfig, ScorerConfig
from streams.items import Items
from streams.producer import Outgoing, play
from streams.scorer import Scorer
from streams.store import Store
from tests.servers import servers

MODELS = {"bundle": "", "ladder": "_ladder"}  # and the suffix of their ratios
LEAST_BATCHES = 4  # of a run: one that waits for its input, and one processed meanwhile
PACKAGES = ("confluent-kafka", "numpy", "orjson", "pyarrow", "pydantic", "redis", "torch")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    events: int  # of one run
    rounds: int  # runs with each model
    users: int
    items: int
    partitions: int
    batch: int
    peer_events: int  # measured of a peer that takes batches; of another one a tenth

    def of_peer(self, peer: Peer) -> int:
        """Events that a peer gets: its warm-up, first and last batch are not measured."""
        measured = self.peer_events if peer.batches else self.peer_events // 10
        return peer.warm_up + max(measured, self.batch) + 2 * self.batch

    @property
    def first_events(self) -> int:
        """Events that leave the states which all runs begin with."""
        return max(self.events // 4, self.batch)


@dataclass(frozen=True)
class Measured:
    """A run of the scoring loop, and of the bare loop over the same transactions."""

    scoring: Run
    bare: Run
    bytes_in: float  # an event
    bytes_out: float
    memory_mb: float  # of the worker at the end


class Bench:
    """The servers, filled, and what is measured on them."""

    def __init__(
        self,
        sizes: Sizes,
        kafka: KafkaConfig,
        redis: RedisConfig,
        models: Mapping[str, str],
        peers: Mapping[str, Path],  # the Python of each
    ) -> None:
        self._sizes = sizes
        self._kafka = kafka
        self._bare = kafka.model_copy(update={"topic_prefix": "bare."})
        self._redis = redis
        self._models = {name: ModelsConfig(url=url) for name, url in models.items()}
        world = make_world(sizes.users, sizes.items)
        self._peers = peers
        self._peer_runs = 0
        of_peers = sum(sizes.of_peer(PEERS[name]) for name in peers)
        ours = len(models) * sizes.events * (1 + sizes.rounds) + sizes.events  # by a flame graph
        self._events = make_events(world, sizes.first_events + ours + sizes.rounds * of_peers)
        self._fill(world)

    def measure(self, model: str) -> Measured:
        """One run with a model on new events, and the bare loop after it."""
        events = self._sizes.events
        bytes_in = self._produce(events)
        scored = self._score(model, events)
        bare = run_bare(self._kafka, self._bare, scored.transactions)
        return Measured(
            scored.run, bare, bytes_in / events, scored.bytes_out / events, scored.memory_mb
        )

    def measure_peer(self, name: str) -> dict[str, Any]:
        """One run of a peer on new events; raises PeerError.

        Peers write user states without a claim, so no scoring loop may run after this.
        """
        self._peer_runs += 1
        kafka = self._kafka.model_copy(update={"topic_prefix": f"{name}-{self._peer_runs}."})
        apply_topics(kafka)
        events = self._sizes.of_peer(PEERS[name])
        play(islice(self._events, events), kafka)
        redis, models = self._redis.url.get_secret_value(), self._models["bundle"].url
        return run(PEERS[name], self._peers[name], kafka, redis, models, events, self._sizes.batch)

    def _fill(self, world: World) -> None:
        apply_topics(self._kafka)
        apply_topics(self._bare)
        prefix = self._kafka.topic_prefix
        store = Store(self._redis, LAYOUT_HASH, self._sizes.partitions)
        put_vectors(store, world)
        known = play(world.records, self._kafka).sent.total()
        work(lambda metrics: Catalog(store, prefix, metrics), self._kafka, known)
        self._produce(self._sizes.first_events)
        written = self._score("ladder", self._sizes.first_events).transactions
        updates = sum(len(each.records("item-updates")) for each in written)
        work(
            lambda metrics: Items(store, self._kafka, ArchiveConfig(), metrics),
            self._kafka,
            updates,
        )
        store.close()

    def _produce(self, count: int) -> int:
        """Send the next events; how many bytes their keys and values have."""
        size = 0

        def counted(events: Iterable[Outgoing]) -> Iterator[Outgoing]:
            nonlocal size
            for event in events:
                size += len(event.key or b"") + len(event.value or b"")
                yield event

        play(counted(islice(self._events, count)), self._kafka)
        return size

    def record(self, path: Path) -> None:
        """A flame graph of one more run with the default bundle; what it measures is not used."""
        self._produce(self._sizes.events)
        self._score("bundle", self._sizes.events, path)

    def _score(self, model: str, events: int, flame: Path | None = None) -> Scored:
        config = ScorerConfig(batch_events=self._sizes.batch)
        with ProcessPoolExecutor(1, get_context("spawn")) as worker:
            return worker.submit(
                score, self._kafka, self._redis, self._models[model], config, events, flame
            ).result()


def run_bare(
    source: KafkaConfig,
    target: KafkaConfig,
    transactions: Sequence[Transaction],
    spent: Callable[[], float] = time.process_time,
    **fetch: int,
) -> Run:
    """Consume, produce, commit: the same transactions with nothing in between.

    `spent` tells processor seconds; `fetch` are options of the consumer.
    """
    written = [
        {target.topic_prefix + topic: by_partition(one.records(topic)) for topic in one.outputs}
        for one in transactions
    ]
    consumer = bare_consumer(source, **{"fetch.wait.max.ms": 20} | fetch)
    producer = bare_producer(target)
    consumer.subscribe([source.topic_prefix + topic for topic in Scorer.topics])
    watch = Stopwatch(spent)
    for at, (transaction, outputs) in enumerate(zip(transactions, written, strict=True)):
        left = transaction.events
        while left:
            if not (messages := consumer.consume(left, WAIT_SECONDS)):
                raise StarcastError(f"Kafka gave the bare loop nothing for {WAIT_SECONDS:.0f} s.")
            left -= len(messages)
        watch.mark("consume")
        producer.begin_transaction()
        for topic, records in outputs.items():
            produce(producer, topic, records)
        producer.poll(0)
        watch.mark("produce")
        if transaction.events:
            producer.send_offsets_to_transaction(
                consumer.position(consumer.assignment()), consumer.consumer_group_metadata()
            )
        producer.commit_transaction(WAIT_SECONDS)
        watch.mark("commit")
        if at == 0:
            watch.start()
    run = watch.run(sum(each.events for each in transactions[1:]))
    consumer.close()
    return run


def summary(measured: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Ratios, rates and the rest, medians over the runs."""
    bare = [each.bare for runs in measured.values() for each in runs]
    limit = median(run.rate for run in bare)
    figures: dict[str, Any] = {}
    for model, suffix in MODELS.items():
        runs = measured[model]
        figures[f"ratio_to_bare{suffix}"] = round(median(r.scoring.rate for r in runs) / limit, 3)
    for name, runs in (
        *((model, [each.scoring for each in measured[model]]) for model in MODELS),
        ("bare", bare),
    ):
        figures[name] = {
            "events_per_second": [round(run.rate) for run in runs],
            "cpu_us_per_event": round(
                median(run.cpu_seconds / run.events for run in runs) * 1e6, 1
            ),
            "us_per_event": phases(runs),
        }
    every = [each for runs in measured.values() for each in runs]
    return figures | {
        "bytes_in_per_event": round(median(each.bytes_in for each in every)),
        "bytes_out_per_event": round(median(each.bytes_out for each in every)),
        "memory_mb": round(max(each.memory_mb for each in every)),
    }


def phases(runs: Sequence[Run]) -> dict[str, float]:
    """Microseconds an event by phase, medians over the runs."""
    return {
        name: round(median(run.phases[name] / run.events for run in runs) * 1e6, 2)
        for name in runs[0].phases
    }


def table(figures: Mapping[str, Any]) -> Table:
    """The figures side by side."""
    names = (*MODELS, "bare")
    shown = report.table(
        "",
        *names,
        title="Scoring loop, exactly-once",
        caption="µs an event, medians over the runs",
    )
    columns = [figures[name] for name in names]
    rates = [f"{median(each['events_per_second']):,.0f}" for each in columns]
    ratios = [f"{figures[f'ratio_to_bare{suffix}']:.2f}" for suffix in MODELS.values()]
    shown.add_row("events/s", *rates)
    shown.add_row("ratio to bare", *ratios, "1", end_section=True)
    for phase in PHASES:
        cells = [each["us_per_event"].get(phase) for each in columns]
        shown.add_row(phase, *("" if cell is None else f"{cell:.1f}" for cell in cells))
    shown.add_section()
    shown.add_row("CPU of the process", *(f"{each['cpu_us_per_event']:.1f}" for each in columns))
    return shown


def read_options(arguments: Sequence[str] | None) -> tuple[Sizes, Sequence[str], Path | None]:
    """How much, beside which peers, and where a flame graph goes."""
    parser = argparse.ArgumentParser(prog="bench.loop", description=__doc__)
    parser.add_argument("--events", type=int, default=200_000, help="events of one run")
    parser.add_argument("--rounds", type=int, default=2, help="runs with each model")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2_000, help="events in a transaction")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=[*PEERS, "none"],
        default=[*PEERS],
        help="which run beside it (default: all that can be installed)",
    )
    parser.add_argument(
        "--peer-events",
        type=int,
        default=40_000,
        help="events measured of a peer that takes batches; of another one a tenth",
    )
    parser.add_argument("--flame", type=Path, help="write a flame graph of one more run there")
    options = vars(parser.parse_args(arguments))
    flame, peers = options.pop("flame"), options.pop("peers")
    if options["rounds"] < 1 or options["events"] < LEAST_BATCHES * options["batch"]:
        parser.error(f"a round at least, of {LEAST_BATCHES} batches: the first are not measured")
    return Sizes(**options), [name for name in peers if name != "none"], flame


def measure_rounds(bench: Bench, rounds: int, console: Console) -> dict[str, list[Measured]]:
    """The runs of each model, in turn, but the first."""
    measured: dict[str, list[Measured]] = {model: [] for model in MODELS}
    for number in range(1 + rounds):
        for model in MODELS:
            each = bench.measure(model)
            if number:
                measured[model].append(each)
            console.print(
                f"{model}: {each.scoring.rate:,.0f} events/s, bare {each.bare.rate:,.0f}"
                + ("" if number else " (the broker warms; not counted)")
            )
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    sizes, names, flame = read_options(arguments)
    configure(LogConfig(level="warning"))
    console = Console()
    peers = beside.installed(names, console)
    with tempfile.TemporaryDirectory(prefix="starcast-bench-") as name:
        folder = Path(name)
        models = {"bundle": default_models(console), "ladder": str(folder / "models")}
        console.print("Filling Kafka and Valkey …")
        with servers(folder / "servers") as endpoints:
            kafka = KafkaConfig(
                bootstrap_servers=endpoints.bootstrap_servers, partitions=sizes.partitions
            )
            redis = RedisConfig(url=SecretStr(endpoints.redis_url))
            bench = Bench(sizes, kafka, redis, models, peers)
            figures = summary(measure_rounds(bench, sizes.rounds, console))
            figures["settings"] = asdict(sizes)
            report.write("loop", figures, *PACKAGES)  # what follows may fail
            if flame:
                bench.record(flame)
            runs = beside.measure(peers, sizes.rounds, bench.measure_peer, console)
    figures |= beside.summary(figures["bundle"], runs)
    console.print(table(figures))
    if runs:
        console.print(beside.table(figures))
    console.print(
        f"{figures['bytes_in_per_event']} bytes in and {figures['bytes_out_per_event']} out "
        f"an event, before compression; {figures['memory_mb']} MB"
    )
    path = report.write("loop", figures, *PACKAGES)
    console.print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
