"""Sending the records of dead letters again, and marking these."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from schemas.topics import BY_NAME, LARGEST_MESSAGE
from streams.admin import existing_topic
from streams.clients import (
    REQUEST_SECONDS,
    client_config,
    error_of,
    reach,
    reader,
    refused_option,
    topic_name,
    watermarks,
)
from streams.config import KafkaConfig
from streams.dead_letters import Letter, Wanted, mark, read_letters, redriven
from streams.exceptions import BrokerError, LetterError
from streams.producer import DELIVERY_SECONDS, FLUSH_SECONDS, Outgoing, Sent, Settle, offer
from streams.tail import bounds

BUNCH_LETTERS = 500  # letters in one transaction
BUNCH_CHARACTERS = 16 * 1024 * 1024  # of their values: bounds the memory that a bunch takes
OVERHEAD_BYTES = 128  # of a record in its batch, at most
TRANSACTION_SECONDS = 60.0  # a redrive that was killed blocks readers no longer than this
DECIDED_SECONDS = TRANSACTION_SECONDS + 30  # Kafka looks now and then for what is over
DECIDED_PAUSE_SECONDS = 0.1

# What a producer and its records are told once a newer one has its transactional id.
_FENCED = (
    KafkaError._FENCED,  # pyright: ignore[reportPrivateUsage]
    KafkaError._PURGE_QUEUE,  # pyright: ignore[reportPrivateUsage]
    KafkaError._PURGE_INFLIGHT,  # pyright: ignore[reportPrivateUsage]
    KafkaError.INVALID_PRODUCER_EPOCH,
)


def redrive(kafka: KafkaConfig, wanted: Wanted | None = None, again: bool = False) -> Sent:
    """Sends each wanted letter's record to the topic it came from, and marks the letter.

    Records and marks of a bunch of letters are one transaction, so a letter is sent once however
    often this is called; marked letters are sent only when asked for `again`. Letters are sent in
    their order, so the records of one key keep theirs. A second redrive fences the first before
    it reads which letters are marked, and waits for others' transactions in `dead-letters`, behind
    which marks are hidden. Where Kafka has no transactions (`exactly_once` is off),
    marks are written once the records are acknowledged: what is cut off in between is sent again
    by the next call. A record that is too large, or that a letter has in part, is counted as failed
    and its letter left unmarked.

    Raises UnreachableError, TopicError for a source topic that is missing, and BrokerError when
    Kafka ends a transaction, for the one of two redrives that was fenced, above all, or does not
    end another's.
    """
    sender = _Redriver(kafka)
    if kafka.exactly_once:
        sender.wait_until_decided()
    for bunch in _bunches(read_letters(kafka, wanted, again)):
        sender.send(bunch)
    return sender.report


class _Redriver:
    """Sends bunches of letters, each with its marks."""

    def __init__(self, kafka: KafkaConfig) -> None:
        self.report = Sent()
        self._kafka = kafka
        self._transactional_id = f"{kafka.topic_prefix}{kafka.group_id}-redrive"
        self._present = set(reach(kafka).list_topics(timeout=DELIVERY_SECONDS).topics)
        options: dict[str, Any] = {
            "acks": "all",
            "enable_idempotence": True,  # it keeps the order, too
            "partitioner": "murmur2_random",
            "message_max_bytes": LARGEST_MESSAGE,
        }
        if kafka.exactly_once:
            options["transactional_id"] = self._transactional_id
            options["transaction_timeout_ms"] = int(TRANSACTION_SECONDS * 1_000)
        else:
            options["message_timeout_ms"] = int(DELIVERY_SECONDS * 1_000)
        try:
            self._producer = Producer(client_config(kafka, **options))
        except KafkaException as problem:
            raise refused_option(problem) from None
        if kafka.exactly_once:
            try:
                self._producer.init_transactions(FLUSH_SECONDS)
            except KafkaException as problem:
                raise BrokerError(
                    f"Kafka gives no transactions to {self._transactional_id}: {problem}. Set "
                    "STARCAST_KAFKA__EXACTLY_ONCE=false for a broker without them."
                ) from problem

    def wait_until_decided(self) -> None:
        """Wait until all that is in `dead-letters` now is committed or aborted.

        Raises BrokerError for a transaction that does not end.
        """
        name = existing_topic(self._kafka, "dead-letters", self._present)
        _, end = bounds(self._kafka, "dead-letters", [0])[0]
        deadline = time.monotonic() + DECIDED_SECONDS
        with reader(self._kafka) as consumer:  # of what is committed
            while True:
                found = watermarks(consumer, [TopicPartition(name, 0)], REQUEST_SECONDS)
                _, decided = found[name, 0]
                if decided >= end:
                    return
                if time.monotonic() > deadline:
                    raise BrokerError(
                        f"A transaction in {name} has been open for {DECIDED_SECONDS:g} s and "
                        f"hides, from offset {decided} on, which letters were sent; so nothing was "
                        "sent now. If no worker is sending, end it with kafka-transactions.sh "
                        "(docs/operate.md, A transaction that hangs)."
                    )
                time.sleep(DECIDED_PAUSE_SECONDS)

    def send(self, letters: list[Letter]) -> None:
        """Send the records of some letters and mark them."""
        lot: list[tuple[Letter, Outgoing, str]] = []
        for letter in letters:
            try:
                record = redriven(letter)
            except LetterError as problem:
                self.report.failed[str(problem)] += 1
                continue
            name = existing_topic(self._kafka, record.topic, self._present)
            self.report.sent[record.topic] += 1
            if _size(record) > BY_NAME[record.topic].largest_message:
                # Told here, since a record that Kafka refuses spoils its whole transaction.
                self.report.failed["too large for its topic, with the headers of its history"] += 1
            else:
                lot.append((letter, record, name))
        if not self._kafka.exactly_once:
            self._deliver(lot)
        elif lot:
            self._transact(lot)

    def _transact(self, lot: list[tuple[Letter, Outgoing, str]]) -> None:
        """Records and marks in one transaction."""
        failed: list[KafkaError] = []

        def settle(error: KafkaError | None, _: Message | None) -> None:
            if error is not None:
                failed.append(error)

        try:
            self._producer.begin_transaction()
            for letter, record, name in lot:
                self._produce(name, record, settle)
                self._produce(topic_name(self._kafka, "dead-letters"), mark(letter), settle)
            self._producer.commit_transaction(FLUSH_SECONDS)
        except KafkaException as problem:
            raise self._ended([*failed, error_of(problem)]) from problem
        for _, record, _ in lot:
            self.report.delivered[record.topic] += 1

    def _ended(self, errors: list[KafkaError]) -> BrokerError:
        """What to tell of a transaction that was not committed; Kafka aborts it by itself."""
        done = f"{self.report.delivered.total()} records were sent and are marked, the rest waits."
        if all(error.code() in _FENCED for error in errors):
            return BrokerError(
                "Another redrive of this prefix and group has begun and goes on in this one's "
                f"place, or this one slept for more than {TRANSACTION_SECONDS:g} s: {done} When "
                "the other has ended, run this again for what is left."
            )
        reason = next(error.str() for error in errors if error.code() not in _FENCED)
        return BrokerError(f"Kafka does not take what is sent again: {reason}. {done}")

    def _deliver(self, lot: list[tuple[Letter, Outgoing, str]]) -> None:
        """Records, then the marks of those that were acknowledged."""
        taken: list[Letter] = []

        def settle(letter: Letter, error: KafkaError | None) -> None:
            if error is None:
                taken.append(letter)
                self.report.delivered[letter.letter.source.topic] += 1
            else:
                self.report.failed[error.str()] += 1

        for letter, record, name in lot:
            self._produce(name, record, lambda error, _, letter=letter: settle(letter, error))
        self._flush()
        for letter in taken:
            self._produce(topic_name(self._kafka, "dead-letters"), mark(letter), None)
        self._flush()

    def _produce(self, name: str, record: Outgoing, settle: Settle | None) -> None:
        while not offer(self._producer, name, record, settle):
            self._producer.poll(0.1)

    def _flush(self) -> None:
        if left := self._producer.flush(FLUSH_SECONDS):
            raise BrokerError(
                f"Kafka acknowledged all but {left} records within {FLUSH_SECONDS:g} s. Run it "
                "again when Kafka answers; some records may then come twice."
            )


def _bunches(letters: Iterable[Letter]) -> Iterator[list[Letter]]:
    bunch: list[Letter] = []
    characters = 0
    for letter in letters:
        bunch.append(letter)
        characters += len(letter.letter.value or "")
        if len(bunch) >= BUNCH_LETTERS or characters >= BUNCH_CHARACTERS:
            yield bunch
            bunch, characters = [], 0
    if bunch:
        yield bunch


def _size(record: Outgoing) -> int:
    """Bytes that a record takes in Kafka, at most."""
    headers = sum(len(name.encode()) + len(value or b"") for name, value in record.headers)
    return len(record.key or b"") + len(record.value or b"") + headers + OVERHEAD_BYTES
