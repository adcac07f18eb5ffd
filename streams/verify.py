"""Replay of the archive: every feature row, prediction, item update and stored state once more.

Inputs come from the archived topics, item states from the archived item updates up to the version
that was read then, attributes from the archived records of that version. What results is compared
with what was written: the journal's feature rows, predicted ratings, item updates and the states
in the store. The journal alone decides order and versions; it is never compared with itself.

Rows of users who were erased from the archive name nobody and have no input any more. They count in
the partition's sums as they are, and the item updates of their transactions are not compared: what
came of other users' rows beside them is.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import bundle, encoder, ladder
from model.catalog import describe_users, item_text
from model.events import (
    EVENT,
    TEXT,
    Rows,
    forget_rows,
    from_behavior,
    from_reviews,
    from_text_features,
)
from model.exceptions import BundleError
from model.features import FEATURES
from model.ids import NONE, Hashes, hash_ids, partitions_of
from model.lookups import Lookups, Table, Vectors, empty, table, vectors_of
from model.lookups import Store as Rowstore
from model.predict import Predictor, predictor
from model.replay import BatchResult, Share, recover, run_batch
from model.state import (
    CATEGORY,
    ITEM,
    ITEM_ATTRIBUTES,
    PARTITION,
    SOURCES,
    USER,
    USER_ATTRIBUTES,
    apply_items,
)
from model.state_bytes import from_bytes
from model.updates import from_updates
from schemas import archive
from schemas.codec import decode
from schemas.exceptions import StarcastError
from schemas.journal import TOPICS, Journal, part
from schemas.topics import BY_NAME
from streams.catalog import Entry, describe_log, id_of
from streams.config import ArchiveConfig, ModelsConfig
from streams.inputs import user_of
from streams.reader import (
    ITEM_STATE,
    USER_STATE,
    VECTOR_DTYPE,
    partition_keys,
    store_keys,
    vector_keys,
)
from streams.store import Store
from streams.user_states import decode_header

FROM_RECORDS: tuple[Callable[[Sequence[Any]], Rows], ...] = (
    from_reviews,
    from_behavior,
    from_text_features,
)
ROUNDED = 1.5e-4  # predictions are written with four decimals
COSINE = 1e-5  # a matrix product may add in another order
EXAMPLES = 20  # differences that are told in full


@dataclass
class Verification:
    """What was compared, and what did not agree."""

    compared: Counter[str] = field(default_factory=Counter[str])
    differences: Counter[str] = field(default_factory=Counter[str])
    examples: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    passed_over: int = 0  # journal rows of users who were erased

    @property
    def clean(self) -> bool:
        """Whether everything agreed and there was something to compare."""
        return not self.differences and bool(self.compared)

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "compared": dict(self.compared),
            "differences": dict(self.differences),
            "examples": self.examples,
            "notes": self.notes,
        }

    def check(self, what: str, same: NDArray[np.bool_], name: Callable[[int], str]) -> None:
        """Count n comparisons; `name` tells of the one at a position."""
        self.compared[what] += len(same)
        wrong = np.flatnonzero(~same)
        if len(wrong):
            self.differences[what] += len(wrong)
            room = max(EXAMPLES - len(self.examples), 0)
            self.examples += [f"{what}: {name(int(at))}" for at in wrong[:room]]

    def check_states(self, whose: str, hashes: Hashes, stored: Rows, expected: Rows) -> None:
        """Compare n stored states bit for bit; `whose` is user or item."""
        self.check(
            f"{whose} state",
            _bits(stored) == _bits(expected),
            lambda at: f"{whose} hash {int(hashes[at]):#x} in the store",
        )


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
    replay = _Replay(archived, models, store, report)
    journalled = archive.positions(archived.url, "journal", replay.options)
    if not journalled:
        raise StarcastError(
            f"The archive at {archived.url} holds no journal. Run the archiver, or point "
            "STARCAST_ARCHIVE__URL at this shop's archive."
        )
    if (last := max(journalled)) >= store.partitions:
        raise replay.other_count(f"it holds a journal of partition {last}")
    for number in sorted(journalled):
        partition = _Partition(number, replay)
        for transaction in archive.journal(archived.url, number, replay.options):
            partition.replay(transaction.journal)
            progress(len(transaction.journal))
        partition.compare_states()
    replay.compare_items()
    if report.passed_over:
        report.notes.append(
            f"{report.passed_over} rows of users who were erased were passed over, and so were the "
            "item updates of their transactions"
        )
    return report


class _Replay:
    """What all partitions share: archived item updates, attributes, predictions, models."""

    def __init__(
        self, archived: ArchiveConfig, models: ModelsConfig, store: Store, report: Verification
    ) -> None:
        self.options = archived.storage_options
        self.url = archived.url
        self.models = models
        self.store = store
        self.report = report
        self.item_attributes, self.texts = self._items()
        self.user_attributes = self._users()
        self._vectors: dict[str, dict[int, NDArray[np.float32] | None]] = {}
        self._predictors: dict[str, Predictor | None] = {}
        self.updates, self.update_offsets, self.update_spans = self._updates()
        # A column of its own: `searchsorted` copies one that lies among others, at each call.
        self.updated_items = self.updates["item"].copy()

    def records(
        self, topic: str, partition: int | None = None
    ) -> Iterator[tuple[int, int, bytes | None, Any]]:
        """Partition, offset, key and record (None for a tombstone) of all good archived rows."""
        rows = archive.read(
            self.url,
            topic,
            self.options,
            columns=["kafka_partition", "kafka_offset", "kafka_key", "kafka_value"],
            partitions=None if partition is None else [partition],
        )
        frame = archive.collect(rows, archive.table_url(self.url, topic))
        places = list(zip(frame["kafka_partition"], frame["kafka_offset"], strict=True))
        decoded = decode(BY_NAME[topic], frame["kafka_value"].to_list(), places)
        bad = {rejection.index for rejection in decoded.rejections}
        found = zip(places, frame["kafka_key"], decoded.records, strict=True)
        for at, ((where, offset), key, record) in enumerate(found):
            if at not in bad:
                yield where, offset, key, record

    def _items(self) -> tuple[dict[tuple[int, int], Rows], dict[int, str]]:
        """Attribute rows by item hash and version, and texts by hash."""
        logs: dict[int, list[Entry]] = {}
        for partition, offset, key, record in self.records("items"):
            logs.setdefault(partition, []).append((id_of(key, record), record, offset + 1))
        rows: dict[tuple[int, int], Rows] = {}
        for log in logs.values():
            described, _ = describe_log(log, {}, empty(CATEGORY))
            hashes = hash_ids([name for name, _, _ in log]).tolist()
            rows |= {
                (item, version): row.reshape(1)
                for item, (_, _, version), row in zip(hashes, log, described, strict=True)
            }
        texts = sorted(
            {item_text(record) for log in logs.values() for _, record, _ in log if record}
        )
        return rows, dict(zip(hash_ids(texts).tolist(), texts, strict=True))

    def _users(self) -> dict[tuple[int, int], Rows]:
        rows: dict[tuple[int, int], Rows] = {}
        for _, offset, _, record in self.records("users"):
            if record is not None:
                user = int(hash_ids([record.user_id])[0])
                rows[user, offset + 1] = describe_users([record], [offset + 1])
        return rows

    def predictions(self, partition: int) -> dict[tuple[str, int, int], Any]:
        """Archived predictions of a user partition, by the position that each answers."""
        found: dict[tuple[str, int, int], Any] = {}
        for _, _, _, record in self.records("predicted-ratings", partition):
            if record.kind == "interaction":
                place = (record.source.topic, record.source.partition, record.source.offset)
                self.report.check(
                    "one prediction a position",
                    np.array([place not in found and record.source.partition == partition]),
                    lambda _: f"{place} is predicted twice, or elsewhere",  # noqa: B023 - at once
                )
                found[place] = record
        return found

    def _updates(self) -> tuple[Rows, NDArray[np.uint64], dict[tuple[int, str, int, int], Rows]]:
        """Deltas sorted by item and offset, their offsets, and each by item and source span."""
        owners, places, records = [], [], []
        for partition, offset, _, record in self.records("item-updates"):
            owners.append(partition)
            places.append(offset)
            records.append(record)
        deltas = from_updates(records)
        offsets = np.array(places, np.uint64)
        theirs = partitions_of(deltas["item"], self.store.partitions)
        wrong = np.flatnonzero(theirs != np.array(owners, np.int64))
        if len(wrong):
            at = wrong[0]
            where = f"item-updates partition {owners[at]} offset {places[at]}"
            raise self.other_count(f"{where} would be in partition {theirs[at]}")
        spans = {
            (
                int(delta["item"]),
                record.source.topic,
                record.source.partition,
                record.source.last_offset,
            ): delta
            for delta, record in zip(deltas, records, strict=True)
        }
        order = np.lexsort((offsets, deltas["item"]))
        return deltas[order], offsets[order], spans

    def item_states(
        self, states: Rowstore, items: NDArray[np.uint64], versions: NDArray[np.uint64]
    ) -> Rows:
        """ITEM rows (m) of distinct items as of their versions; `states` is brought up to them."""
        places = states.place(items)
        known = states.rows[places]
        # A version goes back where the store was lost and the item was read before its rebuild.
        known[versions < known["offset"]] = from_bytes([None], ITEM)[0]
        low = np.searchsorted(self.updated_items, items, "left")
        high = np.searchsorted(self.updated_items, items, "right")
        chosen: list[NDArray[np.intp]] = []
        index: list[NDArray[np.intp]] = []
        for at in np.flatnonzero(versions > known["offset"]):
            span = np.arange(low[at], high[at])
            offsets = self.update_offsets[span]
            span = span[(offsets >= known["offset"][at]) & (offsets < versions[at])]
            chosen.append(span)
            index.append(np.full(len(span), at))
        if chosen:
            rows = np.concatenate(chosen)
            known = apply_items(
                known, np.concatenate(index), self.updates[rows], self.update_offsets[rows]
            )
        states.rows[places] = known
        return known

    def vectors(self, encoder_hash: str, texts: NDArray[np.uint64]) -> Vectors | None:
        """Vectors of texts under an encoder: the store's, which never change, else encoded anew."""
        if not encoder_hash:
            return None
        known = self._vectors.setdefault(encoder_hash, {})
        wanted = np.unique(texts[texts != 0])
        new = np.array([text for text in wanted.tolist() if text not in known], np.uint64)
        values = self.store.read(vector_keys(self.store, encoder_hash, new))
        for text, value in zip(new.tolist(), values, strict=True):
            known[text] = (
                self._encode(encoder_hash, text)
                if value is None
                else np.frombuffer(value, VECTOR_DTYPE).astype(np.float32)
            )
        rows = [known[text] for text in wanted.tolist()]
        found = np.array([row is not None for row in rows], bool)
        width = next((len(row) for row in rows if row is not None), encoder.WIDTH)
        vectors = np.array([row for row in rows if row is not None], np.float32).reshape(-1, width)
        return vectors_of(wanted[found], vectors)

    def _encode(self, encoder_hash: str, text: int) -> NDArray[np.float32] | None:
        loaded = self._encoder
        if loaded is None or loaded.hash != encoder_hash or text not in self.texts:
            return None
        return loaded.project(loaded.encode([self.texts[text]]))[0]

    @cached_property
    def _encoder(self) -> encoder.TextEncoder | None:
        """What encodes texts whose vectors the store has lost."""
        folder = encoder.locate(self.models.encoder)
        return None if folder is None else encoder.load(folder, self.models.device)

    def other_count(self, found: str) -> StarcastError:
        """The error of an archive whose partitions are not as many as settings say."""
        return StarcastError(
            f"The archive at {self.url} is not of {self.store.partitions} partitions, as settings "
            f"say: {found}. Set STARCAST_KAFKA__PARTITIONS to what its topics have."
        )

    def predictor(self, version: str) -> Predictor | None:
        """The predictor of a version; None when its bundle is gone."""
        if version not in self._predictors:
            try:
                loaded = (
                    None if version == ladder.VERSION else bundle.load(self.models.url, version)
                )
                self._predictors[version] = predictor(loaded, self.models.device)
            except BundleError as error:
                self._predictors[version] = None
                self.report.notes.append(f"predictions of {version} were not compared: {error}")
        return self._predictors[version]

    def compare_items(self) -> None:
        """Compare the stored item states with a recount of all archived updates."""
        items = np.unique(self.updated_items)
        stored = from_bytes(self.store.read(store_keys(self.store, ITEM_STATE, items)), ITEM)
        states = self.item_states(Rowstore(ITEM), items, stored["offset"])
        ends = archive.positions(self.url, "item-updates", self.options)
        archived = [ends.get(each, 0) for each in partitions_of(items, self.store.partitions)]
        ahead = stored["offset"] > np.array(archived, np.uint64)
        if ahead.any():
            self.report.notes.append(f"{ahead.sum()} items are ahead of the archive")
        self.report.check_states("item", items[~ahead], stored[~ahead], states[~ahead])


