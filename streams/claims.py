"""Partitions that a worker has claimed in the store, and whose headers are offsets of one topic."""

import time
from collections.abc import Iterable, Sequence

from confluent_kafka import Message

from streams.metrics import Metrics
from streams.store import Claim, Store

CHECK_SECONDS = 5.0  # a store that lost what it had is noticed this soon though nothing happens


class Claims:
    """What one processor holds, by kind and partition. One thread uses it."""

    def __init__(self, store: Store, metrics: Metrics, processor: str) -> None:
        self._store = store
        self._metrics = metrics
        self._processor = processor
        self._held: dict[tuple[bytes, int], Claim] = {}
        self._check_at = 0.0

    def claim(self, kind: bytes, partitions: Iterable[int]) -> dict[int, int]:
        """Take partitions over; the next offset to read of each, 0 where there is no header."""
        claims = self._store.claim_all(kind, partitions)
        self._held |= {(kind, claim.partition): claim for claim in claims}
        return {claim.partition: header_offset(claim.data) for claim in claims}

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget partitions."""
        gone = set(partitions)
        self._held = {key: claim for key, claim in self._held.items() if key[1] not in gone}

    def write(
        self,
        kind: bytes,
        partition: int,
        keys: Sequence[bytes],
        values: Sequence[bytes],
        offset: int,
    ) -> None:
        """Write values and then the header, guarded by the claim; an empty value deletes."""
        self._store.write(self._held[kind, partition], keys, values, header_data(offset))
        self._metrics.state_writes.labels(self._processor, "written").inc(len(keys))

    def check(self) -> None:
        """Raise `FencedError` when a claim no longer holds, or the store has lost writes.

        A write would tell, but a partition without records has none.
        """
        if time.monotonic() < self._check_at:
            return
        self._check_at = time.monotonic() + CHECK_SECONDS
        self._store.read_all_owned([(claim, []) for claim in self._held.values()])


def header_offset(data: bytes | None) -> int:
    """The next offset to read, as a header keeps it."""
    return int(data) if data else 0


def header_data(offset: int) -> bytes:
    """The header of one topic."""
    return b"%d" % offset


def ends(messages: Iterable[Message], topic: str) -> dict[int, int]:
    """By partition, the next offset after a batch's messages of a topic."""
    mine = [message for message in messages if message.topic() == topic]
    # A partition's messages come in the order of their offsets: the last one stays.
    last = dict(zip(map(Message.partition, mine), map(Message.offset, mine), strict=True))
    return {partition or 0: (offset or 0) + 1 for partition, offset in last.items()}
