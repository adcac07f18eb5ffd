"""Servers that fail: three Kafka brokers, a store with replica and sentinels, a store cluster.

Each server can be killed, stopped and started again where it was. Workers reach all of them through
a proxy; the harness itself goes round it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

import redis

from streams import embedded
from streams.embedded import HOST, Child, free_port, kafka_answers, start_child
from tests.faults.proxy import Proxy, Rule
from tests.servers import CLUSTER_ID, FORMAT_TIMEOUT_S, JARS, ServerError, why_no_kafka

KAFKA_SECONDS = 90.0  # a broker that never gets ready would hang the run
SHUTDOWN_SECONDS = 30.0  # a broker hands its partitions over before it ends
OFFSETS_PARTITIONS = 6
HANGING_SECONDS = 30.0  # a transaction of a live worker is over long before
STORE_SECONDS = 60.0  # a failover that never comes ends the run
JAVA = ("-Xmx400m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
QUIET = "-Dorg.slf4j.simpleLogger.defaultLogLevel=error"

COMMON = """\
node.id={node}
process.roles={roles}
controller.quorum.voters=100@{host}:{controller}
controller.listener.names=CONTROLLER
listener.security.protocol.map=DIRECT:PLAINTEXT,WORKERS:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={folder}/data
"""
CONTROLLER = """\
listeners=CONTROLLER://{host}:{controller}
broker.session.timeout.ms=4000
leader.imbalance.check.interval.seconds=20
"""
# What the promises rest on (replication, min ISR), and short waits, so that faults end soon.
BROKER = """\
listeners=DIRECT://{host}:{direct},WORKERS://{host}:{behind}
advertised.listeners=DIRECT://{host}:{direct},WORKERS://{host}:{proxied}
inter.broker.listener.name=DIRECT
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=4000
auto.create.topics.enable=false
default.replication.factor=3
min.insync.replicas=2
message.max.bytes=4194304
replica.lag.time.max.ms=4000
offsets.topic.replication.factor=3
offsets.topic.num.partitions={offsets}
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
transaction.state.log.num.partitions=6
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
share.coordinator.state.topic.replication.factor=3
share.coordinator.state.topic.min.isr=2
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.consumer.min.session.timeout.ms=6000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=500
group.consumer.heartbeat.interval.ms=1500
num.io.threads=4
num.network.threads=2
log.cleaner.dedupe.buffer.size=16777216
"""


@dataclass
class Server:
    """A process that can be ended in any way and started again where it was."""

    name: str
    command: Sequence[str]
    address: str
    folder: Path
    ready: Callable[[], bool]
    seconds: float
    child: Child | None = None

    @property
    def pid(self) -> int:
        assert self.child is not None
        return self.child.process.pid

    def start(self, wait: bool = True) -> None:
        """Start it, and wait until it answers."""
        self.child = start_child(
            self.name,
            self.command,
            self.address,
            self.folder,
            self.ready if wait else lambda: True,
            self.seconds,
            SHUTDOWN_SECONDS,
        )

    def kill(self) -> None:
        """As a power cut does."""
        assert self.child is not None
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.child.process.wait()

    def stop(self) -> None:
        """As an operator does."""
        if self.child is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self.child.stop()


class KafkaCluster:
    """A controller and three brokers; replication 3, min ISR 2."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        if missing := why_no_kafka():
            raise ServerError(missing)
        self.proxy = proxy
        controller = free_port()
        self.controller = self._server(folder / "controller", 100, controller)
        self.brokers = {
            node: self._server(folder / f"broker-{node}", node, controller) for node in (1, 2, 3)
        }
        servers = [self.controller, *self.brokers.values()]
        self._format(servers)
        for server in servers:  # together: JVMs take seconds
            server.start(wait=False)
        until(lambda: all(server.ready() for server in self.brokers.values()), KAFKA_SECONDS)

    @property
    def direct(self) -> str:
        """Bootstrap servers round the proxy."""
        return ",".join(server.address for server in self.brokers.values())

    @property
    def workers(self) -> str:
        """Bootstrap servers through the proxy."""
        return ",".join(f"{HOST}:{self.proxy.ports[self.link(node)]}" for node in self.brokers)

    @staticmethod
    def link(node: int) -> str:
        """The proxy's name of a broker."""
        return f"broker-{node}"

    def end_hanging(self) -> int:
        """What an operator does: end transactions that hang on groups' offsets; how many.

        Kafka 4.3.1 leaves some behind when two of three brokers are killed: an offset commit whose
        transaction is over, with no marker after it.
        """
        ended = 0
        for partition in range(OFFSETS_PARTITIONS):
            where = ["--topic", "__consumer_offsets", "--partition", str(partition)]
            rows = [line.split() for line in self._transactions("describe-producers", *where)]
            for row in rows[1:]:
                latest, start = int(row[4]) / 1000, row[5]
                if start != "None" and time.time() - latest > HANGING_SECONDS:
                    self._transactions("abort", *where, "--start-offset", start)
                    ended += 1
        return ended

    def _transactions(self, *arguments: str) -> list[str]:
        java = [str(which("java")), *JAVA, QUIET, "-cp", f"{JARS}/*"]
        tool = ["org.apache.kafka.tools.TransactionsCommand", "--bootstrap-server", self.direct]
        done = subprocess.run(
            [*java, *tool, *arguments], capture_output=True, text=True, timeout=FORMAT_TIMEOUT_S
        )
        if done.returncode:
            raise ServerError(f"{' '.join(arguments)}: {done.stdout[-300:]}{done.stderr[-300:]}")
        return [line for line in done.stdout.splitlines() if line.strip()]

    def close(self) -> None:
        """End all."""
        for server in [*self.brokers.values(), self.controller]:
            with suppress(AssertionError):
                server.kill()

    def _server(self, folder: Path, node: int, controller: int) -> Server:
        folder.mkdir(parents=True)
        roles = "controller" if node == 100 else "broker"
        text = COMMON + (CONTROLLER if node == 100 else BROKER)
        direct, behind, proxied = free_port(), free_port(), 0
        if node != 100:
            proxied = self.proxy.add(self.link(node), behind)
        properties = folder / "server.properties"
        properties.write_text(
            text.format(
                node=node,
                offsets=OFFSETS_PARTITIONS,
                roles=roles,
                host=HOST,
                controller=controller,
                folder=folder,
                direct=direct,
                behind=behind,
                proxied=proxied,
            )
        )
        address = f"{HOST}:{direct}"
        command = [str(which("java")), *JAVA, QUIET, "-cp", f"{JARS}/*", "kafka.Kafka"]
        return Server(
            f"kafka-{node}",
            [*command, str(properties)],
            address,
            folder,
            lambda: kafka_answers(address),
            KAFKA_SECONDS,
        )

    @staticmethod
    def _format(servers: Sequence[Server]) -> None:
        java = [str(which("java")), *JAVA, QUIET, "-cp", f"{JARS}/*"]
        tool = [*java, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c"]
        running = [
            subprocess.Popen(
                [*tool, server.command[-1]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for server in servers
        ]
        for each in running:
            said, _ = each.communicate(timeout=FORMAT_TIMEOUT_S)
            if each.returncode:
                raise ServerError(f"Kafka's storage was not formatted: {said.decode()}")


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
        *(
            "--repl-diskless-sync-delay",
            "0",
            "--repl-timeout",
            "10",
            "--enable-debug-command",
            "yes",
        ),
        *(f"--{announce}-port", str(proxied)),
        *options,
    ]
    (folder / name).mkdir(parents=True)

    def ready() -> bool:
        return embedded._store_answers(f"redis://{HOST}:{port}")

    server = Server(name, command, f"{HOST}:{port}", folder / name, ready, STORE_SECONDS)
    return Node(server, port, proxied)


@dataclass
class Stores:
    """What both kinds of store have: nodes, and what can be done to them."""

    folder: Path
    proxy: Proxy
    nodes: list[Node] = field(default_factory=list[Node])

    def primaries(self) -> list[Node]:
        return [node for node in self.nodes if node.is_primary()]

    def links(self) -> list[str]:
        return [node.link for node in self.nodes]

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

    def memory(self) -> int:
        """Bytes used by the primaries."""
        return sum(int(node.client().info("memory")["used_memory"]) for node in self.primaries())

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

    def fail_over(self) -> None:
        """The replica takes over, with all that was written."""
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
        self._settle(replica)

    def lose_writes(self, seconds: float) -> None:
        """The primary dies, and the replica takes over without the last writes."""
        (primary,) = self.primaries()
        (replica,) = [node for node in self.nodes if node is not primary]
        until(lambda: _in_sync(primary, 1), STORE_SECONDS)
        try:
            self._lose(primary, replica, seconds)
            until(lambda: replica.is_primary(), STORE_SECONDS)
        finally:
            primary.server.start()
        self._settle(replica)

    def _settle(self, primary: Node) -> None:
        until(lambda: _in_sync(primary, 1) and len(self.primaries()) == 1, STORE_SECONDS)

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

    def fail_over(self, which: int = 0) -> None:
        """A replica takes over from its primary, with all that was written."""
        self.wait()
        replica = self._replicas()[which]
        replica.ask("CLUSTER", "FAILOVER")
        until(lambda: replica.is_primary(), STORE_SECONDS)
        self.wait()

    def lose_writes(self, seconds: float, which: int = 0) -> None:
        """A primary dies, and its replica takes over without the last writes."""
        self.wait()
        replica = self._replicas()[which]
        proxied = int(replica.client().info("replication")["master_port"])
        (primary,) = [node for node in self.nodes if node.proxied == proxied]
        try:
            self._lose(primary, replica, seconds)
            until(lambda: replica.is_primary(), STORE_SECONDS)
        finally:
            primary.server.start()
        self.wait()

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


def until(done: Callable[[], Any], seconds: float, pause: float = 0.1) -> None:
    """Wait until something is so; raises ServerError when it does not come."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise ServerError(f"waited {seconds:.0f} s in vain ({done.__qualname__})")
        time.sleep(pause)


@dataclass
class Servers:
    """All of them."""

    proxy: Proxy
    kafka: KafkaCluster
    sentinel: SentinelStore
    cluster: ClusterStore
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


def start_servers(folder: Path) -> Servers:
    """Start all servers, with their data and logs in `folder`."""
    stack = ExitStack()
    try:
        proxy = Proxy()
        stack.callback(proxy.close)
        kafka = KafkaCluster(folder / "kafka", proxy)
        stack.callback(kafka.close)
        sentinel = SentinelStore(folder / "sentinel", proxy)
        stack.callback(sentinel.close)
        cluster = ClusterStore(folder / "cluster", proxy)
        stack.callback(cluster.close)
        return Servers(proxy, kafka, sentinel, cluster, stack)
    except BaseException:
        stack.close()
        raise
