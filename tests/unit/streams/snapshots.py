"""Windows, a prediction and a registry for tests of what the dashboard shows."""

from collections.abc import Sequence

from model.registry import Change, Entry, Registry
from schemas.records import ScoreDigest
from streams.config import InsightsConfig
from streams.dashboard_data import Link, Prediction
from streams.dashboard_view import LADDER
from streams.steps import add, close, make_steps
from streams.windows import Window
from tests.digests import at, digest, ms

INSIGHTS = InsightsConfig(window_seconds=20, step_seconds=10, keep_windows=100_000)
FIRST, SECOND = "20260101T000000-1a2b3c4d", "20260101T000100-9f8e7d6c"
UP = Link(True)


def windows_of(digests: Sequence[ScoreDigest], until: int) -> tuple[Window, ...]:
    """The windows of ten seconds' steps that insights would write by `until` seconds."""
    steps = make_steps(INSIGHTS)
    for each in digests:
        add(steps, each, ms(until))
    found = [close(steps, ms(end), INSIGHTS) for end in range(10, until + 1, 10)]
    return tuple(window for window in found if window)


def entry(version: str, seconds: float) -> Entry:
    return Entry(version=version, sha256="ab", at=at(seconds), by="trainer", reason="first")


def promoted(version: str, seconds: float) -> Change:
    return Change(**dict(entry(version, seconds)), what="promote")


def prediction() -> Prediction:
    return Prediction(
        key=("interaction", "reviews", 0, 0, "i"),
        kind="interaction",
        user_id="u",
        item_id="i",
        title="",
        rating=4.0,
        low=3.0,
        high=5.0,
        tier="full",
        version=LADDER,
        predicted_ms=0,
    )


RATED = windows_of([digest(at(5), [(4.0, 3.0)])], 10)
UNRATED = windows_of([digest(at(5), [(4.0, None)])], 10)
REGISTRY = Registry(stable=entry(FIRST, 15), history=[promoted(FIRST, 15)])
