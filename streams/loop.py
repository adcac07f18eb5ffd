"""The one Kafka loop that every processor shares.

A turn of the loop: poll a batch, let the processor turn it into records and state writes, send the
input offsets and the records in one transaction, and only then write the states. A thread of its
own begins the transaction, with the offsets, while the batch is processed, and ends it. While the
commit and the writes of one batch are under way there, the next is polled and processed, where the
processor allows it (`Outcome.write`); its transaction begins when they are done. Whatever changes
what is owned, claimed or held waits for them first. Whatever goes wrong in between (a lost
partition, an aborted transaction, a store that does not answer) has one answer: drop what is in
memory, claim again, recover, and go on from the committed offsets.

What the loop asks of a processor is in `processor`, which partitions it works on in `ownership`,
how it sends in `sender`.
"""

import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import structlog
from confluent_kafka import KafkaException, Message, TopicPartition

from streams.config import KafkaConfig
from streams.deadline import within
from streams.exceptions import BrokerError, FencedError, StoreError
from streams.fetching import lingering
from streams.metrics import Metrics
from streams.ownership import FIRST_BACK_OFF_SECONDS, Ownership
from streams.pace import Bound, Overlap
from streams.processor import Outcome, Position, Processor
from streams.sender import TRANSACTION_SECONDS, Sender

IDLE_SECONDS = 0.5  # an idle loop still notices a stop, a swap and a rebalance this soon
TIMED_SECONDS = 5.0  # timed work waits no longer, though it costs a wait for what is under way
LEAVE_SECONDS = 4.0  # a group that does not answer must not keep a worker from ending
COMMITS = "-commits"  # ends the name of the thread that ends transactions
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
        self._metrics = metrics
        self._stop = stop
        self._log = structlog.get_logger().bind(processor=processor.name)
        self._exactly_once = config.exactly_once and processor.transactional
        self._begun_at = 0.0
        self._idle_at = 0.0
        self._flight: _Flight | None = None
        self._overlap = Overlap()
        self._bound = Bound(TRANSACTION_SECONDS)
        self._commits = ThreadPoolExecutor(1, processor.name + COMMITS)
        self._ownership = Ownership(processor, config, metrics, self._settle)
        self._sender = Sender(config, processor.name, slot, self._exactly_once, stop)
        metrics.dead_letters.labels(processor.name, "contract")  # from 0: Prometheus sees no first

    @property
    def live(self) -> frozenset[Position]:
        """What is being worked on."""
        return frozenset(self._ownership.live)

    @property
    def waiting(self) -> bool:
        """Whether something that could be worked on is not yet."""
        return bool(self._ownership.claimable()) or not self._ownership.owned

    def run(self) -> None:
        """Work until stopped.

        Raises `BrokerError` when Kafka fences this worker for good, and what `Ownership.claim`
        does.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        self._sender.start()
        self._ownership.join()
        try:
            while not self._stop.is_set():
                self._turn()
            self._settle()
            self._close()
        finally:
            self._sender.give_up()
            self._commits.shutdown()
            self._processor.drop({partition for _, partition in self.live})
            self._leave()
            self._sender.close(LEAVE_SECONDS)

    def _leave(self) -> None:
        """Leave the group, or be left out of it: all that is to last has been committed.

        A group that waits for its members to join answers late, and a coordinator that is gone not
        at all; `Consumer.close` waits for both (confluent-kafka-python issue 1667).
        """
        try:
            within(LEAVE_SECONDS, self._ownership.consumer.close)
        except (KafkaException, TimeoutError) as error:
            self._log.warning("left the group without its answer", reason=str(error))

    def _close(self) -> None:
        try:
            self._processor.close()
        except StoreError as error:
            self._log.warning("not written; it is read again", reason=str(error))

    def _turn(self) -> None:
        ownership = self._ownership
        ownership.claim()
        waiting = FIRST_BACK_OFF_SECONDS if ownership.claimable() else IDLE_SECONDS
        messages = ownership.consumer.consume(1, waiting)
        # A batch begins with a record: what tells of an end comes after each fetch.
        begun = bool(messages) and messages[0].error() is None
        if begun and (more := self._bound.most(self._processor.batch_size) - 1):
            messages += ownership.consumer.consume(more, self._gathering())
        # Read straight after the poll: a later read could carry a newer generation than the batch.
        metadata = ownership.consumer.consumer_group_metadata()
        batch = self._opened(*ownership.usable(messages), metadata)
        try:
            if batch is not None:
                self._finish(self._processed(batch), batch)
            self._idle(bool(messages))
        except StoreError as error:
            self._refused(error)
        ownership.measure_lag()

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
            self._ownership.restart(BrokerError("The batch was polled outside a group generation."))
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
            self._ownership.restart(error)
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
            self._ownership.restart(error)
            return
        self._write(outcome, delivered)
        self._finished(outcome, delivered)
        if batch is not None:
            self._ownership.commit(batch.offsets)

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
        self._ownership.restart(error)

    def _undo(self, error: KafkaException, records: int = 0) -> None:
        """Abort, and begin again: with fewer than so many `records` where Kafka found it slow."""
        seconds = self._sender.open_seconds
        if self._bound.failed(records, seconds):
            self._log.warning("a transaction was too slow", records=records, seconds=round(seconds))
        self._sender.undo(error)
        self._ownership.restart(error)

    def _write(self, outcome: Outcome, delivered: dict[Position, int]) -> None:
        if outcome.write is not None:
            with self._phase("write"):
                outcome.write(delivered)

    def _finished(self, outcome: Outcome, delivered: dict[Position, int]) -> None:
        self._ownership.went_well()
        if outcome.finish is not None:
            outcome.finish(delivered)

    def _phase(self, phase: str) -> AbstractContextManager[Any]:
        return self._metrics.batch_seconds.labels(self._processor.name, phase).time()


def _generation(metadata: bytes) -> int:
    """The group generation inside librdkafka's serialized metadata ("CGMDv2:", int32, ...)."""
    return struct.unpack_from("=i", metadata, len(b"CGMDv2:"))[0]
