"""Answers: score requests to ranked predicted ratings, from states as they are.

It has a group of its own and reads states from the store, so a request passes the backlog of
events; it changes nothing.

A request waits from the moment at which the broker took it (its append time), by the worker's
clock: what it has waited longer than its deadline is answered as expired. The producer's clock
counts only where it says that the request is more than CLOCK_MS older than its append, as one is
that a producer held back while Kafka was away. So a producer whose clock is somewhat slow, or fast
by any amount, is answered like any other.
"""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from confluent_kafka import Message
from numpy.typing import NDArray

from model.canary import Part, in_order
from model.ids import hash_ids
from model.ladder import TIERS
from schemas.codec import Column, encode_columns, format_times, time_ms
from schemas.records import ScoreRequest
from streams.asking import Asking
from streams.config import ScorerConfig
from streams.digests import Digests, Scored
from streams.inputs import split
from streams.metrics import Metrics
from streams.models import Models
from streams.predictions import prediction_columns
from streams.processor import Offsets, Outcome, OutputBatch, Position
from streams.reader import Reader
from streams.store import Store

BATCH = 200  # requests in one transaction
ITEMS = 20_000  # about so many at most: 200,000 take a gigabyte, and nearly too long
LINGER_SECONDS = 0.005  # a shopper waits for this
CLOCK_MS = 1_000  # producers' clocks may be off by so much


