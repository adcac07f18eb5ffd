"""The kinds of faults: each a function that does the harm, waits, and ends it.

A fault returns when its cause is gone; that all goes on is for the checks at the end to say. It
raises NotReached when it could not be done (a worker that was down); it is then tried again.
"""

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from socket import gethostname

import psutil
from confluent_kafka import KafkaException, Producer, TopicPartition

from model import registry
from model.bundle import MANIFEST
from schemas import archive
from streams.admin import client_config, reach
from tests.faults.proxy import Rule
from tests.faults.servers import SentinelStore, until
from tests.faults.worker import Order
from tests.faults.world import (
    OVERRUN_SECONDS,
    PARTITIONS,
    FaultyShop,
    NotReached,
    Worker,
    World,
    add_worker,
)

ZOMBIE_SECONDS = (8.0, 10.0)  # longer than the session timeout of 6 s
OVERRUN = OVERRUN_SECONDS + 2.5
DANGLING_SECONDS = 14.0  # longer than a transaction may stay open
CUT_SECONDS = (3.0, 9.0)
FULL_SECONDS = (3.0, 6.0)
LOST_SECONDS = (0.5, 2.0)  # of writes that a replica does not have
CLOCK_SECONDS = 2 * 86_400.0  # how far a clock jumps
ADMIN_SECONDS = 30.0
ARCHIVED_SECONDS = 60.0  # every partition has something in the archive by then


@dataclass(frozen=True)
class Kind:
    """One kind of fault. `lane`: those of one lane come one after another."""

    name: str
    lane: str  # workers, store, network: a lane for each shop; brokers, models: one for all
    harm: Callable[[World, FaultyShop, Random], str | None]
    meaning: str


def _some(shop: FaultyShop, random: Random) -> Worker:
    live = shop.live()
    if not live:
        raise NotReached(f"no worker of shop {shop.name} was up")
    return random.choice(live)


def _kill_at(point: str, soon: float = 0.0) -> Callable[[World, FaultyShop, Random], str]:
    def harm(world: World, shop: FaultyShop, random: Random) -> str:
        worker = _some(shop, random)
        processor = "scorer" if random.random() < 0.75 or point not in _ITEMS else "items"
        if soon:
            order = Order(processor, point, "kill_in", random.uniform(0, soon))
        else:
            order = Order(processor, point, "kill")
        worker.not_before = time.monotonic() + random.uniform(0, 4)
        worker.order(order)
        return f"{worker.name} {processor}"

    return harm


_ITEMS = ("scoring", "writing")  # points that `items` has too


def _dangling(world: World, shop: FaultyShop, random: Random) -> str:
    worker = _some(shop, random)
    worker.order(Order("scorer", "sent", "kill"))
    worker.expect_end(DANGLING_SECONDS)
    return worker.name


def _zombie(world: World, shop: FaultyShop, random: Random) -> str:
    worker = _some(shop, random)
    with _stopped(worker):
        time.sleep(random.uniform(*ZOMBIE_SECONDS))
    return worker.name


def _zombie_at(point: str) -> Callable[[World, FaultyShop, Random], str]:
    def harm(world: World, shop: FaultyShop, random: Random) -> str:
        worker = _some(shop, random)
        try:
            worker.order(Order("scorer", point, "stop"))
            time.sleep(random.uniform(*ZOMBIE_SECONDS))
        finally:
            _signal(worker, signal.SIGCONT)
        return worker.name

    return harm


def _overrun_at(point: str) -> Callable[[World, FaultyShop, Random], str]:
    def harm(world: World, shop: FaultyShop, random: Random) -> str:
        worker = _some(shop, random)
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
    worker = _some(shop, random)
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
    worker = _some(shop, random)
    ahead = random.choice([-CLOCK_SECONDS, CLOCK_SECONDS, -3_600.0])
    worker.set_clock(ahead)
    time.sleep(random.uniform(4, 8))
    if worker.alive():
        worker.set_clock(0.0)
    return f"{worker.name} {ahead:+.0f} s"


