"""The user states of the partitions that this worker owns: claimed, recovered, cached, written.

The store is a view of the journal. A partition's header there says up to which journal offset its
states stand; on a claim, the journal from there to its stable end is applied and written before
anything is scored.

In memory a partition may be one batch ahead of the store: `take` holds what a batch made of its
states, for the batch after it to go on from, and `write` stores that once it is committed.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import structlog
from numpy.typing import NDArray

from model.events import DAY_MS, EVENT, Rows, blank, opaque
from model.exceptions import LayoutError
from model.features import FEATURE_HASH
from model.ids import Hashes
from model.lookups import Store as Rowstore
from model.replay import recover
from model.state import LAYOUT_HASH, PARTITION, USER
from model.state_bytes import from_bytes, to_bytes
from schemas.journal import TOPICS, Journal, Transaction
from streams.claims import CHECK_SECONDS
from streams.clients import group_name, topic_name
from streams.config import ArchiveConfig, KafkaConfig, StatesConfig
from streams.exceptions import JournalGapError, StoreAheadError
from streams.journal import read_journals
from streams.processor import CLAIM_SECONDS, Offsets
from streams.reader import USER_STATE, hashes_of, partition_keys
from streams.store import Claim, Keys, Store, Writing

RECOVERY_ROWS = 20_000  # journal rows applied at once: bounds memory, not the result
MARKER_SECONDS = 10.0  # a commit is seen in the offsets before it is seen in the journal
MARKER_PAUSE_SECONDS = 0.05
SWEEP_SECONDS = 600.0  # walks for expired states begin this far apart: each sees the whole store
# A walk goes on in slices: who takes minutes over one does not poll, and leaves its group.
SLICE_SECONDS = 0.1
SLICE_STEPS = 50  # of the store's walk, each with a read of what it found and perhaps a write

HEADER = np.dtype(
    [
        ("journal", "<u8"),  # next journal offset to apply; first, for `streams.journal`
        ("ends", "<i8", len(TOPICS)),  # next offset of each input topic; -1: nothing was read
        ("partition", PARTITION),
    ]
)


@dataclass
class Held:
    """A partition that this worker owns."""

    claim: Claim
    header: Rows  # HEADER, shape (); after the last batch taken
    users: Rowstore = field(default_factory=lambda: Rowstore(USER))
    last: tuple[Hashes, Rows] | None = None  # states of the last batch taken


@dataclass(frozen=True)
class Taken:
    """What a batch left of one partition: states of distinct users (n), and the header."""

    partition: int
    users: Hashes
    rows: Rows  # USER (n)
    header: Rows  # HEADER, shape ()


class UserStates:
    """All that the worker knows of its partitions' users.

    One thread uses it, but `write` may be called from another.
    """

    def __init__(
        self, store: Store, kafka: KafkaConfig, archived: ArchiveConfig, config: StatesConfig
    ) -> None:
        self._store = store
        self._kafka = kafka
        self._archive = archived
        self._config = config
        self._held: dict[int, Held] = {}
        self._check_at = 0.0
        self._sweep_at = time.monotonic() + SWEEP_SECONDS
        self._walk: Iterator[Mapping[int, Sequence[bytes]]] | None = None
        self._expired = 0  # by this walk
        self._log = structlog.get_logger(__name__)

    @property
    def partitions(self) -> int:
        """How many user partitions there are, in whichever worker."""
        return self._store.partitions

    def __getitem__(self, partition: int) -> Held:
        return self._held[partition]

    def claim(self, committed: Offsets) -> Offsets:
        """Take partitions over, bring their states up to the journal's end, say where to read on.

        Those that have more to apply than `CLAIM_SECONDS` allow are left out: their next claim
        goes on. Raises `StoreAheadError` or `JournalGapError` when store, journal and committed
        offsets do not belong together, `StoreError` when the store does not answer.
        """
        for claim in self._store.claim_all(USER_STATE, committed):
            self._held[claim.partition] = Held(claim, decode_header(claim.data))
        ends = self._recover(committed)
        if not self._kafka.exactly_once:
            # Without transactions the journal may be ahead of the committed offsets; it is exact.
            return ends
        until = time.monotonic() + MARKER_SECONDS
        while behind := [each for each in ends if _is_behind(ends[each], committed[each])]:
            if time.monotonic() > until:
                break
            time.sleep(MARKER_PAUSE_SECONDS)
            ends = {each: ends[each] for each in ends if each not in behind}
            ends |= self._recover(behind)
        if gone := [each for each in ends if _last(committed[each]) < 0 <= _last(ends[each])]:
            raise _forgotten(self._kafka, {each: ends[each] for each in gone})
        for partition, reached in ends.items():
            for topic in TOPICS:
                _compare(topic, partition, reached[topic], committed[partition][topic])
        return {partition: committed[partition] for partition in ends}

    def check(self) -> None:
        """Raise `FencedError` when a claim no longer holds, or the store has lost writes.

        A write would tell, but a partition without events has none.
        """
        if time.monotonic() < self._check_at:
            return
        self._check_at = time.monotonic() + CHECK_SECONDS
        self._store.read_all_owned([(held.claim, []) for held in self._held.values()])

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget partitions; their next owner reads them from the store."""
        for partition in partitions:
            self._held.pop(partition, None)

    def read(
        self, wanted: Mapping[int, Hashes], beside: Keys = ()
    ) -> tuple[list[Rows], list[list[bytes | None]]]:
        """By partition, USER rows (n) of distinct users, as they are now.

        Comes with the values of groups of keys of the store, read in the same round trip.
        """
        places: list[NDArray[np.intp]] = []
        missing: list[tuple[Held, Hashes, NDArray[np.intp]]] = []
        for partition, users in wanted.items():
            held = self._held[partition]
            room = self._config.cache_users // len(self._held)
            if len(held.users.rows) + len(users) > room:
                held.users = Rowstore(USER)
                if held.last is not None:  # the store may not have them yet
                    _put(held.users, *held.last)
            known = len(held.users.rows)
            found = held.users.place(users)
            places.append(found)
            new = found >= known
            if new.any():
                missing.append((held, users[new], found[new]))
        values = self._fill(missing, beside)
        states = [
            self._held[partition].users.rows.take(found)
            for partition, found in zip(wanted, places, strict=True)
        ]
        return states, values

    def _fill(
        self,
        missing: Sequence[tuple[Held, Hashes, NDArray[np.intp]]],
        beside: Keys,
    ) -> list[list[bytes | None]]:
        """Read users that have a place in the cache and nothing there yet."""
        keys = [
            partition_keys(self._store, USER_STATE, held.claim.partition, users)
            for held, users, _ in missing
        ]
        claims = [held.claim for held, _, _ in missing]
        found, others = self._store.read_beside(list(zip(claims, keys, strict=True)), beside)
        for (held, _, places), values in zip(missing, found, strict=True):
            opaque(held.users.rows)[places] = opaque(from_bytes(values, USER))
        return others

    def take(self, taken: Taken) -> None:
        """Hold states, and the header, as a batch left them."""
        held = self._held[taken.partition]
        _put(held.users, taken.users, taken.rows)
        held.last = taken.users, taken.rows
        held.header = taken.header

    def write(self, taken: Iterable[Taken]) -> None:
        """Write what was taken, by partition states and then the header, guarded by the claim."""
        self._store.write_all(
            [
                Writing(
                    self._held[each.partition].claim,
                    partition_keys(self._store, USER_STATE, each.partition, each.users),
                    to_bytes(each.rows),
                    each.header.tobytes(),
                )
                for each in taken
            ]
        )

    def expire(self, partitions: Collection[int], watermark: int) -> None:
        """Look for states of recovered partitions whose last event is too old, and delete them.

        A call goes on, for a short while, with a walk through the store; one that has come to its
        end, or failed, begins anew when it is due. No write may be under way. Age is told by event
        time alone, against `watermark` (ms), the latest event seen.
        """
        days = self._config.expire_after_days
        if not days or not watermark or not partitions:
            return
        started = time.monotonic()
        if self._walk is None:
            if started < self._sweep_at:
                return
            self._sweep_at = started + SWEEP_SECONDS
            self._walk, self._expired = self._store.walk(USER_STATE), 0
        oldest = watermark - int(days * DAY_MS)
        for _ in range(SLICE_STEPS):
            found = next(self._walk, None)
            if found is None:
                self._walk = None
                if self._expired:
                    self._log.info("expired", users=self._expired)
                return
            self._delete_old({each: found[each] for each in partitions if each in found}, oldest)
            if time.monotonic() > started + SLICE_SECONDS:
                return

    def _delete_old(self, found: Mapping[int, Sequence[bytes]], oldest: int) -> None:
        """Delete the states, of keys by partition, whose last event was before `oldest` (ms)."""
        times = from_bytes(self._store.read(list(chain(*found.values()))), USER)["last_time"]
        is_old = iter(((times > 0) & (times < oldest)).tolist())
        writings: list[Writing] = []
        for partition, keys in found.items():
            if old := [key for key in keys if next(is_old)]:
                held = self._held[partition]
                cached = np.isin(held.users.hashes, hashes_of(old))
                opaque(held.users.rows)[cached] = opaque(blank(USER, 1))
                held.last = None  # the store has it
                writings.append(Writing(held.claim, old, [b""] * len(old), held.header.tobytes()))
                self._expired += len(old)
        self._store.write_all(writings)

    def _recover(self, partitions: Iterable[int]) -> Offsets:
        """Apply journals up to their stable ends; the next offset of each input topic.

        Partitions whose ends are not reached in time are left out.
        """
        starts = {each: int(self._held[each].header["journal"]) for each in partitions}
        until = time.monotonic() + CLAIM_SECONDS
        rows, ended = Counter[int](), list[int]()
        for several in _in_portions(read_journals(self._kafka, self._archive, starts)):
            for partition, entries in several.items():
                if applied := [each for each in entries if each is not None]:
                    rows[partition] += self._apply(partition, self._held[partition], applied)
                if entries[-1] is None:
                    ended.append(partition)
            if time.monotonic() > until:
                break
        for partition, count in rows.items():
            self._log.info("recovered", partition=partition, journal_rows=count)
        return {
            partition: dict(zip(TOPICS, self._held[partition].header["ends"].tolist(), strict=True))
            for partition in ended
        }

    def _apply(self, partition: int, held: Held, entries: list[Transaction]) -> int:
        journals = [entry.journal for entry in entries]
        header = held.header.copy()
        header["journal"] = entries[-1].last_offset + 1
        for journal in journals:
            _check_layout(journal, partition)
            read = np.array(journal.ends)
            header["ends"] = np.where(read >= 0, read, header["ends"])
        events = np.concatenate([journal.events for journal in journals]).view(EVENT)
        users, user_index = np.unique(events["user"], return_inverse=True)
        states, header["partition"] = recover(
            self.read({partition: users})[0][0],
            user_index,
            header["partition"].copy(),
            events,
            np.concatenate([journal.features for journal in journals]),
            np.concatenate([journal.duplicates for journal in journals]),
            np.concatenate([journal.steps for journal in journals]),
        )
        taken = Taken(partition, users, states, header)
        self.take(taken)
        self.write([taken])
        return len(events)