class Answers:
    """One worker's answers, a processor of `streams.loop`."""

    name = "answers"
    topics = ("score-requests",)
    together = False
    transactional = True
    linger_seconds = LINGER_SECONDS

    def __init__(
        self,
        config: ScorerConfig,
        prefix: str,
        store: Store,
        reader: Reader,
        models: Models,
        metrics: Metrics,
        worker: str,
    ) -> None:
        self._prefix = prefix
        self._asking = Asking(store, reader)
        self._models = models
        self._metrics = metrics
        self._digests = Digests(worker, "request", config.digest_seconds)
        self.most = BATCH  # requests in one transaction
        self.batch_size = BATCH  # in the next one
        self.lag = 0

    def claim(self, committed: Offsets) -> Offsets:
        """Nothing is claimed; read on from the committed offsets."""
        return committed

    def drop(self, partitions: Iterable[int]) -> None:
        """Nothing is held."""

    def idle(self) -> Outcome | None:
        """Digests that are due."""
        digests = self._digests.due(self.lag)
        return Outcome(outputs=digests) if digests else None

    def close(self) -> None:
        """Nothing waits."""

    def process(self, messages: list[Message]) -> Outcome:
        """Answer one batch of requests; those past their deadline are answered as expired."""
        inputs, letters = split(messages, self._prefix, self.name)
        asked = inputs["score-requests"]
        now = int(time.time() * 1_000)
        wanted = sum(len(each.item_ids) for each in asked.records)
        # The next ones are taken to ask for as much as these.
        typical = max(wanted // max(len(asked.records), 1), 1)
        self.batch_size = min(max(ITEMS // typical, 1), self.most)
        late = [
            _late(request, stamp, now)
            for request, stamp in zip(asked.records, asked.timestamps().tolist(), strict=True)
        ]
        batches: list[OutputBatch] = []
        counted: list[Scored] = []
        for expired in (False, True):
            rows = [at for at, each in enumerate(late) if each == expired]
            if rows:
                requests = [asked.records[at] for at in rows]
                sources = [
                    {
                        "topic": "score-requests",
                        "partition": asked.messages[at].partition(),
                        "offset": asked.messages[at].offset(),
                    }
                    for at in rows
                ]
                stamps = asked.timestamps()[rows]
                batch, scored = self._answer(requests, sources, stamps, expired)
                batches.append(batch)
                counted += scored

        def finish(_: dict[Position, int]) -> None:
            self._metrics.dead_letters.labels(self.name, "contract").inc(len(letters))
            for kind, count in (("request", late.count(False)), ("expired", late.count(True))):
                self._metrics.events.labels(self.name, kind).inc(count)
            for scored in counted:
                self._count(scored)

        return Outcome(batches=batches, outputs=letters, finish=finish)

    def _answer(
        self,
        requests: list[ScoreRequest],
        sources: list[dict[str, Any]],
        stamps: NDArray[np.int64],
        expired: bool,
    ) -> tuple[OutputBatch, list[Scored]]:
        """A record for each item of requests (n) that came from `sources`, appended at `stamps`."""
        counts = [len(each.item_ids) for each in requests]
        request = np.repeat(np.arange(len(requests)), counts)  # (m): whose each item is
        items = [item for each in requests for item in each.item_ids]
        users = [requests[at].user_id for at in request]
        times = np.array([time_ms(each.event_time) for each in requests])[request]
        columns: dict[str, Column] = {
            "request_id": [requests[at].request_id for at in request],
            "user_id": users,
            "item_id": items,
            "event_time": times.astype("M8[ms]"),
            "kind": "request",
            "source": [sources[at] for at in request],
            "of": [counts[at] for at in request],
        }
        scored: list[Scored] = []
        if expired:
            columns["status"] = "expired"  # nothing was predicted, by no model
        else:
            parts = self._predict(requests, request, items, times)
            ranks = _ranks(in_order(parts, lambda each: each.rating), request)
            columns |= {**prediction_columns(parts), "status": "ok", "rank": ranks}
            scored = [_scored(part, items, stamps[request]) for part in parts]
        columns["predicted_at"] = format_times(np.array([int(time.time() * 1_000)]))[0]
        keys = (user.encode() for user in users)
        messages = [
            {"key": key, "value": value}
            for key, value in zip(keys, encode_columns(columns), strict=True)
        ]
        return OutputBatch("predicted-ratings", messages), scored

    def _predict(
        self,
        requests: list[ScoreRequest],
        request: NDArray[np.intp],
        items: list[str],
        times: NDArray[np.int64],
    ) -> list[Part]:
        """What answers items (m): `request` (m) asks for each, at its time of `times` (m)."""
        serving = self._models.serving
        users = hash_ids([each.user_id for each in requests])[request]
        asked = self._asking.observe(serving.encoder_hash, users, hash_ids(items), times)
        return self._models.predict(serving, *asked)

    def _count(self, scored: Scored) -> None:
        for tier, count in zip(*np.unique(scored.tiers, return_counts=True), strict=True):
            self._metrics.predictions.labels("request", TIERS[tier], scored.version).inc(int(count))
        self._digests.add(scored)


def _late(request: ScoreRequest, appended: int, now: int) -> bool:
    """Whether a request has waited for longer than its deadline; times in ms."""
    since = min(appended, time_ms(request.event_time) + CLOCK_MS)
    return request.deadline_ms is not None and now - since > request.deadline_ms


def _scored(part: Part, items: list[str], stamps: NDArray[np.int64]) -> Scored:
    """What digests count of a version's part of items (m), asked for at `stamps` (m, ms)."""
    said = part.predictions
    waited = (time.time() * 1_000 - stamps).astype(np.float32)
    return Scored(
        version=said.version,
        ratings=said.rating,
        truths=np.full(len(said.rating), np.nan, np.float32),
        tiers=said.tier,
        items=part.take(items),
        actions=Counter(),
        latencies_ms=waited[part.rows],
        role=part.role,
    )


def _ranks(ratings: NDArray[np.float32], request: NDArray[np.intp]) -> NDArray[np.int64]:
    """1 for a request's best item, then 2, and so on; equal ratings keep the asked order. (m)"""
    order = np.lexsort((np.arange(len(ratings)), -ratings, request))
    first = np.searchsorted(request, request)  # where each item's request begins
    ranks = np.empty(len(ratings), np.int64)
    ranks[order] = np.arange(len(ratings))
    return ranks - first + 1
