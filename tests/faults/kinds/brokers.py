"""Brokers that die and come back."""

import time
from random import Random

from confluent_kafka import KafkaException

from streams.clients import reach
from tests.faults.kinds.kind import ADMIN_SECONDS, Kind, transactional_id
from tests.faults.process import until
from tests.faults.world import FaultyShop, NotReached, World


def _broker_killed(world: World, shop: FaultyShop, random: Random) -> str:
    _start_dead(world)
    node = random.choice([*world.servers.kafka.brokers])
    broker = world.servers.kafka.brokers[node]
    broker.kill()
    time.sleep(random.uniform(1, 6))
    broker.start()
    _in_sync(world)
    return f"broker {node}"


def _two_brokers_killed(world: World, shop: FaultyShop, random: Random) -> str:
    _start_dead(world)
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
    _start_dead(world)
    identity = transactional_id(shop, random.randrange(2))
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


def _start_dead(world: World) -> None:
    """Start what did not come back in time after an earlier fault, before another one dies."""
    for broker in world.servers.kafka.brokers.values():
        if broker.dead:
            broker.start()


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


KINDS: tuple[Kind, ...] = (
    Kind("broker killed", "brokers", _broker_killed, "kill -9, back after seconds"),
    Kind("two brokers killed", "brokers", _two_brokers_killed, "kill -9 of two of three"),
    Kind(
        "coordinator moved",
        "brokers",
        _coordinator_moved,
        "the broker that coordinates a scorer's transactions is restarted",
    ),
)
