"""Processes of `starcast run` under a benchmark, and what they say of themselves."""

import sys
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from streams.embedded import HOST, Child, free_port, start_child

START_SECONDS = 240.0  # two cores that start four processes with torch, and claim
STOP_SECONDS = 15.0  # a worker that does not end is killed, and its partitions wait for its session
ANSWER_SECONDS = 10.0  # a worker that hangs must not hang the benchmark
COUNTED = {  # metrics of interest
    "starcast_predictions_total": "predicted",
    "starcast_lag": "lag",
    "starcast_dead_letters_total": "dead_letters",
    "starcast_lost_records_total": "lost",
}


@dataclass(frozen=True)
class Worker:
    """A process of `starcast run`."""

    child: Child
    port: int
    process: psutil.Process

    def metrics(self) -> dict[str, float]:
        """Events predicted and records waiting, as it says itself."""
        found = dict.fromkeys((*COUNTED.values(), "scorer_lag"), 0.0)
        for sample in samples_of(self.port):
            if sample.labels.get("kind", "interaction") != "interaction":
                continue
            if what := COUNTED.get(sample.name):
                found[what] += sample.value
                if what == "lag" and sample.labels["processor"] == "scorer":
                    found["scorer_lag"] += sample.value
        return found

    def usage(self) -> dict[str, int]:
        """Memory in bytes, its children's too; open file handles, threads."""
        children = 0
        for child in self.process.children():
            with suppress(psutil.NoSuchProcess):  # a compaction that has just ended
                children += child.memory_info().rss
        with self.process.oneshot():
            memory = self.process.memory_full_info()
            return {
                "rss": memory.rss,
                "uss": memory.uss,
                "children": children,
                "handles": self.process.num_fds(),
                "threads": self.process.num_threads(),
            }


@contextmanager
def start_worker(
    name: str, processors: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Generator[Worker]:
    """A process that runs these processors, ready; its log goes to the folder."""
    port = free_port()
    with start_child(
        name,
        [sys.executable, "-m", "starcast", "run", *processors],
        f"{HOST}:{port}",
        folder,
        lambda: is_ready(port),
        timeout=START_SECONDS,
        stop_timeout=STOP_SECONDS,
        environment={**environment, "STARCAST_WEB__METRICS_PORT": str(port)},
    ) as child:
        yield Worker(child, port, psutil.Process(child.process.pid))


def is_ready(port: int) -> bool:
    """Whether a worker has all its partitions."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/ready", timeout=ANSWER_SECONDS) as found:
            return found.status == 200
    except OSError:
        return False


def samples_of(port: int) -> Iterator[Sample]:
    """All samples of a worker's metrics as they are now."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics") as answer:
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        yield from family.samples
