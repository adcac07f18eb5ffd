"""The one Kafka loop that every processor shares.

A turn of the loop: poll a batch, let the processor turn it into records and state writes, send the
input offsets and the records in one transaction, and only then write the states. A thread of its
own begins the transaction, with the offsets, while the batch is processed, and ends it. While the
commit and the writes of one batch are under way there, the next is polled and processed, where the
processor allows it (`Outcome.write`); its transaction begins when they are done. Whatever changes
what is owned, claimed or held waits for them first. A partition is
worked on when all topics of the processor own it and the processor has claimed and recovered it
("live"). Whatever goes wrong in between (a lost partition, an aborted transaction, a store that
does not answer) has one answer: drop what is in memory, claim again, recover, and go on from the
committed offsets.
"""

import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from socket import gethostname
from typing import Any, Protocol

import structlog
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

from schemas.exceptions import UnreachableError
from schemas.topics import LARGEST_MESSAGE
from streams.admin import client_config
from streams.config import KafkaConfig
from streams.deadline import within
from streams.exceptions import BrokerError, FencedError, StoreAheadError, StoreError
from streams.metrics import Metrics
from streams.pace import Overlap

IDLE_SECONDS = 0.5  # an idle loop still notices a stop, a swap and a rebalance this soon
TIMED_SECONDS = 5.0  # timed work waits no longer, though it costs a wait for what is under way
TRANSACTION_SECONDS = 10.0  # a dead worker's open transaction blocks readers no longer than this
COMMIT_SECONDS = 8.0  # a broker that fails over answers late: asked again, unless to stop
CONTROL_SECONDS = 10.0  # a coordinator that moves is found again within this
HANG_SECONDS = COMMIT_SECONDS + 2.0  # what has not answered by then never will
INIT_SECONDS = 8.0  # the same for a new producer, which waits for the old one's transaction
LEAVE_SECONDS = 4.0  # a group that does not answer must not keep a worker from ending
CLAIM_SECONDS = 5.0  # a worker that recovers many partitions still polls, so that it keeps them
TWICE_SECONDS = 60.0  # fenced again so soon, a worker shares its transactional id with another
FIRST_BACK_OFF_SECONDS = 0.1  # a store or broker that is gone is asked again this soon,
LAST_BACK_OFF_SECONDS = 5.0  # and later this often
COMMITS = "-commits"  # ends the name of the thread that ends transactions
BY_KEY = -1  # a partition: that which the key's hash says
LAG_SECONDS = 1.0  # lag is measured this often: it costs a call a partition
FETCH_KILOBYTES = 8_192  # prefetched input a worker holds at most, and one answer of a broker,
FETCH_BYTES = 4 * 1024 * 1024  # which behind a backlog would hold a megabyte of each partition
FETCH_WAIT_SECONDS = 0.1  # a broker without news answers after this
PROMPT_SECONDS = 0.01  # who lingers for less has brokers answer at once; others
GATHER_BYTES = 256 * 1024  # let them gather up to this much: each fetch costs both sides
# A thread that ends a transaction has Python back this soon, each time it has waited for Kafka or
# the store: after Python's own 5 ms a time, the next batch was through before it was.
SWITCH_SECONDS = 0.0005
OUTPUT_MESSAGES = 200_000  # outputs in flight; more than the largest transaction makes

Position = tuple[str, int]  # topic (with the prefix taken off), partition


@dataclass(frozen=True, slots=True)
class Output:
    """One record to send. Without `partition` the key decides, as Java's partitioner does."""

    topic: str
    key: bytes | None
    value: bytes | None
    partition: int = -1
    headers: list[tuple[str, str | bytes | None]] | None = None


@dataclass(frozen=True, slots=True)
class OutputBatch:
    """Many records for one topic: dicts of `key`, `value` and perhaps `partition`."""

    topic: str
    messages: list[dict[str, Any]]


@dataclass
class Outcome:
    """What a processor makes of one batch."""

    batches: list[OutputBatch] = field(default_factory=list[OutputBatch])
    outputs: list[Output] = field(default_factory=list[Output])
    # More of them, made when nothing is under way any more: they tell what the batch before left.
    late: Callable[[], list[Output]] | None = None
    tracked: frozenset[str] = frozenset()  # topics of outputs whose offsets `write` needs
    # Straight after the commit. With it, the next batch may be processed before it is called, in
    # another thread: the processor goes on from what it holds in memory.
    write: Callable[[dict[Position, int]], None] | None = None
    finish: Callable[[dict[Position, int]], None] | None = None  # after both, in the loop's thread


