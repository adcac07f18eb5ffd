"""Two shops on servers that fail, their workers under a supervisor, and events on their way.

Shops whose names begin with a have classic groups and a store behind sentinels, others KIP-848
groups and a store cluster.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from model.state import LAYOUT_HASH
from schemas.records import Item, Record, User
from starcast.settings import Settings
from streams.admin import apply_topics
from streams.config import KafkaConfig
from streams.producer import outgoing, play
from streams.store import Store
from tests.faults.numbered import ITEMS, Numbered, stamp
from tests.faults.producer import PersistentProducer
from tests.faults.servers import Servers
from tests.faults.stores import Stores
from tests.faults.worker import Order, work

PARTITIONS = 6
SCORING = ("scorer", "items", "catalog", "answers")
CACHED_USERS = 50  # so few that states are read from the store again and again
OVERRUN_SECONDS = 10.0  # max.poll.interval: a worker that is silent for longer loses its partitions
REACH_SECONDS = 8.0  # a worker without partitions never reaches a point; another is tried
SLOW_SECONDS = 8.0  # a worker that takes so long to end writes to its log where it is
FEW_A_SECOND = 20.0  # events until all flows: what is sent before a slow start meets no fault
END_SECONDS = 45.0  # a worker that does not end on SIGTERM is stuck
TOLD = 2_000  # characters of an error; of a traceback the last

_processes = get_context("forkserver")  # forked from one that has all modules loaded


class NotReached(Exception):
    """A worker did not come to the point where it was to fail: the fault did not happen."""


@dataclass
class Worker:
    """A process that is started again when it ends, as a supervisor would."""

    name: str
    processors: tuple[str, ...]
    settings: Settings
    log: Path
    switched_off: tuple[str, ...] = ()
    wanted: bool = True
    not_before: float = 0.0  # monotonic; it is not started again before
    killed: bool = False  # its end was ours
    process: Any = None
    control: Any = None
    exits: Counter[str] = field(default_factory=Counter[str])
    lock: Any = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def start(self) -> None:
        """Start the process."""
        self.killed = False
        self.control, theirs = _processes.Pipe()
        self.process = _processes.Process(
            target=work,
            args=(
                self.processors,
                self.settings,
                self.settings.redis.url.get_secret_value(),
                str(self.log),
                theirs,
                self.switched_off,
            ),
            name=self.name,
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def tend(self) -> None:
        """Note an end, and start it again when it is time."""
        with self.lock:
            if self.process is not None and not self.process.is_alive():
                code = self.process.exitcode
                self.process.join()
                self.process = None
                self.exits["killed" if self.killed else self._why(code)] += 1
            if self.process is None and self.wanted and time.monotonic() >= self.not_before:
                self.start()

    def kill(self, down: float = 0.0) -> None:
        """As kill -9 does; it stays down for so long."""
        self.expect_end(down)
        if self.process is not None:
            self.process.kill()

    def expect_end(self, down: float = 0.0) -> None:
        """Its next end is ours."""
        self.killed = True
        self.not_before = time.monotonic() + down

    def stop(self) -> float:
        """End it by SIGTERM for good; the seconds it took. Raises TimeoutError when it is stuck."""
        with self.lock:
            self.wanted = False
            if self.process is None or not self.process.is_alive():
                return 0.0
            started = time.monotonic()
            self.process.terminate()
            self.process.join(SLOW_SECONDS)
            self.tell_where()
            self.process.join(END_SECONDS - SLOW_SECONDS)
            if self.process.is_alive():
                self.process.kill()
                raise TimeoutError(f"{self.name} did not end within {END_SECONDS:.0f} s of SIGTERM")
            self.exits["clean" if self.process.exitcode == 0 else self._why()] += 1
            self.process = None
            return time.monotonic() - started

    def tell_where(self) -> None:
        """Have it write the stacks of its threads to its log."""
        if self.alive():
            os.kill(self.pid, signal.SIGUSR1)

    def restart(self) -> None:
        """End it by SIGTERM and start it again at once."""
        self.stop()
        self.wanted = True
        self.tend()

    def order(self, order: Order, wait: float = REACH_SECONDS) -> None:
        """Have it do something at a point, and wait until it is there. Raises NotReached."""
        try:
            while self.control.poll():
                self.control.recv()
            self.control.send(order)
            if order.action.startswith("kill"):
                self.killed = True
            if self.control.poll(wait) and self.control.recv() == order:
                return
            self.control.send(None)  # forget it
        except (EOFError, OSError, AttributeError):
            pass
        self.killed = False
        raise NotReached(f"{self.name} did not reach {order.processor} {order.point}")

    def set_clock(self, ahead: float) -> None:
        """What it takes for the time of day, seconds ahead of the true one."""
        try:
            self.control.send(ahead)
        except (OSError, AttributeError) as error:
            raise NotReached(f"{self.name} was gone") from error

    def _why(self, code: int | None = None) -> str:
        """What it said before it ended; nothing but its exit code where a signal ended it."""
        code = self.process.exitcode if code is None and self.process else code
        return self._told()[-TOLD:] or f"exit code {code}"

    def _told(self) -> str:
        """The error that it sent, with a traceback where it was none of ours."""
        try:
            while self.control.poll():
                if isinstance(told := self.control.recv(), str):
                    return told
        except (EOFError, OSError):
            pass
        return ""


@dataclass(frozen=True)
class Span:
    """Where topics ended before and after a forgetting, by topic and partition."""

    before: Mapping[tuple[str, int], int]
    after: Mapping[tuple[str, int], int]


@dataclass
class FaultyShop:
    """A shop, its workers and its events."""

    name: str
    settings: Settings  # as the harness reaches it: brokers round the proxy
    stores: Stores
    events: Numbered
    workers: list[Worker]
    archiver: Worker
    played: Counter[str] = field(default_factory=Counter[str])
    # Users who were to be forgotten, and when they last were; none while something is left of them.
    forgotten: dict[str, Span | None] = field(default_factory=dict[str, Span | None])

    @property
    def kafka(self) -> KafkaConfig:
        return self.settings.kafka

    @property
    def store(self) -> Store:
        return Store(self.settings.redis, LAYOUT_HASH, PARTITIONS)

    @property
    def all_workers(self) -> list[Worker]:
        return [*self.workers, self.archiver]

    @property
    def all_sent(self) -> bool:
        """Whether all events and requests were sent."""
        return self.played["sent"] >= self.events.records() + self.events.requests()

    def live(self) -> list[Worker]:
        """Workers that score and are up."""
        return [each for each in self.workers if each.wanted and each.alive()]

    def play(self, rate: float, flowing: threading.Event, hurry: threading.Event) -> None:
        """Send few events until all flows, then the others at a steady rate.

        Told to hurry, it sends the rest as fast as can be. Each is acknowledged by all brokers in
        sync.
        """
        producer = PersistentProducer(self.kafka, self.played)
        due = time.monotonic()
        for topic, key, value in self.events.messages():
            if producer.sent % 20 == 0:
                while (wait := due - time.monotonic()) > 0 and not hurry.is_set():
                    producer.turn(min(wait, 0.1))
                producer.turn(0)
                due += 20 / (rate if flowing.is_set() else min(rate, FEW_A_SECOND))
            producer.send(self.kafka.topic_prefix + topic, key, value)
        self.played["sent"], self.played["failed"] = producer.sent, producer.finish()

    def describe_items(self) -> None:
        """Records of all items: attributes that features are made of."""
        records = [
            (
                "items",
                Item.model_validate_json(
                    b'{"item_id":"i%d","event_time":"%b","title":"Item %d","brand":"b%d",'
                    b'"category":["c%d","d%d"],"price":%d}'
                    % (k, stamp(self.events.start).encode(), k, k % 9, k % 4, k % 20, 5 + k % 90)
                ),
            )
            for k in range(ITEMS)
        ]
        self._describe(records)

    def describe_users(self, users: Sequence[str]) -> None:
        """Records of users: attributes that are to be deleted."""
        known = {"event_time": stamp(self.events.start), "age": 44.0, "region": "north"}
        self._describe([("users", User.model_validate({"user_id": u} | known)) for u in users])

    def _describe(self, records: Sequence[tuple[str, Record]]) -> None:
        assert not play(outgoing(records), self.kafka).failed


@dataclass
class World:
    """Everything."""

    servers: Servers
    shops: list[FaultyShop]
    folder: Path
    models: str
    done: threading.Event = field(default_factory=threading.Event)

    def all_workers(self) -> list[Worker]:
        return [worker for shop in self.shops for worker in shop.all_workers]

    def start_workers(self) -> None:
        """Start all workers, and start them again whenever they end."""
        _processes.set_forkserver_preload(["tests.faults.worker"])
        for worker in self.all_workers():
            worker.tend()

        def tend() -> None:
            while not self.done.wait(0.1):
                for worker in self.all_workers():
                    worker.tend()

        threading.Thread(target=tend, name="supervisor", daemon=True).start()

    def close(self) -> None:
        """End what is left."""
        self.done.set()
        for worker in self.all_workers():
            if worker.alive():
                worker.process.kill()


def make_world(
    servers: Servers,
    folder: Path,
    events: int,
    users: int,
    names: Iterable[str] = ("a", "b"),
    switched_off: tuple[str, ...] = (),
) -> World:
    """The shops with their topics and items, nothing running yet."""
    models = str(folder / "models")
    shops = [
        _make_shop(name, servers, folder, models, events, users, switched_off) for name in names
    ]
    for shop in shops:
        apply_topics(shop.kafka)
        shop.describe_items()
    return World(servers, shops, folder, models)


def _make_shop(
    name: str,
    servers: Servers,
    folder: Path,
    models: str,
    events: int,
    users: int,
    switched_off: tuple[str, ...],
) -> FaultyShop:
    classic = name.startswith("a")
    stores: Stores = servers.sentinel if classic else servers.cluster
    url = servers.sentinel.url if classic else servers.cluster.url
    options = {
        "max.poll.interval.ms": str(int(OVERRUN_SECONDS * 1000)),
        "reconnect.backoff.max.ms": "1000",
        "retry.backoff.max.ms": "500",
        "topic.metadata.refresh.interval.ms": "10000",
    }

    def settings(bootstrap: str, options: dict[str, str]) -> Settings:
        return Settings.model_validate(
            {
                "kafka": {
                    "bootstrap_servers": bootstrap,
                    "topic_prefix": f"{name}.",
                    "group_id": name,
                    "partitions": PARTITIONS,
                    "replication": 3,
                    "group_protocol": "classic" if classic else "consumer",
                    "session_timeout_ms": 6_000,
                    "options": options,
                },
                "redis": {"url": SecretStr(url), "cluster": not classic, "key_prefix": name},
                "archive": {"url": str(folder / name / "archive"), "flush_seconds": 2},
                "models": {"url": models, "encoder": "none", "device": "cpu", "poll_seconds": 1},
                "states": {"cache_users": CACHED_USERS},
                "scorer": {"digest_seconds": 5},
                "web": {"metrics_port": 0},
            }
        )

    def worker(kind: str, processors: tuple[str, ...], **more: str) -> Worker:
        full = f"{name}-{kind}"
        return Worker(
            full,
            processors,
            settings(servers.kafka.workers, options | more),
            folder / f"{full}.log",
            switched_off,
        )

    # Shop a has two workers with static membership and one without.
    members = [{"group.instance.id": "1"}, {"group.instance.id": "2"}, {}] if classic else [{}, {}]
    workers = [worker(str(at), SCORING, **more) for at, more in enumerate(members, 1)]
    (folder / name).mkdir(parents=True, exist_ok=True)
    return FaultyShop(
        name,
        settings(servers.kafka.direct, {}),
        stores,
        Numbered(events, users, int(time.time() * 1000) - 86_400_000 // 2),
        workers,
        worker("archiver", ("archiver",)),
    )


def add_worker(shop: FaultyShop) -> Worker:
    """One more worker of a shop, as when load grows; the supervisor starts it."""
    first = shop.workers[-1]
    number = len(shop.workers) + 1
    extra = Worker(
        f"{shop.name}-{number}",
        first.processors,
        first.settings.model_copy(deep=True),
        first.log.parent / f"{shop.name}-{number}.log",
        first.switched_off,
    )
    extra.settings.kafka.options.pop("group.instance.id", None)
    shop.workers.append(extra)
    return extra
