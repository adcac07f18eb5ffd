"""The one Kafka loop that every processor shares.

A turn of the loop: poll a batch, let the processor turn it into records and state writes, send the
input offsets and the records in one transaction, and only then write the states. A thread of its
own begins the transaction, with the offsets, while the batch is processed, and ends it. While the
commit and the writes of one batch are under way there, the next is polled and processed, where the
processor allows it (`Outcome.write`); its transaction begins when they are done. Whatever changes
what is owned, claimed or held waits for them first. A partition is worked on when all topics of
the processor own it and the processor has claimed and recovered it ("live"). Whatever goes wrong
in between (a lost partition, an aborted transaction, a store that does not answer) has one answer:
drop what is in memory, claim again, recover, and go on from the committed offsets.

What the loop asks of a processor is in `processor`, how it sends in `sender`, where it reads on
after a claim in `starts`.
"""

import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import structlog
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from schemas.exceptions import UnreachableError
from streams.admin import check_topics
from streams.clients import (
    client_config,
    error_of,
    group_name,
    refused_option,
    topic_name,
    watermarks,
)
from streams.config import KafkaConfig
from streams.deadline import within
from streams.exceptions import BrokerError, FencedError, StoreError
from streams.membership import Membership
from streams.metrics import Metrics
from streams.pace import Bound, Overlap
from streams.precedence import Precedence
from streams.processor import CLAIM_SECONDS, Outcome, Position, Processor
from streams.sender import TRANSACTION_SECONDS, Sender
from streams.starts import Start, claim

IDLE_SECONDS = 0.5  # an idle loop still notices a stop, a swap and a rebalance this soon
TIMED_SECONDS = 5.0  # timed work waits no longer, though it costs a wait for what is under way
LEAVE_SECONDS = 4.0  # a group that does not answer must not keep a worker from ending
FIRST_BACK_OFF_SECONDS = 0.1  # a store or broker that is gone is asked again this soon,
LAST_BACK_OFF_SECONDS = 5.0  # and later this often
COMMITS = "-commits"  # ends the name of the thread that ends transactions
LAG_SECONDS = 1.0  # lag is measured this often: it costs a call a partition
PAUSED_LAG_SECONDS = 5.0  # and that of paused partitions this often: Kafka is asked,
PAUSED_ANSWER_SECONDS = 1.0  # and what others wait for meanwhile is no longer
FETCH_KILOBYTES = 8_192  # prefetched input a worker holds at most, and one answer of a broker,
FETCH_BYTES = 4 * 1024 * 1024  # which behind a backlog would hold a megabyte of each partition
FETCH_WAIT_SECONDS = 0.1  # a broker without news answers after this
# Each fetch names all partitions, news or not: 5 µs of client and broker for each. Waits of so long
# for each keep that at a twentieth of a core.
FETCH_PARTITION_SECONDS = 0.0001
PROMPT_SECONDS = 0.01  # who lingers for less has brokers answer at once; others
GATHER_BYTES = 256 * 1024  # let them gather up to this much: each fetch costs both sides
# A thread that ends a transaction has Python back this soon, each time it has waited for Kafka or
# the store: after Python's own 5 ms a time, the next batch was through before it was.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class _Flight:
    """A transaction whose end is under way; it is waited for before the next begins."""

    end: Callable[[], object]
    outcome: Outcome
    delivered: dict[Position, int]  # complete once `end` has come back
    records: int  # that it answers


