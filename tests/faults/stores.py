"""Stores that fail: a primary with a replica and sentinels, and a cluster with replicas."""

import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import redis

from streams import embedded
from streams.embedded import HOST, free_port
from tests.faults.process import Server, until
from tests.faults.proxy import Proxy, Rule

STORE_SECONDS = 60.0  # a failover that never comes ends the run

# KEYS: a hash tag. All keys that have it, and what they hold.
REMEMBER = """
local held = {}
for _, key in ipairs(redis.call('KEYS', '*' .. KEYS[1] .. '*')) do
  held[#held + 1] = key
  held[#held + 1] = redis.call('DUMP', key)
end
return held
"""
RESTORE = """
for _, key in ipairs(redis.call('KEYS', '*' .. KEYS[1] .. '*')) do
  redis.call('DEL', key)
end
for at = 1, #ARGV, 2 do
  redis.call('RESTORE', ARGV[at], 0, ARGV[at + 1])
end
"""


@dataclass
class Node:
    """One server of a store: its process, its own port and the proxy's."""

    server: Server
    port: int
    proxied: int

    @property
    def link(self) -> str:
        """The proxy's name of it."""
        return self.server.name

    def client(self) -> Any:
        """Straight to it, round the proxy."""
        return redis.Redis(HOST, self.port, socket_timeout=3, decode_responses=True)

    def ask(self, *command: Any) -> Any:
        """The answer to one command."""
        with self.client() as client:
            return client.execute_command(*command)

    def is_primary(self) -> bool:
        """Whether it is up and takes writes."""
        try:
            with self.client() as client:
                return client.info("replication")["role"] == "master"
        except (redis.RedisError, OSError):
            return False


def _node(folder: Path, name: str, proxy: Proxy, *options: str, announce: str) -> Node:
    port = free_port()
    proxied = proxy.add(name, port)
    command = [
        *(embedded._store_binary(), "--port", str(port), "--bind", HOST, "--save", ""),
        *("--appendonly", "no", "--maxmemory-policy", "noeviction", "--dir", str(folder / name)),
        *("--repl-diskless-sync-delay", "0", "--repl-timeout", "10"),
        *(f"--{announce}-port", str(proxied)),
        *options,
    ]
    (folder / name).mkdir(parents=True)

    def ready() -> bool:
        return embedded._store_answers(f"redis://{HOST}:{port}")

    server = Server(name, command, f"{HOST}:{port}", folder / name, ready, STORE_SECONDS)
    return Node(server, port, proxied)


@dataclass
class Stores(ABC):
    """What both kinds of store have: nodes, and what can be done to them."""

    folder: Path
    proxy: Proxy
    nodes: list[Node] = field(default_factory=list[Node])

    def primaries(self) -> list[Node]:
        return [node for node in self.nodes if node.is_primary()]

    def links(self) -> list[str]:
        return [node.link for node in self.nodes]

    @property
    @abstractmethod
    def url(self) -> str:
        """Where workers find it."""

    @abstractmethod
    def fail_over(self, random: Random) -> str:
        """A replica takes over with all that was written; its name."""

    @abstractmethod
    def lose_writes(self, seconds: float, random: Random) -> str:
        """A primary dies, and its replica takes over without the last writes; its name."""

    def empty(self) -> None:
        """As a store that came back without its memory."""
        for node in self.primaries():
            node.ask("FLUSHALL")
            node.ask("FUNCTION", "FLUSH")

    def go_back(self, seconds: float) -> None:
        """Every partition is again as it was, at once: a failover too quick to be seen."""
        before: list[tuple[Any, list[tuple[bytes, list[bytes]]]]] = []
        for node in self.primaries():
            client: Any = redis.Redis(HOST, node.port, socket_timeout=10)
            tags = {key[key.index(b"{") : key.index(b"}") + 1] for key in client.keys("*{*}*")}
            before.append((client, [(tag, client.eval(REMEMBER, 1, tag)) for tag in sorted(tags)]))
        time.sleep(seconds)  # what workers write meanwhile is what will be lost
        for client, partitions in before:
            for tag, held in partitions:
                client.eval(RESTORE, 1, tag, *held)
            client.close()

    def fill(self, full: bool) -> None:
        """No memory left, or enough."""
        for node in self.nodes:
            node.ask("CONFIG", "SET", "maxmemory", "1" if full else "0")

    def close(self) -> None:
        for node in self.nodes:
            node.server.kill()

    def _lose(self, primary: Node, replica: Node, seconds: float) -> None:
        """Kill a primary whose last writes have not reached its replica."""
        cut = Rule(primary.link, replica.server.pid)
        try:
            self.proxy.break_(cut)
            time.sleep(seconds)
            primary.server.kill()
        finally:
            self.proxy.heal(cut, discard=True)