def _reopened(world: World, shop: FaultyShop, random: Random) -> str:
    slot = random.randrange(max(len(shop.live()), 1))
    prefix, group = shop.kafka.topic_prefix, shop.kafka.group_id
    identity = f"{prefix}{group}-scorer-{gethostname()}-{slot}"
    producer = Producer(client_config(shop.kafka, **{"transactional.id": identity}))
    try:
        producer.init_transactions(ADMIN_SECONDS)
    except KafkaException as error:
        raise NotReached(str(error)) from error
    return identity


# -- stores --------------------------------------------------------------------------------------


def _failover(world: World, shop: FaultyShop, random: Random) -> str:
    if isinstance(shop.stores, SentinelStore):
        shop.stores.fail_over()
        return "by sentinels"
    which = random.randrange(3)
    shop.stores.fail_over(which)  # pyright: ignore[reportAttributeAccessIssue]
    return f"of replica {which}"


def _failover_lost(world: World, shop: FaultyShop, random: Random) -> str:
    seconds = random.uniform(*LOST_SECONDS)
    if isinstance(shop.stores, SentinelStore):
        shop.stores.lose_writes(seconds)
    else:
        shop.stores.lose_writes(seconds, random.randrange(3))  # pyright: ignore[reportAttributeAccessIssue]
    return f"writes of {seconds:.1f} s lost"


def _emptied(world: World, shop: FaultyShop, random: Random) -> None:
    shop.stores.empty()


def _went_back(world: World, shop: FaultyShop, random: Random) -> str:
    seconds = random.uniform(*LOST_SECONDS)
    shop.stores.go_back(seconds)
    return f"by {seconds:.1f} s"


def _full(world: World, shop: FaultyShop, random: Random) -> None:
    shop.stores.fill(True)
    try:
        time.sleep(random.uniform(*FULL_SECONDS))
    finally:
        shop.stores.fill(False)


def _retention(world: World, shop: FaultyShop, random: Random) -> str:
    """What is archived of journal and item updates leaves Kafka; then the store forgets too."""
    admin = reach(shop.kafka, ADMIN_SECONDS)
    ends: list[TopicPartition] = []

    def archived() -> bool:
        ends[:] = [
            TopicPartition(shop.kafka.topic_prefix + topic, partition, end)
            for topic in ("journal", "item-updates")
            for partition, end in archive.positions(shop.settings.archive.url, topic).items()
        ]
        return len(ends) == 2 * PARTITIONS

    until(archived, ARCHIVED_SECONDS)
    try:
        for future in admin.delete_records(ends).values():
            future.result(ADMIN_SECONDS)
    except KafkaException as error:
        raise NotReached(str(error)) from error
    shop.stores.empty()
    return f"{sum(each.offset for each in ends)} records"


# -- network -------------------------------------------------------------------------------------


def _cut_brokers(world: World, shop: FaultyShop, random: Random) -> str:
    worker = _some(shop, random)
    kafka = world.servers.kafka
    _cut(world, worker, [kafka.link(node) for node in kafka.brokers], random.uniform(*CUT_SECONDS))
    return worker.name


def _cut_store(world: World, shop: FaultyShop, random: Random) -> str:
    worker = _some(shop, random)
    _cut(world, worker, shop.stores.links(), random.uniform(*CUT_SECONDS))
    return worker.name


def _cut(world: World, worker: Worker, links: list[str], seconds: float) -> None:
    _break(world, [Rule(link, worker.pid) for link in links], seconds)


def _slow_links(world: World, shop: FaultyShop, random: Random) -> str:
    worker = _some(shop, random)
    kafka, delay = world.servers.kafka, random.uniform(0.02, 0.15)
    links = [*(kafka.link(node) for node in kafka.brokers), *shop.stores.links()]
    rules = [Rule(link, worker.pid, delay) for link in links]
    _break(world, rules, random.uniform(*CUT_SECONDS))
    return f"{worker.name} {delay * 1000:.0f} ms each way"


