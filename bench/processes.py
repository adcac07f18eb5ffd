"""Processes of `starcast run` under a benchmark, and what they say of themselves."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from schemas.exceptions import StarcastError
from starcast.settings import Settings
from starcast.workers import read_metrics, start_worker
from streams.embedded import Child

START_SECONDS = 240.0  # two cores that start four processes with torch, and claim
STOP_SECONDS = 15.0  # a worker that does not end is killed, and its partitions wait for its session
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
    process: psutil.Process

    def check(self) -> None:
        """Raises StarcastError, with the end of its log, when the process has ended."""
        if not self.child.alive():
            code = self.child.process.poll()
            raise StarcastError(
                f"{self.child.name} has ended (exit code {code}). {self.child.last_words()}"
            )

    def samples(self, *names: str) -> Iterator[Sample]:
        """Its metrics, or those of these names. Raises StarcastError when it has ended."""
        try:
            found = read_metrics(self.child.address, *names)
        except OSError:
            self.check()
            raise
        for family in text_string_to_metric_families(found):
            yield from family.samples

    def metrics(self, *names: str) -> dict[str, float]:
        """Events predicted and records waiting, as it says itself; of these metrics, or all."""
        found = dict.fromkeys((*COUNTED.values(), "scorer_lag"), 0.0)
        for sample in self.samples(*names):
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
def started(
    name: str, processors: Sequence[str], settings: Settings, folder: Path
) -> Generator[Worker]:
    """A process that runs these processors, ready; its log goes to the folder."""
    with start_worker(
        name, processors, settings, folder, start_seconds=START_SECONDS, stop_seconds=STOP_SECONDS
    ) as child:
        yield Worker(child, psutil.Process(child.process.pid))
