"""Every world that a model can reach, breadth first: the first trace found is a shortest."""

from collections import deque
from dataclasses import dataclass

from tests.protocol.model import Model, World, broken, broken_at_rest

MOST_STEPS = 2_000  # of workers that have nothing in their way


@dataclass(frozen=True)
class Found:
    """What a search found: how many worlds, and where one breaks a promise, if one does."""

    worlds: int
    rests: int  # worlds in which no worker has anything left to do
    reason: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        seen = f"{self.worlds} worlds, {self.rests} at rest"
        if not self.reason:
            return f"{seen}: nothing broken"
        return f"{seen}: {self.reason}, after\n  " + "\n  ".join(self.trace)


def search(model: Model, first: World, wanted: str = "") -> Found:
    """Look at all worlds that can be reached from the first, until one is broken.

    With `wanted`, until one is broken in a way that has this in its reason; what comes after a
    world that is broken in another way is not looked at.
    """
    came: dict[World, tuple[World | None, str]] = {first: (None, "")}
    waiting = deque([first])
    rests = 0
    while waiting:
        world = waiting.popleft()
        reason = broken(world)
        if not reason and next(model.work(world), None) is None:
            rests += 1
            reason = broken_at_rest(world)
        if reason and wanted in reason:
            return Found(len(came), rests, reason, _trace(came, world))
        if reason:
            continue
        for name, after in model.steps(world):
            if after not in came:
                came[after] = world, name
                waiting.append(after)
    return Found(len(came), rests)


def settle(model: Model, world: World) -> World:
    """Let all workers end what they are at and read what there is, without another fault."""
    for _ in range(MOST_STEPS):
        step = next(model.work(world), None)
        if step is None:
            return world
        world = step[1]
    raise AssertionError(f"the workers find no rest: {world}")


def _trace(came: dict[World, tuple[World | None, str]], world: World) -> tuple[str, ...]:
    names: list[str] = []
    at: World | None = world
    while at is not None:
        at, name = came[at]
        names.append(name)
    return tuple(reversed(names[:-1]))
