"""Journals of one user partition, and the states that they lead to, without a Kafka."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.events import EVENT, FORGET, REVIEW, TEXT, VIEW, Rows, blank, opaque
from model.features import FEATURE_HASH
from model.lookups import Lookups, Table, empty, table
from model.lookups import Store as Rowstore
from model.replay import Share, run_batch
from model.state import ITEM, ITEM_ATTRIBUTES, LAYOUT_HASH, USER, USER_ATTRIBUTES
from schemas import journal
from schemas.journal import Journal, Transaction
from streams.user_states import HEADER, decode_header

USERS = np.arange(1, 7, dtype=np.uint64) << np.uint64(33)
ITEMS = np.arange(101, 106, dtype=np.uint64) << np.uint64(33)

KINDS = (REVIEW, VIEW, TEXT, FORGET)


@dataclass(frozen=True)
class Step:
    """A transaction, and what its batch would write to the store."""

    transaction: Transaction
    users: NDArray[np.uint64]
    states: Rows  # USER
    header: Rows


@dataclass
class Partition:
    """A user partition whose batches are written down one after the other."""

    header: Rows = field(default_factory=lambda: decode_header(None))
    users: Rowstore = field(default_factory=lambda: Rowstore(USER))
    steps: list[Step] = field(default_factory=list[Step])

    def apply(self, events: Rows) -> Step:
        """One transaction of EVENT (n)."""
        known, index = np.unique(events["user"], return_inverse=True)
        places = self.users.place(known)
        lookups = Lookups(_items(), empty(ITEM_ATTRIBUTES), empty(USER_ATTRIBUTES))
        states, partition = self.users.rows[places].copy(), self.header["partition"].copy()
        (result,), _ = run_batch([Share(states, index, partition, events)], lookups)
        self.users.rows[places] = result.states
        topics = np.select([events["action"] == REVIEW, events["action"] == TEXT], [0, 2], 1)
        ends, offsets = self.header["ends"].copy(), np.zeros(len(events), np.int64)
        for at, topic in enumerate(topics):
            offsets[at] = max(ends[topic], 0)
            ends[topic] = offsets[at] + 1
        entry = Journal(
            topics=topics.astype(np.uint8),
            offsets=offsets,
            steps=result.step,
            seqs=result.seq,
            events=events.view(f"V{EVENT.itemsize}"),
            duplicates=result.duplicate,
            features=result.observation.features,
            item_versions=np.zeros(len(events), np.uint64),
            item_attributes_versions=np.zeros(len(events), np.uint64),
            user_attributes_versions=np.zeros(len(events), np.uint64),
            item_vectors=np.zeros(len(events), np.uint64),
            recents=np.zeros((0, 3), np.uint64),
            feature_hash=FEATURE_HASH,
            layout_hash=LAYOUT_HASH,
            encoder="",
            partition_state=self.header.tobytes(),
            ends=tuple(np.where(ends != self.header["ends"], ends, -1).tolist()),
        )
        first = int(self.header["journal"])
        # Through bytes, as Kafka keeps it; after its pieces stands the transaction's marker.
        pieces = list(enumerate(journal.encode(entry), first))
        (transaction,) = journal.decode_all(pieces)
        header = blank(HEADER, ())
        header["journal"] = transaction.last_offset + 1
        header["ends"], header["partition"] = ends, result.partition
        self.header = header.copy()
        self.header["journal"] += 1
        self.steps.append(Step(transaction, known, result.states, header))
        return self.steps[-1]

    def ends(self) -> dict[str, int]:
        """The committed offsets after all transactions."""
        return dict(zip(journal.TOPICS, self.header["ends"].tolist(), strict=True))

    def read(self, start: int) -> Iterator[Transaction]:
        """The transactions from a journal offset, as `streams.journal` reads them."""
        for step in self.steps:
            if step.transaction.first_offset >= start:
                yield step.transaction


def events(rows: Sequence[tuple[int, int, int, int]]) -> Rows:
    """EVENT (n) from places in USERS and ITEMS, a kind (see KINDS) and an id."""
    made = blank(EVENT, len(rows))
    for at, (user, item, kind, event_id) in enumerate(rows):
        made["user"][at], made["item"][at] = USERS[user], ITEMS[item]
        made["action"][at] = KINDS[kind]
        made["event_id"][at] = 1 + event_id * 3 + kind
        made["rating"][at] = 1 + event_id % 5 if kind == 0 else np.nan
        made["text_stars"][at] = 1 + event_id % 4 if kind == 2 else np.nan
    made["time"] = 1_700_000_000_000 + np.arange(len(rows)) * 60_000
    for at in np.flatnonzero(made["action"] == FORGET):
        row = blank(EVENT, 1)
        row["user"], row["action"] = made["user"][at], FORGET
        opaque(made)[at] = opaque(row)[0]
    return made


def _items() -> Table:
    rows = blank(ITEM, len(ITEMS))
    rows["rating_count"] = np.arange(len(ITEMS)) * 3
    rows["rating_sum"] = rows["rating_count"] * np.linspace(1, 5, len(ITEMS))
    return table(ITEMS, rows)


def told(
    partition: int, transactions: Iterable[Transaction]
) -> Iterator[tuple[int, Transaction | None]]:
    """As `read_journals` tells those of one partition, and their end."""
    for each in (*transactions, None):
        yield partition, each
