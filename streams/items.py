"""Items: item updates to item states. The store's header is its offset."""

import time
from collections.abc import Iterable

import numpy as np
import structlog
from confluent_kafka import Message

from model.state import ITEM, apply_items
from model.state_bytes import from_bytes, to_bytes
from model.updates import from_updates
from streams.claims import Claims, ends
from streams.config import ArchiveConfig, KafkaConfig
from streams.inputs import split
from streams.metrics import Metrics
from streams.processor import CLAIM_SECONDS, Offsets, Outcome, Position
from streams.reader import ITEM_STATE, partition_keys
from streams.store import Store
from streams.tail import archived_end, bounds, read_archived

TOPIC = "item-updates"
BATCH = 5_000  # updates in one turn
LINGER_SECONDS = 0.05  # an item's state is behind its events by little more than this


class Items:
    """One worker's item states, a processor of `streams.loop`."""

    name = "items"
    topics = (TOPIC,)
    together = True
    transactional = False
    batch_size = BATCH
    linger_seconds = LINGER_SECONDS

    def __init__(
        self, store: Store, kafka: KafkaConfig, archived: ArchiveConfig, metrics: Metrics
    ) -> None:
        self._store = store
        self._kafka = kafka
        self._archive = archived
        self._metrics = metrics
        self._claims = Claims(store, metrics, self.name)
        self._log = structlog.get_logger(__name__)
        self.lag = 0

    def claim(self, committed: Offsets) -> Offsets:
        """Claim partitions and read on where their headers stand.

        What retention has taken from Kafka is applied from the archive here. Where the archive
        lacks it too, the start stays before what Kafka has, and the loop counts what is lost.
        """
        found = self._claims.claim(ITEM_STATE, committed)
        starts = {partition: {TOPIC: start} for partition, start in found.items()}
        until = time.monotonic() + CLAIM_SECONDS
        for partition, (low, high) in bounds(self._kafka, TOPIC, committed).items():
            start = found[partition]
            if start >= low:
                continue
            reached = None
            if time.monotonic() <= until:
                reached = self._catch_up(partition, start, low, high, until)
            if reached is None:
                del starts[partition]
            else:
                starts[partition] = {TOPIC: reached}
        return starts

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget partitions."""
        self._claims.drop(partitions)

    def idle(self) -> Outcome | None:
        """Now and then, a look at the claims."""
        self._claims.check()
        return None

    def close(self) -> None:
        """Nothing waits."""

    def process(self, messages: list[Message]) -> Outcome:
        """Apply one batch of updates; states are written once the dead letters are out."""
        prefix = self._kafka.topic_prefix
        inputs, letters = split(messages, prefix, self.name)
        updates = inputs[TOPIC]
        partitions, offsets = updates.partitions(), updates.offsets()
        deltas = from_updates(updates.records)
        written: list[tuple[int, list[bytes], list[bytes], int]] = []
        for partition, end in ends(messages, prefix + TOPIC).items():
            mine = partitions == partition
            items, index = np.unique(deltas["item"][mine], return_inverse=True)
            keys = partition_keys(self._store, ITEM_STATE, partition, items)
            states = from_bytes(self._store.read(keys), ITEM)
            states = apply_items(states, index, deltas[mine], offsets[mine].astype(np.uint64))
            written.append((partition, keys, to_bytes(states), end))

        def finish(_: dict[Position, int]) -> None:
            self._metrics.dead_letters.labels(self.name, "contract").inc(len(letters))
            for partition, keys, values, end in written:
                self._claims.write(ITEM_STATE, partition, keys, values, end)
            self._metrics.events.labels(self.name, "update").inc(len(deltas))

        return Outcome(outputs=letters, finish=finish)

    def _catch_up(
        self, partition: int, start: int, low: int, high: int, until: float
    ) -> int | None:
        """Apply archived updates from `start` on; where to read on in Kafka, from `low` to `high`.

        None where that takes longer than `until`, of the monotonic clock: the next goes on.

        Item updates are written by our own scorer, so none of them is a dead letter; one that
        cannot be read is left out, as a dead letter is, and told in the log.
        """
        reached = start
        for messages in read_archived(self._kafka, self._archive, TOPIC, partition, start, low):
            outcome = self.process(messages)
            assert outcome.finish is not None
            outcome.finish({})
            reached = (messages[-1].offset() or 0) + 1
            if outcome.outputs:
                self._log.error("left out", partition=partition, updates=len(outcome.outputs))
            if time.monotonic() > until:
                return None
        self._log.info("caught up", partition=partition, first=start, end=reached, kafka=low)
        # Ends of transactions have offsets, but no rows. So an archive that goes on has all before;
        # and where nothing is left in Kafka, the last offset was that of an end.
        whole = archived_end(self._archive, TOPIC, partition) >= low - (low == high)
        return low if whole else reached