@dataclass(frozen=True)
class Polled:
    """A batch, and its transaction."""

    messages: list[Message]
    offsets: list[TopicPartition]  # the next of each input
    opened: Future[None] | None  # done when the transaction has begun and has the offsets
    processed: threading.Event


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
        """Raises KafkaOptionError for options that do not go with the loop's own."""
        self._processor = processor
        self._config = config
        self._metrics = metrics
        self._stop = stop
        self._log = structlog.get_logger().bind(processor=processor.name)
        self._exactly_once = config.exactly_once and processor.transactional
        self._group = group_name(config, processor.name)
        self._names = {topic_name(config, topic): topic for topic in processor.topics}
        self._owned: set[Position] = set()
        self._live: dict[Position, int] = {}  # the next offset of what is claimed and recovered
        self._precedence = Precedence(processor.topics if processor.together else ())
        self._retry_at = 0.0
        self._back_off = FIRST_BACK_OFF_SECONDS
        self._refused_at: dict[int, float] = {}  # when a partition's last claim failed
        self._told_lost: dict[Position, int] = {}  # up to which offset it was told
        self._begun_at = 0.0
        self._lag_at = 0.0
        self._paused_lag = 0
        self._paused_lag_at = 0.0
        self._idle_at = 0.0
        self._flight: _Flight | None = None
        self._overlap = Overlap()
        self._bound = Bound(TRANSACTION_SECONDS)
        self._commits = ThreadPoolExecutor(1, processor.name + COMMITS)
        client = self._consumer_config()
        try:
            self._consumer = Consumer(client)
        except KafkaException as problem:
            raise refused_option(problem) from None
        self._membership = Membership(config, processor.name, client)
        self._sender = Sender(config, processor.name, slot, self._exactly_once, stop)
        metrics.dead_letters.labels(processor.name, "contract")  # from 0: Prometheus sees no first

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

        Raises `BrokerError` when Kafka fences this worker for good, `LeftOutError` when its group
        goes on without it, `TopicError` when topics have got more partitions, and what `claim`
        raises when Kafka and the processor's own store do not belong together.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        self._sender.start()
        self._consumer.subscribe(
            [*self._names],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_revoke,
        )
        self._membership.moved()
        try:
            while not self._stop.is_set():
                self._turn()
            self._settle()
            self._close()
        finally:
            self._sender.give_up()
            self._commits.shutdown()
            self._processor.drop({partition for _, partition in self._live})
            self._leave()
            self._sender.close(LEAVE_SECONDS)

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
        if not self._owned:
            self._membership.check(self._consumer.memberid)
        self._claim_pending()
        if due := self._precedence.due():
            self._consumer.resume([self._topic_partition(*position) for position in due])
        waiting = FIRST_BACK_OFF_SECONDS if self._claimable() else IDLE_SECONDS
        messages = self._consumer.consume(1, waiting)
        if messages and (more := self._bound.most(self._processor.batch_size) - 1):
            messages += self._consumer.consume(more, self._gathering())
        # Read straight after the poll: a later read could carry a newer generation than the batch.
        metadata = self._consumer.consumer_group_metadata()
        batch = self._opened(*self._usable(messages), metadata)
        try:
            if batch is not None:
                self._finish(self._processed(batch), batch)
            self._idle(bool(messages))
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

    # -- ownership ---------------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._metrics.rebalances.labels(self._processor.name).inc()
        self._membership.moved()
        for each in partitions:
            # A placeholder: the claim seeks. An offset that retention deleted would stop the fetch.
            each.offset = OFFSET_BEGINNING
        if self._config.group_protocol == "consumer":
            consumer.incremental_assign(partitions)
        else:
            consumer.assign(partitions)
        consumer.pause(partitions)
        self._owned |= {self._position(each) for each in partitions}
        for topic, partition in self._owned:  # from 0, as above
            self._metrics.lost.labels(self._processor.name, topic, str(partition))
        self._retry_at = 0.0
        self._log.info("assigned", partitions=sorted({each.partition for each in partitions}))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Classic groups call this after an overrun too, so revoked and lost are treated alike.
        gone = {each.partition for each in partitions}
        self._membership.moved()
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
        if any(partition >= self._config.partitions for _, partition in self._owned):
            check_topics(self._config)  # which tells: their states would lie where nobody looks
        if not (claimable := self._claimable()):
            return
        self._settle()  # what is compared with the commits must have been committed
        wanted = [claimable]
        if self._back_off > FIRST_BACK_OFF_SECONDS:  # one that cannot be had keeps none from others
            turns = sorted(claimable, key=lambda partition: self._refused_at.get(partition, 0.0))
            wanted = [{partition: claimable[partition]} for partition in turns]
        failed: Exception | None = None
        for each in wanted:
            if time.monotonic() > started + CLAIM_SECONDS:
                break
            try:
                starts = claim(self._processor, self._consumer, self._config, each)
                for position, start in starts.items():
                    self._consumer.seek(self._topic_partition(*position, start.offset))
            except (StoreError, UnreachableError, KafkaException) as error:
                self._forget(set(each))  # they may be claimed already
                if len(each) == 1:  # of several it may be any
                    self._refused_at |= dict.fromkeys(each, time.monotonic())
                failed = error
                continue
            self._consumer.resume([self._topic_partition(*position) for position in starts])
            for position, start in starts.items():
                self._refused_at.pop(position[1], None)
                self._live[position] = start.offset
                if start.lost:
                    self._tell_lost(*position, start)
        if failed is not None:
            self._wait_longer(failed)

    def _tell_lost(self, topic: str, partition: int, start: Start) -> None:
        """Unless it was told before: until something comes, each claim finds the same."""
        first = max(start.offset - start.lost, self._told_lost.get((topic, partition), 0))
        self._told_lost[topic, partition] = start.offset
        if (lost := start.offset - first) > 0:
            where = f"{topic_name(self._config, topic)} partition {partition}"
            left = start.offset
            self._log.error("records lost to retention", where=where, first=first, left=left)
            self._metrics.lost.labels(self._processor.name, topic, str(partition)).inc(lost)

    def _forget(self, partitions: set[int]) -> None:
        """Drop what is in memory of these, live or only claimed, once it is written."""
        self._settle()
        self._processor.drop(partitions)
        self._pause({position for position in self._live if position[1] in partitions})

    def _pause(self, positions: set[Position]) -> None:
        """Those still owned are claimed again."""
        self._precedence.drop(positions)
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
        error = error_of(reason) if isinstance(reason, KafkaException) else None
        early = error is not None and error.code() == KafkaError._STATE
        self._retry_at = time.monotonic() + (0.02 if early else self._back_off)
        if not early:  # a seek just after an assignment only has to be repeated
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
            if offsets[0] < self._live[position] or offsets != sorted(set(offsets)):
                back.add(position[1])
            self._live[position] = offsets[-1] + 1
            self._precedence.read(position, run)
            reached.add(position)
            batch += run
        if back:
            # librdkafka 2.16 answers an assignment's placeholder even after a seek, and goes there.
            self._log.warning("went back", partitions=sorted(back))
            self._forget(back)
            batch = [message for message in batch if self._place(message) in self._live]
            reached &= self._live.keys()
        if early := self._precedence.early():
            return self._without(batch, early)
        return batch, self._next(reached)

    def _without(
        self, batch: Sequence[Message], early: Mapping[Position, Message]
    ) -> tuple[list[Message], list[TopicPartition]]:
        """A batch without records that are early, which are read again when it is their turn."""
        ends = {position: message.offset() or 0 for position, message in early.items()}
        places = [self._topic_partition(*position, end) for position, end in ends.items()]
        self._consumer.pause(places)
        try:
            for place in places:
                self._consumer.seek(place)
        except KafkaException as error:
            self._restart(error)
            return [], []
        self._live |= ends
        kept = [
            message
            for message in batch
            if (end := ends.get(self._place(message))) is None or (message.offset() or 0) < end
        ]
        return kept, self._next({self._place(message) for message in kept})

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
        return [self._topic_partition(*at, self._live[at]) for at in sorted(positions)]

    def _tell(self, message: Message, error: KafkaError) -> None:
        """Log, raise or note what came in place of a record."""
        if error.code() == KafkaError._PARTITION_EOF:
            if (position := self._place(message)) in self._live:
                self._precedence.ended(position, message.offset() or 0)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
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
        elif error.code() == KafkaError._BAD_COMPRESSION:
            where = f"{message.topic()} partition {message.partition()} offset {message.offset()}"
            self._log.error(
                "what is next cannot be decompressed, or is too large then",
                where=where,
                reason=error.str(),
                do="see `A record that cannot be decompressed` in docs/operate.md",
            )
        elif error.fatal() or error.code() == KafkaError._FATAL:
            raise BrokerError(f"Kafka ended this consumer: {error.str()}. Start the worker again.")
        else:
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
            began = time.monotonic()
            self._sender.begin(offsets, metadata)
            self._overlap.opened(time.monotonic() - began)

        return Polled(messages, offsets, self._commits.submit(begin), processed)

    def _void(self, batch: Polled) -> None:
        """Abort the transaction of a batch of which nothing came."""
        batch.processed.set()
        if self._settle() and batch.opened is not None and self._begun(batch.opened):
            self._sender.abort()

    def _begun(self, opened: Future[None]) -> bool:
        """Wait until a transaction has begun; whether it has. If not, all is claimed again."""
        try:
            with self._phase("commit"):
                opened.result()
            return True
        except KafkaException as error:
            self._undo(error)
        except TimeoutError as error:
            self._sender.renew()
            self._restart(error)
        return False

    def _finish(self, outcome: Outcome, batch: Polled | None) -> None:
        """Outputs and offsets in one transaction, then the states."""
        if not self._settle():
            return  # what was processed stood on a transaction that came to nothing
        if outcome.late is not None:
            outcome = replace(outcome, outputs=[*outcome.outputs, *outcome.late()], late=None)
        if self._exactly_once:
            self._transact(outcome, batch)
            return
        try:
            with self._phase("commit"):
                delivered = self._sender.deliver(outcome)
        except (KafkaException, StoreError) as error:
            self._restart(error)
            return
        self._write(outcome, delivered)
        self._finished(outcome, delivered)
        if batch is not None:
            self._commit_plain(batch.offsets)

    def _transact(self, outcome: Outcome, batch: Polled | None) -> None:
        """Send outputs and have the transaction ended: at once, or by `_settle` after another turn.

        It was opened for the batch; where there is none, it begins here.
        """
        opened = None if batch is None else batch.opened
        records = 0 if batch is None else len(batch.messages)
        if opened is not None and not self._begun(opened):
            return
        self._begun_at = time.monotonic()
        try:
            with self._phase("produce"):
                if opened is None:
                    self._sender.begin()
                delivered = self._sender.send(outcome)
        except KafkaException as error:
            self._undo(error, records)
            return

        def end() -> None:
            self._sender.commit()
            self._bound.ended(records, self._sender.open_seconds)
            self._write(outcome, delivered)
            self._overlap.ended(time.monotonic() - self._begun_at)

        if outcome.write is None:
            self._flight = _Flight(end, outcome, delivered, records)
            self._settle()
        else:
            ended = self._commits.submit(end).result
            self._flight = _Flight(ended, outcome, delivered, records)

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
            self._undo(error, flight.records)
        except StoreError as error:
            self._refused(error)
        return False

    def _refused(self, error: StoreError) -> None:
        fenced = isinstance(error, FencedError)
        self._metrics.state_writes.labels(
            self._processor.name, "fenced" if fenced else "failed"
        ).inc()
        if fenced:
            self._log.warning("fenced", reason=str(error))
        self._restart(error)

    def _undo(self, error: KafkaException, records: int = 0) -> None:
        """Abort, and begin again: with fewer than so many `records` where Kafka found it slow."""
        seconds = self._sender.open_seconds
        if self._bound.failed(records, seconds):
            self._log.warning("a transaction was too slow", records=records, seconds=round(seconds))
        self._sender.undo(error)
        self._restart(error)

    def _write(self, outcome: Outcome, delivered: dict[Position, int]) -> None:
        if outcome.write is not None:
            with self._phase("write"):
                outcome.write(delivered)

    def _finished(self, outcome: Outcome, delivered: dict[Position, int]) -> None:
        if not self._refused_at or not self._refused_at.keys() & self._claimable().keys():
            self._back_off = FIRST_BACK_OFF_SECONDS
        if outcome.finish is not None:
            outcome.finish(delivered)

    def _commit_plain(self, offsets: list[TopicPartition]) -> None:
        """Ask for a commit; later polls tell how it went, and the next one mends a failure.

        A commit that is waited for may hang for good (confluent-kafka-python issue 1801).
        """
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._on_commit(error_of(error), offsets)

    def _on_commit(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        if error is not None:
            self._log.warning("offsets not committed", reason=str(error))

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
        self._measure_paused()
        self._processor.lag = total + self._paused_lag

    def _measure_paused(self) -> None:
        """What waits in partitions that cannot be worked on now, as while the store is gone.

        They have no metric of their own: an alert counts the partitions that have one.
        """
        paused = self._owned - self._live.keys()
        if not paused or self._back_off == FIRST_BACK_OFF_SECONDS:  # they are claimed in a moment
            self._paused_lag = 0
            return
        if time.monotonic() < self._paused_lag_at:
            return
        self._paused_lag_at = time.monotonic() + PAUSED_LAG_SECONDS
        places = [self._topic_partition(*position) for position in sorted(paused)]
        try:
            committed = self._consumer.committed(places, PAUSED_ANSWER_SECONDS)
            ends = watermarks(self._consumer, places, PAUSED_ANSWER_SECONDS)
        except KafkaException:
            return  # it stays what it was: the next claim tells why
        self._paused_lag = sum(
            max(high - max(each.offset, low), 0)
            for each in committed
            for low, high in [ends[each.topic, each.partition]]
        )

    def lag(self, topic: str, partition: int) -> int:
        """Records of one input partition that are not read yet, as of the last fetch."""
        where = self._topic_partition(topic, partition)
        _, high = self._consumer.get_watermark_offsets(where, cached=True)
        position = self._consumer.position([where])[0].offset
        return max(high - position, 0) if high >= 0 and position >= 0 else 0

    def _topic_partition(
        self, topic: str, partition: int, offset: int = OFFSET_INVALID
    ) -> TopicPartition:
        return TopicPartition(topic_name(self._config, topic), partition, offset)

    def _position(self, each: TopicPartition) -> Position:
        return each.topic.removeprefix(self._config.topic_prefix), each.partition

    def _consumer_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "group.id": self._group,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",  # what retention deleted is counted, never skipped
            "client.id": self._group,
            "isolation.level": "read_committed",
            "enable.partition.eof": bool(self._precedence),
            "on_commit": self._on_commit,
            "queued.max.messages.kbytes": FETCH_KILOBYTES,
            "fetch.max.bytes": FETCH_BYTES,
            **fetching(
                self._processor.linger_seconds,
                len(self._processor.topics) * self._config.partitions,
            ),
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


def fetching(linger: float, partitions: int) -> dict[str, int]:
    """A consumer's options so that brokers gather for the half of `linger` (seconds).

    Where there are many partitions, of all topics together, they gather for longer.
    """
    if linger < PROMPT_SECONDS:
        return {"fetch.wait.max.ms": round(FETCH_WAIT_SECONDS * 1_000), "fetch.min.bytes": 1}
    wait = max(linger / 2, min(FETCH_PARTITION_SECONDS * partitions, FETCH_WAIT_SECONDS))
    return {"fetch.wait.max.ms": round(wait * 1_000), "fetch.min.bytes": GATHER_BYTES}


def lingering(linger: float) -> float:
    """Seconds that are left of `linger` once there is a record."""
    return linger if linger < PROMPT_SECONDS else linger / 2


def _generation(metadata: bytes) -> int:
    """The group generation inside librdkafka's serialized metadata ("CGMDv2:", int32, ...)."""
    return struct.unpack_from("=i", metadata, len(b"CGMDv2:"))[0]