class SentinelStore(Stores):
    """A primary, a replica, and three sentinels that fail over when two agree."""

    NAME = "starcast"

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        super().__init__(folder, proxy)
        for name in ("store-1", "store-2"):
            node = _node(folder, name, proxy, announce="replica-announce")
            node.server.start()
            self.nodes.append(node)
        first, second = self.nodes
        second.ask("REPLICAOF", HOST, first.proxied)
        until(lambda: _in_sync(first, 1), STORE_SECONDS)
        self.sentinels = [self._sentinel(number, first) for number in (1, 2, 3)]
        until(lambda: all(self._sees(each) for each in self.sentinels), STORE_SECONDS)

    @property
    def url(self) -> str:
        hosts = ",".join(f"{HOST}:{node.port}" for node in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.NAME}"

    def fail_over(self, random: Random) -> str:
        (primary,) = self.primaries()
        (replica,) = [node for node in self.nodes if node is not primary]
        until(lambda: _in_sync(primary, 1), STORE_SECONDS)
        with suppress(redis.RedisError):
            primary.ask("CLIENT", "PAUSE", 3_000, "WRITE")
            until(lambda: _behind(primary) == 0, 2)
            self.sentinels[0].ask("SENTINEL", "FAILOVER", self.NAME)
        until(lambda: replica.is_primary(), STORE_SECONDS)
        with suppress(redis.RedisError):
            primary.ask("CLIENT", "UNPAUSE")
        return self._settle(replica)

    def lose_writes(self, seconds: float, random: Random) -> str:
        (primary,) = self.primaries()
        (replica,) = [node for node in self.nodes if node is not primary]
        until(lambda: _in_sync(primary, 1), STORE_SECONDS)
        try:
            self._lose(primary, replica, seconds)
            until(lambda: replica.is_primary(), STORE_SECONDS)
        finally:
            primary.server.start()
        return self._settle(replica)

    def _settle(self, primary: Node) -> str:
        until(lambda: _in_sync(primary, 1) and len(self.primaries()) == 1, STORE_SECONDS)
        return primary.server.name

    def close(self) -> None:
        for node in self.sentinels:
            node.server.kill()
        super().close()

    def _sentinel(self, number: int, primary: Node) -> Node:
        port, name = free_port(), f"sentinel-{number}"
        folder = self.folder / name
        folder.mkdir()
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind {HOST}\ndir {folder}\n"
            f"sentinel monitor {self.NAME} {HOST} {primary.proxied} 2\n"
            f"sentinel down-after-milliseconds {self.NAME} 1500\n"
            f"sentinel failover-timeout {self.NAME} 5000\n"
        )
        command = [embedded._store_binary(), str(config), "--sentinel"]

        def ready() -> bool:
            return embedded._store_answers(f"redis://{HOST}:{port}")

        server = Server(name, command, f"{HOST}:{port}", folder, ready, STORE_SECONDS)
        server.start()
        return Node(server, port, port)

    def _sees(self, sentinel: Node) -> bool:
        with sentinel.client() as client:
            found = client.sentinel_master(self.NAME)
        return found["num-slaves"] == 1 and found["num-other-sentinels"] == 2


