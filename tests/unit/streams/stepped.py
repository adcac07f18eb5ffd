"""Digests counted and windows closed, for tests of what insights makes of them."""

from collections.abc import Sequence

from schemas.records import Role, ScoreDigest
from streams.config import InsightsConfig
from streams.steps import Steps, add, close, make_steps
from streams.windows import Window
from tests.digests import at, digest, ms

INSIGHTS = InsightsConfig(
    window_seconds=30, step_seconds=10, grace_seconds=2, keep_windows=100, least_rated=2
)
LATER = ms(1_000)
STABLE = ((4.0, 3.0), (3.5, 3.0), (2.0, None))  # errors 1 and 0.5
TRIED = ((5.0, 3.0), (4.0, 3.0))  # 2 and 1


def steps_of(
    digests: Sequence[ScoreDigest], insights: InsightsConfig = INSIGHTS, now_ms: int = ms(90)
) -> Steps:
    steps = make_steps(insights)
    for each in digests:
        assert add(steps, each, now_ms)[0] == "counted"
    return steps


def window_of(digests: Sequence[ScoreDigest], end: int, insights: InsightsConfig) -> Window:
    window = close(steps_of(digests, insights), end, insights)
    assert window is not None
    return window


def trial_digests(
    second: float, role: Role, version: str = "b", since: float | None = None
) -> list[ScoreDigest]:
    """One of `STABLE` by version a, and one of `TRIED` by a version on trial."""
    return [
        digest(at(second), STABLE, version="a", lag=3, items={"x": 3}),
        digest(
            at(second),
            TRIED,
            version=version,
            role=role,
            tried_since=None if since is None else at(since),
            lag=3,
            latencies_ms=[9.0],
        ),
    ]
