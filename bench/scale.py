"""How cost grows with size: users, items, partitions, workers; and what a larger shop would need.

Parts, each an option of `--parts`:

users: processor time an event with more and more users in the store, at the same number of distinct
    users a batch, with the worker's cache of user states off and on;
bytes: growth of the store's memory by users;
items: the same with more and more items, and the worker's memory when it has met all of them;
workers: events a second and processor time an event of one worker, two, …, on one input;
partitions: processor time an event with more and more partitions and one worker, and that of a bare
    loop (`bench/loop.py`) which writes what transactions of ours wrote;
extrapolation: computed from the last figures of the parts, not measured.

Users and items are scored by the real scorer without Kafka (`bench/direct.py`), with the cold-start
ladder, since a network's constant cost would hide growth; workers and partitions by `starcast run
scorer` on Kafka (`bench/fleet.py`), workers with the default bundle. Prints tables, writes
`results/scale.json` and a plot beside it; parts that were not run keep their last figures.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import altair
import orjson
import polars as pl
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from bench.command import exit_code
from bench.direct import FIRST_EVENT, Batches, Scored, Shop, score_batches
from bench.events import World, make_events
from bench.extrapolation import LABEL, Measured, Needed, Wanted, extrapolate
from bench.fleet import SEND_SECONDS, Played, Servers, processor, send, start_fleet
from bench.loop import run_bare
from bench.model import default_models
from bench.population import (
    Filled,
    Sample,
    make_items,
    make_sample,
    make_users,
    put_items,
    put_users,
    replay,
)
from bench.report import RESULTS, machine, write
from bench.worker import score
from model.state import LAYOUT_HASH
from schemas.exceptions import StarcastError
from starcast.log import LogConfig, configure
from streams.admin import apply_topics
from streams.config import KafkaConfig, ModelsConfig, RedisConfig, ScorerConfig, StatesConfig
from streams.embedded import start_store
from streams.fetching import fetching
from streams.producer import Outgoing
from streams.scorer import Scorer
from streams.store import Store
from tests.servers import start_kafka

PARTS = ("users", "bytes", "items", "workers", "partitions", "extrapolation")
PARTITIONS = 8  # of shops whose partitions are not what is measured
ITEMS, USERS = 10_000, 10_000  # of shops whose items, or users, are not what is measured
BATCH = 2_000  # events, as the scorer's default
BATCH_USERS = 1_000  # drawn for a batch; about two thirds of them act
WARM_UP = 6_000  # events that a fleet scores before it is measured
FIRST_RUNS = 3  # on new partitions, not counted: Kafka opens their files, its JVM compiles
PACKAGES = ("confluent-kafka", "numpy", "orjson", "pyarrow", "pydantic", "redis", "torch")


@dataclass(frozen=True)
class Options:
    """What is measured, and how large."""

    parts: Sequence[str]
    users: Sequence[int]
    items: Sequence[int]
    workers: Sequence[int]
    partitions: Sequence[int]
    batches: int
    events: int
    rounds: int
    history: int
    wanted: Wanted


class Scale:
    """The parts, and what they have in common."""

    def __init__(self, options: Options, folder: Path, console: Console) -> None:
        self._options = options
        self._folder = folder
        self._console = console
        self._ladder = ModelsConfig(url=str(folder / "models"))  # an empty registry

    @cached_property
    def _sample(self) -> Sample:
        self._console.print("Making items, texts and vectors …")
        return make_sample()

    def users(self, scored: bool) -> dict[str, dict[str, Any]]:
        """Cost an event, unless bytes alone are asked for; and bytes a user."""
        sample, options = self._sample, self._options
        histories = replay(sample, ITEMS, options.history)
        with ExitStack() as stack:
            shops: list[Shop] = []
            filled: list[Filled] = []
            for users in options.users:
                self._console.print(f"Filling a store with {users:,} users …")
                redis = stack.enter_context(self._store(f"users-{users}"))
                store = stack.enter_context(_opened(redis, PARTITIONS))
                put_items(store, sample, histories, ITEMS)
                filled.append(put_users(store, sample, histories, users))
                shops.append(Shop(users, ITEMS, PARTITIONS, redis))
            events = sorted(histories.events.tolist())
            parts: dict[str, dict[str, Any]] = {
                "bytes": {
                    "sizes": [asdict(each) | {"structure": each.structure} for each in filled],
                    "events_a_user": {
                        "mean": round(sum(events) / len(events), 1),
                        "median": median(events),
                        "largest": events[-1],
                    },
                }
            }
            if scored:
                cached = StatesConfig().cache_users
                parts["users"] = {
                    name: curve(options.users, self._score(shops, cache, cache > 0))
                    for name, cache in (("uncached", 0), ("cached", cached))
                }
        return parts

    def items(self) -> dict[str, Any]:
        """Cost an event; and the memory of a worker that has met every item."""
        sample, options = self._sample, self._options
        with ExitStack() as stack:
            shops: list[Shop] = []
            for items in options.items:
                self._console.print(f"Filling a store with {items:,} items …")
                histories = replay(sample, items, options.history)
                redis = stack.enter_context(self._store(f"items-{items}"))
                store = stack.enter_context(_opened(redis, PARTITIONS))
                put_items(store, sample, histories, items)
                put_users(store, sample, histories, USERS)
                shops.append(Shop(USERS, items, PARTITIONS, redis))
            cached = StatesConfig().cache_users
            figures = curve(options.items, self._score(shops, cached, False))
            for shop, point in zip(shops, figures["points"], strict=True):
                (alone,) = self._score([shop], cached, True)
                point["worker_mb"] = round(alone.memory / 2**20)
        return figures

    def workers(self) -> dict[str, Any]:
        """Events a second and cost an event of one worker, two, … in turn, on one stream."""
        models = default_models(self._console)
        with self._servers() as (servers, kafka, redis):
            self._fill(redis, PARTITIONS)
            apply_topics(kafka)
            stream = self._stream(self._options.rounds * len(self._options.workers))
            played: dict[int, list[Played]] = {count: [] for count in self._options.workers}
            for _ in range(self._options.rounds):
                for count in self._options.workers:
                    with start_fleet(servers, kafka, redis, models, count) as fleet:
                        fleet.play(islice(stream, WARM_UP))
                        played[count].append(fleet.play(islice(stream, self._options.events)))
                    self._tell(f"{count} workers", played[count][-1])
        return {"points": [{"size": size} | typical(each) for size, each in played.items()]}

    def partitions(self) -> dict[str, Any]:
        """Cost an event of one worker that has all partitions."""
        played: dict[int, list[Played]] = {count: [] for count in self._options.partitions}
        bare: dict[int, float] = {}
        with self._servers() as (servers, first, store):
            for count in self._options.partitions:
                changes = {"topic_prefix": f"p{count}.", "partitions": count}
                kafka = first.model_copy(update=changes)
                redis = store.model_copy(update={"key_prefix": f"p{count}"})
                self._fill(redis, count)
                apply_topics(kafka)
                stream = self._stream(FIRST_RUNS + self._options.rounds + 1)
                with start_fleet(servers, kafka, redis, self._ladder.url, 1) as fleet:
                    for number in range(FIRST_RUNS + self._options.rounds):
                        last = fleet.play(islice(stream, self._options.events))
                        self._tell(f"{count} partitions", last)
                        if number >= FIRST_RUNS:
                            played[count].append(last)
                bare[count] = self._bare(servers, kafka, redis, stream)
                self._console.print(f"the bare loop, with Kafka: {bare[count]} µs an event")
        return {
            "points": [
                {"size": size} | typical(each) | {"bare_us": bare[size]}
                for size, each in played.items()
            ]
        }

    def _bare(
        self, servers: Servers, kafka: KafkaConfig, redis: RedisConfig, stream: Iterator[Outgoing]
    ) -> float:
        """Processor microseconds an event of the bare loop and of Kafka, median over the rounds.

        It reads the shop's events again, and writes what a last run of the scorer wrote, in
        transactions as large.
        """
        producer, count = send(kafka, islice(stream, self._options.events))
        producer.commit_transaction(SEND_SECONDS)
        config = ScorerConfig()
        with ProcessPoolExecutor(1, get_context("spawn")) as worker:
            scoring = worker.submit(score, kafka, redis, self._ladder, config, count)
            transactions = scoring.result().transactions

        def spent() -> float:
            return time.process_time() + processor(servers.kafka)

        fetch = fetching(config.linger_ms / 1_000, len(Scorer.topics) * kafka.partitions)
        runs = [
            run_bare(kafka, kafka, transactions, spent, **fetch)
            for _ in range(self._options.rounds)
        ]
        return round(median(run.cpu_seconds / run.events for run in runs) * 1e6, 1)

    def _score(self, shops: Sequence[Shop], cache_users: int, warm: bool) -> list[Scored]:
        batches = Batches(self._options.batches, BATCH, BATCH_USERS, cache_users, warm)
        self._console.print(
            f"Scoring {batches.count} batches in {len(shops)} shops, "
            f"{cache_users:,} users cached a partition …"
        )
        with ProcessPoolExecutor(1, get_context("spawn")) as worker:
            scoring = worker.submit(score_batches, shops, self._sample.shop, self._ladder, batches)
            return scoring.result()

    def _fill(self, redis: RedisConfig, partitions: int) -> None:
        histories = replay(self._sample, ITEMS, self._options.history)
        with _opened(redis, partitions) as store:
            put_items(store, self._sample, histories, ITEMS)
            put_users(store, self._sample, histories, USERS)

    def _stream(self, plays: int) -> Iterator[Outgoing]:
        """Events of the users and items that the store knows, for so many runs after a warm-up."""
        shop = self._sample.shop
        world = World(make_users(USERS), make_items(shop, ITEMS), shop.texts)
        count = plays * (WARM_UP + self._options.events)
        return make_events(world, count, seed=8, first=FIRST_EVENT)

    @contextmanager
    def _store(self, name: str) -> Generator[RedisConfig]:
        with start_store(self._folder / name) as store:
            yield RedisConfig(url=SecretStr(store.address))

    @contextmanager
    def _servers(self) -> Generator[tuple[Servers, KafkaConfig, RedisConfig]]:
        with (
            tempfile.TemporaryDirectory(dir=self._folder) as name,
            start_kafka(Path(name), lasting=True) as kafka,
            start_store(Path(name)) as store,
        ):
            config = KafkaConfig(
                bootstrap_servers=kafka.address, group_id="scale", partitions=PARTITIONS
            )
            redis = RedisConfig(url=SecretStr(store.address))
            yield Servers(kafka, store, Path(name)), config, redis

    def _tell(self, what: str, played: Played) -> None:
        figures = played.figures()
        self._console.print(
            f"{what}: {figures['events_per_second']:,} events/s; worker {figures['worker_us']}, "
            f"Kafka {figures['kafka_us']}, store {figures['store_us']} µs an event"
        )


def curve(sizes: Sequence[int], scored: Sequence[Scored]) -> dict[str, Any]:
    """Cost by size; ratios to the smallest are those of the same batch, in the same second."""
    points: list[dict[str, Any]] = []
    for size, each in zip(sizes, scored, strict=True):
        ratios = [
            mine.total / least.total
            for mine, least in zip(each.costs, scored[0].costs, strict=True)
        ]
        low, middle, high = quantiles(ratios, n=4)
        points.append(
            {
                "size": size,
                **each.summary(),
                "ratio": round(middle, 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
                "worker_mb": round(each.memory / 2**20),
            }
        )
    return {"points": points}


def typical(played: Sequence[Played]) -> dict[str, float]:
    """Medians over runs, and the processor time of all together."""
    runs = [each.figures() for each in played]
    middle = {name: round(median(run[name] for run in runs), 1) for name in runs[0]}
    return middle | {
        "cpu_us_per_event": round(middle["worker_us"] + middle["kafka_us"] + middle["store_us"], 1)
    }


def ratios(parts: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are compared, by name."""
    found: dict[str, float] = {}
    for name, suffix in (("uncached", ""), ("cached", "_cached")):
        for point in parts.get("users", {}).get(name, {}).get("points", [])[1:]:
            found[f"ratio_users_{point['size']}{suffix}"] = point["ratio"]
    if sizes := parts.get("bytes", {}).get("sizes"):
        found["bytes_per_user"] = round(sizes[-1]["total"], 1)
    for point in parts.get("items", {}).get("points", [])[1:]:
        found[f"ratio_items_{point['size']}"] = point["ratio"]
    if points := parts.get("workers", {}).get("points"):
        for point in points[1:]:
            faster = point["events_per_second"] / points[0]["events_per_second"]
            found[f"ratio_workers_{point['size']}"] = round(faster, 3)
            dearer = point["cpu_us_per_event"] / points[0]["cpu_us_per_event"]
            found[f"ratio_workers_{point['size']}_cpu"] = round(dearer, 3)
    if points := parts.get("partitions", {}).get("points"):
        for point in points[1:]:
            dearer = point["cpu_us_per_event"] / points[0]["cpu_us_per_event"]
            found[f"ratio_partitions_{point['size']}"] = round(dearer, 3)
        for point in points:
            if bare := point.get("bare_us"):
                to_bare = point["cpu_us_per_event"] / bare
                found[f"ratio_to_bare_partitions_{point['size']}"] = round(to_bare, 3)
    return found


