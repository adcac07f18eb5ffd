"""Three Kafka brokers and a controller, each of which can be killed and started again."""

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shutil import which

from streams.embedded import HOST, free_ports, kafka_answers
from tests.faults.process import Server, until
from tests.faults.proxy import Proxy
from tests.servers import CLUSTER_ID, FORMAT_TIMEOUT_S, JARS, ServerError, why_no_kafka

KAFKA_SECONDS = 90.0  # a broker that never gets ready would hang the run
OFFSETS_PARTITIONS = 6
HANGING_SECONDS = 30.0  # a transaction of a live worker is over long before
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


class KafkaCluster:
    """A controller and three brokers; replication 3, min ISR 2."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        if missing := why_no_kafka():
            raise ServerError(missing)
        self.proxy = proxy
        # All at once: they start together, and a proxy at one's port would answer in its place.
        controller, *ports = free_ports(1 + 3 * 4)
        self.controller = self._server(folder / "controller", 100, controller, ports[:3])
        self.brokers = {
            node: self._server(folder / f"broker-{node}", node, controller, ports[3 * node :])
            for node in (1, 2, 3)
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

    def _server(self, folder: Path, node: int, controller: int, ports: Sequence[int]) -> Server:
        folder.mkdir(parents=True)
        roles = "controller" if node == 100 else "broker"
        text = COMMON + (CONTROLLER if node == 100 else BROKER)
        direct, behind, proxied = ports[:3]
        if node != 100:
            self.proxy.add(self.link(node), behind, proxied)
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
