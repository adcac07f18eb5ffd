"""What a batch of the scorer sends: predictions, what it did to items, and its journal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.canary import Part
from model.events import EVENT, Rows, joined
from model.features import FEATURE_HASH
from model.ids import NONE, Hashes
from model.lookups import Lookups
from model.replay import BatchResult, Observation
from model.state import LAYOUT_HASH, SOURCES
from model.updates import encode_updates
from schemas import journal
from schemas.codec import encode, encode_columns, format_times
from schemas.journal import Journal
from schemas.records import UpdateSource
from streams.arrivals import Arrivals, taken
from streams.predictions import prediction_columns
from streams.processor import Output, OutputBatch
from streams.user_states import Taken

_TOPICS = [f'"{topic}"'.encode() for topic in journal.TOPICS]  # as JSON


@dataclass(frozen=True)
class Applied:
    """What one user partition's share of a batch gave."""

    partition: int
    rows: slice
    users: Hashes
    result: BatchResult
    header: Rows  # after the batch, but for the journal's end

    @property
    def taken(self) -> Taken:
        """What it left."""
        return Taken(self.partition, self.users, self.result.states, self.header)


def truths_of(arrivals: Arrivals, parts: Sequence[Applied]) -> NDArray[np.float32]:
    """The stars that each event gives (n), nan for none.

    Nor for a repetition: its user's state had them when it was predicted.
    """
    return np.where(repetitions(parts), np.float32(np.nan), arrivals.events["rating"])


def repetitions(parts: Sequence[Applied]) -> NDArray[np.bool_]:
    """Which events (n) had been applied before."""
    return np.concatenate([part.result.duplicate for part in parts])


def prediction_records(
    arrivals: Arrivals,
    parts: list[Applied],
    scored: NDArray[np.intp],
    answers: Sequence[Part],
    predicted_at: int,
) -> OutputBatch:
    """A record for each scored event, in the order of `arrivals`."""
    every = len(scored) == len(arrivals.events)
    ids = arrivals.ids if every else taken(arrivals.ids, scored.tolist())
    keys = map(str.encode, ids["user_id"])
    partitions = arrivals.partitions[scored].tolist()
    values = encode_columns(
        {
            **ids,
            "event_time": arrivals.events["time"][scored].astype("M8[ms]"),
            "predicted_at": format_times(np.array([predicted_at]))[0],
            "kind": "interaction",
            **prediction_columns(answers),
            "source": {
                "topic": list(map(_TOPICS.__getitem__, arrivals.topics[scored].tolist())),
                "partition": partitions,
                "offset": arrivals.offsets[scored],
            },
            "seq": np.concatenate([part.result.seq for part in parts])[scored],
        }
    )
    # All of a user's records share the number of the partition that the user's events came from.
    return OutputBatch(
        "predicted-ratings",
        [
            {"key": key, "value": value, "partition": partition}
            for key, value, partition in zip(keys, values, partitions, strict=True)
        ],
    )


def item_updates(arrivals: Arrivals, parts: list[Applied]) -> OutputBatch:
    """What the batch did to each item, a record for each source topic and partition."""
    names = dict(zip(arrivals.events["item"].tolist(), arrivals.ids["item_id"], strict=True))
    sources = _update_sources(arrivals)
    spans = [
        sources[part.partition, source]
        for part in parts
        for source in part.result.deltas["source"].tolist()
    ]
    deltas = joined([part.result.deltas for part in parts])
    items = [names[item] for item in deltas["item"].tolist()]
    return OutputBatch(
        "item-updates",
        [
            {"key": item.encode(), "value": value}
            for item, value in zip(items, encode_updates(items, deltas, spans), strict=True)
        ],
    )


def _update_sources(arrivals: Arrivals) -> dict[tuple[int, int], bytes]:
    """As JSON the span of offsets of each partition and source topic, which is one of SOURCES."""
    found: dict[tuple[int, int], bytes] = {}
    for source, topic in enumerate(SOURCES):
        mine = np.flatnonzero(arrivals.topics == journal.TOPICS.index(topic))
        partitions, begins, counts = np.unique(
            arrivals.partitions[mine], return_index=True, return_counts=True
        )
        firsts, lasts = mine[begins], mine[begins + counts - 1]  # they are in order
        spans = zip(
            partitions.tolist(),
            arrivals.offsets[firsts].tolist(),
            arrivals.offsets[lasts].tolist(),
            strict=True,
        )
        for partition, first, last in spans:
            found[partition, source] = encode(
                UpdateSource(topic=topic, partition=partition, first_offset=first, last_offset=last)
            )
    return found


def journal_records(
    arrivals: Arrivals,
    parts: list[Applied],
    before: Mapping[int, Rows],
    observation: Observation,
    lookups: Lookups,
    encoder: str,
) -> list[Output]:
    """Each partition's journal; `before`: headers as the batch before has left them, by then."""
    events = arrivals.events
    items, attributes = lookups.items, lookups.item_attributes
    users = lookups.user_attributes
    texts = _texts_read(lookups, attributes.rows["text"][:-1])
    reads = np.stack([attributes.hashes, texts, attributes.rows["version"][:-1]], axis=1)
    read_by = attributes.find(np.column_stack([observation.recents, events["item"]]))
    raw = events.view(f"V{EVENT.itemsize}")
    item_versions = items.rows["offset"][items.find(events["item"])]
    user_versions = users.rows["version"][users.find(events["user"])]
    vectors = _texts_read(lookups, observation.item_attributes["text"])
    entries: list[Journal] = []
    for part in parts:
        rows, result, header = part.rows, part.result, before[part.partition]
        mine = np.zeros(len(reads) + 1, np.bool_)
        mine[read_by[rows]] = True
        entries.append(
            Journal(
                topics=arrivals.topics[rows],
                offsets=arrivals.offsets[rows],
                steps=result.step,
                seqs=result.seq,
                events=raw[rows],
                duplicates=result.duplicate,
                features=observation.features[rows],
                item_versions=item_versions[rows],
                item_attributes_versions=observation.item_attributes["version"][rows],
                user_attributes_versions=user_versions[rows],
                item_vectors=vectors[rows],
                recents=reads[mine[:-1]],
                feature_hash=FEATURE_HASH,
                layout_hash=LAYOUT_HASH,
                encoder=encoder,
                partition_state=header.tobytes(),
                ends=tuple(_read_ends(header, part.header)),
            )
        )
    return [
        Output("journal", str(part.partition).encode(), value, part.partition)
        for part, values in zip(parts, journal.encode_all(entries), strict=True)
        for value in values
    ]


def _texts_read(lookups: Lookups, texts: Hashes) -> Hashes:
    """Those of n texts whose vector was read; 0 in place of the others."""
    vectors = lookups.vectors
    if vectors is None:
        return np.zeros_like(texts)
    return np.where(vectors.find(texts) > 0, texts, np.uint64(NONE))


def _read_ends(before: Rows, after: Rows) -> list[int]:
    return np.where(after["ends"] != before["ends"], after["ends"], -1).tolist()
