"""What a worker scored, summed up for insights and the dashboard."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from model.ladder import TIERS
from schemas.codec import encode
from schemas.records import ErrorSums, Kind, Role, ScoreDigest, format_time
from streams.processor import Output
from streams.sketches import encode_latency

NO_TIER = 255  # of predictions from a review's text, which stand on no ladder
TOP_ITEMS = 20  # items named in a digest
QUIET_SECONDS = 10.0  # with nothing scored and no lag, a worker is heard of this often
_Trial = tuple[str, Role, datetime | None]  # version, role, since when it is tried
LATENCIES = 100_000  # kept of one window; more say nothing new of its quantiles


@dataclass(frozen=True)
class Scored:
    """Predictions of one kind, all arrays (n)."""

    version: str
    ratings: NDArray[np.float32]
    truths: NDArray[np.float32]  # NaN where the true rating is not in the event
    tiers: NDArray[np.uint8]  # positions in TIERS, or NO_TIER
    items: Sequence[str]
    actions: Counter[str]
    latencies_ms: NDArray[np.float32]
    role: Role = "stable"  # of the version
    tried_since: datetime | None = None  # of one on trial


class Digests:
    """Collects what was scored and gives one digest a window, model version and trial of it."""

    def __init__(self, worker: str, kind: Kind, seconds: float) -> None:
        self._worker = worker
        self._kind = kind
        self._seconds = seconds
        self._since = time.monotonic()
        self._scored: dict[_Trial, list[Scored]] = {}
        self._version = "ladder"

    def add(self, scored: Scored) -> None:
        """Count predictions in; call it only after their commit."""
        trial = scored.version, scored.role, scored.tried_since
        self._scored.setdefault(trial, []).append(scored)
        if scored.role == "stable":
            self._version = scored.version

    def due(self, lag: int) -> list[Output]:
        """The digests of the window that has ended, if it has."""
        age = time.monotonic() - self._since
        wait = self._seconds if self._scored or lag else QUIET_SECONDS
        if age < wait:
            return []
        end = datetime.now(UTC)
        start = end - timedelta(seconds=age)  # whatever a clock that was put right says
        versions = self._scored or {(self._version, "stable", None): []}
        outputs = [
            Output(
                "score-digests",
                self._worker.encode(),
                encode(self._digest(trial, parts, start, end, lag)),
            )
            for trial, parts in versions.items()
        ]
        self._scored, self._since = {}, self._since + age
        return outputs

    def _digest(
        self,
        trial: _Trial,
        parts: list[Scored],
        start: datetime,
        end: datetime,
        lag: int,
    ) -> ScoreDigest:
        version, role, tried_since = trial
        empty = np.zeros(0, np.float32)
        ratings = np.concatenate([empty, *(part.ratings for part in parts)])
        truths = np.concatenate([empty, *(part.truths for part in parts)])
        tiers = np.concatenate([empty.astype(np.uint8), *(part.tiers for part in parts)])
        latencies = np.concatenate([empty, *(part.latencies_ms for part in parts)])[:LATENCIES]
        stars = np.bincount(np.clip(np.rint(ratings), 1, 5).astype(int), minlength=6)[1:]
        items = Counter(chain.from_iterable(part.items for part in parts))
        actions = sum((part.actions for part in parts), Counter[str]())
        present = np.unique(tiers[tiers != NO_TIER])
        tried = [] if role == "stable" else [role]
        tried += [] if tried_since is None else [format_time(tried_since)]
        name = (self._worker, self._kind, str(int(end.timestamp() * 1000)), version)
        return ScoreDigest(
            worker=self._worker,
            digest_id="-".join([*name, *tried]),
            window_start=start,
            window_end=end,
            model_version=version,
            role=role,
            tried_since=tried_since,
            kinds={self._kind: len(ratings)},
            tiers={TIERS[tier]: int((tiers == tier).sum()) for tier in present},
            actions=dict(actions),
            stars=stars.tolist(),
            predicted_sum=float(ratings.sum(dtype=np.float64)),
            errors=error_sums(ratings, truths),
            errors_by_tier={
                TIERS[tier]: error_sums(ratings[tiers == tier], truths[tiers == tier])
                for tier in present
            },
            top_items=dict(items.most_common(TOP_ITEMS)),
            lag=lag,
            latency_ms=encode_latency(latencies),
        )


def error_sums(ratings: NDArray[np.float32], truths: NDArray[np.float32]) -> ErrorSums:
    """Sums over the predictions whose truth is known; both (n), truths NaN where unknown."""
    known = ~np.isnan(truths)
    predicted, true = ratings[known].astype(np.float64), truths[known].astype(np.float64)
    error = predicted - true
    return ErrorSums(
        count=int(known.sum()),
        squared=float((error**2).sum()),
        absolute=float(np.abs(error).sum()),
        rating=float(true.sum()),
        predicted=float(predicted.sum()),
    )
