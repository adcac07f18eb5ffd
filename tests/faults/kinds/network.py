"""Links to brokers and store that are cut or slow."""

import time
from random import Random

from tests.faults.kinds.kind import Kind, some_worker
from tests.faults.proxy import Rule
from tests.faults.world import FaultyShop, Worker, World

CUT_SECONDS = (3.0, 9.0)


def _cut_brokers(world: World, shop: FaultyShop, random: Random) -> str:
    worker = some_worker(shop, random)
    kafka = world.servers.kafka
    _cut(world, worker, [kafka.link(node) for node in kafka.brokers], random.uniform(*CUT_SECONDS))
    return worker.name


def _cut_store(world: World, shop: FaultyShop, random: Random) -> str:
    worker = some_worker(shop, random)
    _cut(world, worker, shop.stores.links(), random.uniform(*CUT_SECONDS))
    return worker.name


def _cut(world: World, worker: Worker, links: list[str], seconds: float) -> None:
    _break(world, [Rule(link, worker.pid) for link in links], seconds)


def _slow_links(world: World, shop: FaultyShop, random: Random) -> str:
    worker = some_worker(shop, random)
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


KINDS: tuple[Kind, ...] = (
    Kind("broker link cut", "network", _cut_brokers, "nothing passes between a worker and Kafka"),
    Kind("store link cut", "network", _cut_store, "nothing passes between a worker and the store"),
    Kind("slow links", "network", _slow_links, "20 to 150 ms each way to brokers and store"),
)