def _break(world: World, rules: list[Rule], seconds: float) -> None:
    proxy = world.servers.proxy
    try:
        for rule in rules:
            proxy.break_(rule)
        time.sleep(seconds)
    finally:
        for rule in rules:
            proxy.heal(rule)


# -- brokers -------------------------------------------------------------------------------------


def _broker_killed(world: World, shop: FaultyShop, random: Random) -> str:
    node = random.choice([*world.servers.kafka.brokers])
    broker = world.servers.kafka.brokers[node]
    broker.kill()
    time.sleep(random.uniform(1, 6))
    broker.start()
    _in_sync(world)
    return f"broker {node}"


def _two_brokers_killed(world: World, shop: FaultyShop, random: Random) -> str:
    nodes = random.sample([*world.servers.kafka.brokers], 2)
    brokers = [world.servers.kafka.brokers[node] for node in nodes]
    for broker in brokers:
        broker.kill()
        time.sleep(random.uniform(0, 2))
    time.sleep(random.uniform(1, 4))
    for broker in brokers:
        broker.start(wait=False)
    until(lambda: all(broker.ready() for broker in brokers), brokers[0].seconds)
    _in_sync(world)
    return f"brokers {nodes}"


def _coordinator_moved(world: World, shop: FaultyShop, random: Random) -> str:
    """The broker that coordinates a scorer's transactions hands over, and comes back."""
    slot = random.randrange(2)
    prefix, group = shop.kafka.topic_prefix, shop.kafka.group_id
    identity = f"{prefix}{group}-scorer-{gethostname()}-{slot}"
    topic = (
        reach(shop.kafka, ADMIN_SECONDS)
        .list_topics("__transaction_state")
        .topics["__transaction_state"]
    )
    partition = abs(_java_hash(identity)) % max(len(topic.partitions), 1)
    node = topic.partitions[partition].leader if topic.partitions else -1
    if node not in world.servers.kafka.brokers:
        raise NotReached("the coordinator has no leader now")
    broker = world.servers.kafka.brokers[node]
    broker.stop()
    time.sleep(random.uniform(1, 3))
    broker.start()
    _in_sync(world)
    return f"{identity} from broker {node}"


def _in_sync(world: World) -> None:
    """Until every partition has all its replicas again: a third failure may lose none."""
    admin = reach(world.shops[0].kafka, ADMIN_SECONDS)

    def all_back() -> bool:
        try:
            topics = admin.list_topics(timeout=5).topics.values()
        except KafkaException:
            return False
        return all(
            len(each.isrs) == len(each.replicas) and each.leader >= 0
            for topic in topics
            for each in topic.partitions.values()
        )

    until(all_back, 90, 0.5)


def _java_hash(text: str) -> int:
    value = 0
    for character in text:
        value = (31 * value + ord(character)) & 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


# -- archive and models --------------------------------------------------------------------------


def _disk_full(world: World, shop: FaultyShop, random: Random) -> str:
    """No file of the archiver may grow: writes fail as on a full disk."""
    worker = shop.archiver
    if not worker.alive():
        raise NotReached("the archiver was down")
    process = psutil.Process(worker.pid)
    _, hard = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        time.sleep(random.uniform(*FULL_SECONDS) + 2)
    finally:
        if worker.alive():
            process.rlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return worker.name


def _archiver_killed(world: World, shop: FaultyShop, random: Random) -> str:
    if not shop.archiver.alive():
        raise NotReached("the archiver was down")
    time.sleep(random.uniform(0, 2))
    shop.archiver.kill(random.uniform(0, 3))
    return shop.archiver.name


def _versions(world: World) -> list[Path]:
    """Folders of the bundles that are whole and stay."""
    found = Path(world.models).glob(f"*/{MANIFEST}")
    return sorted(path.parent for path in found if not path.parent.name.startswith("2099"))


