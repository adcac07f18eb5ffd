"""The scoring loop beside the bare consume-produce-commit of the same transactions.

Starts an Apache Kafka and a Valkey of its own and fills them: users, items, vectors, and the states
that a first part of the events leaves. Then measures in turn, each time on new events: the scoring
loop, exactly-once, with the default bundle; the bare loop, which reads the same input and writes
the records that the scoring loop wrote in the same transactions, and does nothing else; the scoring
loop with the cold-start ladder; the bare loop. Prints a table and writes `results/loop.json`.
"""

import argparse
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from confluent_kafka import Consumer, Producer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from bench.events import World, make_events, make_world
from bench.model import default_models
from bench.report import write
from bench.watch import PHASES, Run, Stopwatch, Transaction, Watched
from model import encoder
from model.catalog import item_text
from model.ids import hash_ids
from model.state import LAYOUT_HASH
from schemas.exceptions import StarcastError
from starcast.log import LogConfig, configure
from streams.admin import apply_topics, client_config
from streams.catalog import Catalog
from streams.config import (
    ArchiveConfig,
    KafkaConfig,
    ModelsConfig,
    RedisConfig,
    ScorerConfig,
    StatesConfig,
)
from streams.items import Items
from streams.loop import FETCH_KILOBYTES, Loop, Processor
from streams.metrics import Metrics, make_metrics
from streams.models import Models
from streams.producer import Outgoing, play
from streams.reader import VECTOR_DTYPE, Reader, vector_keys
from streams.scorer import Scorer
from streams.store import Store
from streams.user_states import UserStates
from tests.servers import servers

ENCODED_TEXTS = 256  # item texts that the encoder sees; a vector's numbers cost nothing more
WAIT_SECONDS = 60.0  # a broker that answers nothing any more ends the benchmark
COMMIT_SECONDS = 30.0
MODELS = {"bundle": "", "ladder": "_ladder"}  # and the suffix of their ratios
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


@dataclass(frozen=True)
class Measured:
    """A run of the scoring loop, and of the bare loop over the same transactions."""

    scoring: Run
    bare: Run
    bytes_in: float  # an event
    bytes_out: float
    memory: float  # MB of the worker at the end


class Bench:
    """The servers, filled, and what is measured on them."""

    def __init__(
        self, sizes: Sizes, kafka: KafkaConfig, redis: RedisConfig, folder: Path, say: Console
    ) -> None:
        self._sizes = sizes
        self._kafka = kafka
        self._bare = kafka.model_copy(update={"topic_prefix": "bare."})
        self._archive = ArchiveConfig(url=str(folder / "archive"))
        self._store = Store(redis, LAYOUT_HASH, sizes.partitions)
        self._say = say
        self._models = {
            "bundle": ModelsConfig(url=default_models(say), threads=1),
            "ladder": ModelsConfig(url=str(folder / "models"), threads=1),
        }
        world = make_world(sizes.users, sizes.items)
        total = sizes.events * (1 + len(MODELS) * sizes.rounds)
        self._events = make_events(world, total)
        self._fill(world)

    def measure(self, model: str) -> Measured:
        """One run with a model on new events, and the bare loop after it."""
        bytes_in = self._produce(self._sizes.events)
        watched = self._score(model)
        memory = psutil.Process().memory_info().rss
        scoring, transactions = watched.run(), watched.transactions()
        bytes_out = sum(each.bytes_out for each in transactions)
        bare = run_bare(self._kafka, self._bare, transactions)
        events = self._sizes.events
        return Measured(
            scoring, bare, bytes_in / events, bytes_out / events, (memory - bytes_out) / 2**20
        )

    def _fill(self, world: World) -> None:
        apply_topics(self._kafka)
        apply_topics(self._bare)
        self._say.print(f"{len(world.items):,} items, {len(world.users):,} users …")
        known = play(world.records, self._kafka)
        self._put_vectors(world)
        prefix = self._kafka.topic_prefix
        self._run(lambda metrics: Catalog(self._store, prefix, metrics), known.sent.total())
        self._say.print("first states …")
        self._produce(self._sizes.events)
        written = [each.outputs for each in self._score("ladder").transactions()]
        updates = sum(len(outputs.get("item-updates", ())) for outputs in written)
        self._run(lambda metrics: Items(self._store, prefix, metrics), updates)

    def _put_vectors(self, world: World) -> None:
        """Each item's text gets the vector of one of the texts that the encoder has seen."""
        folder = encoder.locate("auto")
        if folder is None:
            raise StarcastError("The packaged text encoder is not installed; run: make setup")
        texts = [item_text(item) for item in world.items]
        loaded = encoder.load(folder)
        vectors = loaded.project(loaded.encode(texts[:ENCODED_TEXTS])).astype(VECTOR_DTYPE)
        keys = vector_keys(self._store, loaded.hash, hash_ids(texts))
        self._store.put(keys, [vectors[at % len(vectors)].tobytes() for at in range(len(keys))])

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

    def _score(self, model: str) -> Watched:
        config = ScorerConfig(batch_events=self._sizes.batch)
        states = UserStates(self._store, self._kafka, self._archive, StatesConfig())
        reader = Reader(self._store)
        prefix = self._kafka.topic_prefix
        with ExitStack() as stack:

            def make(metrics: Metrics) -> Scorer:
                models = Models(self._models[model], metrics).start()
                stack.callback(models.close)
                return Scorer(config, prefix, states, reader, models, metrics, "scorer-0")

            return self._run(make, self._sizes.events)

    def _run(self, make: Callable[[Metrics], Processor], records: int) -> Watched:
        """Run a processor until it has worked on so many records."""
        stop, metrics = threading.Event(), make_metrics()
        watched = Watched(make(metrics), metrics, records, stop)
        Loop(watched, self._kafka, metrics, stop).run()
        return watched


