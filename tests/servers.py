"""Real servers for tests and benchmarks: Apache Kafka on loopback from jars, Valkey, S3 by moto.

`python -m tests.servers` runs the first two until Ctrl-C and prints where they listen.
"""

import signal
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from subprocess import run
from urllib.request import urlopen

from schemas.exceptions import StarcastError
from streams.embedded import (
    HOST,
    Child,
    Endpoints,
    free_port,
    free_ports,
    kafka_answers,
    start_child,
    start_store,
)

_CACHE = Path(__file__).parents[1] / ".cache"
JARS = _CACHE / "kafka" / "libs"
MOTO = _CACHE / "moto" / "bin" / "moto_server"
CLUSTER_ID = "MkU3OEVBNTcwNTJENDM2Qg"  # any 16 bytes, base64
JVM = ("-Xmx512m", "-XX:+UseSerialGC")
# Only the first of Java's compilers: a broker that lasts minutes takes half the processor time so.
BRIEF = "-XX:TieredStopAtLevel=1"
KAFKA_STARTUP_TIMEOUT_S = 90.0  # a broker that never gets ready would hang the whole test run
MOTO_STARTUP_TIMEOUT_S = 60.0  # so would an object store
FORMAT_TIMEOUT_S = 60.0  # so would a storage tool that waits for something

# One broker that is its own controller, with short waits and few internal partitions. Groups start
# at once, dead members are noticed in a second, and a hanging transaction is ended soon.
PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers={host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
message.max.bytes=4194304
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
transaction.max.timeout.ms=60000
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.consumer.min.session.timeout.ms=1000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=500
group.consumer.heartbeat.interval.ms=1000
log.cleaner.dedupe.buffer.size=16777216
log.retention.check.interval.ms=5000
"""


class ServerError(StarcastError):
    """A server that tests need cannot be had here."""


def start_kafka(folder: Path, overrides: str = "", *, lasting: bool = False) -> Child:
    """Start Apache Kafka with its data and log in `folder`; `overrides` are lines of properties.

    With `lasting` it gets as fast as it can be, in the end.
    """
    if missing := why_no_kafka():
        raise ServerError(missing)
    port, controller_port = free_ports(2)
    folder.mkdir(parents=True, exist_ok=True)
    properties = folder / "server.properties"
    properties.write_text(
        PROPERTIES.format(
            host=HOST, port=port, controller_port=controller_port, data=folder / "data"
        )
        + overrides
    )
    java = [str(which("java")), *JVM, "-cp", f"{JARS}/*"]
    quiet = ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
    tool = ["kafka.tools.StorageTool", "format", "--standalone", "-t", CLUSTER_ID]
    formatted = run(
        [*java, BRIEF, *quiet, *tool, "-c", str(properties)],
        capture_output=True,
        text=True,
        timeout=FORMAT_TIMEOUT_S,
    )
    if formatted.returncode != 0:
        raise ServerError(f"Kafka's storage in {folder} was not formatted: {formatted.stderr}")
    address = f"{HOST}:{port}"
    brief = [] if lasting else [BRIEF]
    command = [*java, *brief, *quiet, "kafka.Kafka", str(properties)]
    return start_child(
        "kafka", command, address, folder, lambda: kafka_answers(address), KAFKA_STARTUP_TIMEOUT_S
    )


def why_no_kafka() -> str | None:
    """What is missing for `start_kafka` and what to do, or None."""
    if which("java") is None:
        return "Apache Kafka needs Java 17 or later, and there is no java on the PATH: make system"
    if not any(JARS.glob("kafka_*.jar")):
        return f"Apache Kafka's jars are not in {JARS}: make kafka-jars"
    return None


def start_object_store(folder: Path) -> Child:
    """Start an S3 server that keeps its objects in memory, with its log in `folder`."""
    if not MOTO.exists():
        raise ServerError(f"There is no {MOTO}: make object-store")
    port = free_port()
    address = f"http://{HOST}:{port}"
    command = [str(MOTO), "-H", HOST, "-p", str(port)]
    folder.mkdir(parents=True, exist_ok=True)
    return start_child(
        "moto", command, address, folder, lambda: _answers(address), MOTO_STARTUP_TIMEOUT_S
    )


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def servers(folder: Path) -> Generator[Endpoints]:
    """Run Kafka and Valkey for as long as the block runs."""
    with start_kafka(folder, lasting=True) as kafka, start_store(folder) as store:
        yield Endpoints(bootstrap_servers=kafka.address, redis_url=store.address)


def main() -> int:
    """Run both servers in the foreground and print their addresses as shell lines."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="starcast-servers-") as folder:
        try:
            with servers(Path(folder)) as endpoints:
                print(f"export STARCAST_KAFKA__BOOTSTRAP_SERVERS={endpoints.bootstrap_servers}")
                print(f"export STARCAST_REDIS__URL={endpoints.redis_url}", flush=True)
                print(f"Data and logs are in {folder} until Ctrl-C.", file=sys.stderr, flush=True)
                signal.pause()
        except KeyboardInterrupt:
            return 0
        except StarcastError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
