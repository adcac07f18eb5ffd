"""Score digests as workers send them, for tests of insights and the dashboard."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np

from schemas.records import ErrorSums, Kind, Role, ScoreDigest
from streams.digests import error_sums
from streams.sketches import encode_latency


def digest(
    end: datetime,
    pairs: Sequence[tuple[float, float | None]],
    *,
    worker: str = "scorer-0",
    kind: Kind = "interaction",
    version: str = "ladder",
    tier: str | None = "full",
    lag: int = 0,
    seconds: float = 1.0,
    items: Mapping[str, int] | None = None,
    latencies_ms: Sequence[float] = (),
    name: str = "",
    role: Role = "stable",
    tried_since: datetime | None = None,
) -> ScoreDigest:
    """The digest of predictions given as pairs of predicted and true rating (None: not told)."""
    ratings = np.array([predicted for predicted, _ in pairs], np.float32)
    truths = np.array([np.nan if true is None else true for _, true in pairs], np.float32)
    sums = error_sums(ratings, truths)
    stars = np.bincount(np.clip(np.rint(ratings), 1, 5).astype(int), minlength=6)[1:]
    tiers: dict[str, int] = {tier: len(pairs)} if tier and pairs else {}
    errors: dict[str, ErrorSums] = {tier: sums} if tier and pairs else {}
    return ScoreDigest(
        worker=worker,
        digest_id=name
        or f"{worker}-{kind}-{round(end.timestamp() * 1_000)}-{version}-{role}-{tried_since}",
        window_start=end - timedelta(seconds=seconds),
        window_end=end,
        model_version=version,
        role=role,
        tried_since=tried_since,
        kinds={kind: len(pairs)},
        tiers=tiers,
        actions={"review": sums.count} if sums.count else {},
        stars=stars.tolist(),
        predicted_sum=float(ratings.sum(dtype=np.float64)),
        errors=sums,
        errors_by_tier=errors,
        top_items=dict(items or {}),
        lag=lag,
        latency_ms=encode_latency(np.array(latencies_ms, np.float32)),
    )


def at(seconds: float) -> datetime:
    """A time so many seconds after one that lies on a step of any usual length."""
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def ms(seconds: float) -> int:
    """The same, in milliseconds since the epoch."""
    return round(at(seconds).timestamp() * 1_000)
