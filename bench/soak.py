"""An hour at half the peak: does anything grow?

Starts an Apache Kafka and a Valkey of its own, measures how many events a second two workers can do
at most, then plays at half of that with fixed users and items, exactly-once, and looks every ten
seconds at each worker process, the store, the lag and the latency. Ends with 1 when memory or file
handles of a worker grow (`bench/growth.py` says how that is told), or an event was not
predicted.
"""

import argparse
import base64
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any, cast

import altair
import datasketches  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import orjson
import polars as pl
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import (
    AlterConfigOpType,  # pyright: ignore[reportPrivateImportUsage]
    ConfigEntry,  # pyright: ignore[reportPrivateImportUsage]
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
    ResourceType,  # pyright: ignore[reportPrivateImportUsage]
)
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from bench.clients import hand_over, shop_producer
from bench.command import exit_code
from bench.events import make_world
from bench.growth import Judged, judge
from bench.model import default_models
from bench.pool import Template, make_pool
from bench.population import put_vectors
from bench.processes import Worker, started
from bench.report import write
from model.state import LAYOUT_HASH
from schemas.codec import format_times
from schemas.exceptions import StarcastError
from schemas.topics import TOPICS
from starcast.commands.context import stopping
from starcast.log import LogConfig, configure
from starcast.settings import Settings
from starcast.workers import ANSWER_SECONDS
from streams.admin import apply_topics
from streams.clients import client_config, reach, topic_name
from streams.config import (
    ArchiveConfig,
    InsightsConfig,
    KafkaConfig,
    ModelsConfig,
    RedisConfig,
    ScorerConfig,
)
from streams.producer import play
from streams.store import Store
from tests.servers import servers

WORKERS = {
    "worker-1": ("scorer", "items", "catalog", "answers"),
    "worker-2": ("scorer", "items", "catalog", "answers"),
    "archiver": ("archiver",),
    "insights": ("insights",),
}
POOL = 100_000  # events made once and sent again and again, with new ids and times
RETENTION = timedelta(minutes=15)  # else an hour's records would fill the disk
SEGMENT = timedelta(minutes=1)  # Kafka deletes whole segments only
SEGMENT_BYTES = 16 * 1024 * 1024
BACKLOG = 40_000  # events waiting while the peak is measured
PEAK_SECONDS = 180.0  # of a load that leaves no worker idle; compactions of the archive count too
TICK_SECONDS = 0.02
SAMPLE_SECONDS = 10.0
DRAIN_SECONDS = 240.0  # the archiver takes longest; under RETENTION, so that it loses nothing
DRAINED_LAG = 1_000  # transactions' ends count as records that wait
LEAST_DISK = 5 * 2**30  # bytes that are left to others
MEGABYTE = 2**20
_SKETCHES = cast(Any, datasketches)  # the wheel has no type information
PACKAGES = ("confluent-kafka", "deltalake", "faust-streaming", "numpy", "polars", "redis", "torch")


@dataclass(frozen=True)
class Options:
    """How long, how fast, and of how much."""

    minutes: float
    rate: float
    users: int
    items: int
    partitions: int
    folder: Path
    json: bool


class Load:
    """Sends the pool round and round from a thread of its own."""

    def __init__(self, kafka: KafkaConfig, pool: Sequence[Template]) -> None:
        self.events = 0  # requests are not counted
        self.failed = 0
        self._prefix = kafka.topic_prefix
        self._number = 0
        self._pool = cycle(pool)
        self._producer = shop_producer(kafka, enable_idempotence=True)

    def send(self, count: int) -> None:
        """The next records until so many events are sent."""
        now = format_times(np.array([time.time() * 1_000], np.int64))[0].encode()
        until = self.events + count
        while self.events < until:
            each = next(self._pool)
            value = each.value(self._number, now)
            self._number += 1
            hand_over(self._producer, self._prefix + each.topic, value, each.key, self._note)
            self.events += each.topic != "score-requests"
        self._producer.poll(0)

    def finish(self) -> None:
        """Wait until Kafka has all."""
        left = self._producer.flush(DRAIN_SECONDS)
        self.failed += left

    @contextmanager
    def steady(self, rate: float) -> Generator[Future[None]]:
        """Send at an even rate, whatever becomes of it, while the block runs.

        Gives what is done when that has ended before, and raises what ended it.
        """
        stop = threading.Event()
        began, first = time.monotonic(), self.events

        def run() -> None:
            while not stop.wait(TICK_SECONDS):
                self.send(int((time.monotonic() - began) * rate) + first - self.events)

        with ThreadPoolExecutor(1, "load") as pool:
            sending = pool.submit(run)
            try:
                yield sending
            finally:
                stop.set()
            sending.result()

    def _note(self, error: Any, _: Any) -> None:
        self.failed += error is not None


