"""Which partitions a worker works on, and how far it has read them.

Kafka assigns a partition of each topic ("owned"); the processor claims and recovers it; from then
on it is worked on ("live") until it is revoked or something goes wrong. Then what is in memory of
it is dropped, and it is claimed again, if it is still owned, from the committed offsets. One that
cannot be claimed is tried again, later each time, and keeps no other from its worker.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from streams.clients import error_of, refused_option, topic_name, watermarks
from streams.config import KafkaConfig
from streams.exceptions import BrokerError, StoreError
from streams.fetching import consumer_config
from streams.membership import Membership
from streams.metrics import Metrics
from streams.precedence import Precedence
from streams.processor import CLAIM_SECONDS, Position, Processor
from streams.starts import Start, claim

FIRST_BACK_OFF_SECONDS = 0.1  # a store or broker that is gone is asked again this soon,
LAST_BACK_OFF_SECONDS = 5.0  # and later this often
EARLY_SECONDS = 0.02  # a seek just after an assignment is only to be repeated
LAG_SECONDS = 1.0  # lag is measured this often: it costs a call a partition
PAUSED_LAG_SECONDS = 5.0  # and that of paused partitions this often: Kafka is asked,
PAUSED_ANSWER_SECONDS = 1.0  # and what others wait for meanwhile is no longer


class Ownership:
    """A worker's consumer and its partitions. The loop's thread uses it, and no other."""

    def __init__(
        self,
        processor: Processor,
        config: KafkaConfig,
        metrics: Metrics,
        settle: Callable[[], object],
    ) -> None:
        """`settle` waits for the transaction under way; it may come back here by `restart`.

        Raises KafkaOptionError for options that do not go with the loop's own.
        """
        self._processor = processor
        self._config = config
        self._metrics = metrics
        self._settle = settle
        self._log = structlog.get_logger().bind(processor=processor.name)
        self._names = {topic_name(config, topic): topic for topic in processor.topics}
        self.owned: set[Position] = set()
        self.live: dict[Position, int] = {}  # the next offset of what is claimed and recovered
        self._precedence = Precedence(processor.topics if processor.together else ())
        self._retry_at = 0.0
        self._back_off = FIRST_BACK_OFF_SECONDS
        self._refused_at: dict[int, float] = {}  # when a partition's last claim failed
        self._told_lost: dict[Position, int] = {}  # up to which offset it was told
        self._lag_at = 0.0
        self._paused_lag = 0
        self._paused_lag_at = 0.0
        client = consumer_config(processor, config, bool(self._precedence), self._on_commit)
        try:
            self.consumer = Consumer(client)
        except KafkaException as problem:
            raise refused_option(problem) from None
        self._membership = Membership(config, processor.name, client)

    # -- what is owned -----------------------------------------------------------------------

    def join(self) -> None:
        """Join the group."""
        self.consumer.subscribe(
            [*self._names],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_revoke,
        )
        self._membership.moved()

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
        self.owned |= {self._position(each) for each in partitions}
        for topic, partition in self.owned:  # from 0: Prometheus sees no first
            self._metrics.lost.labels(self._processor.name, topic, str(partition))
        self._retry_at = 0.0
        self._log.info("assigned", partitions=sorted({each.partition for each in partitions}))

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Classic groups call this after an overrun too, so revoked and lost are treated alike.
        gone = {each.partition for each in partitions}
        self._membership.moved()
        self.owned -= {self._position(each) for each in partitions}
        self._forget(gone)
        if self._config.group_protocol == "consumer":
            consumer.incremental_unassign(partitions)
        else:
            consumer.unassign()
        self._log.info("revoked", partitions=sorted(gone))

    # -- what is claimed ---------------------------------------------------------------------

    def claimable(self) -> dict[int, list[str]]:
        """Topics to claim, by partition."""
        idle: dict[int, list[str]] = {}
        for topic, partition in sorted(self.owned - self.live.keys()):
            idle.setdefault(partition, []).append(topic)
        if self._processor.together:
            return {
                partition: topics
                for partition, topics in idle.items()
                if len(topics) == len(self._processor.topics)
            }
        return idle

    def claim(self) -> None:
        """Claim, recover and resume what is owned but not live yet, and what has waited enough.

        Raises `LeftOutError` when the group goes on without this worker, `TopicError` when topics
        have got more partitions, and what `starts.claim` raises when Kafka and the processor's own
        store do not belong together.
        """
        if not self.owned:
            self._membership.check(self.consumer.memberid)
        if time.monotonic() >= self._retry_at:
            self._claim_pending()
        if due := self._precedence.due():
            self.consumer.resume([self._topic_partition(*position) for position in due])

    def _claim_pending(self) -> None:
        if any(partition >= self._config.partitions for _, partition in self.owned):
            check_topics(self._config)  # which tells: their states would lie where nobody looks
        if not (claimable := self.claimable()):
            return
        started = time.monotonic()
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
                starts = claim(self._processor, self.consumer, self._config, each)
                for position, start in starts.items():
                    self.consumer.seek(self._topic_partition(*position, start.offset))
            except (StoreError, UnreachableError, KafkaException) as error:
                self._forget(set(each))  # they may be claimed already
                if len(each) == 1:  # of several it may be any
                    self._refused_at |= dict.fromkeys(each, time.monotonic())
                failed = error
                continue
            self.consumer.resume([self._topic_partition(*position) for position in starts])
            for position, start in starts.items():
                self._refused_at.pop(position[1], None)
                self.live[position] = start.offset
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

    def restart(self, reason: Exception) -> None:
        """Begin again from the committed offsets."""
        self._forget({partition for _, partition in self.live})
        self._wait_longer(reason)

    def went_well(self) -> None:
        """A batch has ended: what fails next is tried again soon, as the first time."""
        if not self._refused_at or not self._refused_at.keys() & self.claimable().keys():
            self._back_off = FIRST_BACK_OFF_SECONDS

    def _forget(self, partitions: set[int]) -> None:
        """Drop what is in memory of these, live or only claimed, once it is written."""
        self._settle()
        self._processor.drop(partitions)
        self._pause({position for position in self.live if position[1] in partitions})

    def _pause(self, positions: set[Position]) -> None:
        """Those still owned are claimed again."""
        self._precedence.drop(positions)
        for topic, partition in positions:
            del self.live[topic, partition]
            self._metrics.lag.remove(self._processor.name, topic, str(partition))
        self.consumer.pause(
            [self._topic_partition(*position) for position in positions & self.owned]
        )

    def _wait_longer(self, reason: Exception) -> None:
        error = error_of(reason) if isinstance(reason, KafkaException) else None
        early = error is not None and error.code() == KafkaError._STATE
        self._retry_at = time.monotonic() + (EARLY_SECONDS if early else self._back_off)
        if not early:
            self._log.warning("paused", reason=str(reason), seconds=self._back_off)
            self._back_off = min(self._back_off * 2, LAST_BACK_OFF_SECONDS)

    # -- what is read ------------------------------------------------------------------------

    def usable(self, messages: Sequence[Message]) -> tuple[list[Message], list[TopicPartition]]:
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
            if position not in self.live:
                continue
            offsets: list[Any] = list(map(Message.offset, run))
            if offsets[0] < self.live[position] or offsets != sorted(set(offsets)):
                back.add(position[1])
            self.live[position] = offsets[-1] + 1
            self._precedence.read(position, run)
            reached.add(position)
            batch += run
        if back:
            # librdkafka 2.16 answers an assignment's placeholder even after a seek, and goes there.
            self._log.warning("went back", partitions=sorted(back))
            self._forget(back)
            batch = [message for message in batch if self._place(message) in self.live]
            reached &= self.live.keys()
        if early := self._precedence.early():
            return self._without(batch, early)
        return batch, self._next(reached)

    def _without(
        self, batch: Sequence[Message], early: Mapping[Position, Message]
    ) -> tuple[list[Message], list[TopicPartition]]:
        """A batch without records that are early, which are read again when it is their turn."""
        ends = {position: message.offset() or 0 for position, message in early.items()}
        places = [self._topic_partition(*position, end) for position, end in ends.items()]
        self.consumer.pause(places)
        try:
            for place in places:
                self.consumer.seek(place)
        except KafkaException as error:
            self.restart(error)
            return [], []
        self.live |= ends
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
        return [self._topic_partition(*at, self.live[at]) for at in sorted(positions)]

    def _tell(self, message: Message, error: KafkaError) -> None:
        """Log, raise or note what came in place of a record."""
        if error.code() == KafkaError._PARTITION_EOF:
            if (position := self._place(message)) in self.live:
                self._precedence.ended(position, message.offset() or 0)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            if self._place(message) in self.owned:  # librdkafka seeks there no more
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

    def commit(self, offsets: list[TopicPartition]) -> None:
        """Ask for a commit outside transactions.

        Later polls tell how it went, and the next one mends a failure: a commit that is waited for
        may hang for good (confluent-kafka-python issue 1801).
        """
        try:
            self.consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._on_commit(error_of(error), offsets)

    def _on_commit(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        if error is not None:
            self._log.warning("offsets not committed", reason=str(error))

    # -- what waits --------------------------------------------------------------------------

    def measure_lag(self) -> None:
        """Tell the processor and the metrics how many records wait, when it is time again."""
        if time.monotonic() < self._lag_at:
            return
        self._lag_at = time.monotonic() + LAG_SECONDS
        total = 0
        for topic, partition in self.live:
            lag = self.lag(topic, partition)
            total += lag
            self._metrics.lag.labels(self._processor.name, topic, str(partition)).set(lag)
        self._measure_paused()
        self._processor.lag = total + self._paused_lag

    def _measure_paused(self) -> None:
        """What waits in partitions that cannot be worked on now, as while the store is gone.

        They have no metric of their own: an alert counts the partitions that have one.
        """
        paused = self.owned - self.live.keys()
        if not paused or self._back_off == FIRST_BACK_OFF_SECONDS:  # they are claimed in a moment
            self._paused_lag = 0
            return
        if time.monotonic() < self._paused_lag_at:
            return
        self._paused_lag_at = time.monotonic() + PAUSED_LAG_SECONDS
        places = [self._topic_partition(*position) for position in sorted(paused)]
        try:
            committed = self.consumer.committed(places, PAUSED_ANSWER_SECONDS)
            ends = watermarks(self.consumer, places, PAUSED_ANSWER_SECONDS)
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
        _, high = self.consumer.get_watermark_offsets(where, cached=True)
        position = self.consumer.position([where])[0].offset
        return max(high - position, 0) if high >= 0 and position >= 0 else 0

    def _place(self, message: Message) -> Position:
        return self._names[str(message.topic())], message.partition() or 0

    def _topic_partition(
        self, topic: str, partition: int, offset: int = OFFSET_INVALID
    ) -> TopicPartition:
        return TopicPartition(topic_name(self._config, topic), partition, offset)

    def _position(self, each: TopicPartition) -> Position:
        return each.topic.removeprefix(self._config.topic_prefix), each.partition
