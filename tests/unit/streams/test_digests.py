from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.ladder import FULL, GLOBAL
from schemas.records import ScoreDigest
from streams import digests
from streams.digests import NO_TIER, QUIET_SECONDS, Digests, Scored, error_sums
from streams.processor import Output

stars = st.floats(1, 5, width=32)


class Clock:
    """Stands in for `time` in `streams.digests`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(digests, "time", made)
    return made


def scored(
    ratings: Sequence[float],
    truths: Sequence[float] | None = None,
    version: str = "v1",
    **changes: Any,
) -> Scored:
    count = len(ratings)
    fields: dict[str, Any] = {
        "tiers": np.full(count, FULL, np.uint8),
        "items": [f"item {at}" for at in range(count)],
        "actions": Counter({"view": count}),
        "latencies_ms": np.full(count, 10, np.float32),
    }
    known = np.array([np.nan] * count if truths is None else truths, np.float32)
    return Scored(version, np.array(ratings, np.float32), known, **fields | changes)


def read(outputs: list[Output]) -> list[ScoreDigest]:
    assert {each.topic for each in outputs} <= {"score-digests"}
    assert {each.key for each in outputs} <= {b"scorer-0"}
    return [ScoreDigest.model_validate_json(each.value or b"") for each in outputs]


def test_a_window_is_summed_up(clock: Clock) -> None:
    made = Digests("scorer-0", "interaction", 2.0)
    made.add(scored([1.2, 4.6], [1, np.nan], tiers=np.array([GLOBAL, FULL], np.uint8)))
    made.add(
        scored(
            [3.0, 2.0, 2.4],
            [5, np.nan, 2],
            items=["item 0", "x", "x"],
            actions=Counter({"view": 1, "review": 2}),
        )
    )
    clock.now += 1.9
    assert made.due(7) == []
    clock.now += 0.1
    (digest,) = read(made.due(7))
    assert (digest.worker, digest.model_version, digest.lag) == ("scorer-0", "v1", 7)
    assert digest.kinds == {"interaction": 5}
    assert digest.tiers == {"global": 1, "full": 4}
    assert digest.actions == {"view": 3, "review": 2}
    assert digest.stars == [1, 2, 1, 0, 1]
    assert digest.predicted_sum == pytest.approx(13.2)
    assert (digest.errors.count, digest.errors.rating) == (3, 8)
    assert digest.errors.squared == pytest.approx(0.2**2 + 2**2 + 0.4**2)
    assert digest.errors.absolute == pytest.approx(2.6)
    assert digest.errors_by_tier["global"].count == 1
    assert digest.errors_by_tier["full"].absolute == pytest.approx(2.4)
    assert digest.top_items == {"item 0": 2, "x": 2, "item 1": 1}
    assert digest.latency_ms is not None
    assert digest.window_end - digest.window_start == timedelta(seconds=2)
    assert made.due(0) == []


def test_a_clock_that_is_put_right_changes_no_window_s_length(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a window of no length the rate would be that of all its events in a millisecond."""
    made = Digests("scorer-0", "interaction", 1.0)

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) - timedelta(hours=1)

    monkeypatch.setattr(digests, "datetime", Earlier)
    made.add(scored([1.0]))
    clock.now += 1
    (digest,) = read(made.due(0))
    assert digest.window_end - digest.window_start == timedelta(seconds=1)


def test_models_are_told_apart(clock: Clock) -> None:
    made = Digests("scorer-0", "interaction", 1.0)
    made.add(scored([1.0], version="v1"))
    made.add(scored([2.0, 3.0], version="v2"))
    made.add(scored([4.0], version="v1"))
    clock.now += 1
    found = read(made.due(0))
    assert {each.model_version: each.kinds["interaction"] for each in found} == {"v1": 2, "v2": 2}
    assert len({each.digest_id for each in found}) == 2


def test_roles_of_a_version_are_told_apart(clock: Clock) -> None:
    made = Digests("scorer-0", "interaction", 1.0)
    made.add(scored([1.0], version="v1"))
    for role in ("canary", "shadow", "stable"):  # as one window meets it that ends two trials
        made.add(scored([2.0, 4.0], [2, 2], version="v2", role=role))
    for minute in (1, 2):  # its trial was ended, and began again
        since = datetime(2026, 1, 1, 0, minute, tzinfo=UTC)
        made.add(scored([3.0], version="v3", role="shadow", tried_since=since))
    clock.now += 1
    found = read(made.due(0))
    assert [
        (each.model_version, each.role, each.tried_since and each.tried_since.minute)
        for each in found
    ] == [
        ("v1", "stable", None),
        ("v2", "canary", None),
        ("v2", "shadow", None),
        ("v2", "stable", None),
        ("v3", "shadow", 1),
        ("v3", "shadow", 2),
    ]
    assert len({each.digest_id for each in found}) == 6  # else insights would take them for one
    assert [each.errors.squared for each in found] == [0, 4, 4, 4, 0, 0]
    clock.now += QUIET_SECONDS
    (digest,) = read(made.due(0))
    assert (digest.model_version, digest.role) == ("v2", "stable")


def test_a_quiet_worker_is_heard_of_now_and_then(clock: Clock) -> None:
    made = Digests("scorer-0", "interaction", 1.0)
    made.add(scored([1.0], version="v1"))
    clock.now += 1
    assert len(made.due(0)) == 1
    clock.now += QUIET_SECONDS - 0.1
    assert made.due(0) == []
    clock.now += 0.1
    (digest,) = read(made.due(0))
    assert (digest.kinds, digest.model_version) == ({"interaction": 0}, "v1")
    assert digest.latency_ms is None
    clock.now += 1
    (digest,) = read(made.due(3))  # one that is stuck is heard of at once
    assert digest.lag == 3


def test_predictions_from_texts_stand_on_no_tier(clock: Clock) -> None:
    made = Digests("scorer-0", "review", 1.0)
    made.add(scored([2.0, 3.0], [2, 4], tiers=np.full(2, NO_TIER, np.uint8)))
    clock.now += 1
    (digest,) = read(made.due(0))
    assert digest.kinds == {"review": 2}
    assert (digest.tiers, digest.errors_by_tier) == ({}, {})
    assert digest.errors.count == 2


def test_few_items_and_latencies_are_kept_of_many(clock: Clock) -> None:
    made = Digests("scorer-0", "interaction", 1.0)
    count = digests.LATENCIES + 1_000
    items = ["often"] * (count - 100) + [f"item {at}" for at in range(100)]
    made.add(scored([3.0] * count, items=items))
    clock.now += 1
    (digest,) = read(made.due(0))
    assert len(digest.top_items) == digests.TOP_ITEMS
    assert digest.top_items["often"] == count - 100
    assert digest.kinds == {"interaction": count}


@given(st.lists(st.tuples(stars, st.none() | stars)))
def test_errors_are_those_of_known_truths(pairs: list[tuple[float, float | None]]) -> None:
    ratings = np.array([rating for rating, _ in pairs], np.float32)
    truths = np.array([np.nan if truth is None else truth for _, truth in pairs], np.float32)
    sums = error_sums(ratings, truths)
    known = [(rating, truth) for rating, truth in pairs if truth is not None]
    assert sums.count == len(known)
    assert sums.squared == pytest.approx(sum((r - t) ** 2 for r, t in known))
    assert sums.absolute == pytest.approx(sum(abs(r - t) for r, t in known))
    assert sums.rating == pytest.approx(sum(t for _, t in known))
    assert sums.predicted == pytest.approx(sum(r for r, _ in known))
