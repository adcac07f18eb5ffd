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
from model.events import EVENT, Rows, blank, from_request, joined
from model.ids import hash_ids, partitions_of
from model.ladder import TIERS
from model.replay import observe
from model.state import USER
from schemas.codec import Column, encode_columns, format_times, time_ms
from schemas.records import ScoreRequest
from streams.config import ScorerConfig
from streams.digests import Digests, Scored
from streams.inputs import split
from streams.metrics import Metrics
from streams.models import Models
from streams.predictions import prediction_columns
from streams.processor import Offsets, Outcome, OutputBatch, Position
from streams.reader import USER_STATE, Reader
from streams.store import Store
from streams.user_states import decode_header

BATCH = 200  # requests in one transaction
ITEMS = 20_000  # about so many at most: 200,000 take a gigabyte, and nearly too long
LINGER_SECONDS = 0.005  # a shopper waits for this
CLOCK_MS = 1_000  # producers' clocks may be off by so much
HEADER_SECONDS = 1.0  # a partition's running mean moves slowly


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
        self._store = store
        self._reader = reader
        self._models = models
        self._metrics = metrics
        self._digests = Digests(worker, "request", config.digest_seconds)
        self._headers: dict[int, tuple[float, Rows]] = {}
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
        request = np.repeat(
            np.arange(len(requests)), [len(each.item_ids) for each in requests]
        )  # (m)
        items = [item for each in requests for item in each.item_ids]
        users = [requests[at].user_id for at in request]
        columns: dict[str, Column] = {
            "request_id": [requests[at].request_id for at in request],
            "user_id": users,
            "item_id": items,
            "event_time": np.array([time_ms(each.event_time) for each in requests], "M8[ms]")[
                request
            ],
            "kind": "request",
            "source": [sources[at] for at in request],
            "of": [len(requests[at].item_ids) for at in request],
        }
        scored: list[Scored] = []
        if expired:
            columns["status"] = "expired"  # nothing was predicted, by no model
        else:
            parts = self._predict(requests, request, items)
            columns |= prediction_columns(parts)
            columns |= {
                "status": "ok",
                "rank": _ranks(in_order(parts, lambda each: each.rating), request),
            }
            waited = (time.time() * 1_000 - stamps[request]).astype(np.float32)
            scored = [
                Scored(
                    version=part.predictions.version,
                    ratings=part.predictions.rating,
                    truths=np.full(len(part.predictions.rating), np.nan, np.float32),
                    tiers=part.predictions.tier,
                    items=part.take(items),
                    actions=Counter(),
                    latencies_ms=waited[part.rows],
                    role=part.role,
                )
                for part in parts
            ]
        columns["predicted_at"] = format_times(np.array([int(time.time() * 1_000)]))[0]
        values = encode_columns(columns)
        return OutputBatch(
            "predicted-ratings",
            [
                {"key": user.encode(), "value": value}
                for user, value in zip(users, values, strict=True)
            ],
        ), scored

    def _predict(
        self, requests: list[ScoreRequest], request: NDArray[np.intp], items: list[str]
    ) -> list[Part]:
        users = hash_ids([each.user_id for each in requests])
        hashes = hash_ids(items)
        events = blank(EVENT, len(items))
        for at, each in enumerate(requests):
            mine = request == at
            events[mine] = from_request(int(users[at]), hashes[mine], time_ms(each.event_time))
        serving = self._models.serving
        self._reader.use_encoder(serving.encoder_hash)
        distinct, index = np.unique(users, return_inverse=True)
        states = self._reader.states(USER_STATE, distinct, USER)
        lookups = self._reader.lookups(events, states)
        partitions = partitions_of(users, self._store.partitions)[request]
        owners, owner = np.unique(partitions, return_inverse=True)
        headers = [self._header(partition)["partition"] for partition in owners.tolist()]
        running = joined([each.copy().reshape(1) for each in headers]).take(owner)
        observation = observe(states.take(index[request]), running, events, lookups)
        return self._models.predict(serving, events, observation, lookups)

    def _header(self, partition: int) -> Rows:
        until, header = self._headers.get(partition, (0.0, None))
        if header is None or until < time.monotonic():
            header = decode_header(self._store.header(USER_STATE, partition))
            self._headers[partition] = time.monotonic() + HEADER_SECONDS, header
        return header

    def _count(self, scored: Scored) -> None:
        for tier, count in zip(*np.unique(scored.tiers, return_counts=True), strict=True):
            self._metrics.predictions.labels("request", TIERS[tier], scored.version).inc(int(count))
        self._digests.add(scored)


def _late(request: ScoreRequest, appended: int, now: int) -> bool:
    """Whether a request has waited for longer than its deadline; times in ms."""
    since = min(appended, time_ms(request.event_time) + CLOCK_MS)
    return request.deadline_ms is not None and now - since > request.deadline_ms


def _ranks(ratings: NDArray[np.float32], request: NDArray[np.intp]) -> NDArray[np.int64]:
    """1 for a request's best item, then 2, and so on; equal ratings keep the asked order. (m)"""
    order = np.lexsort((np.arange(len(ratings)), -ratings, request))
    first = np.searchsorted(request, request)  # where each item's request begins
    ranks = np.empty(len(ratings), np.int64)
    ranks[order] = np.arange(len(ratings))
    return ranks - first + 1
