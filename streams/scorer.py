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
from collections.abc import Iterable, Sequence
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
    FORGET,
    LATE_MS,
    TEXT,
    joined,
)
from model.ids import Hashes, partitions_of
from model.ladder import TIERS
from model.lookups import Lookups, distinct
from model.predict import Predictions
from model.replay import Observation, Share, run_batch
from schemas import journal
from streams.arrivals import Arrivals, arrange, input_ends
from streams.config import ScorerConfig
from streams.dead_letters import dead_letter
from streams.digests import Digests, Scored
from streams.inputs import split_columns
from streams.metrics import Metrics
from streams.models import Models
from streams.pace import Pace
from streams.processor import Offsets, Outcome, Output, Position
from streams.reader import Reader
from streams.scorer_records import (
    Applied,
    item_updates,
    journal_records,
    prediction_records,
    repetitions,
    truths_of,
)
from streams.user_states import UserStates


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
            arrivals, ahead = self._set_aside(arrange(inputs))
        serving = self._models.serving
        self._reader.use_encoder(serving.encoder_hash)
        parts, observed, lookups = self._run(messages, arrivals)
        with self._phase("predict"):
            scored = np.flatnonzero(arrivals.events["action"] < TEXT)
            events, observation = arrivals.events, observed
            if len(scored) < len(events):
                events, observation = events.take(scored), observed.take(scored)
            answers = self._models.predict(serving, events, observation, lookups)
            truths = truths_of(arrivals, parts)[scored]
        with self._phase("encode"):
            predicted_at = int(time.time() * 1_000)
            ratings = prediction_records(arrivals, parts, scored, answers, predicted_at)
            updates = item_updates(arrivals, parts)
        before = {part.partition: self._states[part.partition].header for part in parts}
        for part in parts:
            self._states.take(part.taken)
        took = 0.0

        def journals() -> list[Output]:
            with self._phase("encode"):
                encoder = serving.encoder_hash
                return journal_records(arrivals, parts, before, observed, lookups, encoder)

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

    def _set_aside(self, arrivals: Arrivals) -> tuple[Arrivals, list[Output]]:
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
        self, messages: list[Message], arrivals: Arrivals
    ) -> tuple[list[Applied], Observation, Lookups]:
        """Read what the batch needs, then observe and apply it."""
        reached = input_ends(messages, self._prefix)
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
        parts: list[Applied] = []
        with self._phase("features"):
            results, observation = run_batch(shares, lookups)
            for (partition, rows), header, result in zip(spans, headers, results, strict=True):
                header["partition"] = result.partition
                read = np.array(reached[partition])
                header["ends"] = np.where(read >= 0, read, header["ends"])
                parts.append(Applied(partition, rows, users[partition], result, header))
        return parts, observation, lookups

    def _write(self, delivered: dict[Position, int], parts: list[Applied]) -> None:
        for part in parts:
            part.header["journal"] = delivered["journal", part.partition]
        self._states.write([part.taken for part in parts])
        written = sum(len(part.users) for part in parts)
        self._metrics.state_writes.labels(self.name, "written").inc(written)

    def _count_unusual(
        self, arrivals: Arrivals, parts: list[Applied], letters: dict[str, int]
    ) -> None:
        for reason, count in letters.items():
            self._metrics.dead_letters.labels(self.name, reason).inc(count)
        for part in parts:
            apart = newcomers.level(part.result.partition)
            self._metrics.newcomers.labels(self.name, str(part.partition)).set(float(apart))
        self._count_misplaced(arrivals)
        events, repeated = arrivals.events, repetitions(parts)
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

    def _count_misplaced(self, arrivals: Arrivals) -> None:
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
        arrivals: Arrivals,
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
        arrivals: Arrivals,
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
