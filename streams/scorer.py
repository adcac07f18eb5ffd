"""The scorer: reviews, behaviour and text features to predicted ratings.

For each event in order: predict what the user will rate the item from what was known before, then
apply the event to the user's state. A null value is an event too: it erases its user's state.
Predictions, item updates, the journal and the input offsets go out in one transaction; user states
are written to the store after it.

Events are applied in the order in which Kafka took them, whatever their own times say; what comes
late, out of order or a second time is counted. An event from too far in the future is a dead
letter. "Future" and "late" are measured against the time at which the broker took the record,
never against this worker's clock: each replay and each worker comes to the same verdict.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import structlog
from confluent_kafka import Message
from numpy.typing import NDArray

from model import newcomers
from model.canary import Part
from model.events import (
    ACTIONS,
    EVENT,
    FORGET,
    LATE_MS,
    TEXT,
    Rows,
    behavior_rows,
    blank,
    forget_rows,
    joined,
    review_rows,
    text_rows,
)
from model.features import FEATURE_HASH
from model.ids import NONE, Hashes, partitions_of
from model.ladder import TIERS
from model.lookups import Lookups, distinct
from model.predict import Predictions
from model.replay import BatchResult, Observation, Share, run_batch
from model.state import LAYOUT_HASH, SOURCES
from model.updates import encode_updates
from schemas import journal
from schemas.codec import encode, encode_columns, format_times
from schemas.columns import Columns
from schemas.journal import Journal
from schemas.records import UpdateSource
from streams.claims import ends
from streams.config import ScorerConfig
from streams.dead_letters import dead_letter
from streams.digests import Digests, Scored
from streams.inputs import Inputs, split_columns, user_of
from streams.metrics import Metrics
from streams.models import Models
from streams.pace import Pace
from streams.predictions import prediction_columns
from streams.processor import Offsets, Outcome, Output, OutputBatch, Position
from streams.reader import Reader
from streams.user_states import Taken, UserStates

_ROWS: dict[str, Callable[[Columns], Rows]] = {
    "reviews": review_rows,
    "behavior": behavior_rows,
    "text-features": text_rows,
}
_TOPICS = [f'"{topic}"'.encode() for topic in journal.TOPICS]  # as JSON
_IDS = ("event_id", "user_id", "item_id")


@dataclass(frozen=True)
class _Arrivals:
    """n events in the order of their journal: by partition, then by arrival."""

    events: Rows  # EVENT (n)
    topics: NDArray[np.uint8]  # (n): positions in journal.TOPICS
    partitions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    timestamps: NDArray[np.int64]  # ms
    ids: Mapping[str, list[str]]  # by field
    messages: list[Message]

    def take(self, rows: NDArray[np.intp]) -> "_Arrivals":
        """These rows, in this order."""
        order = rows.tolist()
        return _Arrivals(
            self.events.take(rows),
            self.topics[rows],
            self.partitions[rows],
            self.offsets[rows],
            self.timestamps[rows],
            _taken(self.ids, order),
            list(map(self.messages.__getitem__, order)),
        )


@dataclass(frozen=True)
class _Part:
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
        self._pace = Pace(config.batch_events, config.latency_target_ms / 1_000)
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
        self._told_misplaced = False
        self._log = structlog.get_logger(__name__)
        self.lag = 0

    @property
    def batch_size(self) -> int:
        """Most events in the next transaction."""
        return self._pace.size(self.lag)

    def claim(self, committed: Offsets) -> Offsets:
        """Claim and recover the partitions' user states."""
        starts = self._states.claim(committed)
        self._owned |= starts.keys()
        self._pace.spread(len(self._owned))
        return starts

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget partitions."""
        gone = set(partitions)
        self._owned -= gone
        self._pace.spread(len(self._owned))
        self._states.drop(gone)
        for partition in gone:
            self._metrics.newcomers.remove(self.name, str(partition))

    def process(self, messages: list[Message]) -> Outcome:
        """Score and apply one batch."""
        began = time.monotonic()
        with self._phase("decode"):
            inputs, letters = split_columns(messages, self._prefix, self.name)
            arrivals, ahead = self._set_aside(_arrange(inputs))
        serving = self._models.serving
        self._reader.use_encoder(serving.encoder_hash)
        parts, observed, lookups = self._run(messages, arrivals)
        with self._phase("predict"):
            scored = np.flatnonzero(arrivals.events["action"] < TEXT)
            events, observation = arrivals.events, observed
            if len(scored) < len(events):
                events, observation = events.take(scored), observed.take(scored)
            answers = self._models.predict(serving, events, observation, lookups)
            truths = _truths(arrivals, parts)[scored]
        with self._phase("encode"):
            predicted_at = int(time.time() * 1_000)
            ratings = _prediction_records(arrivals, parts, scored, answers, predicted_at)
            updates = _item_updates(arrivals, parts)
        before = {part.partition: self._states[part.partition].header for part in parts}
        for part in parts:
            self._states.take(part.taken)
        took = 0.0

        def journals() -> list[Output]:
            with self._phase("encode"):
                encoder = serving.encoder_hash
                return _journal_records(arrivals, parts, before, observed, lookups, encoder)

        def write(delivered: dict[Position, int]) -> None:
            nonlocal took
            self._write(delivered, parts)
            refused = {"contract": len(letters), "future": len(ahead)}
            self._count_unusual(arrivals, parts, refused)
            took = time.monotonic() - began

        def finish(_: dict[Position, int]) -> None:
            since = serving.canary.since if serving.canary else None
            self._count_scored(arrivals, scored, truths, answers, since, predicted_at)
            self._pace.took(len(messages), took)
            if serving.shadow is not None and len(scored):
                # After the commit: nobody waits for it, and no event is counted twice.
                with self._phase("shadow"):
                    said = self._models.predict_beside(serving, events, observation, lookups)
                if said is not None:
                    self._count_shadow(said, truths, since)

        return Outcome(
            batches=[ratings, updates],
            outputs=letters + ahead + self._digests.due(self.lag),
            late=journals,
            tracked=frozenset({"journal"}),
            write=write,
            finish=finish,
        )

    def idle(self) -> Outcome | None:
        """Digests that are due; now and then, a look at the claims and at some states' age."""
        self._states.check()
        self._states.expire(self._owned, self._watermark)
        digests = self._digests.due(self.lag)
        return Outcome(outputs=digests) if digests else None

    def close(self) -> None:
        """Nothing waits."""

    def _set_aside(self, arrivals: _Arrivals) -> tuple[_Arrivals, list[Output]]:
        """The events without those from too far in the future, and dead letters for these."""
        longest = self._config.longest_future_seconds
        ahead = arrivals.events["time"] > arrivals.timestamps + longest * 1_000
        if not ahead.any():
            return arrivals, []
        letters = [
            dead_letter(
                arrivals.messages[at],
                journal.TOPICS[arrivals.topics[at]],
                self.name,
                f"more than {longest:.0f} s in the future when Kafka took it",
                "event_time",
            )
            for at in np.flatnonzero(ahead)
        ]
        return arrivals.take(np.flatnonzero(~ahead)), letters

    def _run(
        self, messages: list[Message], arrivals: _Arrivals
    ) -> tuple[list[_Part], Observation, Lookups]:
        """Read what the batch needs, then observe and apply it."""
        reached = _ends(messages, self._prefix)
        spans: list[tuple[int, slice]] = []
        users: dict[int, Hashes] = {}
        index: list[NDArray[np.intp]] = []
        with self._phase("read"):
            for partition in sorted(reached):
                low, high = np.searchsorted(arrivals.partitions, [partition, partition + 1])
                rows = slice(int(low), int(high))
                spans.append((partition, rows))
                users[partition], mine = distinct(arrivals.events["user"][rows])
                index.append(mine)
            asked = self._reader.ask(arrivals.events)
            states, values = self._states.read(users, asked.keys)
            headers = [self._states[partition].header.copy() for partition, _ in spans]
            shares = [
                Share(rows_, at, header["partition"].copy(), arrivals.events[rows])
                for rows_, at, header, (_, rows) in zip(states, index, headers, spans, strict=True)
            ]
            lookups = self._reader.answer(asked, values, joined(states))
        parts: list[_Part] = []
        with self._phase("features"):
            results, observation = run_batch(shares, lookups)
            for (partition, rows), header, result in zip(spans, headers, results, strict=True):
                header["partition"] = result.partition
                read = np.array(reached[partition])
                header["ends"] = np.where(read >= 0, read, header["ends"])
                parts.append(_Part(partition, rows, users[partition], result, header))
        return parts, observation, lookups

    def _write(self, delivered: dict[Position, int], parts: list[_Part]) -> None:
        for part in parts:
            part.header["journal"] = delivered["journal", part.partition]
        self._states.write([part.taken for part in parts])
        written = sum(len(part.users) for part in parts)
        self._metrics.state_writes.labels(self.name, "written").inc(written)

    def _count_unusual(
        self, arrivals: _Arrivals, parts: list[_Part], letters: dict[str, int]
    ) -> None:
        for reason, count in letters.items():
            self._metrics.dead_letters.labels(self.name, reason).inc(count)
        for part in parts:
            apart = newcomers.level(part.result.partition)
            self._metrics.newcomers.labels(self.name, str(part.partition)).set(float(apart))
        self._count_misplaced(arrivals)
        events, repeated = arrivals.events, _repeated(parts)
        self._metrics.duplicates.labels(self.name).inc(int(repeated.sum()))
        if forgotten := int((events["action"] == FORGET).sum()):
            self._metrics.events.labels(self.name, "forget").inc(forgotten)
        applied = ~repeated & (events["action"] < TEXT)
        late = arrivals.timestamps - events["time"] > LATE_MS
        behind = np.concatenate([part.result.behind for part in parts])
        for kind, count in (
            ("late", (late & applied).sum()),
            ("out_of_order", (behind & applied).sum()),
            ("future", letters["future"]),
        ):
            self._metrics.disorder.labels(self.name, kind).inc(int(count))

    def _count_misplaced(self, arrivals: _Arrivals) -> None:
        """Of the user of such an event, answers and `forget` look for the state elsewhere."""
        events = arrivals.events["action"] < TEXT
        theirs = partitions_of(arrivals.events["user"], self._states.partitions)
        misplaced = np.flatnonzero(events & (theirs != arrivals.partitions))
        self._metrics.misplaced.labels(self.name).inc(len(misplaced))
        if len(misplaced) and not self._told_misplaced:
            self._told_misplaced = True
            at = misplaced[0]
            self._log.warning(
                "events lie in partitions that are not their users'",
                topic=journal.TOPICS[arrivals.topics[at]],
                partition=int(arrivals.partitions[at]),
                offset=int(arrivals.offsets[at]),
                expected=int(theirs[at]),
                help="their producer's key must be the user_id, its partitioner murmur2_random",
            )

    def _count_scored(
        self,
        arrivals: _Arrivals,
        scored: NDArray[np.intp],
        truths: NDArray[np.float32],
        answers: Sequence[Part],
        tried_since: datetime | None,
        predicted_at: int,
    ) -> None:
        for part in answers:
            mine = scored[part.rows]
            if len(mine):
                since = None if part.role == "stable" else tried_since
                self._count_part(arrivals, mine, truths[part.rows], part, since, predicted_at)

    def _count_part(
        self,
        arrivals: _Arrivals,
        scored: NDArray[np.intp],
        truths: NDArray[np.float32],
        part: Part,
        tried_since: datetime | None,
        predicted_at: int,
    ) -> None:
        events, predictions = arrivals.events.take(scored), part.predictions
        self._watermark = max(self._watermark, int(events["time"].max()))
        codes, counts = np.unique(events["action"], return_counts=True)
        actions = Counter(
            {ACTIONS[code]: int(count) for code, count in zip(codes, counts, strict=True)}
        )
        for action, count in actions.items():
            self._metrics.events.labels(self.name, action).inc(count)
        tiers, counts = np.unique(predictions.tier, return_counts=True)
        for tier, count in zip(tiers, counts, strict=True):
            self._metrics.predictions.labels("interaction", TIERS[tier], predictions.version).inc(
                int(count)
            )
        self._digests.add(
            Scored(
                version=predictions.version,
                ratings=predictions.rating,
                truths=truths,
                tiers=predictions.tier,
                items=list(map(arrivals.ids["item_id"].__getitem__, scored.tolist())),
                actions=actions,
                latencies_ms=(predicted_at - arrivals.timestamps[scored]).astype(np.float32),
                role=part.role,
                tried_since=tried_since,
            )
        )

    def _count_shadow(
        self, said: Predictions, truths: NDArray[np.float32], tried_since: datetime | None
    ) -> None:
        """Its errors alone: whatever else there is to count, the version that answered counts."""
        self._digests.add(
            Scored(
                version=said.version,
                ratings=said.rating,
                truths=truths,
                tiers=said.tier,
                items=[],
                actions=Counter(),
                latencies_ms=np.zeros(0, np.float32),
                role="shadow",
                tried_since=tried_since,
            )
        )

    def _phase(self, phase: str) -> Any:
        return self._metrics.batch_seconds.labels(self.name, phase).time()


