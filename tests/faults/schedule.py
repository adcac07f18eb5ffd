"""When which fault is injected: made from a seed, written to a file, and replayed from it.

First each kind once, alone: a lane of its own, one after another. Then, in lanes that run side by
side, all kinds in random order, so that faults of different lanes overlap.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random

import orjson

from tests.faults.kinds import BY_KIND, EVERYWHERE, KINDS

ALONE = "alone"
LONGEST_PAUSE = 4.0  # seconds between two faults of a lane


@dataclass(frozen=True)
class Planned:
    """One fault. `pause`: seconds after the one before it in its lane; `seed`: of its choices."""

    kind: str
    shop: str
    lane: str
    pause: float
    seed: int


@dataclass(frozen=True)
class Schedule:
    """All faults of a run."""

    seed: int
    alone: list[Planned]
    lanes: dict[str, list[Planned]]

    @property
    def count(self) -> int:
        """How many faults there are."""
        return len(self.alone) + sum(map(len, self.lanes.values()))


def make_schedule(
    seed: int,
    shops: Sequence[str],
    each: int,
    kinds: Sequence[str] = tuple(BY_KIND),
    alone: bool = True,
) -> Schedule:
    """`each` faults of every kind in all; `alone`: the first of each kind by itself."""
    random = Random(seed)

    def plan(kind: str, shop: str, lane: str) -> Planned:
        pause = round(random.uniform(0, LONGEST_PAUSE), 2)
        return Planned(kind, shop, lane, pause, random.randrange(2**31))

    chosen = [kind for kind in KINDS if kind.name in kinds]
    first = [plan(kind.name, random.choice(shops), ALONE) for kind in chosen] if alone else []
    lanes: dict[str, list[Planned]] = {}
    turns = cycle(shops)  # kind after kind, so that each shop gets as many
    for kind in chosen:
        for shop in islice(turns, each - len(first[:1])):
            lane = kind.lane if kind.lane in EVERYWHERE else f"{kind.lane} {shop}"
            lanes.setdefault(lane, []).append(plan(kind.name, shop, lane))
    for planned in lanes.values():
        random.shuffle(planned)
    random.shuffle(first)
    return Schedule(seed, first, lanes)


def save(schedule: Schedule, path: Path) -> None:
    """Write a schedule, so that a run can be replayed."""
    path.write_bytes(orjson.dumps(asdict(schedule), option=orjson.OPT_INDENT_2))


def load(path: Path) -> Schedule:
    """The schedule that `save` wrote."""
    found = orjson.loads(path.read_bytes())
    return Schedule(
        found["seed"],
        [Planned(**each) for each in found["alone"]],
        {lane: [Planned(**each) for each in several] for lane, several in found["lanes"].items()},
    )
