"""Items: item updates to item states. The store's header is its offset."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from confluent_kafka import Message

from model.state import ITEM, apply_items, from_bytes, to_bytes
from model.updates import from_updates
from streams.inputs import split
from streams.loop import Outcome, Position
from streams.metrics import Metrics
from streams.reader import ITEM_STATE, partition_keys
from streams.store import Claim, Store

BATCH = 5_000  # updates in one turn
LINGER_SECONDS = 0.01  # an item's state is behind its events by little more than this


class Items:
    """One worker's item states, a processor of `streams.loop`."""

    name = "items"
    topics = ("item-updates",)
    together = True
    transactional = False
    batch_size = BATCH
    linger_seconds = LINGER_SECONDS

    def __init__(self, store: Store, prefix: str, metrics: Metrics) -> None:
        self._store = store
        self._prefix = prefix
        self._metrics = metrics
        self.lag = 0
        self._claims: dict[int, Claim] = {}

    def claim(self, partition: int, committed: dict[str, int]) -> dict[str, int]:
        """Claim the partition and read on where its header stands."""
        claim = self._claims[partition] = self._store.claim(ITEM_STATE, partition)
        return {"item-updates": header_offset(claim.data)}

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget partitions."""
        for partition in partitions:
            self._claims.pop(partition, None)

    def idle(self) -> Outcome | None:
        """Nothing."""
        return None

    def close(self) -> None:
        """Nothing waits."""

    def process(self, messages: list[Message]) -> Outcome:
        """Apply one batch of updates; states are written once the dead letters are out."""
        inputs, letters = split(messages, self._prefix, self.name)
        updates = inputs["item-updates"]
        partitions, offsets = updates.partitions(), updates.offsets()
        deltas = from_updates(updates.records)
        written: list[tuple[int, list[bytes], list[bytes], int]] = []
        for partition, end in _ends(messages).items():
            mine = partitions == partition
            items, index = np.unique(deltas["item"][mine], return_inverse=True)
            keys = partition_keys(self._store, ITEM_STATE, partition, items)
            states = from_bytes(self._store.read(keys), ITEM)
            states = apply_items(states, index, deltas[mine], offsets[mine].astype(np.uint64))
            written.append((partition, keys, to_bytes(states), end))

        def finish(_: dict[Position, int]) -> None:
            self._metrics.dead_letters.labels(self.name, "contract").inc(len(letters))
            for partition, keys, values, end in written:
                self._store.write(self._claims[partition], keys, values, header_data(end))
                self._metrics.state_writes.labels(self.name, "written").inc(len(keys))
            self._metrics.events.labels(self.name, "update").inc(len(deltas))

        return Outcome(outputs=letters, finish=finish)


def header_offset(data: bytes | None) -> int:
    """The next offset to read, as a header of one topic keeps it."""
    return int(data) if data else 0


def header_data(offset: int) -> bytes:
    """The header of one topic."""
    return b"%d" % offset


def _ends(messages: Iterable[Any]) -> dict[int, int]:
    """By partition, the next offset after these messages."""
    return {message.partition(): message.offset() + 1 for message in messages}