def run_bare(source: KafkaConfig, target: KafkaConfig, transactions: Sequence[Transaction]) -> Run:
    """Consume, produce, commit: the same transactions with nothing in between."""
    consumer = Consumer(
        client_config(
            source,
            **{
                "group.id": "bare",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "queued.max.messages.kbytes": FETCH_KILOBYTES,
                "fetch.wait.max.ms": 20,
            },
        )
    )
    producer = Producer(
        client_config(
            target,
            **{
                "transactional.id": "bare",
                "partitioner": "murmur2_random",
                "linger.ms": 1,
                "compression.type": "lz4",
            },
        )
    )
    producer.init_transactions(WAIT_SECONDS)
    consumer.subscribe([source.topic_prefix + topic for topic in Scorer.topics])
    watch = Stopwatch()
    for at, transaction in enumerate(transactions):
        left = transaction.events
        while left:
            left -= len(consumer.consume(left, WAIT_SECONDS))
        watch.mark("consume")
        producer.begin_transaction()
        for topic, records in transaction.outputs.items():
            producer.produce_batch(target.topic_prefix + topic, records)
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
        "memory_mb": round(max(each.memory for each in every)),
    }


def phases(runs: Sequence[Run]) -> dict[str, float]:
    """Microseconds an event by phase, medians over the runs."""
    return {
        name: round(median(run.phases[name] / run.events for run in runs) * 1e6, 2)
        for name in runs[0].phases
    }


def table(figures: Mapping[str, Any]) -> Table:
    """The figures side by side."""
    shown = Table(title="Scoring loop, exactly-once", caption="µs an event, medians over the runs")
    for column in ("", *MODELS, "bare"):
        shown.add_column(column, justify="left" if not column else "right")
    columns = [figures[name] for name in (*MODELS, "bare")]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="bench.loop", description=__doc__)
    parser.add_argument("--events", type=int, default=200_000, help="events of one run")
    parser.add_argument("--rounds", type=int, default=2, help="runs with each model")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2_000, help="events in a transaction")
    sizes = Sizes(**vars(parser.parse_args(arguments)))
    configure(LogConfig(level="warning"))
    console = Console()
    measured: dict[str, list[Measured]] = {model: [] for model in MODELS}
    with tempfile.TemporaryDirectory(prefix="starcast-bench-") as name:
        folder = Path(name)
        with servers(folder / "servers") as endpoints:
            kafka = KafkaConfig(
                bootstrap_servers=endpoints.bootstrap_servers, partitions=sizes.partitions
            )
            redis = RedisConfig(url=SecretStr(endpoints.redis_url))
            bench = Bench(sizes, kafka, redis, folder, console)
            for _ in range(sizes.rounds):
                for model in MODELS:
                    run = bench.measure(model)
                    measured[model].append(run)
                    console.print(
                        f"{model}: {run.scoring.rate:,.0f} events/s, bare {run.bare.rate:,.0f}"
                    )
    figures = summary(measured)
    console.print(table(figures))
    console.print(
        f"{figures['bytes_in_per_event']} bytes in and {figures['bytes_out_per_event']} out "
        f"an event, before compression; {figures['memory_mb']} MB"
    )
    path = write("loop", figures | {"settings": asdict(sizes)}, *PACKAGES)
    console.print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