class _Partition:
    """The replay of one user partition."""

    def __init__(self, partition: int, shared: _Replay) -> None:
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
            item_attributes=_versions(
                shared.item_attributes, recents[:, 0], recents[:, 2], ITEM_ATTRIBUTES
            ),
            user_attributes=_versions(
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


def _runs(flags: NDArray[np.bool_]) -> Iterator[slice]:
    """Spans of equal neighbours among flags (n)."""
    if len(flags):
        edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
        yield from (slice(begin, end) for begin, end in pairwise(edges))


def _bits(rows: Rows) -> NDArray[np.void]:
    """Rows (n) that are equal where all their bytes are."""
    return np.ascontiguousarray(rows).view(f"V{rows.dtype.itemsize}")


def _versions(
    rows: Mapping[tuple[int, int], Rows],
    hashes: NDArray[np.uint64],
    versions: NDArray[np.uint64],
    dtype: np.dtype[Any],
) -> Table:
    """Rows of distinct hashes as of the versions read; blank where nothing was read."""
    # Row by row: to concatenate them asks numpy of each anew whether their fields are the same.
    found = np.empty(len(hashes), dtype)
    blank_row = from_bytes([None], dtype)
    for at, place in enumerate(zip(hashes.tolist(), versions.tolist(), strict=True)):
        found[at] = rows.get(place, blank_row)[0]
    return table(hashes, found)
