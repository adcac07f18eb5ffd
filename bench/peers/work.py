"""What peers of the scoring loop do with events, one at a time or a batch at once.

Decode, read states from Redis, compute features, predict, write user states back, encode prediction
records: by the same functions of `model` and `schemas` as the scorer (but for Kafka Streams, whose
Java program has its own). How events come and how predictions and offsets go is the peer's own
affair, and so is how many it hands over at once.

The pace is taken at the beginnings of calls: a peer that asks for the next events has done whatever
it does with those before. The events until the first mark are left out (start-up, compilation), and
so is the end, where a peer waits for input that does not come.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import orjson
import psutil
import torch
from pydantic import SecretStr

from model import bundle, registry
from model.canary import predict
from model.events import EVENT, Rows, behavior_rows, blank, joined, opaque, review_rows
from model.lookups import Lookups
from model.predict import Predictor, predictor
from model.replay import BatchResult, Observation, Share, run_batch
from model.state import LAYOUT_HASH, PARTITION, USER
from model.state_bytes import from_bytes, to_bytes
from schemas.codec import encode_columns, format_times
from schemas.columns import Columns, decode_columns
from schemas.records import Behavior, Record, Review
from starcast.log import LogConfig, configure
from streams.config import RedisConfig
from streams.memory import settle
from streams.predictions import prediction_columns
from streams.reader import USER_STATE, Reader, partition_keys
from streams.store import Store
from streams.user_states import decode_header

INPUTS: dict[str, tuple[type[Record], Callable[[Columns], Rows]]] = {
    "reviews": (Review, review_rows),
    "behavior": (Behavior, behavior_rows),
}
OUTPUT = "predicted-ratings"
WAIT_SECONDS = 60.0  # a broker that answers nothing any more ends the run
# Prefetched input, as the scorer has it: a peer that starts must not be measured while it fills.
HOLDING = {"queued.max.messages.kbytes": 8_192, "fetch.queue.backoff.ms": 20}

Ids = dict[str, list[str]]
"""By field, of each event."""


@dataclass(frozen=True)
class Settings:
    """Where a peer works, and on how much."""

    bootstrap: str
    redis: str
    models: str
    events: int  # that it will find
    batch: int  # most events in a transaction or a batch
    partitions: int
    prefix: str  # of the peer's own topics

    @property
    def inputs(self) -> list[str]:
        """The topics to read, with the prefix."""
        return [self.prefix + topic for topic in INPUTS]

    @property
    def output(self) -> str:
        """The topic of predictions, with the prefix."""
        return self.prefix + OUTPUT


@dataclass(frozen=True, slots=True)
class Arrival:
    """One event as Kafka gave it."""

    topic: str  # with the prefix
    partition: int
    offset: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """One prediction record, for the partition whose events it answers."""

    key: bytes
    value: bytes
    partition: int


@dataclass(frozen=True)
class Mark:
    """How far a peer was."""

    events: int
    seconds: float
    cpu_seconds: float  # of the processes, all threads


class Processes:
    """The processes that a peer works in: one, and those that it had started by now."""

    def __init__(self, root: int | None = None) -> None:
        first = psutil.Process(root)
        self._all = [first, *first.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Processor time of all threads."""
        return sum(sum(each.cpu_times()[:2]) for each in self._all)

    def memory_mb(self) -> int:
        """Resident memory."""
        return round(sum(each.memory_info().rss for each in self._all) / 2**20)


class Pace:
    """Marks, each at the first beginning of a call at least `every` events after the last."""

    def __init__(self, every: int, cpu_seconds: Callable[[], float] = time.process_time) -> None:
        self.events = 0
        self.calls = 0
        self.marks: list[Mark] = []
        self._every = every
        self._cpu_seconds = cpu_seconds

    def begin(self, events: int) -> None:
        """A call with so many events begins."""
        if not self.marks or self.events - self.marks[-1].events >= self._every:
            self.marks.append(Mark(self.events, time.perf_counter(), self._cpu_seconds()))
        self.events += events
        self.calls += 1


