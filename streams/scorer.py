"""The scorer: reviews, behaviour and text features to predicted ratings.

For each event in order: predict what the user will rate the item from what was known before, then
apply the event to the user's state. Predictions, item updates, the journal and the input offsets
go out in one transaction; user states are written to the store after it.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import structlog
from confluent_kafka import Message
from numpy.typing import NDArray

from model.events import (
    ACTIONS,
    EVENT,
    TEXT,
    Rows,
    blank,
    from_behavior,
    from_reviews,
    from_text_features,
)
from model.features import FEATURE_HASH
from model.ids import Hashes
from model.lookups import Lookups
from model.predict import Predictions
from model.replay import BatchResult, run_batch
from model.state import LAYOUT_HASH, SOURCES
from model.updates import to_updates
from schemas import journal
from schemas.codec import encode_columns, format_times
from schemas.journal import Journal
from streams.config import ScorerConfig
from streams.dead_letters import dead_letter
from model.ladder import TIERS
from streams.digests import Digests, Scored
from streams.inputs import Inputs, split
from streams.loop import Outcome, Output, OutputBatch, Position
from streams.metrics import Metrics
from streams.models import Models, vector_width
from streams.predictions import prediction_columns, select
from streams.reader import Reader
from streams.user_states import UserStates

SWEEP_SECONDS = 600.0  # expired states are looked for this often: it walks the whole store

_FROM_RECORDS = dict(
    zip(journal.TOPICS, (from_reviews, from_behavior, from_text_features), strict=True)
)


@dataclass(frozen=True)
class _Arrivals:
    """n events in the order of their journal: by partition, then by arrival."""

    events: Rows  # EVENT (n)
    topics: NDArray[np.uint8]  # (n): positions in journal.TOPICS
    partitions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    timestamps: NDArray[np.int64]  # ms
    records: Sequence[Any]


@dataclass(frozen=True)
class _Part:
    """What one user partition's share of a batch gave."""

    partition: int
    rows: slice
    users: Hashes
    result: BatchResult
    header: Rows  # after the batch, but for the journal's end


