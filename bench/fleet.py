"""Workers (`starcast run scorer`) on one input, exactly-once, on real servers: what an event costs.

Events are sent in one transaction, which is committed when all are there: so every worker begins at
the same moment behind a backlog, and sending takes no processor from scoring. Processor time is
that of the worker processes, of Kafka and of the store from then until the last event is predicted.
"""

import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from confluent_kafka import Producer

from bench.clients import hand_over, shop_producer
from bench.processes import START_SECONDS, Worker, started
from schemas.exceptions import StarcastError
from starcast.settings import Settings
from starcast.workers import is_ready
from streams.clients import topic_name
from streams.config import KafkaConfig, ModelsConfig, RedisConfig, StatesConfig
from streams.embedded import Child
from streams.producer import Outgoing

SEND_SECONDS = 50.0  # a transaction that is open for longer is ended by the broker
SCORE_SECONDS = 120.0  # workers that score nothing any more end the benchmark
READY_SECONDS = 3.0  # ready for so long, no rebalance is on its way
LOOK_SECONDS = 0.1
PREDICTED = "starcast_predictions_total"
MICROSECONDS = 1e6  # in a second


@dataclass(frozen=True)
class Servers:
    """The broker and the store, with the broker's folder."""

    kafka: Child
    store: Child
    folder: Path


@dataclass(frozen=True)
class Played:
    """A backlog that a fleet has scored."""

    workers: int
    events: int
    seconds: float
    worker: float  # processor seconds, of all workers
    kafka: float
    store: float
    log_bytes: int  # that Kafka's topics grew by, compressed, one replica; inputs too
    memory: int  # bytes, resident, of the largest worker

    def figures(self) -> dict[str, float]:
        """As JSON has it."""
        return {
            "events_per_second": round(self.events / self.seconds),
            "worker_us": round(self.worker / self.events * MICROSECONDS, 1),
            "kafka_us": round(self.kafka / self.events * MICROSECONDS, 1),
            "store_us": round(self.store / self.events * MICROSECONDS, 1),
            "kafka_bytes_per_event": round(self.log_bytes / self.events),
            "worker_mb": round(self.memory / 2**20),
        }


class Fleet:
    """Running workers."""

    def __init__(self, servers: Servers, kafka: KafkaConfig, workers: Mapping[str, Worker]) -> None:
        self._servers = servers
        self._kafka = kafka
        self._workers = workers

    def play(self, events: Iterable[Outgoing]) -> Played:
        """Score a backlog."""
        log = log_bytes(self._servers.folder)
        before = self._predicted()
        producer, count = send(self._kafka, events)
        spent = self._processor()
        began = time.perf_counter()
        producer.commit_transaction(SEND_SECONDS)
        while self._predicted() - before < count:
            if time.perf_counter() - began > SCORE_SECONDS:
                left = count - (self._predicted() - before)
                said = [each.child.last_words() for each in self._workers.values()]
                told = f"{left:.0f} of {count} events were not scored in {SCORE_SECONDS:.0f} s."
                raise StarcastError("\n".join([told, *said]))
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - began
        worker, kafka, store = (
            now - then for now, then in zip(self._processor(), spent, strict=True)
        )
        return Played(
            len(self._workers),
            count,
            seconds,
            worker,
            kafka,
            store,
            log_bytes(self._servers.folder) - log,
            max(each.process.memory_info().rss for each in self._workers.values()),
        )

    def _predicted(self) -> float:
        # All metrics of 256 partitions, ten times a second, would be a third of a worker's Python.
        return sum(worker.metrics(PREDICTED)["predicted"] for worker in self._workers.values())

    def _processor(self) -> tuple[float, float, float]:
        """Processor seconds of workers, Kafka and store so far."""
        return (
            sum(processor(each.child) for each in self._workers.values()),
            processor(self._servers.kafka),
            processor(self._servers.store),
        )


@contextmanager
def start_fleet(
    servers: Servers, kafka: KafkaConfig, redis: RedisConfig, models: str, workers: int
) -> Generator[Fleet]:
    """So many workers, with all partitions claimed."""
    settings = Settings(
        kafka=kafka,
        redis=redis,
        models=ModelsConfig(url=str(Path(models).resolve())),
        # Else a few users would all be at hand, and an event would cost less than at any real size.
        states=StatesConfig(cache_users=0),
    )
    with ExitStack() as stack:
        ready = {
            name: stack.enter_context(started(name, ["scorer"], settings, servers.folder))
            for name in (f"scorer-{number}" for number in range(workers))
        }
        _settle(ready)
        yield Fleet(servers, kafka, ready)


def send(kafka: KafkaConfig, events: Iterable[Outgoing]) -> tuple[Producer, int]:
    """Send events in a transaction that the caller commits; how many there are."""
    producer = shop_producer(kafka, transactional_id="bench-scale")
    producer.init_transactions(SEND_SECONDS)
    producer.begin_transaction()
    count = 0
    for event in events:
        hand_over(producer, topic_name(kafka, event.topic), event.value, event.key)
        count += 1
    if producer.flush(SEND_SECONDS):
        raise StarcastError(f"Kafka did not take all events in {SEND_SECONDS:.0f} s.")
    return producer, count


def log_bytes(folder: Path) -> int:
    """Bytes of all segments of a broker's topics, its own topics' too."""
    return sum(path.stat().st_size for path in folder.rglob("*.log") if path.parent != folder)


def _settle(workers: Mapping[str, Worker]) -> None:
    """Wait until the group stands still: a worker that joins takes partitions from the others."""
    until = time.monotonic() + START_SECONDS
    since = time.monotonic()
    while time.monotonic() - since < READY_SECONDS:
        if time.monotonic() > until:
            raise StarcastError(f"The workers were not ready within {START_SECONDS:.0f} s.")
        if not all(is_ready(worker.child.address) for worker in workers.values()):
            since = time.monotonic()
        time.sleep(LOOK_SECONDS)


def processor(child: Child) -> float:
    """Processor seconds of a process so far."""
    used: Any = psutil.Process(child.process.pid).cpu_times()
    return used.user + used.system