def steady(marks: Sequence[Mark]) -> Mark:
    """Events, seconds and processor seconds between the second mark and the last."""
    first, last = marks[1], marks[-1]
    return Mark(
        last.events - first.events,
        last.seconds - first.seconds,
        last.cpu_seconds - first.cpu_seconds,
    )


def figures_of(
    marks: Sequence[Mark], events_per_call: float, memory_mb: float, versions: Mapping[str, str]
) -> dict[str, Any]:
    """What a peer tells of itself."""
    measured = steady(marks)
    return {
        "events": measured.events,
        "events_per_second": round(measured.events / measured.seconds, 1),
        "cpu_us_per_event": round(measured.cpu_seconds / measured.events * 1e6, 1),
        "events_per_call": round(events_per_call, 1),
        "memory_mb": round(memory_mb),
        "versions": versions,
    }


class Work:
    """The work on events, with the model and the store that it needs."""

    def __init__(self, settings: Settings, processes: Processes | None = None) -> None:
        self._processes = processes or Processes()
        torch.set_num_threads(1)  # as the scorer has it
        stable = registry.read(settings.models).stable
        loaded = bundle.load(settings.models, stable.version, stable.sha256) if stable else None
        self._predictor: Predictor = predictor(loaded)
        self._store = Store(
            RedisConfig(url=SecretStr(settings.redis)), LAYOUT_HASH, settings.partitions
        )
        self._reader = Reader(self._store)
        self._reader.use_encoder(self._predictor.encoder_hash or "")
        self._prefix = settings.prefix
        self._events = settings.events
        self._partition_keys = [
            self._store.plain_key(f"{settings.prefix}partition:{partition}")
            for partition in range(settings.partitions)
        ]
        self._begin_partitions()
        self.pace = Pace(settings.batch, self._processes.cpu_seconds)

    @property
    def done(self) -> bool:
        """Whether all events have come."""
        return self.pace.events >= self._events

    def figures(self, packages: Sequence[str]) -> dict[str, Any]:
        """What was measured until now, and the versions of the peer's packages."""
        return figures_of(
            self.pace.marks,
            self.pace.events / self.pace.calls,
            self._processes.memory_mb(),
            {package: version(package) for package in packages},
        )

    def score(self, arrivals: Sequence[Arrival]) -> list[Prediction]:
        """Predictions for events, in some order that keeps each partition's own."""
        self.pace.begin(len(arrivals))
        arrivals = sorted(arrivals, key=lambda arrival: arrival.partition)
        ids, events = self._decode(arrivals)
        shares, partitions, users = self._read(arrivals, events)
        lookups = self._reader.lookups(events, joined([share.states for share in shares]))
        results, observation = run_batch(shares, lookups)
        self._write(partitions, users, results)
        return self._encode(arrivals, ids, events, observation, lookups, results)

    def _begin_partitions(self) -> None:
        """Go on where the scorer stopped: the running means and counters of its partitions."""
        headers = [
            decode_header(self._store.header(USER_STATE, partition))
            for partition in range(self._store.partitions)
        ]
        self._store.put(self._partition_keys, [each["partition"].tobytes() for each in headers])

    def _decode(self, arrivals: Sequence[Arrival]) -> tuple[Ids, Rows]:
        ids: Ids = {name: [""] * len(arrivals) for name in ("event_id", "user_id", "item_id")}
        events = blank(EVENT, len(arrivals))
        for topic, (record, rows_of) in INPUTS.items():
            name = self._prefix + topic
            rows = [at for at, arrival in enumerate(arrivals) if arrival.topic == name]
            columns = decode_columns(record, [arrivals[at].value for at in rows])
            assert columns is not None  # of events that the benchmark made
            opaque(events)[rows] = opaque(rows_of(columns))
            for field, found in ids.items():
                for at, one in zip(rows, columns[field], strict=True):
                    found[at] = one
        return ids, events

    def _read(
        self, arrivals: Sequence[Arrival], events: Rows
    ) -> tuple[list[Share], list[int], list[bytes]]:
        """The shares of the partitions, their numbers, and the keys of all their users."""
        of = np.array([arrival.partition for arrival in arrivals])
        partitions, starts = np.unique(of, return_index=True)
        spans = [
            slice(begin, end)
            for begin, end in zip(starts, [*starts[1:], len(arrivals)], strict=True)
        ]
        distinct = [np.unique(events["user"][span], return_inverse=True) for span in spans]
        numbers = partitions.tolist()
        keys = [
            partition_keys(self._store, USER_STATE, partition, users)
            for partition, (users, _) in zip(numbers, distinct, strict=True)
        ]
        all_keys = [key for mine in keys for key in mine]
        values = self._store.read(
            [*(self._partition_keys[partition] for partition in numbers), *all_keys]
        )
        headers = np.frombuffer(b"".join(each or b"" for each in values[: len(numbers)]), PARTITION)
        states = from_bytes(values[len(numbers) :], USER)
        ends = np.cumsum([len(mine) for mine in keys])
        shares = [
            Share(states[end - len(mine) : end], index, headers[at].copy(), events[span])
            for at, (end, mine, (_, index), span) in enumerate(
                zip(ends, keys, distinct, spans, strict=True)
            )
        ]
        return shares, numbers, all_keys

    def _write(
        self, partitions: Sequence[int], users: Sequence[bytes], results: Sequence[BatchResult]
    ) -> None:
        keys = [*users, *(self._partition_keys[partition] for partition in partitions)]
        states = to_bytes(joined([result.states for result in results]))
        self._store.put(keys, [*states, *(result.partition.tobytes() for result in results)])

    def _encode(
        self,
        arrivals: Sequence[Arrival],
        ids: Ids,
        events: Rows,
        observation: Observation,
        lookups: Lookups,
        results: Sequence[BatchResult],
    ) -> list[Prediction]:
        predictions = predict(self._predictor, None, events, observation, lookups)
        now = np.array([int(time.time() * 1_000)])
        values = encode_columns(
            {
                **ids,
                "event_time": format_times(events["time"]),
                "predicted_at": format_times(now)[0],
                "kind": "interaction",
                **prediction_columns(predictions),
                "source": {
                    "topic": [arrival.topic.removeprefix(self._prefix) for arrival in arrivals],
                    "partition": [arrival.partition for arrival in arrivals],
                    "offset": [arrival.offset for arrival in arrivals],
                },
                "seq": np.concatenate([result.seq for result in results]),
            }
        )
        return [
            Prediction(user.encode(), value, arrival.partition)
            for user, value, arrival in zip(ids["user_id"], values, arrivals, strict=True)
        ]


