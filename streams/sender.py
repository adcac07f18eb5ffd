"""A worker's producer: what it sends, and the transactions that this is in.

Whatever Kafka answers, a transaction ends in one of three ways: committed; aborted, and worked on
again; or with its producer, in whose place another of the same id ends it.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from socket import gethostname
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from schemas.topics import LARGEST_MESSAGE
from streams.clients import client_config, error_of, group_name, refused_option, topic_name
from streams.config import KafkaConfig
from streams.deadline import within
from streams.exceptions import BrokerError, StoreError
from streams.processor import Outcome, OutputBatch, Position

TRANSACTION_SECONDS = 10.0  # a dead worker's open transaction blocks readers no longer than this
COMMIT_SECONDS = 8.0  # a broker that fails over answers late: asked again, unless to stop
HANG_SECONDS = COMMIT_SECONDS + 2.0  # what has not answered by then never will
# Until the end of a transaction stands in all its partitions, some ten milliseconds after it was
# answered, Kafka refuses the offsets of the next, and librdkafka asks again after this, then twice
# that: with its own 100 ms each twentieth transaction came so much later.
RETRY_MS = 10
INIT_SECONDS = 8.0  # the same for a new producer, which waits for the old one's transaction
TWICE_SECONDS = 60.0  # fenced again so soon, a worker shares its transactional id with another
FULL_SECONDS = 0.1  # a full queue is tried again after this
OUTPUT_MESSAGES = 200_000  # outputs in flight; more than the largest transaction makes
BY_KEY = -1  # a partition: that which the key's hash says


class Sender:
    """One worker's producer.

    Transactions are begun and ended in one thread and filled in another, never both at once.
    """

    def __init__(
        self,
        config: KafkaConfig,
        processor: str,
        slot: int,
        exactly_once: bool,
        stop: threading.Event,
    ) -> None:
        """`slot` tells a host's workers apart; without `exactly_once` there are no transactions.

        Raises KafkaOptionError for options that do not go with ours.
        """
        self._config = config
        self._group = group_name(config, processor)
        self._transactional_id = f"{config.topic_prefix}{self._group}-{gethostname()}-{slot}"
        self._exactly_once = exactly_once
        self._stop = stop
        self._log = structlog.get_logger().bind(processor=processor)
        self._given_up = False
        self._begun_at = 0.0
        self._fenced_at = -TWICE_SECONDS
        try:
            self._producer = Producer(self._options())
        except KafkaException as problem:
            raise refused_option(problem) from None

    def start(self) -> None:
        """Wait for transactions, and end what a producer of the same id has left open.

        Raises `BrokerError` where Kafka has none to give.
        """
        while self._exactly_once and not self._stop.is_set():
            try:
                self._producer.init_transactions(INIT_SECONDS)
                return
            except KafkaException as error:
                if not error_of(error).retriable():
                    raise BrokerError(
                        f"Kafka gives no transactions to {self._transactional_id}: {error}. Set "
                        "STARCAST_KAFKA__EXACTLY_ONCE=false for a broker without them."
                    ) from error
                self._log.warning("waiting for transactions", reason=str(error))

    def renew(self) -> None:
        """Another producer of the same id."""
        self._producer = Producer(self._options())
        self.start()

    def give_up(self) -> None:
        """From now on no transaction begins, and the end of one is asked for once."""
        self._given_up = True

    def close(self, seconds: float) -> None:
        """Wait so long for what is under way."""
        with suppress(KafkaException):  # a fenced one repeats why, over the error that tells
            self._producer.flush(seconds)

    # -- what is sent ------------------------------------------------------------------------

    def send(self, outcome: Outcome, failed: list[KafkaError] | None = None) -> dict[Position, int]:
        """Hand outputs to the producer.

        Gives the next offset of each tracked topic's partition, complete once all is delivered.
        Outside a transaction, `failed` is to have what went wrong.
        """
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
                        topic_name(self._config, output.topic),
                        key=output.key,
                        value=output.value,
                        partition=output.partition,
                        headers=output.headers,
                        on_delivery=track,
                    )
                    break
                except BufferError:
                    self._producer.poll(FULL_SECONDS)
        self._producer.poll(0)
        return delivered

    def _send_batch(self, batch: OutputBatch, track: Any) -> None:
        topic = topic_name(self._config, batch.topic)
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
                self._producer.poll(FULL_SECONDS)

    def deliver(self, outcome: Outcome) -> dict[Position, int]:
        """Send outputs without a transaction, and wait for them.

        What is tracked comes last: a journal tells whoever reads it that its batch is done.

        Raises KafkaException or `StoreError` when they are to be sent again, and `BrokerError`
        when Kafka takes no more from this producer.
        """
        first = [each for each in outcome.outputs if each.topic not in outcome.tracked]
        last = [each for each in outcome.outputs if each.topic in outcome.tracked]
        try:
            self._deliver(replace(outcome, outputs=first))
            return self._deliver(replace(outcome, batches=[], outputs=last)) if last else {}
        except (KafkaException, StoreError):
            # What this producer still holds would come beside what is then sent in its place: of
            # two journals of one batch nothing can be computed again.
            self.renew()
            raise

    def _deliver(self, outcome: Outcome) -> dict[Position, int]:
        failed: list[KafkaError] = []
        try:
            delivered = self.send(outcome, failed)
            left = self._producer.flush(COMMIT_SECONDS)
        except KafkaException as error:
            if error_of(error).fatal():
                raise BrokerError(
                    f"Kafka ended this producer: {error}. Start the worker again."
                ) from error
            raise
        if failed:
            raise KafkaException(failed[0])
        if left:
            raise StoreError("Kafka took no output in time.")
        return delivered

    # -- transactions ------------------------------------------------------------------------

    @property
    def open_seconds(self) -> float:
        """For how long the last transaction has been open, or was when it ends just now."""
        return time.monotonic() - self._begun_at

    def begin(self, offsets: list[TopicPartition] | None = None, metadata: Any = None) -> None:
        """Begin a transaction, with the next offsets of what it answers.

        Raises KafkaException, and TimeoutError when the producer hangs: librdkafka's own timeout is
        not heeded when the group's coordinator is gone (its issues 5456 and 5511); the call then
        never returns, and its producer is of no more use.
        """
        if self._given_up:
            return  # nothing comes of the batch
        self._begun_at = time.monotonic()
        self._producer.begin_transaction()
        if offsets is not None:
            note = self._producer.send_offsets_to_transaction
            within(HANG_SECONDS, lambda: note(offsets, metadata, COMMIT_SECONDS))

    def commit(self) -> None:
        """Raises KafkaException."""
        self._insist(self._producer.commit_transaction)

    def undo(self, error: KafkaException) -> None:
        """Abort after an error; where it has ended the producer, take another."""
        if error_of(error).fatal():
            self._reopen(error)
        else:
            self.abort()

    def abort(self) -> None:
        """Raises `BrokerError` when Kafka does not answer."""
        try:
            self._insist(self._producer.abort_transaction)
        except KafkaException as error:
            if error_of(error).fatal():
                self._reopen(error)
            # That code says that none was begun. After a stop the next producer ends it, or Kafka.
            elif error_of(error).code() != KafkaError._STATE and not self._stop.is_set():
                raise BrokerError(
                    f"Kafka does not end a transaction: {error}. Start the worker again; the batch "
                    "is worked on again unless it was committed."
                ) from error

    def _insist(self, end: Callable[[float], None]) -> None:
        """Ask for the end of a transaction until Kafka answers, or the worker is to stop."""
        while True:
            try:
                return end(COMMIT_SECONDS)
            except KafkaException as error:
                ending = self._given_up or self._stop.is_set()
                if ending or not error_of(error).retriable():
                    raise

    def _reopen(self, reason: KafkaException) -> None:
        """A new producer in place of one that was fenced.

        That happens to a worker that slept past the timeout of its transaction, and to one whose
        transactional id another worker has as well.
        """
        own = self.open_seconds > TRANSACTION_SECONDS  # Kafka ended it: too slow
        if not own and time.monotonic() < self._fenced_at + TWICE_SECONDS:
            raise BrokerError(
                f"Kafka fenced this worker again: {reason}. Another worker uses the transactional "
                f"id {self._transactional_id}; give each host its own name and start again."
            ) from reason
        if not own:
            self._fenced_at = time.monotonic()
        self.renew()

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "client.id": self._group,
            "partitioner": "murmur2_random",
            "enable.idempotence": True,
            "linger.ms": 1,
            "compression.type": "lz4",
            "queue.buffering.max.messages": OUTPUT_MESSAGES,
            "message.max.bytes": LARGEST_MESSAGE,
        }
        if self._exactly_once:
            options |= {
                "transactional.id": self._transactional_id,
                "transaction.timeout.ms": int(TRANSACTION_SECONDS * 1_000),
                "retry.backoff.ms": RETRY_MS,
            }
        return client_config(self._config, **options)
