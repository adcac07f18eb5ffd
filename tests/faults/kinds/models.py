"""Bundles that are swapped, tried on some users, damaged and withdrawn."""

import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from random import Random

from model import registry
from model.bundle import MANIFEST
from tests.faults.kinds.kind import Kind
from tests.faults.world import FaultyShop, World

LOOKED_SECONDS = 2.0  # in which every worker has looked at the registry, once a second


def _versions(world: World) -> list[Path]:
    """Folders of the bundles that are whole and stay."""
    found = Path(world.models).glob(f"*/{MANIFEST}")
    return sorted(path.parent for path in found if not path.parent.name.startswith("2099"))


def _others(world: World) -> list[Path]:
    """Those of them that are not stable."""
    stable = registry.read(world.models).stable
    return [each for each in _versions(world) if not stable or each.name != stable.version]


def _other_version(random: Random) -> str:
    """A name as versions have it, of no bundle that stays."""
    return f"20990101T000000-{random.randrange(16**8):08x}"


def _swapped(world: World, shop: FaultyShop, random: Random) -> str:
    chosen = random.choice(_others(world))
    _promote(world, chosen)
    time.sleep(3)
    return chosen.name


def _tried(world: World, shop: FaultyShop, random: Random) -> str:
    """Another than stable answers a share of users, or none of them, and then none again."""
    chosen = random.choice(_others(world))
    share = random.choice([0.0, 0.3, 1.0])
    registry.set_canary(world.models, chosen.name, _sum(chosen), share, "harness", "a fault")
    time.sleep(3)
    registry.clear_canary(world.models, "harness", "restored")
    return f"{chosen.name} at {share}"


def _damaged(world: World, shop: FaultyShop, random: Random) -> str:
    """A copy of a bundle with a byte changed is made stable: it must be refused."""

    def damage(copy: Path) -> None:
        weights = min(copy.rglob("*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 0xFF
        weights.write_bytes(data)

    with _copy_promoted(world, random, damage) as (healthy, _):
        time.sleep(2 * LOOKED_SECONDS)
    return healthy.name


def _withdrawn(world: World, shop: FaultyShop, random: Random) -> str:
    """A bundle is made stable and its folder goes away; then the one before is stable again."""
    with _copy_promoted(world, random) as (healthy, copy):
        time.sleep(random.uniform(0, LOOKED_SECONDS))
        shutil.rmtree(copy)
        time.sleep(LOOKED_SECONDS)
    return healthy.name


@contextmanager
def _copy_promoted(
    world: World, random: Random, change: Callable[[Path], None] = lambda copy: None
) -> Generator[tuple[Path, Path]]:
    """A bundle and its copy, which is stable meanwhile; afterwards the one before is again."""
    healthy = random.choice(_versions(world))
    before = registry.read(world.models).stable
    copy = healthy.parent / _other_version(random)
    shutil.copytree(healthy, copy)
    change(copy)
    _promote(world, copy)
    yield healthy, copy
    if before is not None:
        registry.promote(world.models, before.version, before.sha256, "harness", "restored")
    shutil.rmtree(copy, ignore_errors=True)


def _promote(world: World, folder: Path) -> None:
    registry.promote(world.models, folder.name, _sum(folder), "harness", "a fault")


def _sum(folder: Path) -> str:
    return sha256((folder / MANIFEST).read_bytes()).hexdigest()


KINDS: tuple[Kind, ...] = (
    Kind("bundle swapped", "models", _swapped, "another version is promoted"),
    Kind("bundle tried", "models", _tried, "a version answers a share of users, and ends"),
    Kind("bundle damaged", "models", _damaged, "a version with a wrong byte is promoted"),
    Kind("bundle withdrawn", "models", _withdrawn, "a promoted version's folder is removed"),
)