def serve(
    name: str,
    packages: Sequence[str],
    run: Callable[[Settings, Work], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a peer over the events that wait in its topics; its figures as JSON, last on stdout."""
    settings = read_settings(name, arguments)
    work = Work(settings)
    settle()  # as the scorer does
    run(settings, work)
    show(work.figures(packages))
    return 0


def read_settings(name: str, arguments: Sequence[str] | None = None) -> Settings:
    """A peer's settings from its command line; its log is set up too."""
    parser = argparse.ArgumentParser(prog=f"bench.peers.{name}")
    parser.add_argument("--bootstrap", required=True, help="host:port of Kafka")
    parser.add_argument("--redis", required=True, help="URL of Redis or Valkey")
    parser.add_argument("--models", required=True, help="URL of the registry of models")
    parser.add_argument("--events", type=int, required=True, help="events that wait; three batches")
    parser.add_argument("--batch", type=int, default=2_000, help="most events at once")
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--prefix", default=f"{name}.", help="of the peer's own topics")
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.events < 3 * settings.batch:
        parser.error("the first batch is left out, and the last: three are needed at least")
    configure(LogConfig(level="warning"))
    return settings


def show(figures: Mapping[str, Any]) -> None:
    """Print figures where `bench.peers.launch` looks for them."""
    sys.stdout.buffer.write(orjson.dumps(figures) + b"\n")
    sys.stdout.flush()
