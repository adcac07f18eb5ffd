"""What a replay of the archive takes in place of what workers read from store and topics.

Item states come from the archived item updates up to the version that was read then, attributes
from the archived records of that version, vectors from the store, whose texts name them.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import bundle, encoder, ladder
from model.catalog import describe_users, item_text
from model.events import Rows
from model.exceptions import BundleError
from model.ids import hash_ids, partitions_of
from model.lookups import Store as Rowstore
from model.lookups import Table, Vectors, empty, table, vectors_of
from model.predict import Predictor, predictor
from model.state import CATEGORY, ITEM, apply_items
from model.state_bytes import from_bytes
from model.updates import from_updates
from schemas import archive
from schemas.codec import decode
from schemas.exceptions import StarcastError
from schemas.topics import BY_NAME
from streams.catalog import Entry, describe_log, id_of
from streams.config import ArchiveConfig, ModelsConfig
from streams.reader import VECTOR_DTYPE, vector_keys
from streams.store import Store
from streams.verification import Verification


class Archived:
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


def versions_of(
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
