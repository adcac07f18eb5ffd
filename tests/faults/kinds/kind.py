"""What a kind of fault is."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from socket import gethostname

from tests.faults.world import FaultyShop, NotReached, Worker, World

ADMIN_SECONDS = 30.0  # brokers that fail over answer within this


@dataclass(frozen=True)
class Kind:
    """One kind of fault. `lane`: those of one lane come one after another."""

    name: str
    lane: str  # brokers, models: one for all; the others: one for each shop
    harm: Callable[[World, FaultyShop, Random], str | None]
    meaning: str


def some_worker(shop: FaultyShop, random: Random) -> Worker:
    """One that is up. Raises NotReached when none is."""
    live = shop.live()
    if not live:
        raise NotReached(f"no worker of shop {shop.name} was up")
    return random.choice(live)


def transactional_id(shop: FaultyShop, slot: int) -> str:
    """That of the scorer in a slot of this host."""
    return f"{shop.kafka.topic_prefix}{shop.kafka.group_id}-scorer-{gethostname()}-{slot}"
