"""A scripted Kafka: what a consumer and a producer see of a broker, without one.

Only what `streams.loop` relies on, and strict about it: a transaction is begun once, offsets of an
older generation are refused, a seek needs an assignment, and each input position may be committed
once and in order.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    OFFSET_INVALID,
    TIMESTAMP_LOG_APPEND_TIME,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

Place = tuple[str, int]
Rebalance = Callable[[Any, list[TopicPartition]], None]


def failure(code: int, **flags: bool) -> KafkaException:
    return KafkaException(KafkaError(code, "scripted", **flags))


def metadata(generation: int) -> bytes:
    return b"CGMDv2:" + struct.pack("=i", generation) + b"group\0member\0"


class Broker:
    """Input logs, committed offsets, and the outputs of committed transactions."""

    def __init__(self) -> None:
        self.logs: dict[Place, list[bytes]] = {}
        self.times: dict[Place, list[int]] = {}  # of its records, ms
        self.first: dict[Place, int] = {}  # retention has taken what lies below
        self.committed: dict[Place, int] = {}
        self.outputs: list[tuple[str, bytes | None]] = []
        self.generation = 1
        self.consumers: list[ScriptedConsumer] = []
        self.producers: list[ScriptedProducer] = []
        self.failures: dict[str, deque[KafkaException]] = {}  # by method, of the next calls

    def consumer(self, config: Mapping[str, Any]) -> "ScriptedConsumer":
        self.consumers.append(ScriptedConsumer(self, config))
        return self.consumers[-1]

    def producer(self, config: Mapping[str, Any]) -> "ScriptedProducer":
        self.producers.append(ScriptedProducer(self, config))
        return self.producers[-1]

    def append(self, topic: str, partition: int, *values: bytes) -> None:
        self.logs.setdefault((topic, partition), []).extend(values)

    def fail(self, method: str, *failures: KafkaException) -> None:
        self.failures.setdefault(method, deque()).extend(failures)

    def may_fail(self, method: str) -> None:
        if waiting := self.failures.get(method):
            raise waiting.popleft()

    def watermarks(
        self, _: Any, places: Iterable[TopicPartition], __: float
    ) -> dict[Place, tuple[int, int]]:
        """In place of `streams.clients.watermarks`."""
        self.may_fail("watermarks")
        return {
            place: (self.first.get(place, 0), len(self.logs.get(place, [])))
            for each in places
            for place in [(each.topic, each.partition)]
        }

    def commit(self, offsets: Iterable[TopicPartition]) -> None:
        for each in offsets:
            place = each.topic, each.partition
            assert each.offset > self.committed.get(place, 0), "offsets moved back"
            self.committed[place] = each.offset


class ScriptedConsumer:
    """Gives the messages of assigned partitions that are not paused, in order."""

    def __init__(self, broker: Broker, config: Mapping[str, Any]) -> None:
        self.broker = broker
        self.config = config
        self.positions: dict[Place, int] = {}
        self.paused: set[Place] = set()
        self.generation = 0  # as this member knows it; below 1: it is in no group
        self.between: deque[Callable[[], None]] = deque()  # run by the next calls of `consume`
        self.errors: deque[Message] = deque()
        self.most: dict[Place, int] = {}  # records of a partition in one call of `consume`
        self.told: dict[Place, int] = {}  # ends of partitions, where they are wanted
        self.commits: list[list[TopicPartition]] = []  # asked for, not answered
        self.waits: list[float] = []  # the timeouts of `consume`
        self.closed = False

    def subscribe(
        self, topics: list[str], on_assign: Rebalance, on_revoke: Rebalance, on_lost: Rebalance
    ) -> None:
        self.topics = topics
        self.on_assign, self.on_revoke, self.on_lost = on_assign, on_revoke, on_lost

    def rebalance(
        self, gone: Iterable[Place] = (), new: Iterable[Place] = (), lost: bool = False
    ) -> None:
        """What the group's coordinator says: first what is gone, then what is new."""
        self.broker.generation += 1
        self.generation = self.broker.generation
        if gone := sorted(gone):
            call = self.on_lost if lost else self.on_revoke
            call(self, [TopicPartition(*place) for place in gone])
            assert not self.positions.keys() & gone, "kept what is gone"
        if new := sorted(new):
            self.on_assign(self, [TopicPartition(*place) for place in new])

    def consume(self, count: int, timeout: float) -> list[Message]:
        self.waits.append(timeout)
        self._answer_commits()
        if self.between:
            self.between.popleft()()
        found, ends = list[Message](), list[Message]()
        while self.errors and len(found) < count:
            found.append(self.errors.popleft())
        for place, position in sorted(self.positions.items()):
            if place in self.paused:
                continue
            most = min(count - len(found), self.most.get(place, count))
            values = self.broker.logs.get(place, [])[position:][:most]
            self.positions[place] = position + len(values)
            found += [
                self._message(place, offset, value) for offset, value in enumerate(values, position)
            ]
            end = len(self.broker.logs.get(place, []))
            if self.positions[place] == end != self.told.get(place):
                self.told[place] = end
                ends += self._ends(place, end)
        return found + ends  # beyond the count, so that batches do not hang on them

    def _message(self, place: Place, offset: int, value: bytes) -> Message:
        options: dict[str, Any] = {"topic": place[0], "partition": place[1], "offset": offset}
        if times := self.broker.times.get(place):
            options["timestamp"] = (TIMESTAMP_LOG_APPEND_TIME, times[offset])
        return Message(value=value, **options)

    def _ends(self, place: Place, end: int) -> list[Message]:
        if not self.config["enable.partition.eof"]:
            return []
        error = KafkaError(KafkaError._PARTITION_EOF)
        return [Message(topic=place[0], partition=place[1], offset=end, error=error)]

    def consumer_group_metadata(self) -> bytes:
        return metadata(self.generation)

    def memberid(self) -> str:
        return "member"

    def assign(self, partitions: list[TopicPartition]) -> None:
        assert all(each.offset == OFFSET_BEGINNING for each in partitions), "may be deleted"
        self.positions = {(each.topic, each.partition): 0 for each in partitions}
        self.paused = set()

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        assert all(each.offset == OFFSET_BEGINNING for each in partitions), "may be deleted"
        self.positions |= {(each.topic, each.partition): 0 for each in partitions}

    def unassign(self) -> None:
        self.positions, self.paused = {}, set()

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        for each in partitions:
            del self.positions[each.topic, each.partition]
            self.paused.discard((each.topic, each.partition))

    def pause(self, partitions: list[TopicPartition]) -> None:
        places = {(each.topic, each.partition) for each in partitions}
        assert places <= self.positions.keys(), "paused what is not assigned"
        self.paused |= places

    def resume(self, partitions: list[TopicPartition]) -> None:
        self.paused -= {(each.topic, each.partition) for each in partitions}

    def seek(self, where: TopicPartition) -> None:
        self.broker.may_fail("seek")
        place = where.topic, where.partition
        if place not in self.positions:
            raise failure(KafkaError._STATE)
        first = self.broker.first.get(place, 0)
        self.positions[place] = first if where.offset == OFFSET_BEGINNING else where.offset
        self.told.pop(place, None)

    def committed(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        self.broker.may_fail("committed")
        return [
            TopicPartition(
                each.topic,
                each.partition,
                self.broker.committed.get((each.topic, each.partition), -1001),
            )
            for each in partitions
        ]

    def position(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        return [
            TopicPartition(each.topic, each.partition, self.positions[each.topic, each.partition])
            for each in partitions
        ]

    def get_watermark_offsets(
        self, where: TopicPartition, timeout: float | None = None, cached: bool = False
    ) -> tuple[int, int]:
        (found,) = self.broker.watermarks(None, [where], 0).values()
        return found

    def commit(self, offsets: list[TopicPartition], asynchronous: bool) -> None:
        assert asynchronous, "a commit that is waited for may hang"
        self.broker.may_fail("commit")
        self.commits.append(offsets)

    def _answer_commits(self) -> None:
        for offsets in self.commits:
            problem: KafkaError | None = None
            try:
                self.broker.may_fail("answer commit")
                self.broker.commit(offsets)
            except KafkaException as error:
                problem = error.args[0]
            self.config["on_commit"](problem, offsets)
        self.commits = []

    def close(self) -> None:
        self._answer_commits()
        self.closed = True


class ScriptedProducer:
    """Outputs and offsets of a transaction are seen once it is committed, or never."""

    def __init__(self, broker: Broker, config: Mapping[str, Any]) -> None:
        self.broker = broker
        self.config = config
        self.transactional = "transactional.id" in config
        self.begun = False
        self.ready = False
        self.room = 1_000_000  # messages that `produce_batch` still takes
        self.outputs: list[tuple[str, bytes | None]] = []
        self.partitions: list[int] = []  # that each output was sent to; -1: by its key
        self.offsets: list[TopicPartition] = []
        self.reports: list[Callable[[], None]] = []

    def init_transactions(self, timeout: float) -> None:
        self.broker.may_fail("init_transactions")
        self.ready = True

    def begin_transaction(self) -> None:
        self.broker.may_fail("begin_transaction")
        if self.begun or not self.ready:
            raise failure(KafkaError._STATE)
        self.begun = True

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        partition: int = -1,
        headers: Any = None,
        on_delivery: Callable[[KafkaError | None, Message], None] | None = None,
    ) -> None:
        self.broker.may_fail("produce")
        offset = sum(each == topic for each, _ in self.broker.outputs + self.outputs)
        self.outputs.append((topic, value))
        self.partitions.append(partition)
        message = Message(topic=topic, partition=max(partition, 0), offset=offset, value=value)
        failed: KafkaError | None = None
        try:
            self.broker.may_fail("deliver")
        except KafkaException as problem:
            failed = problem.args[0]
        if on_delivery is not None:
            report = on_delivery
            self.reports.append(lambda: report(failed, message))
        if not self.transactional:
            self.broker.outputs += self.outputs if failed is None else []
            self.outputs = []

    def produce_batch(
        self,
        topic: str,
        messages: list[dict[str, Any]],
        partition: int = -1,
        on_delivery: Any = None,
    ) -> int:
        queued = 0
        for message in messages:
            assert "_error" not in message
            try:
                self.broker.may_fail("produce_batch")
                if not self.room:
                    raise failure(KafkaError._QUEUE_FULL)
                self.produce(topic, message["value"], partition=partition, on_delivery=on_delivery)
                self.room -= 1
                queued += 1
            except KafkaException as problem:
                message["_error"] = problem.args[0]
        return queued

    def poll(self, timeout: float) -> int:
        self.room = 1_000_000
        return 0

    def flush(self, timeout: float) -> int:
        self.broker.may_fail("flush")
        for report in self.reports:
            report()
        self.reports = []
        return 0

    def send_offsets_to_transaction(
        self, offsets: list[TopicPartition], group: bytes, timeout: float
    ) -> None:
        assert self.begun
        self.broker.may_fail("send_offsets_to_transaction")
        if group != metadata(self.broker.generation):
            raise failure(KafkaError.ILLEGAL_GENERATION, txn_requires_abort=True)
        self.offsets = offsets

    def commit_transaction(self, timeout: float) -> None:
        assert self.begun
        self.broker.may_fail("commit_transaction")
        self.flush(timeout)
        self.broker.commit(self.offsets)
        self.broker.outputs += self.outputs
        self._end()

    def abort_transaction(self, timeout: float) -> None:
        self.broker.may_fail("abort_transaction")
        if not self.begun:
            raise failure(KafkaError._STATE)
        self._end()

    def _end(self) -> None:
        self.begun, self.outputs, self.offsets, self.reports = False, [], [], []


@dataclass
class Offsets:
    """A consumer that is told, of each partition in order, the offset of its beginning and end."""

    lows: list[int | KafkaError]
    highs: list[int | KafkaError]
    closed: bool = False

    def offsets_for_times(self, asked: list[TopicPartition], _: float) -> list[TopicPartition]:
        told = {OFFSET_BEGINNING: self.lows, OFFSET_END: self.highs}[asked[0].offset]
        found = [
            SimpleNamespace(
                topic=each.topic,
                partition=each.partition,
                offset=OFFSET_INVALID if isinstance(offset, KafkaError) else offset,
                error=offset if isinstance(offset, KafkaError) else None,
            )
            for each, offset in zip(asked, told, strict=True)
        ]
        return cast(list[TopicPartition], found[::-1])  # in an order of its own

    def close(self) -> None:
        self.closed = True
