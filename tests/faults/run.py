"""Faults while events flow, then the checks: one run, from its schedule to its verdict."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from model import bundle, registry
from model.predict import predictor, warm
from streams.reader import USER_STATE
from tests.faults.check import (
    SETTLED_SECONDS,
    Verdict,
    check_all,
    check_predictions,
    unarchived,
    unscored,
    wait_settled,
)
from tests.faults.forgetting import forget_until_erased
from tests.faults.forgotten import read_forgotten
from tests.faults.kinds import BY_KIND
from tests.faults.process import until
from tests.faults.schedule import Planned, Schedule
from tests.faults.servers import Servers
from tests.faults.world import PARTITIONS, FaultyShop, NotReached, World, make_world
from tests.servers import ServerError
from tests.unit.model.bundles import write

TRIES = 6  # to come to the point where a fault is to happen: a busy machine is late
VERSIONS = 3  # bundles to swap
FLOWS_SECONDS = 150.0  # all workers have started, claimed and written by then; 66 s were seen


@dataclass
class Injected:
    """One fault as it happened. `began`: seconds after the first event."""

    kind: str
    shop: str
    lane: str
    began: float
    seconds: float
    about: str
    happened: bool


@dataclass
class Result:
    """What came of a run."""

    seed: int
    faults: list[Injected] = field(default_factory=list[Injected])
    verdicts: dict[str, Verdict] = field(default_factory=dict[str, Verdict])
    events: int = 0
    hanging: int = 0  # transactions that Kafka left hanging, ended as operate.md says
    stuck: list[str] = field(default_factory=list[str])
    exits: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    stop_seconds: dict[str, float] = field(default_factory=dict[str, float])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    schedule: Any = None

    @property
    def injected(self) -> Counter[str]:
        """Faults that happened, by kind."""
        return Counter(fault.kind for fault in self.faults if fault.happened)

    @property
    def clean(self) -> bool:
        """Whether all that was checked holds."""
        return not self.stuck and all(each.clean for each in self.verdicts.values())


@dataclass(frozen=True)
class Load:
    """What flows while faults are injected: `events` of `users` users to each shop."""

    shops: tuple[str, ...]
    events: int
    users: int
    rate: float  # events a second, to each shop


def run(
    servers: Servers,
    schedule: Schedule,
    load: Load,
    folder: Path,
    say: Callable[[str], None],
    switched_off: tuple[str, ...] = (),
    settled_seconds: float = SETTLED_SECONDS,
) -> Result:
    """Play the load, inject the faults, and check everything.

    Raises what a harness that cannot do its work raises (ServerError); damage is in the result.
    """
    torch.set_num_threads(1)  # several wait for one another on a machine that does much else
    result = Result(schedule.seed, schedule=asdict(schedule))
    began = time.monotonic()
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        _write_bundles(str(folder / "models"))
        world = make_world(servers, folder, load.events, load.users, load.shops, switched_off)
        stack.callback(world.close)
        world.start_workers()
        _play(world, schedule, load.rate, result, say)
        _settle(world, result, say, settled_seconds)
        for shop in world.shops:
            verdict = result.verdicts[shop.name]
            if verdict.clean:
                check_all(shop, verdict, say)
            else:  # what was published may tell why: a journal that was doubled ends the workers
                check_predictions(shop, verdict, read_forgotten(shop))
        result.events = sum(
            shop.played["reviews"] + shop.played["behavior"] for shop in world.shops
        )
        result.exits = {worker.name: dict(worker.exits) for worker in world.all_workers()}
    result.seconds["total"] = time.monotonic() - began
    return result


def _play(
    world: World, schedule: Schedule, rate: float, result: Result, say: Callable[[str], None]
) -> None:
    flowing = threading.Event()
    hurry = threading.Event()  # once all faults are injected: what is left is a burst
    started = time.monotonic()
    players = [
        threading.Thread(target=shop.play, args=(rate, flowing, hurry), name=f"plays {shop.name}")
        for shop in world.shops
    ]
    for player in players:
        player.start()

    def inject(lane: Sequence[Planned]) -> None:
        left, again = list(lane), set[Planned]()
        while left:
            planned = left.pop(0)
            time.sleep(planned.pause)
            result.faults.append(fault := _inject(world, planned, started))
            say(
                f"{fault.began:6.0f} s  {planned.lane}: {planned.kind}"
                f"{'' if fault.happened else ' DID NOT HAPPEN'} ({fault.about})"
            )
            if not fault.happened and planned not in again:  # later it may
                again.add(planned)
                left.append(planned)

    try:
        until(lambda: all(_flows(shop) for shop in world.shops), FLOWS_SECONDS)
        flowing.set()
        inject(schedule.alone)
        lanes = [
            threading.Thread(target=inject, args=(lane,), name=name)
            for name, lane in schedule.lanes.items()
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        result.seconds["faults"] = time.monotonic() - started
        say(f"all faults are injected after {result.seconds['faults']:.0f} s")
    finally:
        hurry.set()
        for player in players:
            player.join()
    result.seconds["playing"] = time.monotonic() - started


def _flows(shop: FaultyShop) -> bool:
    """Whether every partition has been scored and written: before that a fault meets nothing."""
    with closing(shop.store) as store:
        return all(store.header(USER_STATE, partition) for partition in range(PARTITIONS))


def _inject(world: World, planned: Planned, started: float) -> Injected:
    (shop,) = [shop for shop in world.shops if shop.name == planned.shop]
    random = Random(planned.seed)
    began = time.monotonic()
    about, happened = "", False
    for _ in range(TRIES):
        try:
            about = BY_KIND[planned.kind].harm(world, shop, random) or ""
            happened = True
            break
        except (NotReached, ServerError) as error:
            about = str(error)
            time.sleep(2)
        except Exception as error:  # noqa: BLE001 - a server that another fault has taken away
            about = f"{type(error).__name__}: {error}"
            time.sleep(2)
    return Injected(
        planned.kind,
        planned.shop,
        planned.lane,
        round(began - started, 1),
        round(time.monotonic() - began, 1),
        about,
        happened,
    )


def _settle(
    world: World, result: Result, say: Callable[[str], None], settled_seconds: float
) -> None:
    """Wait until all is worked off, then end everything in order."""

    def operate() -> None:
        result.hanging += world.servers.kafka.end_hanging()

    for shop in world.shops:
        verdict = result.verdicts[shop.name] = Verdict()
        for worker in shop.workers[:2]:  # a shop whose last worker left would wait for ever
            worker.wanted = True
        if again := shop.played["sent again"]:
            say(f"shop {shop.name}: a producer stood still; {again} records were sent again")
        if shop.played["failed"]:
            verdict.note("sent", 0, shop.played["failed"], "records were not acknowledged")
        if not wait_settled(shop, verdict, unscored, settled_seconds, operate):
            for worker in shop.workers:
                worker.tell_where()
        say(f"shop {shop.name}: scored after {verdict.settled_seconds:.0f} s")
        if shop.forgotten:
            left = _forget_rest(shop, settled_seconds, say)
            verdict.note("forgotten", len(shop.forgotten), int(bool(left)), left)
            wait_settled(shop, verdict, unscored, settled_seconds)
    world.done.set()
    scoring = [worker for shop in world.shops for worker in shop.workers]
    archivers = [shop.archiver for shop in world.shops]
    for several in (scoring, archivers):
        if several is archivers:
            for shop in world.shops:
                verdict = result.verdicts[shop.name]
                if not wait_settled(shop, verdict, unarchived, settled_seconds):
                    shop.archiver.tell_where()
        for worker in several:
            clean, alive = worker.exits["clean"], worker.alive()
            try:
                result.stop_seconds[worker.name] = round(worker.stop(), 1)
                if alive and worker.exits["clean"] == clean:
                    result.stuck.append(f"{worker.name} did not end cleanly; its log tells why")
            except TimeoutError as error:
                result.stuck.append(str(error))


def _forget_rest(shop: FaultyShop, seconds: float, say: Callable[[str], None]) -> str:
    """Forget those of whom something was left; what still is."""
    users = [user for user, span in shop.forgotten.items() if span is None]
    if not users:
        return ""
    started = time.monotonic()
    try:
        left = forget_until_erased(shop, users, seconds)
    except NotReached as error:
        left = str(error)
    took = time.monotonic() - started
    say(f"shop {shop.name}: {len(users)} users were forgotten again in {took:.0f} s {left}")
    return left


def _write_bundles(url: str) -> None:
    """Small networks with weights by chance: other predictions with each."""
    for seed in range(VERSIONS):
        written = write(url, seed, vector=8)
        if not seed:
            # Compiled here once, for workers that would each do it at the same time.
            warm(predictor(bundle.load(url, written.version, written.sha256), "cpu"))
            registry.promote(url, written.version, written.sha256, "harness", "the first")
