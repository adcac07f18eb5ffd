"""Stores that fail over, forget, or are full."""

import time
from random import Random

from confluent_kafka import KafkaException, TopicPartition

from schemas import archive
from streams.clients import reach
from tests.faults.kinds.kind import ADMIN_SECONDS, Kind
from tests.faults.process import until
from tests.faults.world import PARTITIONS, FaultyShop, NotReached, World

FULL_SECONDS = (3.0, 6.0)
LOST_SECONDS = (0.5, 2.0)  # of writes that a replica does not have
ARCHIVED_SECONDS = 60.0  # every partition has something in the archive by then


def _failover(world: World, shop: FaultyShop, random: Random) -> str:
    return f"to {shop.stores.fail_over(random)}"


def _failover_lost(world: World, shop: FaultyShop, random: Random) -> str:
    seconds = random.uniform(*LOST_SECONDS)
    return f"to {shop.stores.lose_writes(seconds, random)}, writes of {seconds:.1f} s lost"


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


KINDS: tuple[Kind, ...] = (
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
)