class Latencies:
    """Event to prediction, from the digests that the scorers write."""

    def __init__(self, kafka: KafkaConfig) -> None:
        self._consumer = Consumer(
            client_config(kafka, group_id=f"{kafka.group_id}-soak", enable_auto_commit=False)
        )
        digests = topic_name(kafka, "score-digests")
        _, end = self._consumer.get_watermark_offsets(TopicPartition(digests, 0), ANSWER_SECONDS)
        self._consumer.assign([TopicPartition(digests, 0, end)])

    def take(self) -> dict[str, float | None]:
        """Milliseconds of all predictions since the last call."""
        merged = _SKETCHES.kll_floats_sketch(200)
        while messages := self._consumer.consume(1_000, 0.1):
            for message in messages:
                digest = orjson.loads(message.value() or b"{}")
                if "interaction" in digest.get("kinds", {}) and digest.get("latency_ms"):
                    data = base64.b64decode(digest["latency_ms"])
                    merged.merge(_SKETCHES.kll_floats_sketch.deserialize(data))
        if merged.is_empty():
            return {"p50": None, "p99": None}
        return {"p50": float(merged.get_quantile(0.5)), "p99": float(merged.get_quantile(0.99))}


def shorten_retention(kafka: KafkaConfig) -> None:
    """Let Kafka keep minutes, not days, of all topics that are not compacted."""
    wanted = {
        "retention.ms": RETENTION // timedelta(milliseconds=1),
        "segment.ms": SEGMENT // timedelta(milliseconds=1),
        "segment.bytes": SEGMENT_BYTES,
    }
    resources = [
        ConfigResource(
            ResourceType.TOPIC,
            topic_name(kafka, topic.name),
            incremental_configs=[
                ConfigEntry(name, str(value), incremental_operation=AlterConfigOpType.SET)
                for name, value in wanted.items()
            ],
        )
        for topic in TOPICS
        if topic.cleanup == "delete"
    ]
    admin = reach(kafka)  # held, since futures of a client that is gone never end
    for future in admin.incremental_alter_configs(resources).values():
        future.result(ANSWER_SECONDS)


class Soak:
    """A shop of fixed size under load, and what is seen of it."""

    def __init__(
        self,
        workers: Mapping[str, Worker],
        load: Load,
        latencies: Latencies,
        store: Store,
        folder: Path,
        stop: threading.Event,
    ) -> None:
        self._workers = workers
        self._load = load
        self._latencies = latencies
        self._store = store
        self._folder = folder
        self._stop = stop

    def peak(self) -> float:
        """Events a second that all processes keep up with.

        From the first event of a load that leaves none idle to when the last one is archived:
        scoring alone is faster, and would leave the archiver further and further behind.
        """
        began, first = time.monotonic(), self._load.events
        while not self._stop.is_set() and time.monotonic() < began + PEAK_SECONDS:
            waiting = self._load.events - self.total("predicted")
            self._load.send(int(max(BACKLOG - waiting, 0)))
            self._pause(0.5)
        self.drain()
        return (self._load.events - first) / (time.monotonic() - began)

    def drain(self) -> int:
        """Wait until all that was sent is predicted and archived; how many are not predicted."""
        self._load.finish()
        until = time.monotonic() + DRAIN_SECONDS
        while (left := int(self._load.events - self.total("predicted"))) > 0 or self.total(
            "lag"
        ) > DRAINED_LAG:
            if self._stop.is_set() or time.monotonic() > until:
                break
            self._pause(1)
        return left

    def play(self, rate: float, seconds: float) -> list[dict[str, Any]]:
        """Samples of so many seconds at a steady rate."""
        samples: list[dict[str, Any]] = []
        self._latencies.take()
        began, first = time.monotonic(), (self._load.events, self.total("predicted"))
        until = began + seconds
        with (self._folder / "samples.jsonl").open("wb") as file, self._load.steady(rate) as load:
            while not (self._stop.is_set() or load.done()) and time.monotonic() < until:
                self._pause(began + (len(samples) + 1) * SAMPLE_SECONDS - time.monotonic())
                sample = self._sample(time.monotonic() - began, *first)
                samples.append(sample)
                file.write(orjson.dumps(sample) + b"\n")
                file.flush()
        return samples

    def total(self, what: str) -> float:
        """A sum over all workers."""
        return sum(worker.metrics()[what] for worker in self._workers.values())

    def _sample(self, seconds: float, sent: int, predicted: float) -> dict[str, Any]:
        free = disk_usage(self._folder).free
        if free < LEAST_DISK:
            raise StarcastError(f"{free / 2**30:.1f} GiB of disk are left: make room, start again.")
        metrics = [worker.metrics() for worker in self._workers.values()]
        info: Any = self._store.client.info()
        return {
            "seconds": round(seconds, 1),
            "sent": self._load.events - sent,
            "predicted": int(sum(each["predicted"] for each in metrics) - predicted),
            "lag": int(sum(each["scorer_lag"] for each in metrics)),
            "all_lag": int(sum(each["lag"] for each in metrics)),
            "lost": int(sum(each["lost"] for each in metrics)),
            "latency_ms": self._latencies.take(),
            "processes": {name: each.usage() for name, each in self._workers.items()},
            "store": {"memory": info["used_memory"], "keys": self._store.client.dbsize()},
            "archive": size_of(self._folder / "archive"),
            "disk_free": free,
        }

    def _pause(self, seconds: float) -> None:
        self._stop.wait(max(seconds, 0))


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # the archiver has deleted it meanwhile
            size += path.stat().st_size if path.is_file() else 0
    return size