@dataclass(frozen=True)
class _Flight:
    """A transaction whose end is under way; it is waited for before the next begins."""

    end: Callable[[], object]
    outcome: Outcome
    delivered: dict[Position, int]  # complete once `end` has come back


@dataclass(frozen=True)
class Polled:
    """A batch, and its transaction."""

    messages: list[Message]
    offsets: list[TopicPartition]  # the next of each input
    opened: Future[None] | None  # done when the transaction has begun and has the offsets
    processed: threading.Event


class Processor(Protocol):
    """What the loop asks of a processor. All calls come from the loop's own thread.

    Of what an outcome holds, only `write` may be called from another.
    """

    @property
    def name(self) -> str:
        """Its name in groups, metrics and on the command line."""
        ...

    @property
    def topics(self) -> Sequence[str]:
        """The topics it reads; all of a partition number are worked on together."""
        ...

    @property
    def together(self) -> bool:
        """Whether a partition number is worked on only when all its topics are owned."""
        ...

    @property
    def transactional(self) -> bool:
        """Whether its outputs and offsets belong in one transaction."""
        ...

    @property
    def batch_size(self) -> int:
        """Most records in one turn."""
        ...

    lag: int  # the loop sets it: records waiting in all its partitions

    @property
    def linger_seconds(self) -> float:
        """Longest wait for a fuller batch once there is a record and nothing is under way."""
        ...

    def claim(self, partition: int, committed: dict[str, int]) -> dict[str, int]:
        """Take a partition over and recover its states; where each topic is to be read from.

        `committed` has the group's committed offset of each topic, -1 where there is none: of all
        topics, or of those owned when the processor does not want them together.
        """
        ...

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget all that is held in memory of these partitions."""
        ...

    def process(self, messages: list[Message]) -> Outcome:
        """One batch. Nothing outside this process may change before the commit."""
        ...

    def idle(self) -> Outcome | None:
        """For timed work: called with nothing under way, after a batch or `TIMED_SECONDS`."""
        ...

    def close(self) -> None:
        """Called when all is well and the worker is to stop: write what still waits."""
        ...


class Loop:
    """Runs one processor until `stop` is set; ends within a batch."""

    def __init__(
        self,
        processor: Processor,
        config: KafkaConfig,
        metrics: Metrics,
        stop: threading.Event,
        slot: int = 0,
    ) -> None:
        self._processor = processor
        self._config = config
        self._metrics = metrics
        self._stop = stop
        self._log = structlog.get_logger().bind(processor=processor.name)
        self._exactly_once = config.exactly_once and processor.transactional
        self._group = f"{config.group_id}-{processor.name}"
        self._transactional_id = f"{config.topic_prefix}{self._group}-{gethostname()}-{slot}"
        self._names = {config.topic_prefix + topic: topic for topic in processor.topics}
        self._owned: set[Position] = set()
        self._live: dict[Position, int] = {}  # the next offset of what is claimed and recovered
        self._retry_at = 0.0
        self._back_off = FIRST_BACK_OFF_SECONDS
        self._fenced_at = -TWICE_SECONDS
        self._opened_at = 0.0
        self._begun_at = 0.0
        self._lag_at = 0.0
        self._idle_at = 0.0
        self._flight: _Flight | None = None
        self._overlap = Overlap()
        self._ended = False
        self._commits = ThreadPoolExecutor(1, processor.name + COMMITS)
        self._consumer = Consumer(self._consumer_config())
        self._producer = Producer(self._producer_config())

    @property
    def live(self) -> frozenset[Position]:
        """What is being worked on."""
        return frozenset(self._live)

    @property
    def waiting(self) -> bool:
        """Whether something that could be worked on is not yet."""
        return bool(self._claimable()) or not self._owned

    def run(self) -> None:
        """Work until stopped.

        Raises `BrokerError` when Kafka fences this worker for good, and what `claim` raises when
        Kafka and the processor's own store do not belong together.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        if self._exactly_once:
            self._init_transactions()
        self._consumer.subscribe(
            [self._config.topic_prefix + topic for topic in self._processor.topics],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_revoke,
        )
        try:
            while not self._stop.is_set():
                self._turn()
            self._settle()
            self._close()
        finally:
            self._ended = True
            self._commits.shutdown()
            self._processor.drop({partition for _, partition in self._live})
            self._leave()
            with suppress(KafkaException):  # a fenced one repeats why, over the error that tells
                self._producer.flush(LEAVE_SECONDS)

    def _leave(self) -> None:
        """Leave the group, or be left out of it: all that is to last has been committed.

        A group that waits for its members to join answers late, and a coordinator that is gone not
        at all; `Consumer.close` waits for both (confluent-kafka-python issue 1667).
        """
        try:
            within(LEAVE_SECONDS, self._consumer.close)
        except (KafkaException, TimeoutError) as error:
            self._log.warning("left the group without its answer", reason=str(error))

    def _close(self) -> None:
        try:
            self._processor.close()
        except StoreError as error:
            self._log.warning("not written; it is read again", reason=str(error))

    def _turn(self) -> None:
        self._claim_pending()
        waiting = FIRST_BACK_OFF_SECONDS if self._claimable() else IDLE_SECONDS
        messages = self._consumer.consume(1, waiting)
        if messages and self._processor.batch_size > 1:
            messages += self._consumer.consume(self._processor.batch_size - 1, self._gathering())
        # Read straight after the poll: a later read could carry a newer generation than the batch.
        metadata = self._consumer.consumer_group_metadata()
        batch = self._opened(*self._usable(messages), metadata)
        try:
            if batch is not None:
                self._finish(self._processed(batch), batch)
            self._idle(batch is not None)
        except StoreError as error:
            self._refused(error)
        self._measure_lag()

    def _processed(self, batch: Polled) -> Outcome:
        began = time.monotonic()
        try:
            with self._phase("process"):
                outcome = self._processor.process(batch.messages)
        except StoreError:
            self._void(batch)
            raise
        batch.processed.set()
        self._overlap.processed(time.monotonic() - began)
        return outcome

    def _gathering(self) -> float:
        """Longest wait for a fuller batch now that there is a record, seconds."""
        if self._flight is None:
            return lingering(self._processor.linger_seconds)
        return self._overlap.left(time.monotonic() - self._begun_at)

    def _idle(self, busy: bool) -> None:
        """Timed work, and what it sends; a transaction under way is waited for only when due."""
        if busy and self._flight is not None and time.monotonic() < self._idle_at:
            return
        self._settle()
        self._idle_at = time.monotonic() + TIMED_SECONDS
        if (extra := self._processor.idle()) is not None:
            self._finish(extra, None)
            self._settle()

    # -- ownership ---------------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._metrics.rebalances.labels(self._processor.name).inc()
        for each in partitions:
            # A placeholder: the claim seeks. An offset that retention deleted would stop the fetch.
            each.offset = OFFSET_BEGINNING
        if self._config.group_protocol == "consumer":
            consumer.incremental_assign(partitions)
        else:
            consumer.assign(partitions)
        consumer.pause(partitions)
        self._owned |= {self._position(each) for each in partitions}
        self._retry_at = 0.0
        self._log.info("assigned", partitions=sorted({each.partition for each in partitions}))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Classic groups call this after an overrun too, so revoked and lost are treated alike.
        gone = {each.partition for each in partitions}
        self._owned -= {self._position(each) for each in partitions}
        self._forget(gone)
        if self._config.group_protocol == "consumer":
            consumer.incremental_unassign(partitions)
        else:
            consumer.unassign()
        self._log.info("revoked", partitions=sorted(gone))

    def _claimable(self) -> dict[int, list[str]]:
        """Topics to claim, by partition."""
        idle: dict[int, list[str]] = {}
        for topic, partition in sorted(self._owned - self._live.keys()):
            idle.setdefault(partition, []).append(topic)
        if self._processor.together:
            return {
                partition: topics
                for partition, topics in idle.items()
                if len(topics) == len(self._processor.topics)
            }
        return idle

    def _claim_pending(self) -> None:
        """Claim, recover and resume what is owned but not live yet."""
        started = time.monotonic()
        if started < self._retry_at:
            return
        claimable = self._claimable()
        if claimable:
            self._settle()  # what is compared with the commits must have been committed
        for partition, topics in claimable.items():
            if time.monotonic() > started + CLAIM_SECONDS:
                return
            inputs = [self._topic_partition(topic, partition) for topic in topics]
            try:
                starts = self._claim(partition, inputs)
                for each, (start, _) in zip(inputs, starts, strict=True):
                    each.offset = start
                    self._consumer.seek(each)
            except (StoreError, UnreachableError, KafkaException) as error:
                self._forget({partition})  # it may be claimed already
                self._wait_longer(error)
                return
            self._consumer.resume(inputs)
            for topic, (start, lost) in zip(topics, starts, strict=True):
                self._live[topic, partition] = start
                if lost:
                    self._tell_lost(topic, partition, start, lost)

    def _claim(self, partition: int, inputs: list[TopicPartition]) -> list[tuple[int, int]]:
        """Have the processor claim a partition.

        Gives where each input is to be read from, and how many records before it are lost.
        """
        committed = self._committed(inputs)
        try:
            starts = self._processor.claim(partition, committed)
        except StoreAheadError:
            # A worker that slept in between compares with offsets that another has moved since.
            moved = self._committed(inputs)
            if moved == committed:
                raise
            committed = moved
            starts = self._processor.claim(partition, committed)
        if not self._config.exactly_once:  # the embedded broker does not tell a partition's ends
            return [
                (OFFSET_BEGINNING if start < 0 else start, 0)
                for start in (starts[self._position(each)[0]] for each in inputs)
            ]
        ends = self._ends(inputs)
        # Retention may have passed a start meanwhile, and what left Kafka is in the archive.
        while any(0 <= starts[topic] < low for topic, (low, _) in ends.items()):
            again = self._processor.claim(partition, committed)
            if again == starts:
                break
            starts, ends = again, self._ends(inputs)
        return [
            self._start(each, starts[topic], *ends[topic])
            for each in inputs
            for topic in [self._position(each)[0]]
        ]

    def _committed(self, inputs: list[TopicPartition]) -> dict[str, int]:
        try:
            found = self._consumer.committed(inputs, CONTROL_SECONDS)
        except KafkaException as error:
            if _code(error) != KafkaError._TIMED_OUT:
                raise
            where = ", ".join(f"{each.topic} partition {each.partition}" for each in inputs)
            raise StoreError(
                f"Kafka does not tell what {self._group} has committed of {where}: {error}. If it "
                "goes on for minutes, a transaction hangs on the group's offsets: end it with "
                "kafka-transactions.sh (docs/operate.md)."
            ) from error
        return {
            self._position(each)[0]: max(each.offset, -1) for each in found if _raise(each.error)
        }

    def _ends(self, inputs: list[TopicPartition]) -> dict[str, tuple[int, int]]:
        """The first offset of each input and the next one to be written."""
        return {
            self._position(each)[0]: self._consumer.get_watermark_offsets(each, CONTROL_SECONDS)
            for each in inputs
        }

    def _start(self, where: TopicPartition, offset: int, low: int, high: int) -> tuple[int, int]:
        """Where to begin: at `offset`, or the first record where that is gone; and the loss."""
        if offset < 0:
            return OFFSET_BEGINNING, 0
        place = f"{where.topic} partition {where.partition}"
        if offset > high:
            raise StoreAheadError(
                f"The {self._processor.name} has done with {place} up to offset {offset}, but it "
                f"ends at {high}: the topic was made anew. Take another "
                "STARCAST_KAFKA__TOPIC_PREFIX, STARCAST_REDIS__KEY_PREFIX and STARCAST_ARCHIVE__URL"
                " for the new topics, or bring the old ones back."
            )
        return max(offset, low), max(low - offset, 0)

    def _tell_lost(self, topic: str, partition: int, start: int, lost: int) -> None:
        where = f"{self._config.topic_prefix}{topic} partition {partition}"
        first = start - lost
        self._log.error("records lost to retention", where=where, first=first, left=start)
        self._metrics.lost.labels(self._processor.name, topic, str(partition)).inc(lost)

    def _forget(self, partitions: set[int]) -> None:
        """Drop what is in memory of these, live or only claimed, once it is written."""
        self._settle()
        self._processor.drop(partitions)
        self._pause({position for position in self._live if position[1] in partitions})

    def _pause(self, positions: set[Position]) -> None:
        """Those still owned are claimed again."""
        for topic, partition in positions:
            del self._live[topic, partition]
            self._metrics.lag.remove(self._processor.name, topic, str(partition))
        self._consumer.pause(
            [self._topic_partition(*position) for position in positions & self._owned]
        )

    def _restart(self, reason: Exception) -> None:
        """Begin again from the committed offsets."""
        self._forget({partition for _, partition in self._live})
        self._wait_longer(reason)

    def _wait_longer(self, reason: Exception) -> None:
        fetching = isinstance(reason, KafkaException) and _code(reason) == KafkaError._STATE
        self._retry_at = time.monotonic() + (0.02 if fetching else self._back_off)
        if not fetching:  # a seek just after an assignment only has to be repeated
            self._log.warning("paused", reason=str(reason), seconds=self._back_off)
            self._back_off = min(self._back_off * 2, LAST_BACK_OFF_SECONDS)

    def _usable(self, messages: Sequence[Message]) -> tuple[list[Message], list[TopicPartition]]:
        """Of polled messages, those that may be worked on, and the next offset of each input.

        Errors are logged or raised.
        """
        read = zip(messages, map(Message.error, messages), strict=True)
        if failed := [(message, error) for message, error in read if error is not None]:
            for message, error in failed:
                self._tell(message, error)
            messages = [message for message in messages if message.error() is None]
        batch: list[Message] = []
        reached: set[Position] = set()
        back: set[int] = set()
        for position, run in self._runs(messages):
            # A rebalance inside the poll leaves messages of partitions that are not live now;
            # they are read again after the claim.
            if position not in self._live:
                continue
            offsets: list[Any] = list(map(Message.offset, run))
            if offsets[0] < self._live[position] or offsets != sorted(offsets):
                back.add(position[1])
            self._live[position] = offsets[-1] + 1
            reached.add(position)
            batch += run
        if back:
            # librdkafka 2.16 answers an assignment's placeholder even after a seek, and goes there.
            self._log.warning("went back", partitions=sorted(back))
            self._forget(back)
            batch = [message for message in batch if self._place(message) in self._live]
            reached &= self._live.keys()
        return batch, self._next(reached)

    def _runs(self, messages: Sequence[Message]) -> Iterator[tuple[Position, list[Message]]]:
        """Messages of one topic and partition as long as they follow each other."""
        where = map(Message.topic, messages), map(Message.partition, messages)
        places: Any = zip(*where, strict=True)
        begin = 0
        for (topic, partition), run in groupby(places):
            end = begin + sum(1 for _ in run)
            yield (self._names[topic], partition), list(messages[begin:end])
            begin = end

    def _next(self, positions: Iterable[Position]) -> list[TopicPartition]:
        """The next offset to read of live inputs."""
        prefix, live = self._config.topic_prefix, self._live
        return [TopicPartition(prefix + at[0], at[1], live[at]) for at in sorted(positions)]

    def _tell(self, message: Message, error: KafkaError) -> None:
        """Log or raise what came in place of a record."""
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            if self._place(message) in self._owned:  # librdkafka seeks there no more
                raise BrokerError(
                    f"Retention has deleted what was to be read next of {message.topic()} "
                    f"partition {message.partition()}. Start the worker again: it takes what is "
                    "in the archive and counts the rest as lost."
                )
        elif error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            self._log.warning(
                "topic missing", reason=error.str(), do="run `starcast topics apply`, once"
            )
        elif error.fatal() or error.code() == KafkaError._FATAL:
            raise BrokerError(f"Kafka ended this consumer: {error.str()}. Start the worker again.")
        elif error.code() != KafkaError._PARTITION_EOF:
            self._log.warning("poll", reason=error.str())

    def _place(self, message: Message) -> Position:
        return self._names[str(message.topic())], message.partition() or 0

    # -- output ------------------------------------------------------------------------------

    def _opened(
        self, messages: list[Message], offsets: list[TopicPartition], metadata: Any
    ) -> Polled | None:
        """Have a batch's transaction begun, with its offsets, once the one before has ended.

        The group's coordinator takes as long to note offsets as to end a transaction, and they are
        known before the outputs are. It is asked so that it has done when the batch is processed,
        no sooner: a worker that dies with an open transaction keeps a new owner waiting.
        """
        if not messages:
            return None
        processed = threading.Event()
        if not self._exactly_once:
            return Polled(messages, offsets, None, processed)
        if _generation(metadata) < 1:
            self._restart(BrokerError("The batch was polled outside a group generation."))
            return None
        before, polled = self._flight, time.monotonic()

        def begin() -> None:
            if before is not None:
                before.end()  # it has ended; where it came to nothing, so does this one
            processed.wait(self._overlap.spare(time.monotonic() - polled))
            if self._ended:
                return  # by an error; nothing comes of the batch
            self._opened_at = began = time.monotonic()
            self._producer.begin_transaction()
            self._send_offsets(offsets, metadata)
            self._overlap.opened(time.monotonic() - began)

        return Polled(messages, offsets, self._commits.submit(begin), processed)

    def _void(self, batch: Polled) -> None:
        """Abort the transaction of a batch of which nothing came."""
        batch.processed.set()
        if self._settle() and batch.opened is not None and self._begun(batch.opened):
            self._abort()

    def _begun(self, opened: Future[None]) -> bool:
        """Wait until a transaction has begun; whether it has. If not, all is claimed again."""
        try:
            with self._phase("commit"):
                opened.result()
            return True
        except KafkaException as error:
            self._undo(error)
        except TimeoutError as error:
            self._renew_producer()
            self._restart(error)
        return False

    def _finish(self, outcome: Outcome, batch: Polled | None) -> None:
        """Outputs and offsets in one transaction, then the states."""
        if not self._settle():
            return  # what was processed stood on a transaction that came to nothing
        if outcome.late is not None:
            outcome = replace(outcome, outputs=[*outcome.outputs, *outcome.late()], late=None)
        if self._exactly_once:
            self._transact(outcome, None if batch is None else batch.opened)
            return
        with self._phase("commit"):
            delivered = self._deliver(outcome)
        if delivered is None:
            return
        self._write(outcome, delivered)
        self._finished(outcome, delivered)
        if batch is not None:
            self._commit_plain(batch.offsets)

    def _transact(self, outcome: Outcome, opened: Future[None] | None) -> None:
        """Send outputs and have the transaction ended: at once, or by `_settle` after another turn.

        It was opened for the batch; where there is none, it begins here.
        """
        if opened is not None and not self._begun(opened):
            return
        self._begun_at = time.monotonic()
        try:
            with self._phase("produce"):
                if opened is None:
                    self._opened_at = self._begun_at
                    self._producer.begin_transaction()
                delivered = self._send(outcome)
        except KafkaException as error:
            self._undo(error)
            return

        def end() -> None:
            self._insist(self._producer.commit_transaction)
            self._write(outcome, delivered)
            self._overlap.ended(time.monotonic() - self._begun_at)

        if outcome.write is None:
            self._flight = _Flight(end, outcome, delivered)
            self._settle()
        else:
            self._flight = _Flight(self._commits.submit(end).result, outcome, delivered)

    def _settle(self) -> bool:
        """Wait for the transaction under way, if there is one; whether all is well.

        If not, it was aborted, or its states were not written: all is claimed again.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return True
        try:
            with self._phase("commit"):
                flight.end()
            self._finished(flight.outcome, flight.delivered)
            return True
        except KafkaException as error:
            self._undo(error)
        except StoreError as error:
            self._refused(error)
        return False

    def _refused(self, error: StoreError) -> None:
        if isinstance(error, FencedError):
            self._log.warning("fenced", reason=str(error))
        self._restart(error)

    def _undo(self, error: KafkaException) -> None:
        """Abort, and begin again."""
        if _error(error).fatal():
            self._reopen(error)
        else:
            self._abort()
        self._restart(error)

    def _write(self, outcome: Outcome, delivered: dict[Position, int]) -> None:
        if outcome.write is not None:
            with self._phase("write"):
                outcome.write(delivered)

    def _finished(self, outcome: Outcome, delivered: dict[Position, int]) -> None:
        self._back_off = FIRST_BACK_OFF_SECONDS
        if outcome.finish is not None:
            outcome.finish(delivered)

    def _send_offsets(self, offsets: list[TopicPartition], metadata: Any) -> None:
        """Raises TimeoutError when the producer hangs.

        librdkafka's own timeout is not heeded when the group's coordinator is gone (its issues
        5456 and 5511); the call then never returns, and its producer is of no more use.
        """
        send = self._producer.send_offsets_to_transaction
        within(HANG_SECONDS, lambda: send(offsets, metadata, COMMIT_SECONDS))

    def _insist(self, end: Callable[[float], None]) -> None:
        """Ask for the end of a transaction until Kafka answers, or the worker is to stop."""
        while True:
            try:
                return end(COMMIT_SECONDS)
            except KafkaException as error:
                ending = self._ended or self._stop.is_set()
                if ending or not _error(error).retriable():
                    raise

    def _abort(self) -> None:
        try:
            self._insist(self._producer.abort_transaction)
        except KafkaException as error:
            if _error(error).fatal():
                self._reopen(error)
            # That code says that none was begun. After a stop the next producer ends it, or Kafka.
            elif _code(error) != KafkaError._STATE and not self._stop.is_set():
                raise BrokerError(
                    f"Kafka does not end a transaction: {error}. Start the worker again; the batch "
                    "is worked on again unless it was committed."
                ) from error

    def _reopen(self, reason: KafkaException) -> None:
        """A new producer in place of one that was fenced.

        That happens to a worker that slept past the timeout of its transaction, and to one whose
        transactional id another worker has as well.
        """
        own = time.monotonic() - self._opened_at > TRANSACTION_SECONDS  # Kafka ended it: too slow
        if not own and time.monotonic() < self._fenced_at + TWICE_SECONDS:
            raise BrokerError(
                f"Kafka fenced this worker again: {reason}. Another worker uses the transactional "
                f"id {self._transactional_id}; give each host its own name and start again."
            ) from reason
        if not own:
            self._fenced_at = time.monotonic()
        self._renew_producer()

    def _renew_producer(self) -> None:
        """Another producer of the same id; it ends what the one before has left open."""
        self._producer = Producer(self._producer_config())
        self._init_transactions()

    def _deliver(self, outcome: Outcome) -> dict[Position, int] | None:
        """Outputs without a transaction; what was not delivered is worked on again."""
        failed: list[KafkaError] = []
        try:
            delivered = self._send(outcome, failed)
            left = self._producer.flush(COMMIT_SECONDS)
        except KafkaException as error:
            if _error(error).fatal():
                raise BrokerError(
                    f"Kafka ended this producer: {error}. Start the worker again."
                ) from error
            self._restart(error)
            return None
        if failed or left:
            self._restart(
                KafkaException(failed[0]) if failed else StoreError("Kafka took no output in time.")
            )
            return None
        return delivered

    def _commit_plain(self, offsets: list[TopicPartition]) -> None:
        """Ask for a commit; later polls tell how it went, and the next one mends a failure.

        A commit that is waited for may hang for good (confluent-kafka-python issue 1801).
        """
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._on_commit(_error(error), offsets)

    def _on_commit(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        if error is not None:
            self._log.warning("offsets not committed", reason=str(error))

    def _send(
        self, outcome: Outcome, failed: list[KafkaError] | None = None
    ) -> dict[Position, int]:
        delivered: dict[Position, int] = {}

        def track(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                if failed is not None:
                    failed.append(error)
                return
            topic = str(message.topic()).removeprefix(self._config.topic_prefix)
            if topic in outcome.tracked:
                position = (topic, int(message.partition() or 0))
                end = int(message.offset() or 0) + 1
                delivered[position] = max(delivered.get(position, 0), end)

        for batch in outcome.batches:
            self._send_batch(batch, track if failed is not None else None)
        for output in outcome.outputs:
            while True:
                try:
                    self._producer.produce(
                        self._config.topic_prefix + output.topic,
                        key=output.key,
                        value=output.value,
                        partition=output.partition,
                        headers=output.headers,
                        on_delivery=track,
                    )
                    break
                except BufferError:
                    self._producer.poll(0.1)
        self._producer.poll(0)
        return delivered

    def _send_batch(self, batch: OutputBatch, track: Any) -> None:
        topic = self._config.topic_prefix + batch.topic
        arguments = {} if track is None else {"on_delivery": track}
        # confluent-kafka 2.16 heeds the partition of a call, not those of its messages.
        by_partition = defaultdict[int, list[dict[str, Any]]](list)
        for message in batch.messages:
            by_partition[message.get("partition", BY_KEY)].append(message)
        for partition, messages in by_partition.items():
            while True:
                queued = self._producer.produce_batch(
                    topic, messages, partition=partition, **arguments
                )
                if queued == len(messages):
                    break
                messages = [message for message in messages if "_error" in message]
                for error in [message.pop("_error") for message in messages]:
                    if error.code() != KafkaError._QUEUE_FULL:
                        raise KafkaException(error)
                self._producer.poll(0.1)

    def _init_transactions(self) -> None:
        while not self._stop.is_set():
            try:
                self._producer.init_transactions(INIT_SECONDS)
                return
            except KafkaException as error:
                if not _error(error).retriable():
                    raise BrokerError(
                        f"Kafka gives no transactions to {self._transactional_id}: {error}. Set "
                        "STARCAST_KAFKA__EXACTLY_ONCE=false for a broker without them."
                    ) from error
                self._log.warning("waiting for transactions", reason=str(error))

    def _phase(self, phase: str) -> AbstractContextManager[Any]:
        return self._metrics.batch_seconds.labels(self._processor.name, phase).time()

    # -- set-up ------------------------------------------------------------------------------

    def _measure_lag(self) -> None:
        if time.monotonic() < self._lag_at:
            return
        self._lag_at = time.monotonic() + LAG_SECONDS
        total = 0
        for topic, partition in self._live:
            lag = self.lag(topic, partition)
            total += lag
            self._metrics.lag.labels(self._processor.name, topic, str(partition)).set(lag)
        self._processor.lag = total

    def lag(self, topic: str, partition: int) -> int:
        """Records of one input partition that are not read yet, as of the last fetch."""
        where = self._topic_partition(topic, partition)
        _, high = self._consumer.get_watermark_offsets(where, cached=True)
        position = self._consumer.position([where])[0].offset
        return max(high - position, 0) if high >= 0 and position >= 0 else 0

    def _topic_partition(self, topic: str, partition: int) -> TopicPartition:
        return TopicPartition(self._config.topic_prefix + topic, partition)

    def _position(self, each: TopicPartition) -> Position:
        return each.topic.removeprefix(self._config.topic_prefix), each.partition

    def _consumer_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "group.id": self._group,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",  # what retention deleted is counted, never skipped
            "client.id": self._group,
            "isolation.level": "read_committed",
            "on_commit": self._on_commit,
            "queued.max.messages.kbytes": FETCH_KILOBYTES,
            "fetch.max.bytes": FETCH_BYTES,
            **fetching(self._processor.linger_seconds),
        }
        if self._config.group_protocol == "consumer":
            config |= {"group.protocol": "consumer", "group.remote.assignor": "range"}
        else:
            config |= {
                "partition.assignment.strategy": "range",
                "session.timeout.ms": self._config.session_timeout_ms,
                "heartbeat.interval.ms": max(self._config.session_timeout_ms // 3, 100),
            }
        return client_config(self._config, **config)

    def _producer_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "client.id": self._group,
            "partitioner": "murmur2_random",
            "enable.idempotence": True,
            "linger.ms": 1,
            "compression.type": "lz4",
            "queue.buffering.max.messages": OUTPUT_MESSAGES,
            "message.max.bytes": LARGEST_MESSAGE,
        }
        if self._exactly_once:
            config |= {
                "transactional.id": self._transactional_id,
                "transaction.timeout.ms": int(TRANSACTION_SECONDS * 1_000),
            }
        return client_config(self._config, **config)


def fetching(linger: float) -> dict[str, int]:
    """A consumer's options so that brokers gather for the half of `linger` (seconds)."""
    if linger < PROMPT_SECONDS:
        return {"fetch.wait.max.ms": round(FETCH_WAIT_SECONDS * 1_000), "fetch.min.bytes": 1}
    return {"fetch.wait.max.ms": round(linger / 2 * 1_000), "fetch.min.bytes": GATHER_BYTES}


def lingering(linger: float) -> float:
    """Seconds that are left of `linger` once there is a record."""
    return linger if linger < PROMPT_SECONDS else linger / 2


def _generation(metadata: bytes) -> int:
    """The group generation inside librdkafka's serialized metadata ("CGMDv2:", int32, ...)."""
    return struct.unpack_from("=i", metadata, len(b"CGMDv2:"))[0]


def _error(exception: KafkaException) -> KafkaError:
    return exception.args[0]


def _code(exception: KafkaException) -> int:
    return _error(exception).code()


def _raise(error: KafkaError | None) -> bool:
    if error is not None:
        raise KafkaException(error)
    return True