def _other_version(random: Random) -> str:
    """A name as versions have it, of no bundle that stays."""
    return f"20990101T000000-{random.randrange(16**8):08x}"


def _swapped(world: World, shop: FaultyShop, random: Random) -> str:
    stable = registry.read(world.models).stable
    others = [each for each in _versions(world) if not stable or each.name != stable.version]
    chosen = random.choice(others)
    _promote(world, chosen)
    time.sleep(3)
    return chosen.name


def _damaged(world: World, shop: FaultyShop, random: Random) -> str:
    """A copy of a bundle with a byte changed is made stable: it must be refused."""
    healthy = random.choice(_versions(world))
    before = registry.read(world.models).stable
    broken = healthy.parent / _other_version(random)
    shutil.copytree(healthy, broken)
    weights = next(iter(sorted(broken.rglob("*.safetensors"))))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0xFF
    weights.write_bytes(data)
    _promote(world, broken)
    time.sleep(4)
    if before is not None:
        registry.promote(world.models, before.version, before.sha256, "harness", "restored")
    shutil.rmtree(broken)
    return healthy.name


def _withdrawn(world: World, shop: FaultyShop, random: Random) -> str:
    """A bundle is made stable and its folder goes away; then the one before is stable again."""
    healthy = random.choice(_versions(world))
    before = registry.read(world.models).stable
    gone = healthy.parent / _other_version(random)
    shutil.copytree(healthy, gone)
    _promote(world, gone)
    time.sleep(random.uniform(0, 2))
    shutil.rmtree(gone)
    time.sleep(2)
    if before is not None:
        registry.promote(world.models, before.version, before.sha256, "harness", "withdrawn")
    return healthy.name


def _promote(world: World, folder: Path) -> None:
    manifest = sha256((folder / MANIFEST).read_bytes()).hexdigest()
    registry.promote(world.models, folder.name, manifest, "harness", "a fault")


# -- all of them ---------------------------------------------------------------------------------


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
    Kind("store failover", "store", _failover, "the replica takes over with all writes"),
    Kind(
        "store failover, writes lost",
        "store",
        _failover_lost,
        "the primary is killed, its last writes never reached the replica",
    ),
    Kind("store emptied", "store", _emptied, "FLUSHALL and FUNCTION FLUSH on all primaries"),
    Kind("store went back", "store", _went_back, "partitions are as they were, no link was lost"),
    Kind("store full", "store", _full, "maxmemory 1, noeviction"),
    Kind(
        "retention passed",
        "store",
        _retention,
        "journal and item updates deleted as far as archived, store emptied",
    ),
    Kind("broker link cut", "network", _cut_brokers, "nothing passes between a worker and Kafka"),
    Kind("store link cut", "network", _cut_store, "nothing passes between a worker and the store"),
    Kind("slow links", "network", _slow_links, "20 to 150 ms each way to brokers and store"),
    Kind("broker killed", "brokers", _broker_killed, "kill -9, back after seconds"),
    Kind("two brokers killed", "brokers", _two_brokers_killed, "kill -9 of two of three"),
    Kind(
        "coordinator moved",
        "brokers",
        _coordinator_moved,
        "the broker that coordinates a scorer's transactions is restarted",
    ),
    Kind("disk full", "archive", _disk_full, "no file of the archiver can grow"),
    Kind("archiver killed", "archive", _archiver_killed, "kill -9"),
    Kind("bundle swapped", "models", _swapped, "another version is promoted"),
    Kind("bundle damaged", "models", _damaged, "a version with a wrong byte is promoted"),
    Kind("bundle withdrawn", "models", _withdrawn, "a promoted version's folder is removed"),
)
BY_KIND = {kind.name: kind for kind in KINDS}
EVERYWHERE = ("brokers", "models")  # lanes that all shops share