class Scorer:
    """One worker's scorer, a processor of `streams.loop`."""

    name = "scorer"
    topics = journal.TOPICS
    together = True
    transactional = True

    def __init__(
        self,
        config: ScorerConfig,
        prefix: str,
        states: UserStates,
        reader: Reader,
        models: Models,
        metrics: Metrics,
        worker: str,
    ) -> None:
        self.batch_size = config.batch_events
        self.linger_seconds = config.linger_ms / 1_000
        self._config = config
        self._prefix = prefix
        self._states = states
        self._reader = reader
        self._models = models
        self._metrics = metrics
        self._digests = Digests(worker, "interaction", config.digest_seconds)
        self._owned: set[int] = set()
        self._watermark = 0
        self._sweep_at = time.monotonic() + SWEEP_SECONDS
        self.lag = 0
        self._log = structlog.get_logger(__name__)

    def claim(self, partition: int, committed: dict[str, int]) -> dict[str, int]:
        """Claim and recover the partition's user states."""
        starts = self._states.claim(partition, committed)
        self._owned.add(partition)
        return starts

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget partitions."""
        self._owned -= set(partitions)
        self._states.drop(partitions)

    def process(self, messages: list[Message]) -> Outcome:
        """Score and apply one batch."""
        with self._phase("decode"):
            inputs, letters = split(messages, self._prefix, self.name)
            letters += self._from_the_future(inputs)
            arrivals = _arrange(inputs)
        serving = self._models.serving
        self._reader.use_encoder(serving.encoder_hash, vector_width(serving))
        parts, lookups = self._run(messages, arrivals)
        with self._phase("predict"):
            scored = np.flatnonzero(arrivals.events["action"] != TEXT)
            observation = select([part.result.observation for part in parts], scored)
            predictions = serving.predictor.predict(arrivals.events[scored], observation, lookups)
        with self._phase("encode"):
            predicted_at = int(time.time() * 1_000)
            ratings = _prediction_records(arrivals, parts, scored, predictions, predicted_at)
            updates = _item_updates(arrivals, parts)
            journals = self._journal_records(arrivals, parts, lookups, serving.encoder_hash)
        for letter in letters:
            self._metrics.dead_letters.labels(self.name, "contract").inc()
        return Outcome(
            batches=[ratings, updates],
            outputs=journals + letters,
            tracked=frozenset({"journal"}),
            finish=lambda delivered: self._finish(
                delivered, arrivals, parts, scored, predictions, predicted_at
            ),
        )

    def idle(self) -> Outcome | None:
        """Digests that are due; now and then, a look for expired states."""
        if time.monotonic() > self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_SECONDS
            gone = sum(self._states.expire(each, self._watermark) for each in self._owned)
            if gone:
                self._log.info("expired", users=gone)
        digests = self._digests.due(self.lag)
        return Outcome(outputs=digests) if digests else None

    def _from_the_future(self, inputs: dict[str, Inputs]) -> list[Output]:
        """Dead letters of events whose clock is ahead of ours by too much."""
        letters: list[Output] = []
        latest = time.time() + self._config.longest_future_seconds
        for topic, each in inputs.items():
            good = np.array([record.event_time.timestamp() <= latest for record in each.records])
            if good.all():
                continue
            letters += [
                dead_letter(
                    each.messages[at],
                    topic,
                    self.name,
                    f"more than {self._config.longest_future_seconds:.0f} s in the future",
                    "event_time",
                )
                for at in np.flatnonzero(~good)
            ]
            each.keep(good)
        return letters

    def _run(self, messages: list[Message], arrivals: _Arrivals) -> tuple[list[_Part], Lookups]:
        """Read what the batch needs, then observe and apply it partition by partition."""
        ends = _ends(messages, self._prefix)
        shares: list[tuple[int, slice, Hashes, NDArray[np.intp], Rows]] = []
        with self._phase("read"):
            for partition in sorted(ends):
                low, high = np.searchsorted(arrivals.partitions, [partition, partition + 1])
                rows = slice(int(low), int(high))
                users, index = np.unique(arrivals.events["user"][rows], return_inverse=True)
                shares.append((partition, rows, users, index, self._states.read(partition, users)))
            all_states = np.concatenate([share[-1] for share in shares])
            lookups = self._reader.lookups(arrivals.events, all_states)
        parts: list[_Part] = []
        with self._phase("features"):
            for partition, rows, users, index, states in shares:
                header = self._states[partition].header.copy()
                result = run_batch(
                    states, index, header["partition"].copy(), arrivals.events[rows], lookups
                )
                header["partition"] = result.partition
                read = np.array(ends[partition])
                header["ends"] = np.where(read >= 0, read, header["ends"])
                parts.append(_Part(partition, rows, users, result, header))
        return parts, lookups

    def _journal_records(
        self, arrivals: _Arrivals, parts: list[_Part], lookups: Lookups, encoder: str
    ) -> list[Output]:
        outputs: list[Output] = []
        vectors = lookups.vectors
        missing = -1 if vectors is None else len(vectors.hashes)
        known = lookups.item_attributes.hashes
        attributes = lookups.item_attributes.take(known)
        texts = attributes["text"].copy()
        if vectors is None:
            texts[:] = 0
        else:
            texts[vectors.find(texts) == missing] = 0
        reads = np.stack([known, texts, attributes["version"]], axis=1)  # (m, 3)
        for part in parts:
            rows, result = part.rows, part.result
            events, observation = arrivals.events[rows], result.observation
            mine = np.isin(known, np.union1d(observation.recents, events["item"]))
            before = self._states[part.partition].header
            found = observation.item_vectors != missing if vectors is not None else False
            entry = Journal(
                topics=arrivals.topics[rows],
                offsets=arrivals.offsets[rows],
                steps=result.step,
                seqs=result.seq,
                events=events.view(f"V{EVENT.itemsize}"),
                duplicates=result.duplicate,
                features=observation.features,
                item_versions=lookups.items.take(events["item"])["offset"],
                item_attributes_versions=observation.item_attributes["version"],
                user_attributes_versions=lookups.user_attributes.take(events["user"])["version"],
                item_vectors=np.where(found, observation.item_attributes["text"], 0).astype("u8"),
                recents=reads[mine],
                feature_hash=FEATURE_HASH,
                layout_hash=LAYOUT_HASH,
                encoder=encoder,
                partition_state=before.tobytes(),
                ends=tuple(_read_ends(before, part.header)),
            )
            key = str(part.partition).encode()
            outputs += [
                Output("journal", key, value, part.partition) for value in journal.encode(entry)
            ]
        return outputs

    def _finish(
        self,
        delivered: dict[Position, int],
        arrivals: _Arrivals,
        parts: list[_Part],
        scored: NDArray[np.intp],
        predictions: Predictions,
        predicted_at: int,
    ) -> None:
        for part in parts:
            part.header["journal"] = delivered["journal", part.partition]
            self._states.write(part.partition, part.users, part.result.states, part.header)
            self._metrics.state_writes.labels(self.name, "written").inc(len(part.users))
            self._metrics.duplicates.labels(self.name).inc(int(part.result.duplicate.sum()))
        events = arrivals.events[scored]
        if not len(events):
            return
        self._watermark = max(self._watermark, int(events["time"].max()))
        codes, counts = np.unique(events["action"], return_counts=True)
        for code, count in zip(codes, counts, strict=True):
            self._metrics.events.labels(self.name, ACTIONS[code]).inc(int(count))
        tiers, counts = np.unique(predictions.tier, return_counts=True)
        for tier, count in zip(tiers, counts, strict=True):
            self._metrics.predictions.labels("interaction", TIERS[tier], predictions.version).inc(
                int(count)
            )
        self._digests.add(
            Scored(
                version=predictions.version,
                ratings=predictions.rating,
                truths=events["rating"],
                tiers=predictions.tier,
                items=[arrivals.records[at].item_id for at in scored],
                actions=Counter(
                    {
                        ACTIONS[c]: int(k)
                        for c, k in zip(
                            *np.unique(events["action"], return_counts=True), strict=True
                        )
                    }
                ),
                latencies_ms=(predicted_at - arrivals.timestamps[scored]).astype(np.float32),
            )
        )

    def _phase(self, phase: str) -> Any:
        return self._metrics.batch_seconds.labels(self.name, phase).time()


def _arrange(inputs: dict[str, Inputs]) -> _Arrivals:
    """All good events of a batch by partition, topics merged by the time of their append."""
    used = [inputs[topic] for topic in journal.TOPICS if topic in inputs]
    events = [blank(EVENT, 0)]
    topics, partitions, offsets, timestamps = [], [], [], []
    records: list[Any] = []
    for each in used:
        events.append(_FROM_RECORDS[each.topic](each.records))
        topics.append(np.full(len(each.records), journal.TOPICS.index(each.topic), np.uint8))
        partitions.append(each.partitions())
        offsets.append(each.offsets())
        timestamps.append(each.timestamps())
        records += each.records
    empty = np.zeros(0, np.int64)
    partition = np.concatenate([empty, *partitions])
    timestamp = np.concatenate([empty, *timestamps])
    offset = np.concatenate([empty, *offsets])
    topic = np.concatenate([empty.astype(np.uint8), *topics])
    # A topic's own order comes before the clock: its append times are made to never fall.
    by_log = np.lexsort((offset, topic, partition))
    arrival = timestamp.copy()
    log = np.stack([partition, topic.astype(np.int64)])[:, by_log]
    starts = np.flatnonzero(np.r_[True, (log[:, 1:] != log[:, :-1]).any(0)]) if len(by_log) else []
    for low, high in zip(starts, [*starts[1:], len(by_log)], strict=True):
        rows = by_log[low:high]
        arrival[rows] = np.maximum.accumulate(arrival[rows])
    order = np.lexsort((offset, topic, arrival, partition))
    return _Arrivals(
        events=np.concatenate(events)[order],
        topics=topic[order],
        partitions=partition[order],
        offsets=offset[order],
        timestamps=timestamp[order],
        records=[records[at] for at in order],
    )


def _ends(messages: Sequence[Message], prefix: str) -> dict[int, list[int]]:
    """By partition, the next offset of each input topic after these messages; -1: none of it."""
    ends: dict[int, list[int]] = {}
    for message in messages:
        topic = journal.TOPICS.index(str(message.topic()).removeprefix(prefix))
        mine = ends.setdefault(message.partition() or 0, [-1] * len(journal.TOPICS))
        mine[topic] = max(mine[topic], (message.offset() or 0) + 1)
    return ends


def _read_ends(before: Rows, after: Rows) -> list[int]:
    return np.where(after["ends"] != before["ends"], after["ends"], -1).tolist()


def _prediction_records(
    arrivals: _Arrivals,
    parts: list[_Part],
    scored: NDArray[np.intp],
    predictions: Predictions,
    predicted_at: int,
) -> OutputBatch:
    records = [arrivals.records[at] for at in scored]
    seqs = np.concatenate([part.result.seq for part in parts])[scored].tolist()
    users = [record.user_id for record in records]
    partitions = arrivals.partitions[scored].tolist()
    topics = [journal.TOPICS[topic] for topic in arrivals.topics[scored].tolist()]
    offsets = arrivals.offsets[scored].tolist()
    count = len(records)
    values = encode_columns(
        {
            "event_id": [record.event_id for record in records],
            "user_id": users,
            "item_id": [record.item_id for record in records],
            "event_time": format_times(arrivals.events["time"][scored]),
            "predicted_at": format_times(np.full(count, predicted_at, np.int64)),
            "kind": ["interaction"] * count,
            **prediction_columns(predictions),
            "source": [
                {"topic": topic, "partition": partition, "offset": offset}
                for topic, partition, offset in zip(topics, partitions, offsets, strict=True)
            ],
            "seq": seqs,
        }
    )
    # All of a user's records share the number of the partition that the user's events came from.
    return OutputBatch(
        "predicted-ratings",
        [
            {"key": user.encode(), "value": value, "partition": partition}
            for user, value, partition in zip(users, values, partitions, strict=True)
        ],
    )


def _item_updates(arrivals: _Arrivals, parts: list[_Part]) -> OutputBatch:
    """What the batch did to each item, a record for each source topic and partition."""
    names = dict(
        zip(
            arrivals.events["item"].tolist(),
            (record.item_id for record in arrivals.records),
            strict=True,
        )
    )
    messages: list[dict[str, Any]] = []
    for part in parts:
        sources: dict[int, dict[str, Any]] = {}
        for source, topic in enumerate(SOURCES):
            mine = arrivals.topics[part.rows] == journal.TOPICS.index(topic)
            offsets = arrivals.offsets[part.rows][mine]
            if len(offsets):
                sources[source] = {
                    "topic": topic,
                    "partition": part.partition,
                    "first_offset": int(offsets.min()),
                    "last_offset": int(offsets.max()),
                }
        updates = to_updates(part.result.deltas, names, sources)
        messages += [
            {"key": update["item_id"].encode(), "value": orjson.dumps(update)} for update in updates
        ]
    return OutputBatch("item-updates", messages)
