"""Runs peers of the scoring loop: each in a process of its own, some in an environment of its own.

A peer whose packages would not agree with ours, or that nothing else needs, has them locked in
`NAME.txt`. They are installed into `.cache/peers/NAME` at first use; a `.pth` file there lets what
the peer does not bring itself (torch, numba, …) come from the environment that runs us. Jars that a
peer needs, those of `NAME.pom.xml`, are copied by Maven into its folder `jars`.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from sysconfig import get_path
from typing import Any

import orjson
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from bench.peers.work import OUTPUT, WAIT_SECONDS
from schemas.exceptions import StarcastError
from streams.clients import reader
from streams.config import KafkaConfig

ENVIRONMENTS = Path(".cache/peers")
INSTALL_SECONDS = 600.0  # an index that hangs would hang the benchmark
RUN_SECONDS = 900.0  # so would a peer that waits for events which it has lost
LONGEST_TAIL = 2_000  # characters of a failed peer's last words


class PeerError(StarcastError):
    """A peer that cannot be installed, that failed, or that did not do the work."""


@dataclass(frozen=True)
class Peer:
    """A peer and how it is run."""

    name: str  # of its module
    title: str
    batches: bool  # whether it hands over many events at once
    exactly_once: bool
    own_environment: bool = False
    warm_up: int = 0  # events before the first that is measured: a JVM compiles what runs often
    apart: str = ""  # what it does otherwise than the others, told beside its figures


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("confluent", "confluent-kafka, single events", batches=False, exactly_once=True),
        Peer("quix", "Quix Streams", batches=False, exactly_once=True, own_environment=True),
        Peer("faust", "Faust, take", batches=True, exactly_once=False),
        Peer("faststream", "FastStream, batches", True, exactly_once=False, own_environment=True),
        Peer("flink", "PyFlink, pandas", batches=True, exactly_once=True, own_environment=True),
        Peer(
            "kafka_streams",
            "Kafka Streams, ONNX",
            batches=True,
            exactly_once=True,
            own_environment=True,
            warm_up=20_000,
            apart="reads items once, from a copy; sums nothing up of items; commits its states",
        ),
    )
}


def python(peer: Peer) -> Path:
    """The Python that runs a peer; its environment is made at first use, or when its lock changed.

    Raises PeerError when it cannot be.
    """
    if not peer.own_environment:
        return Path(sys.executable)
    folder = ENVIRONMENTS / peer.name
    lock, jars = (Path(__file__).with_name(peer.name + end) for end in (".txt", ".pom.xml"))
    inputs = [lock, jars] if jars.exists() else [lock]
    made_of = folder / "made-of"
    digest = sha256(b"".join(each.read_bytes() for each in inputs)).hexdigest()
    executable = (folder / "bin" / "python").absolute()
    if made_of.exists() and made_of.read_text() == digest:
        return executable
    uv = Path(sys.executable).with_name("uv")
    _install([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder])
    _install(
        [uv, "pip", "install", "--quiet", "--python", executable, "--require-hashes", "-r", lock]
    )
    if jars.exists():
        copy = ["mvn", "--batch-mode", "--quiet", "-f", jars, "dependency:copy-dependencies"]
        _install([*copy, f"-DoutputDirectory={folder.absolute() / 'jars'}"])
    [packages] = folder.glob("lib/python*/site-packages")
    # After the peer's own: where both have a package, the peer's version wins.
    (packages / "ours.pth").write_text(get_path("purelib") + "\n")
    made_of.write_text(digest)
    return executable


def run(
    peer: Peer,
    executable: Path,
    kafka: KafkaConfig,
    redis: str,
    models: str,
    events: int,
    batch: int,
) -> dict[str, Any]:
    """A peer's figures over the events that wait in its topics.

    Raises PeerError when it failed, or has not published one prediction for each event.
    """
    options = {
        "bootstrap": kafka.bootstrap_servers,
        "redis": redis,
        "models": models,
        "events": events,
        "batch": batch,
        "partitions": kafka.partitions,
        "prefix": kafka.topic_prefix,
    }
    command = [str(executable), "-m", f"bench.peers.{peer.name}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        try:
            told, said = process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"{peer.title} did not end within {RUN_SECONDS:.0f} s.") from error
        finally:
            with suppress(ProcessLookupError):  # a JVM would outlive the Python that started it
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise PeerError(f"{peer.title} failed: {said.decode()[-LONGEST_TAIL:]}")
    figures = orjson.loads(told.splitlines()[-1])
    published = predicted(kafka)
    if len(published) != events or (peer.exactly_once and published.total() != events):
        raise PeerError(
            f"{peer.title} published {published.total():,} predictions for {len(published):,} "
            f"of {events:,} events."
        )
    return figures | {"published_twice": published.total() - events}


def predicted(kafka: KafkaConfig) -> Counter[str]:
    """How often each event has a prediction that a read_committed reader sees."""
    found = Counter[str]()
    with reader(kafka, auto_offset_reset="earliest") as consumer:
        topic = kafka.topic_prefix + OUTPUT
        left = set(range(kafka.partitions))
        consumer.assign([TopicPartition(topic, partition, 0) for partition in left])
        while left:
            # One message waits for nothing; a batch would wait for more until its timeout.
            message = consumer.poll(WAIT_SECONDS)
            if message is None:
                raise PeerError(f"{topic} gave nothing for {WAIT_SECONDS:.0f} s.")
            error = message.error()
            if error is None:
                found[orjson.loads(message.value() or b"")["event_id"]] += 1
            elif error.code() == KafkaError._PARTITION_EOF:  # pyright: ignore[reportPrivateUsage]
                left.discard(message.partition() or 0)
            else:
                raise KafkaException(error)
    return found


def _install(command: list[Any]) -> None:
    words = [str(word) for word in command]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"{words[0]} did not run: {error}") from error
    if ended.returncode:
        said = ended.stderr or ended.stdout  # Maven tells its errors on stdout
        raise PeerError(f"{' '.join(words)} failed: {said[-LONGEST_TAIL:]}")