def _put(cache: Rowstore, users: Hashes, rows: Rows) -> None:
    places = cache.place(users)
    opaque(cache.rows)[places] = opaque(rows)


def decode_header(data: bytes | None) -> Rows:
    """The HEADER row, shape (), that the store keeps; that of an empty partition for None."""
    if data is None:
        header = blank(HEADER, ())
        header["ends"] = -1
        return header
    if len(data) != HEADER.itemsize:
        raise LayoutError(
            f"A partition's header in the store has {len(data)} bytes, this version's has "
            f"{HEADER.itemsize}. Empty the store's keys; they are rebuilt from the journal."
        )
    return np.frombuffer(data, HEADER).copy().reshape(())


def _in_portions(
    entries: Iterator[tuple[int, Transaction | None]],
) -> Iterator[dict[int, list[Transaction | None]]]:
    """By partition; what `read_journals` gives, some at a time."""
    portion = defaultdict[int, list[Transaction | None]](list)
    rows = 0
    for partition, entry in entries:
        portion[partition].append(entry)
        rows += len(entry.journal) if entry is not None else 0
        if rows >= RECOVERY_ROWS:
            yield portion
            portion.clear()
            rows = 0
    if portion:
        yield portion


def _is_behind(ends: Mapping[str, int], committed: Mapping[str, int]) -> bool:
    return any(ends[topic] < committed[topic] for topic in TOPICS)


