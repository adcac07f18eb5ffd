"""Kafka Streams, exactly-once: a Java program, user states in RocksDB, the network by ONNX Runtime.

The program (`kafka_streams/`, built by Maven at first use) does what `work.Work` does, ported: the
same decoding, states, features, network, trees, taste and calibration, so that its predictions are
ours (`tests/unit/bench/test_kafka_streams.py` compares them). What it does otherwise:

- Item states, attributes and vectors are read from the store once, before the first event, into
  its memory; the others ask the store for item states in each batch. User states and running means
  are taken over from the store likewise, and then live in RocksDB and their changelog topics:
  unlike the other peers' states, they are committed with the predictions.
- It does not sum up what a batch did to items, which the others compute and throw away.
- Of the contract it checks that ids, time and action are there, ids' lengths and numbers' ranges;
  not a text's length, a time's range or a NUL.

Kafka Streams hands over one record at a time; a task gathers up to `batch / partitions` of them for
one call of the network. Those that wait stand in a state store of their own, so that a commit
between two of them loses nothing.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import orjson
from pydantic import SecretStr

from bench.peers import export
from bench.peers.launch import ENVIRONMENTS, INSTALL_SECONDS, LONGEST_TAIL, PEERS, PeerError
from bench.peers.work import Mark, Settings, figures_of, read_settings, show
from model import bundle, registry
from model.bundle import Bundle
from model.state import LAYOUT_HASH
from schemas.exceptions import StarcastError
from streams.config import RedisConfig
from streams.store import Store

SOURCE = Path(__file__).with_name("kafka_streams")
BUILT = ENVIRONMENTS / "kafka_streams" / "java"
JAVA = ("java", "-Xms1g", "-Xmx1g", "-XX:+UseParallelGC")
LOG = "-Dorg.slf4j.simpleLogger.defaultLogLevel=error"

GATHER_SECONDS = 1.0  # an event waits no longer than this for a fuller call

STREAMS: Mapping[str, Any] = {
    "num.stream.threads": 1,
    "commit.interval.ms": 1_000,
    "max.task.idle.ms": -1,  # else it waits for behaviour where reviews are there, and so idles
    "statestore.cache.max.bytes": 128 * 2**20,
    "producer.compression.type": "lz4",
    "producer.linger.ms": 5,
    "producer.batch.size": 256 * 1024,
    "consumer.max.poll.records": 2_000,
}
"""What was changed of Kafka Streams' own configuration."""


def build() -> str:
    """The class path of the program; it is built at first use, or when its source changed.

    Raises PeerError when it cannot be.
    """
    files = sorted(each for each in SOURCE.rglob("*") if each.suffix in (".java", ".xml"))
    digest = sha256(b"".join(each.read_bytes() for each in files)).hexdigest()
    made_of = BUILT / "made-of"
    if not made_of.exists() or made_of.read_text() != digest:
        shutil.rmtree(BUILT, ignore_errors=True)
        command = ["mvn", "--batch-mode", "--quiet", "--file", str(SOURCE / "pom.xml")]
        command += [f"-Dbuild.folder={BUILT.absolute()}", "package"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"Maven did not run: {error}") from error
        if ended.returncode:
            raise PeerError(f"Maven failed: {ended.stdout[-LONGEST_TAIL:]}")
        made_of.write_text(digest)
    return f"{BUILT.absolute()}/*"


def versions() -> dict[str, str]:
    """Of what the program is made of."""
    space = "{http://maven.apache.org/POM/4.0.0}"
    found = ElementTree.parse(SOURCE / "pom.xml").iter(f"{space}dependency")
    named = [
        [each.findtext(space + tag, "") for tag in ("artifactId", "version")] for each in found
    ]
    return {name: version for name, version in named if name in ("kafka-streams", "onnxruntime")}


def fill(folder: Path, given: Settings, loaded: Bundle) -> None:
    """Fill a folder with what the program reads."""
    store = Store(RedisConfig(url=SecretStr(given.redis)), LAYOUT_HASH, given.partitions)
    rows = export.from_store(store, loaded)
    store.close()
    told = {
        "bootstrap": given.bootstrap,
        "prefix": given.prefix,
        "inputs": given.inputs,
        "output": given.output,
        "application": f"{given.prefix}scoring",
        "events": given.events,
        "warm_up": PEERS["kafka_streams"].warm_up,
        "batch": given.batch,
        "partitions": given.partitions,
        "gather_ms": round(GATHER_SECONDS * 1_000),
        "streams": STREAMS,
    }
    export.write_settings(folder, told | export.write(folder, loaded, rows))


def main() -> int:
    """Run the program over the events that wait in its topics; its figures as JSON."""
    given = read_settings("kafka_streams")
    stable = registry.read(given.models).stable
    if stable is None:
        raise StarcastError(f"{given.models} has no stable version.")
    loaded = bundle.load(given.models, stable.version, stable.sha256)
    path = build()
    with tempfile.TemporaryDirectory(prefix="starcast-kafka-streams-") as name:
        fill(Path(name), given, loaded)
        command = [*JAVA, LOG, "-cp", path, "starcast.peer.Main", name]
        ended = subprocess.run(command, stdout=subprocess.PIPE)
    if ended.returncode:
        raise PeerError(f"The program ended with {ended.returncode}.")
    figures = orjson.loads(ended.stdout.splitlines()[-1])
    show(
        figures_of(
            [Mark(**mark) for mark in figures["marks"]],
            figures["events"] / figures["calls"],
            figures["memory_mb"],
            versions(),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