def run_soak(options: Options, console: Console, stop: threading.Event) -> dict[str, Any]:
    """Start everything, play, and judge."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("servers", "archive"):  # those of a run before are another shop's
        rmtree(folder / name, ignore_errors=True)
    models = Path(default_models(console)).resolve()
    with servers(folder / "servers") as endpoints, ExitStack() as stack:
        kafka = KafkaConfig(
            bootstrap_servers=endpoints.bootstrap_servers,
            group_id="soak",
            partitions=options.partitions,
        )
        redis = RedisConfig(url=SecretStr(endpoints.redis_url))
        apply_topics(kafka)
        shorten_retention(kafka)
        store = Store(redis, LAYOUT_HASH, options.partitions)
        stack.callback(store.close)
        world = make_world(options.users, options.items)
        put_vectors(store, world)
        play(world.records, kafka)
        console.print(f"Starting {len(WORKERS)} processes; their logs are in {folder} …")
        settings = Settings(
            kafka=kafka,
            redis=redis,
            archive=ArchiveConfig(url=str((folder / "archive").resolve())),
            models=ModelsConfig(url=str(models)),
            insights=InsightsConfig(keep_windows=60),  # five minutes, so that keys level off
            # Two cores for all and Kafka: small transactions alone would take both.
            scorer=ScorerConfig(linger_ms=1_000),
        )
        workers = {
            name: stack.enter_context(started(name, processors, settings, folder))
            for name, processors in WORKERS.items()
        }
        load = Load(kafka, make_pool(world, POOL))
        soak = Soak(workers, load, Latencies(kafka), store, folder, stop)
        console.print("Measuring the peak …")
        peak = soak.peak()
        rate = min(peak / 2, options.rate)
        console.print(f"Peak {peak:,.0f} events/s; playing {rate:,.0f} events/s …")
        samples = soak.play(rate, options.minutes * 60)
        if not samples:
            raise StarcastError("Stopped before anything was measured.")
        left = soak.drain()
        dead_letters = int(soak.total("dead_letters"))
    return figures_of(samples, peak, rate, left + load.failed, dead_letters)


def figures_of(
    samples: Sequence[Mapping[str, Any]], peak: float, rate: float, missing: int, dead_letters: int
) -> dict[str, Any]:
    """The verdict and what stands beside it."""
    processes = judge(samples)
    latencies = [each["latency_ms"] for each in samples if each["latency_ms"]["p50"] is not None]
    return {
        "good": all(each.good for each in processes) and not missing and not dead_letters,
        "minutes": round(samples[-1]["seconds"] / 60, 1),
        "peak_events_per_second": round(peak),
        "events_per_second": round(samples[-1]["predicted"] / samples[-1]["seconds"]),
        "wanted_events_per_second": round(rate),
        "events": samples[-1]["predicted"],
        "not_predicted": missing,
        "dead_letters": dead_letters,
        "latency_ms": {
            name: round(float(np.median([each[name] for each in latencies])), 1)
            for name in (("p50", "p99") if latencies else ())
        },
        "most_lag": max(each["lag"] for each in samples),
        "lost_to_retention": samples[-1]["lost"],
        "store_mb": round(samples[-1]["store"]["memory"] / MEGABYTE),
        "store_keys": [samples[0]["store"]["keys"], samples[-1]["store"]["keys"]],
        "archive_mb": round(samples[-1]["archive"] / MEGABYTE),
        "most_of_compactions_mb": round(
            max(each["children"] for sample in samples for each in sample["processes"].values())
            / MEGABYTE
        ),
        "processes": {each.process: each.figures() for each in processes},
    }


def verdict_table(judged: Sequence[Judged]) -> Table:
    """What each process did, as a person reads it."""
    table = Table(
        "process",
        "memory",
        "slope %/h",
        "95% bound",
        "of its own",
        "handles",
        "threads",
        "",
        title="After the warm-up",
        caption="memory: resident, MiB; of its own: bound of the unique set size, %/h",
    )
    for each in judged:
        table.add_row(
            each.process,
            f"{each.resident.mean / MEGABYTE:,.0f}",
            f"{each.resident.slope:+.2f}",
            f"{each.resident.bound:+.2f}",
            f"{each.unique.bound:+.2f}",
            "{:.0f} → {:.0f}".format(*each.handles),
            "{:.0f} → {:.0f}".format(*each.threads),
            each.word if each.good else f"[red]{each.word}[/red]",
        )
    return table


def plot(samples: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Memory, handles, store, lag and latency over time, as SVG and PNG."""
    per_process = [
        {
            "minutes": each["seconds"] / 60,
            "process": name,
            "resident MiB": found["rss"] / MEGABYTE,
            "open files": found["handles"],
        }
        for each in samples
        for name, found in each["processes"].items()
    ]
    whole = [
        {
            "minutes": each["seconds"] / 60,
            "store MiB": each["store"]["memory"] / MEGABYTE,
        }
        for each in samples
    ]
    lag = [
        {"minutes": each["seconds"] / 60, "of": name, "lag": each[key]}
        for each in samples
        for name, key in (("scorers", "lag"), ("all, archiver too", "all_lag"))
    ]
    latency = [
        {"minutes": each["seconds"] / 60, "quantile": name, "latency ms": each["latency_ms"][name]}
        for each in samples
        for name in ("p50", "p99")
    ]
    specification = altair.vconcat(
        _lines(per_process, "resident MiB", "process"),
        _lines(per_process, "open files", "process"),
        _lines(whole, "store MiB"),
        _lines(lag, "lag", "of"),
        _lines(latency, "latency ms", "quantile"),
    ).resolve_scale(color="independent")
    path = folder / "soak.svg"
    specification.save(path)
    specification.save(path.with_suffix(".png"), scale_factor=1.5)
    return path