def _taken(ids: Mapping[str, list[str]], order: list[int]) -> Mapping[str, list[str]]:
    return {name: list(map(each.__getitem__, order)) for name, each in ids.items()}


def _arrange(inputs: Mapping[str, Inputs[Columns]]) -> _Arrivals:
    """All good events of a batch by partition, topics merged by the time of their append."""
    used = [inputs[topic] for topic in journal.TOPICS if topic in inputs]
    none = np.zeros(0, np.int64)
    events = [_ROWS[each.topic](each.records) for each in used]
    ids = [each.records for each in used]
    for each in [each for each in used if each.tombstones]:
        users = [user_of(message.key()) or "" for message in each.tombstones]
        nothing = [""] * len(users)
        used.append(Inputs(each.topic, each.tombstones, {}))
        events.append(forget_rows(users))
        ids.append({"event_id": nothing, "user_id": users, "item_id": nothing})
    arrivals = _Arrivals(
        events=np.concatenate([blank(EVENT, 0), *events]),
        topics=np.repeat(
            np.array([journal.TOPICS.index(each.topic) for each in used], np.uint8),
            [len(each.messages) for each in used],
        ),
        partitions=np.concatenate([none, *(each.partitions() for each in used)]),
        offsets=np.concatenate([none, *(each.offsets() for each in used)]),
        timestamps=np.concatenate([none, *(each.timestamps() for each in used)]),
        ids={name: [one for each in ids for one in each[name]] for name in _IDS},
        messages=[message for each in used for message in each.messages],
    )
    return arrivals.take(_order(arrivals))