class ClusterStore(Stores):
    """A cluster of three primaries, each with a replica."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        super().__init__(folder, proxy)
        for number in range(6):
            bus = free_port()
            node = _node(
                folder,
                f"cluster-{number}",
                proxy,
                *("--cluster-enabled", "yes", "--cluster-port", str(bus)),
                *("--cluster-node-timeout", "2000", "--cluster-announce-bus-port", str(bus)),
                *("--cluster-announce-ip", HOST, "--cluster-allow-replica-migration", "no"),
                announce="cluster-announce",
            )
            node.server.start()
            self.nodes.append(node)
            if number:
                first = self.nodes[0]
                node.ask("CLUSTER", "MEET", HOST, first.port, self._bus(first))
        for number, node in enumerate(self.nodes[:3]):
            node.ask(
                "CLUSTER", "ADDSLOTSRANGE", number * 16_384 // 3, (number + 1) * 16_384 // 3 - 1
            )
        until(lambda: all(self._known(node) == 6 for node in self.nodes), STORE_SECONDS)
        for replica, primary in zip(self.nodes[3:], self.nodes[:3], strict=True):
            id_ = primary.ask("CLUSTER", "MYID")
            until(lambda r=replica, i=id_: self._follow(r, i), STORE_SECONDS)
        self.wait()

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.nodes[0].proxied}"

    def wait(self) -> None:
        """Until all six are in their places."""
        until(self._whole, STORE_SECONDS)

    def fail_over(self, random: Random) -> str:
        self.wait()
        replica = random.choice(self._replicas())
        replica.ask("CLUSTER", "FAILOVER")
        until(lambda: replica.is_primary(), STORE_SECONDS)
        self.wait()
        return replica.server.name

    def lose_writes(self, seconds: float, random: Random) -> str:
        self.wait()
        replica = random.choice(self._replicas())
        proxied = int(replica.client().info("replication")["master_port"])
        (primary,) = [node for node in self.nodes if node.proxied == proxied]
        try:
            self._lose(primary, replica, seconds)
            until(lambda: replica.is_primary(), STORE_SECONDS)
        finally:
            primary.server.start()
        self.wait()
        return replica.server.name

    def _replicas(self) -> list[Node]:
        return [node for node in self.nodes if not node.is_primary()]

    @staticmethod
    def _bus(node: Node) -> int:
        command = list(node.server.command)
        return int(command[command.index("--cluster-port") + 1])

    @staticmethod
    def _known(node: Node) -> int:
        return int(_info(node)["cluster_known_nodes"])

    @staticmethod
    def _follow(replica: Node, primary: str) -> bool:
        try:
            replica.ask("CLUSTER", "REPLICATE", primary)
        except redis.RedisError:
            return False
        return True

    def _whole(self) -> bool:
        try:
            primaries = self.primaries()
            return (
                len(primaries) == 3
                and all(_info(node)["cluster_state"] == "ok" for node in self.nodes)
                and all(_in_sync(node, 1) for node in primaries)
            )
        except (redis.RedisError, OSError):
            return False


def _info(node: Node) -> dict[str, str]:
    answer = node.ask("CLUSTER", "INFO")
    if isinstance(answer, dict):
        return answer
    return dict(line.split(":", 1) for line in str(answer).split() if ":" in line)


def _in_sync(primary: Node, replicas: int) -> bool:
    try:
        with primary.client() as client:
            found = client.info("replication")
    except (redis.RedisError, OSError):
        return False
    states = [found.get(f"slave{at}", {}).get("state") for at in range(replicas)]
    return found["role"] == "master" and states == ["online"] * replicas


def _behind(primary: Node) -> int:
    """Bytes that the replica has not acknowledged."""
    with primary.client() as client:
        found = client.info("replication")
    return int(found["master_repl_offset"]) - int(found["slave0"]["offset"])