def _check_layout(journal: Journal, partition: int) -> None:
    if (journal.layout_hash, journal.feature_hash) != (LAYOUT_HASH, FEATURE_HASH):
        raise JournalGapError(
            f"Journal partition {partition} was written under layout {journal.layout_hash} and "
            f"features {journal.feature_hash}; this version has {LAYOUT_HASH} and {FEATURE_HASH}. "
            "Start the version that wrote it, or begin anew beside it: `starcast export`, other "
            "names of topics, keys and archive, `starcast backfill` (docs/operate.md, Begin anew)."
        )


def _last(offsets: Mapping[str, int]) -> int:
    return max(offsets.values())


def _forgotten(kafka: KafkaConfig, ends: Offsets) -> StoreAheadError:
    group = group_name(kafka, "scorer")
    lines = [
        f"{topic_name(kafka, topic)},{partition},{end}"
        for partition, topics in sorted(ends.items())
        for topic, end in topics.items()
        if end >= 0
    ]
    return StoreAheadError(
        f"Kafka has no committed offsets of {group} in partitions of which states have applied "
        "events. It forgets those of a group that had no worker for `offsets.retention.minutes`, 7 "
        "days unless set; or they were deleted. Stop all scorers, have `kafka-consumer-groups.sh "
        f"--group {group} --reset-offsets --from-file FILE --execute` put back what the journal "
        "tells, and start them; or begin anew (docs/operate.md). FILE, of this worker's "
        "partitions:\n" + "\n".join(lines)
    )


def _compare(topic: str, partition: int, applied: int, committed: int) -> None:
    if applied == committed:
        return
    if applied > committed:
        raise StoreAheadError(
            f"States of partition {partition} have applied {topic} up to offset {applied}, but the "
            f"group's committed offset is {max(committed, 0)}: the offsets or topics were reset. "
            "Put the offsets back, or begin anew (docs/operate.md, Begin anew)."
        )
    raise JournalGapError(
        f"The group's committed offset of {topic} partition {partition} is {committed}, but the "
        f"journal ends at {applied}: its records were lost or the offsets were moved by hand. "
        "Put the offsets back to the journal's."
    )