def _order(arrivals: _Arrivals) -> NDArray[np.intp]:
    """The order of the journal: in it each topic partition's own order is kept."""
    partition, topic, offset = arrivals.partitions, arrivals.topics, arrivals.offsets
    # A topic's own order comes before the clock: its append times are made to never fall.
    by_log = np.lexsort((offset, topic, partition))
    log = partition[by_log] * len(journal.TOPICS) + topic[by_log]
    arrival = arrivals.timestamps.copy()
    for rows in np.split(by_log, np.flatnonzero(np.diff(log)) + 1):
        arrival[rows] = np.maximum.accumulate(arrival[rows])
    return np.lexsort((offset, topic, arrival, partition))


def _truths(arrivals: _Arrivals, parts: Sequence[_Part]) -> NDArray[np.float32]:
    """The stars that each event gives (n), nan for none.

    Nor for a repetition: its user's state had them when it was predicted.
    """
    return np.where(_repeated(parts), np.float32(np.nan), arrivals.events["rating"])


def _repeated(parts: Sequence[_Part]) -> NDArray[np.bool_]:
    return np.concatenate([part.result.duplicate for part in parts])


def _ends(messages: Sequence[Message], prefix: str) -> dict[int, list[int]]:
    """By partition, the next offset of each input topic after these messages; -1: none of it."""
    found: dict[int, list[int]] = {}
    for at, topic in enumerate(journal.TOPICS):
        for partition, end in ends(messages, prefix + topic).items():
            found.setdefault(partition, [-1] * len(journal.TOPICS))[at] = end
    return found


def _texts_read(lookups: Lookups, texts: Hashes) -> Hashes:
    """Those of n texts whose vector was read; 0 in place of the others."""
    vectors = lookups.vectors
    if vectors is None:
        return np.zeros_like(texts)
    return np.where(vectors.find(texts) > 0, texts, np.uint64(NONE))


def _read_ends(before: Rows, after: Rows) -> list[int]:
    return np.where(after["ends"] != before["ends"], after["ends"], -1).tolist()


def _journal_records(
    arrivals: _Arrivals,
    parts: list[_Part],
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


def _prediction_records(
    arrivals: _Arrivals,
    parts: list[_Part],
    scored: NDArray[np.intp],
    answers: Sequence[Part],
    predicted_at: int,
) -> OutputBatch:
    every = len(scored) == len(arrivals.events)
    ids = arrivals.ids if every else _taken(arrivals.ids, scored.tolist())
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


def _item_updates(arrivals: _Arrivals, parts: list[_Part]) -> OutputBatch:
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


def _update_sources(arrivals: _Arrivals) -> dict[tuple[int, int], bytes]:
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
