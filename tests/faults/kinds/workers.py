"""Workers that die, sleep, come and go."""

import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from random import Random

from confluent_kafka import KafkaException, Producer

from streams.clients import client_config
from tests.faults.kinds.kind import ADMIN_SECONDS, Kind, some_worker, transactional_id
from tests.faults.worker import Order, Point
from tests.faults.world import OVERRUN_SECONDS, FaultyShop, NotReached, Worker, World, add_worker

ZOMBIE_SECONDS = (8.0, 10.0)  # longer than the session timeout of 6 s
OVERRUN = OVERRUN_SECONDS + 2.5
DANGLING_SECONDS = 14.0  # longer than a transaction may stay open
CLOCK_SECONDS = 2 * 86_400.0  # how far a clock jumps
BACKLOG_SECONDS = 3.0  # of events: written in several chunks, as the few of a quick loop are not


def _kill_at(point: Point, soon: float = 0.0) -> Callable[[World, FaultyShop, Random], str]:
    def harm(world: World, shop: FaultyShop, random: Random) -> str:
        worker = some_worker(shop, random)
        processor = "scorer" if random.random() < 0.75 or point not in _ITEMS else "items"
        if soon:
            order = Order(processor, point, "kill_in", random.uniform(0, soon))
        else:
            order = Order(processor, point, "kill")
        if point == "writing":
            _let_wait(worker, processor)
        worker.not_before = time.monotonic() + random.uniform(0, 4)
        worker.order(order)
        return f"{worker.name} {processor}"

    return harm


_ITEMS = ("scoring", "writing")  # points that `items` has too


def _let_wait(worker: Worker, processor: str) -> None:
    """Have its next batch be a long one."""
    worker.order(Order(processor, "scoring", "sleep", BACKLOG_SECONDS))


def _dangling(world: World, shop: FaultyShop, random: Random) -> str:
    worker = some_worker(shop, random)
    worker.order(Order("scorer", "sent", "kill"))
    worker.expect_end(DANGLING_SECONDS)
    return worker.name


def _zombie(world: World, shop: FaultyShop, random: Random) -> str:
    worker = some_worker(shop, random)
    with _stopped(worker):
        time.sleep(random.uniform(*ZOMBIE_SECONDS))
    return worker.name


def _zombie_at(point: Point) -> Callable[[World, FaultyShop, Random], str]:
    def harm(world: World, shop: FaultyShop, random: Random) -> str:
        worker = some_worker(shop, random)
        if point == "writing":
            _let_wait(worker, "scorer")
        try:
            worker.order(Order("scorer", point, "stop"))
            time.sleep(random.uniform(*ZOMBIE_SECONDS))
        finally:
            _signal(worker, signal.SIGCONT)
        return worker.name

    return harm


def _overrun_at(point: Point) -> Callable[[World, FaultyShop, Random], str]:
    def harm(world: World, shop: FaultyShop, random: Random) -> str:
        worker = some_worker(shop, random)
        worker.order(Order("scorer", point, "sleep", OVERRUN))
        time.sleep(OVERRUN)
        return worker.name

    return harm


def _worker_added(world: World, shop: FaultyShop, random: Random) -> str:
    idle = [each for each in shop.workers if not each.wanted]
    worker = idle[0] if idle else add_worker(shop)
    worker.wanted, worker.not_before = True, 0.0
    time.sleep(5)
    return worker.name


def _worker_removed(world: World, shop: FaultyShop, random: Random) -> str:
    worker = some_worker(shop, random)
    alone = len(shop.live()) < 3
    seconds = worker.stop()
    time.sleep(random.uniform(1, 4))
    if alone:
        worker.wanted = True
    return f"{worker.name}, {seconds:.1f} s"


def _rolling_restart(world: World, shop: FaultyShop, random: Random) -> str:
    names: list[str] = []
    for worker in [*shop.workers]:
        if worker.wanted and (
            not shop.name.startswith("a") or "group.instance.id" in worker.settings.kafka.options
        ):
            worker.restart()
            names.append(worker.name)
            time.sleep(2)
    if not names:
        raise NotReached("no static member was up")
    return ", ".join(names)


def _clock(world: World, shop: FaultyShop, random: Random) -> str:
    worker = some_worker(shop, random)
    ahead = random.choice([-CLOCK_SECONDS, CLOCK_SECONDS, -3_600.0])
    worker.set_clock(ahead)
    time.sleep(random.uniform(4, 8))
    if worker.alive():
        worker.set_clock(0.0)
    return f"{worker.name} {ahead:+.0f} s"


def _reopened(world: World, shop: FaultyShop, random: Random) -> str:
    identity = transactional_id(shop, random.randrange(max(len(shop.live()), 1)))
    producer = Producer(client_config(shop.kafka, transactional_id=identity))
    try:
        producer.init_transactions(ADMIN_SECONDS)
    except KafkaException as error:
        raise NotReached(str(error)) from error
    return identity


@contextmanager
def _stopped(worker: Worker) -> Generator[None]:
    _signal(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(worker, signal.SIGCONT)


def _signal(worker: Worker, number: int) -> None:
    try:
        os.kill(worker.pid, number)
    except (ProcessLookupError, AttributeError) as error:
        raise NotReached(f"{worker.name} was gone") from error


KINDS: tuple[Kind, ...] = (
    Kind("killed after poll", "workers", _kill_at("polled"), "kill -9 between poll and scoring"),
    Kind("killed while scoring", "workers", _kill_at("scoring"), "kill -9 with states read"),
    Kind("killed with offsets noted", "workers", _kill_at("noted"), "kill -9 in a transaction"),
    Kind("killed before commit", "workers", _kill_at("sent"), "kill -9 with outputs sent"),
    Kind(
        "killed inside commit",
        "workers",
        _kill_at("committing", 0.02),
        "kill -9 up to 20 ms after the commit was asked for",
    ),
    Kind(
        "killed after commit",
        "workers",
        _kill_at("committed"),
        "kill -9 between commit and state write",
    ),
    Kind(
        "killed inside state write",
        "workers",
        _kill_at("writing"),
        "kill -9 with some chunks of states written and the header not",
    ),
    Kind(
        "dangling transaction",
        "workers",
        _dangling,
        "kill -9 in an open transaction whose id does not come back for 14 s",
    ),
    Kind("zombie", "workers", _zombie, "SIGSTOP for longer than the session timeout, SIGCONT"),
    Kind(
        "zombie before state write",
        "workers",
        _zombie_at("committed"),
        "asleep between commit and state write while another takes over",
    ),
    Kind(
        "zombie inside state write",
        "workers",
        _zombie_at("writing"),
        "asleep between two chunks: its write comes after the new owner's read",
    ),
    Kind(
        "overrun with a batch in hand",
        "workers",
        _overrun_at("scoring"),
        "past max.poll.interval with a polled batch, then its commit; partitions come back",
    ),
    Kind(
        "overrun before the generation is read",
        "workers",
        _overrun_at("polled"),
        "past max.poll.interval between poll and metadata: generation -1",
    ),
    Kind("worker added", "workers", _worker_added, "one more member"),
    Kind("worker removed", "workers", _worker_removed, "SIGTERM; one member less"),
    Kind(
        "rolling restart",
        "workers",
        _rolling_restart,
        "SIGTERM and start, one after another; static members in shop a",
    ),
    Kind("clock jumps", "workers", _clock, "a worker's clock is days or an hour off, and back"),
    Kind("transactional id reopened", "workers", _reopened, "another producer takes the id"),
)