def _lines(rows: Sequence[Mapping[str, Any]], what: str, by: str | None = None) -> Any:
    chart = altair.Chart(pl.DataFrame(rows)).mark_line()
    chart = chart.encode(x="minutes:Q", y=altair.Y(f"{what}:Q"))
    if by is not None:
        chart = chart.encode(color=altair.Color(f"{by}:N"))
    return chart.properties(width=640, height=150)


def read_options(arguments: Sequence[str] | None) -> Options:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="of steady load")
    parser.add_argument("--rate", type=float, default=np.inf, help="at most, events/s")
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=5_000)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(".cache/soak"), help="for all output")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    options = read_options(arguments)
    configure(LogConfig(level="warning"))
    console = Console(stderr=options.json)
    with stopping() as stop:
        figures = run_soak(options, console, stop.event)
    samples = [
        orjson.loads(line) for line in (options.folder / "samples.jsonl").read_bytes().splitlines()
    ]
    settings = {"users": options.users, "items": options.items, "partitions": options.partitions}
    written = write("soak", figures | {"settings": settings}, *PACKAGES)
    (options.folder / "verdict.json").write_bytes(written.read_bytes())
    path = plot(samples, options.folder)
    if options.json:
        print(written.read_text())
    console.print(verdict_table(judge(samples)))
    console.print(
        f"{figures['events']:,} events at {figures['events_per_second']:,}/s, "
        f"{figures['not_predicted']} not predicted, {figures['dead_letters']} dead letters; "
        f"latency {figures['latency_ms']} ms; plot in {path}, samples beside it; "
        f"verdict in {written}"
    )
    return 0 if figures["good"] else 1


if __name__ == "__main__":
    sys.exit(exit_code(main))
