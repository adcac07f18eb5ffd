"""A processor with its transactions and times noted."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from confluent_kafka import Message
from numpy.typing import NDArray

from bench.clients import Record
from streams.metrics import Metrics
from streams.processor import Outcome, Output, OutputBatch, Position, Processor
from streams.sender import BY_KEY

# Phases that scorer and loop time themselves. "commit" is the wait for a transaction's end, which
# goes on while the next batch is processed, and "write" a part of that end, in its own thread.
INNER = ("decode", "read", "features", "predict", "encode")
OUTER = ("process", "produce", "commit", "write")
PHASES = ("consume", *INNER, "produce", "commit", "write", "other")


@dataclass(frozen=True)
class Packed:
    """Records of one topic in two pieces: kept apart, a million would crowd the loop's memory."""

    keys: bytes  # one after the other
    values: bytes
    lengths: NDArray[np.uint32]  # (2, n): of keys, of values
    partitions: NDArray[np.int32]  # (n); BY_KEY: that which the key says

    def __len__(self) -> int:
        return len(self.partitions)

    def records(self) -> list[Record]:
        """As they were packed."""
        ends = np.cumsum(self.lengths, axis=1)
        begins = ends - self.lengths
        spans = zip(*begins.tolist(), *ends.tolist(), self.partitions.tolist(), strict=True)
        return [
            {"key": self.keys[key:until], "value": self.values[value:end], "partition": partition}
            for key, value, until, end, partition in spans
        ]


def packed(records: Sequence[Record]) -> Packed:
    """Records, as `produce_batch` takes them, in two pieces."""
    keys = [record["key"] for record in records]
    values = [record["value"] for record in records]
    lengths = [list(map(len, keys)), list(map(len, values))]
    partitions = [record.get("partition", BY_KEY) for record in records]
    return Packed(
        b"".join(keys),
        b"".join(values),
        np.array(lengths, np.uint32),
        np.array(partitions, np.int32),
    )


@dataclass(frozen=True)
class Transaction:
    """What one transaction read and wrote."""

    events: int
    outputs: dict[str, list[Packed]]  # by topic, as they were made

    @property
    def bytes_out(self) -> int:
        """Keys and values written, before compression."""
        return sum(
            len(each.keys) + len(each.values)
            for several in self.outputs.values()
            for each in several
        )

    def records(self, topic: str) -> list[Record]:
        """What it wrote to a topic."""
        return [record for each in self.outputs.get(topic, ()) for record in each.records()]


@dataclass(frozen=True)
class Run:
    """One measured run. The first transaction is left out: it waits for its input and warms up."""

    events: int
    seconds: float
    cpu_seconds: float  # of this process, all threads, unless the watch was told otherwise
    phases: Mapping[str, float]  # seconds

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds


class Stopwatch:
    """Seconds of clock and processor by phase, from `start` on."""

    def __init__(self, spent: Callable[[], float] = time.process_time) -> None:
        """`spent` tells the processor seconds so far."""
        self._spent = spent
        self.start()

    def start(self) -> None:
        """Begin at zero."""
        self.phases = Counter[str]()
        self._began = self._marked = time.perf_counter()
        self._cpu_began = self._spent()

    def mark(self, phase: str) -> None:
        """Book the time since the last mark to a phase."""
        now = time.perf_counter()
        self.phases[phase] += now - self._marked  # pyright: ignore[reportArgumentType]
        self._marked = now

    def run(self, events: int) -> Run:
        """What has passed until the last mark."""
        return Run(
            events,
            self._marked - self._began,
            self._spent() - self._cpu_began,
            dict(self.phases),
        )


class Watched:
    """A processor whose batches are timed and kept; sets `stop` once it has seen `events`."""

    def __init__(
        self, inner: Processor, metrics: Metrics, events: int, stop: threading.Event
    ) -> None:
        self.name, self.topics, self.together = inner.name, inner.topics, inner.together
        self.transactional = inner.transactional
        self.linger_seconds = inner.linger_seconds
        self.claim, self.drop, self.close = inner.claim, inner.drop, inner.close
        self.lag = 0
        self._inner = inner
        self._metrics = metrics
        self.left = events  # that it has still to see
        self._stop = stop
        self._watch = Stopwatch()
        self._before: dict[str, float] = {}  # seconds by phase when the watch was started
        self._first = 0  # transaction that was not processed by then
        self._late = 0.0  # seconds of making late outputs, a part of processing
        self._transactions: list[Transaction] = []

    @property
    def batch_size(self) -> int:
        """As the processor has it at the moment."""
        return self._inner.batch_size

    def process(self, messages: list[Message]) -> Outcome:
        """One batch."""
        return self._noted(self._inner.process(messages), len(messages))

    def idle(self) -> Outcome | None:
        """Timed work."""
        self._inner.lag = self.lag
        outcome = self._inner.idle()
        return outcome and self._noted(outcome, 0)

    def run(self) -> Run:
        """What was measured; the first batch is not, nor one processed while it was committed."""
        run = self._watch.run(sum(each.events for each in self._transactions[self._first :]))
        spent = {name: now - self._before[name] for name, now in self._seconds().items()}
        spent["process"] += self._late
        inner = sum(spent[name] for name in INNER)
        between = run.seconds - spent["process"] - spent["produce"] - spent["commit"]
        spent |= {"consume": between, "other": spent.pop("process") - inner}
        return replace(run, phases=spent)

    def transactions(self) -> list[Transaction]:
        """All transactions, the first one too."""
        return self._transactions

    def _noted(self, outcome: Outcome, events: int) -> Outcome:
        inner, late = outcome.finish, outcome.late
        transaction = Transaction(events, _by_topic(outcome.batches, outcome.outputs))
        self._transactions.append(transaction)
        self.left -= events

        def made() -> list[Output]:
            began = time.perf_counter()
            outputs = late() if late else []
            self._late += time.perf_counter() - began
            for topic, several in _by_topic([], outputs).items():
                transaction.outputs.setdefault(topic, []).extend(several)
            return outputs

        def finish(delivered: dict[Position, int]) -> None:
            if inner:
                inner(delivered)
            self._watch.mark("")
            if not self._before:
                self._watch.start()
                self._before, self._first = self._seconds(), len(self._transactions)
                self._late = 0.0
            if self.left <= 0:
                self._stop.set()

        return replace(outcome, finish=finish, late=made)

    def _seconds(self) -> dict[str, float]:
        return seconds_of(self._metrics, self.name, (*INNER, *OUTER))


def seconds_of(metrics: Metrics, processor: str, phases: Iterable[str]) -> dict[str, float]:
    """What a processor has spent in phases so far."""
    found = metrics.registry.get_sample_value
    labels = {phase: {"processor": processor, "phase": phase} for phase in phases}
    return {
        phase: found("starcast_batch_seconds_sum", each) or 0.0 for phase, each in labels.items()
    }


def _by_topic(batches: Sequence[OutputBatch], outputs: Sequence[Output]) -> dict[str, list[Packed]]:
    single = defaultdict[str, list[Record]](list)
    for output in outputs:
        record = {"key": output.key, "value": output.value, "partition": output.partition}
        single[output.topic].append(record)
    topics = defaultdict[str, list[Packed]](list)
    for topic, records in (*((each.topic, each.messages) for each in batches), *single.items()):
        topics[topic].append(packed(records))
    return topics
