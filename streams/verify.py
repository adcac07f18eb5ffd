"""Replay of the archive: every feature row, prediction, item update and stored state once more.

Inputs come from the archived topics, item states from the archived item updates up to the version
that was read then, attributes from the archived records of that version. What results is compared
with what was written: the journal's feature rows, predicted ratings, item updates and the states
in the store. The journal alone decides order and versions; it is never compared with itself.

Rows of users who were erased from the archive name nobody and have no input any more. They count in
the partition's sums as they are, and the item updates of their transactions are not compared: what
came of other users' rows beside them is.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import ladder
from model.events import (
    EVENT,
    TEXT,
    Rows,
    forget_rows,
    from_behavior,
    from_reviews,
    from_text_features,
)
from model.features import FEATURES
from model.ids import NONE, partitions_of
from model.lookups import Lookups, table
from model.lookups import Store as Rowstore
from model.replay import BatchResult, Share, recover, run_batch
from model.state import ITEM, ITEM_ATTRIBUTES, PARTITION, SOURCES, USER, USER_ATTRIBUTES
from model.state_bytes import from_bytes
from schemas import archive
from schemas.exceptions import StarcastError
from schemas.journal import TOPICS, Journal, part
from streams.archived import Archived, versions_of
from streams.config import ArchiveConfig, ModelsConfig
from streams.inputs import user_of
from streams.reader import ITEM_STATE, USER_STATE, partition_keys, store_keys
from streams.store import Store
from streams.user_states import decode_header
from streams.verification import Verification

FROM_RECORDS: tuple[Callable[[Sequence[Any]], Rows], ...] = (
    from_reviews,
    from_behavior,
    from_text_features,
)
ROUNDED = 1.5e-4  # predictions are written with four decimals
COSINE = 1e-5  # a matrix product may add in another order


def verify_replay(
    archived: ArchiveConfig,
    models: ModelsConfig,
    store: Store,
    progress: Callable[[int], None] = lambda rows: None,
) -> Verification:
    """Replay all that is archived and compare; `progress` is told of the rows replayed.

    Raises `StarcastError` when the archive holds no journal, or is of another number of partitions
    than the store.
    """
    report = Verification()
    shared = Archived(archived, models, store, report)
    journalled = archive.positions(archived.url, "journal", shared.options)
    if not journalled:
        raise StarcastError(
            f"The archive at {archived.url} holds no journal. Run the archiver, or point "
            "STARCAST_ARCHIVE__URL at this shop's archive."
        )
    if (last := max(journalled)) >= store.partitions:
        raise shared.other_count(f"it holds a journal of partition {last}")
    for number in sorted(journalled):
        partition = _Partition(number, shared)
        for transaction in archive.journal(archived.url, number, shared.options):
            partition.replay(transaction.journal)
            progress(len(transaction.journal))
        partition.compare_states()
    _compare_items(shared)
    if report.passed_over:
        report.notes.append(
            f"{report.passed_over} rows of users who were erased were passed over, and so were the "
            "item updates of their transactions"
        )
    return report


class _Partition:
    """The replay of one user partition."""

    def __init__(self, partition: int, shared: Archived) -> None:
        self._partition = partition
        self._shared = shared
        self._report = shared.report
        self._users = Rowstore(USER)
        self._items = Rowstore(ITEM)
        self._state = from_bytes([None], PARTITION)[0]
        self._skipped = 0  # runs of rows of a transaction
        self._predictions = shared.predictions(partition)
        self._inputs: list[dict[int, Any]] = [  # the user's id in place of what erases one
            {
                offset: found
                for _, offset, key, record in shared.records(topic, partition)
                if (found := user_of(key) if record is None else record) is not None
            }
            for topic in TOPICS
        ]

    def replay(self, entry: Journal) -> None:
        """Replay one transaction's rows and compare them."""
        erased = entry.events.view(EVENT).reshape(-1)["user"] == NONE
        whole = not erased.any()
        for rows in _runs(erased):
            if erased[rows.start]:
                self._report.passed_over += rows.stop - rows.start
                self._pass_over(part(entry, rows))
            else:
                self._replay(entry if whole else part(entry, rows), whole)

    def _pass_over(self, entry: Journal) -> None:
        """Count rows in the partition, and make no states of them."""
        events = entry.events.view(EVENT).reshape(-1).copy()
        events["user"] = NONE
        _, self._state = recover(
            from_bytes([None], USER),
            np.zeros(len(entry), np.intp),
            self._state.copy(),
            events,
            entry.features,
            entry.duplicates,
            entry.steps,
        )

    def _replay(self, entry: Journal, whole: bool) -> None:
        """Replay rows of one transaction, perhaps all of it, and compare them."""
        events = self._events(entry)
        if events is None:
            self._pass_over(entry)
            return
        users, index = np.unique(events["user"], return_inverse=True)
        places = self._users.place(users)
        lookups = self._lookups(entry, events, users)
        share = Share(self._users.rows[places].copy(), index, self._state.copy(), events)
        (result,), _ = run_batch([share], lookups)
        self._users.rows[places] = result.states
        self._state = result.partition
        self._compare(entry, events, result, lookups)
        if whole:
            self._compare_updates(entry, result)

    def _events(self, entry: Journal) -> Rows | None:
        """The entry's events, from the archived inputs alone."""
        events = np.zeros(len(entry), EVENT)
        places = zip(entry.topics.tolist(), entry.offsets.tolist(), strict=True)
        found = [self._inputs[topic].get(offset) for topic, offset in places]
        there = np.array([each is not None for each in found])
        self._report.check("archived input", there, lambda at: self._place(entry, at))
        if not there.all():
            self._skipped += 1
            return None
        forgets = np.array([isinstance(each, str) for each in found])
        events[forgets] = forget_rows([each for each in found if isinstance(each, str)])
        for topic, read in enumerate(FROM_RECORDS):
            rows = np.flatnonzero((entry.topics == topic) & ~forgets)
            if len(rows):
                events[rows] = read([found[row] for row in rows.tolist()])
        return events

    def _lookups(self, entry: Journal, events: Rows, users: NDArray[np.uint64]) -> Lookups:
        items, first = np.unique(events["item"], return_index=True)
        versions = entry.item_versions[first]
        shared = self._shared
        recents = entry.recents
        return Lookups(
            items=table(items, shared.item_states(self._items, items, versions)),
            item_attributes=versions_of(
                shared.item_attributes, recents[:, 0], recents[:, 2], ITEM_ATTRIBUTES
            ),
            user_attributes=versions_of(
                shared.user_attributes,
                users,
                entry.user_attributes_versions[np.unique(events["user"], return_index=True)[1]],
                USER_ATTRIBUTES,
            ),
            vectors=shared.vectors(entry.encoder, recents[:, 1]),
        )

    def _compare(self, entry: Journal, events: Rows, result: BatchResult, lookups: Lookups) -> None:
        report, place = self._report, lambda at: self._place(entry, at)
        written, replayed = entry.features, result.observation.features
        both_missing = np.isnan(written) & np.isnan(replayed)
        text = np.array([feature.group == "text" for feature in FEATURES])
        near = np.where(text, np.abs(written - replayed) <= COSINE, written == replayed)
        same: NDArray[np.bool_] = np.asarray(both_missing | near)

        def tell(at: int) -> str:
            wrong = [each.name for each, ok in zip(FEATURES, same[at], strict=True) if not ok]
            return f"{place(at)}: {', '.join(wrong)}"

        report.check("feature row", np.asarray(same.all(1)), tell)
        report.check("step", entry.steps == result.step, place)
        report.check("seq", entry.seqs == result.seq, place)
        report.check("duplicate", entry.duplicates == result.duplicate, place)
        self._compare_predictions(entry, events, result, lookups)

    def _compare_predictions(
        self, entry: Journal, events: Rows, result: BatchResult, lookups: Lookups
    ) -> None:
        rows = np.flatnonzero(events["action"] < TEXT)
        records = [
            self._predictions.get(
                (TOPICS[entry.topics[at]], self._partition, int(entry.offsets[at]))
            )
            for at in rows
        ]
        there = np.array([record is not None for record in records], bool)
        found = {at: record for at, record in enumerate(records) if record is not None}
        self._report.check("predicted", there, lambda at: self._place(entry, int(rows[at])))
        for version in sorted({record.model_version for record in found.values()}):
            used = self._shared.predictor(version)
            if used is None:
                continue
            then = {at: each for at, each in found.items() if each.model_version == version}
            chosen = rows[list(then)]
            now = used.predict(events[chosen], result.observation.take(chosen), lookups)
            numbers = np.column_stack([now.rating, now.distribution, now.low, now.high])
            written = np.array(
                [[each.rating, *each.distribution, *each.interval] for each in then.values()]
            )
            names = np.array(
                [
                    ladder.TIERS[tier] == each.tier and seq == each.seq
                    for tier, seq, each in zip(
                        now.tier, result.seq[chosen], then.values(), strict=True
                    )
                ]
            )
            self._report.check(
                "prediction",
                (np.abs(numbers - written) <= ROUNDED).all(1) & names,
                lambda at, chosen=chosen: self._place(entry, int(chosen[at])),
            )

    def _compare_updates(self, entry: Journal, result: BatchResult) -> None:
        last = {
            topic: int(entry.offsets[entry.topics == TOPICS.index(topic)].max())
            for topic in SOURCES
            if (entry.topics == TOPICS.index(topic)).any()
        }
        spans = self._shared.update_spans
        deltas = result.deltas.copy()
        deltas["source"] = 0  # a record has it by name, in its span
        same = np.array(
            [
                (found := spans.get((int(delta["item"]), topic, self._partition, last[topic])))
                is not None
                and found == delta
                for delta, source in zip(deltas, result.deltas["source"], strict=True)
                for topic in [SOURCES[source]]
            ],
            bool,
        )
        self._report.check(
            "item update", same, lambda at: f"item hash {int(result.deltas['item'][at]):#x}"
        )

    def compare_states(self) -> None:
        """Compare the stored states and header with the replay's."""
        if self._skipped:
            self._report.notes.append(
                f"partition {self._partition}: rows were skipped in {self._skipped} places: their "
                "inputs are missing"
            )
        users = self._users.hashes
        keys = partition_keys(self._shared.store, USER_STATE, self._partition, users)
        stored = from_bytes(self._shared.store.read(keys), USER)
        replayed = self._users.rows
        header = decode_header(self._shared.store.header(USER_STATE, self._partition))
        behind = header["partition"]["step"] > self._state["step"]  # the archive, the store
        # A user who was erased has no step: where the archive is behind, it may lack that row.
        ahead = (stored["step"] > self._state["step"]) | (behind & (stored["step"] == 0))
        if ahead.any():
            self._report.notes.append(
                f"partition {self._partition}: {ahead.sum()} users are ahead of the archive"
            )
        self._report.check_states("user", users[~ahead], stored[~ahead], replayed[~ahead])
        if not behind:
            same = np.array([header["partition"] == self._state], bool)
            self._report.check("partition header", same, lambda _: f"partition {self._partition}")

    def _place(self, entry: Journal, at: int) -> str:
        topic = TOPICS[entry.topics[at]]
        return f"{topic} partition {self._partition} offset {entry.offsets[at]}"


def _compare_items(shared: Archived) -> None:
    """Compare the stored item states with a recount of all archived updates."""
    items = np.unique(shared.updated_items)
    stored = from_bytes(shared.store.read(store_keys(shared.store, ITEM_STATE, items)), ITEM)
    states = shared.item_states(Rowstore(ITEM), items, stored["offset"])
    ends = archive.positions(shared.url, "item-updates", shared.options)
    archived = [ends.get(each, 0) for each in partitions_of(items, shared.store.partitions)]
    ahead = stored["offset"] > np.array(archived, np.uint64)
    if ahead.any():
        shared.report.notes.append(f"{ahead.sum()} items are ahead of the archive")
    shared.report.check_states("item", items[~ahead], stored[~ahead], states[~ahead])


def _runs(flags: NDArray[np.bool_]) -> Iterator[slice]:
    """Spans of equal neighbours among flags (n)."""
    if len(flags):
        edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
        yield from (slice(begin, end) for begin, end in pairwise(edges))