def computed(parts: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    """The extrapolation, from the last figures of one worker and of bytes a user."""
    if missing := {"workers", "bytes"} - parts.keys():
        raise StarcastError(f"Nothing to compute from; run --parts {' '.join(sorted(missing))}.")
    one = parts["workers"]["points"][0]
    measured = Measured(
        worker_us=one["worker_us"],
        kafka_us=one["kafka_us"],
        store_us=one["store_us"],
        kafka_bytes=one["kafka_bytes_per_event"],
        user_bytes=parts["bytes"]["sizes"][-1]["total"],
        worker_mb=one["worker_mb"],
    )
    return extrapolate(measured, wanted).figures(measured, wanted)


def tables(parts: Mapping[str, Any]) -> Iterator[Table]:
    """Every part as a person reads it."""
    for title, points in curves(parts):
        table = Table(title=title, caption="processor µs an event, medians")
        columns = ("size", "cpu_us_per_event", "worker_us", "store_us", "kafka_us", "bare_us")
        more = ("ratio", "ratio_quartiles", "events_per_second", "worker_mb")
        shown = [name for name in (*columns, *more) if name in points[0]]
        for name in shown:
            table.add_column(name.replace("_us", "").replace("_", " "), justify="right")
        for point in points:
            table.add_row(*(_text(point[name]) for name in shown))
        yield table
    if sizes := parts.get("bytes", {}).get("sizes"):
        table = Table(title="Bytes a user in the store")
        names = ("users", "total", "value", "key", "structure", "attributes")
        for name in names:
            table.add_column(name, justify="right")
        for each in sizes:
            table.add_row(*(_text(each[name]) for name in names))
        yield table
    if needed := parts.get("extrapolation"):
        table = Table("", "", title=f"A larger shop: {LABEL}")
        assumed = needed["assumed"]
        table.add_row("users", _text(assumed["users"]))
        table.add_row("events a second", _text(assumed["events_per_second"]))
        for name in Needed.__dataclass_fields__:
            table.add_row(name.replace("_", " "), _text(needed[name]))
        yield table


def curves(parts: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and points of each curve."""
    users = parts.get("users", {})
    for name, title in (("uncached", "Users, cache off"), ("cached", "Users, cache on")):
        if name in users:
            yield title, users[name]["points"]
    for name in ("items", "partitions", "workers"):
        if name in parts:
            yield name.capitalize(), parts[name]["points"]


def plot(parts: Mapping[str, Any], path: Path) -> None:
    """Processor time an event by size, a panel for each kind of size."""
    rows = [
        {
            "of": title.partition(",")[0],
            "curve": title,
            "size": point["size"],
            "µs an event": point["cpu_us_per_event"],
        }
        for title, points in curves(parts)
        for point in points
    ]
    panels = [
        altair.Chart(pl.DataFrame([row for row in rows if row["of"] == of]))
        .mark_line(point=True)
        .encode(
            x=altair.X("size:Q", title=of, scale=altair.Scale(type="log")),
            y=altair.Y("µs an event:Q", scale=altair.Scale(zero=True)),
            color=altair.Color("curve:N", title=None),
        )
        .properties(width=320, height=180)
        for of in dict.fromkeys(row["of"] for row in rows)
    ]
    if panels:
        chart: Any = altair.concat(*panels, columns=2).resolve_scale(color="independent")
        chart.save(path)


def kept_parts() -> dict[str, Any]:
    """The last figures of every part."""
    path = RESULTS / "scale.json"
    return orjson.loads(path.read_bytes())["parts"] if path.exists() else {}


@contextmanager
def _opened(redis: RedisConfig, partitions: int) -> Generator[Store]:
    store = Store(redis, LAYOUT_HASH, partitions)
    try:
        yield store
    finally:
        store.close()


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    if value is None:
        return "no price given"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or value >= 1_000 else f"{value:,.3g}"
    return f"{value:,}"


def read_options(arguments: Sequence[str] | None) -> Options:
    """From the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    sizes = [10_000, 100_000, 1_000_000]
    parser.add_argument("--users", nargs="+", type=int, default=sizes, help="in the store")
    parser.add_argument("--items", nargs="+", type=int, default=sizes)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--partitions", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--batches", type=int, default=30, help=f"of {BATCH} events, without Kafka")
    parser.add_argument("--events", type=int, default=30_000, help="of one run through Kafka")
    parser.add_argument("--rounds", type=int, default=2, help="runs through Kafka of each size")
    parser.add_argument("--history", type=int, default=14, help="events a user has had, on average")
    wanted = parser.add_argument_group("extrapolation")
    wanted.add_argument("--shop-users", type=float, default=1e9)
    wanted.add_argument("--shop-events", type=float, default=1e6, help="a second")
    wanted.add_argument("--machine-cores", type=int, default=32)
    wanted.add_argument("--machine-gb", type=float, default=128.0)
    wanted.add_argument("--core-hour", type=float, help="price of a core for an hour")
    wanted.add_argument("--gb-month", type=float, help="price of a GB of disk for a month")
    given = vars(parser.parse_args(arguments))
    shop = Wanted(
        users=given.pop("shop_users"),
        events_per_second=given.pop("shop_events"),
        **{name: given.pop(name) for name in ("machine_cores", "machine_gb")},
        **{name: given.pop(name) for name in ("core_hour", "gb_month")},
    )
    return Options(**given, wanted=shop)


def measure(options: Options, folder: Path, console: Console) -> Iterator[tuple[str, Any]]:
    """Figures of each part that is asked for, as they come."""
    scale = Scale(options, folder, console)
    if {"users", "bytes"} & set(options.parts):
        yield from scale.users("users" in options.parts).items()
    for name, part in (
        ("items", scale.items),
        ("workers", scale.workers),
        ("partitions", scale.partitions),
    ):
        if name in options.parts:
            yield name, part()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = read_options(arguments)
    configure(LogConfig(level="warning"))
    console = Console()
    parts = kept_parts()
    path = RESULTS / "scale.json"
    with tempfile.TemporaryDirectory(prefix="starcast-bench-") as name:
        for part, figures in measure(options, Path(name), console):
            parts[part] = figures | {
                "settings": asdict(options),
                "date": datetime.now(UTC).date().isoformat(),
                "machine": machine(),  # other parts may be of another one
            }
            path = write("scale", ratios(parts) | {"parts": parts}, *PACKAGES)
    if "extrapolation" in options.parts:
        parts["extrapolation"] = computed(parts, options.wanted)
        path = write("scale", ratios(parts) | {"parts": parts}, *PACKAGES)
    for table in tables(parts):
        console.print(table)
    for name, ratio in ratios(parts).items():
        console.print(f"{name}: {ratio}")
    plot(parts, path.with_suffix(".svg"))
    console.print(f"written to {path}, plot beside it")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
