"""An archiver that dies, and one whose disk is full."""

import resource
import time
from random import Random

import psutil

from tests.faults.kinds.kind import Kind
from tests.faults.world import FaultyShop, NotReached, World

FULL_SECONDS = (5.0, 8.0)


def _disk_full(world: World, shop: FaultyShop, random: Random) -> str:
    """No file of the archiver may grow: writes fail as on a full disk."""
    worker = shop.archiver
    if not worker.alive():
        raise NotReached("the archiver was down")
    process = psutil.Process(worker.pid)
    _, hard = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        time.sleep(random.uniform(*FULL_SECONDS))
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


KINDS: tuple[Kind, ...] = (
    Kind("disk full", "archive", _disk_full, "no file of the archiver can grow"),
    Kind("archiver killed", "archive", _archiver_killed, "kill -9"),
)
