from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from model.registry import Canary, Change, Registry
from streams.config import InsightsConfig, KafkaConfig
from streams.dashboard_data import Link, Snapshot, Topics
from streams.dashboard_view import (
    LADDER,
    in_range,
    last_busy,
    model_rows,
    newest,
    short,
    silent,
    stages,
    summary,
    swaps,
    together,
    totals,
    trial,
    versions,
)
from streams.steps import add, close, due, make_steps
from tests.digests import at, digest, ms
from tests.unit.streams.snapshots import (
    FIRST,
    RATED,
    REGISTRY,
    SECOND,
    UNRATED,
    UP,
    entry,
    prediction,
    promoted,
    windows_of,
)

KAFKA = KafkaConfig(bootstrap_servers="broker:9092")


def test_each_thing_that_is_missing_is_told_apart() -> None:
    snapshot = Snapshot(topics=Topics(missing=("reviews",)), broker=Link(False, "refused"))
    coming: dict[str, dict[str, Any]] = {
        "broker": {"broker": UP},
        "store": {"store": UP},
        "topics": {"topics": Topics()},
        "events": {"topics": Topics(events=5)},
        "predictions": {"predictions": (prediction(),)},
        "insights": {"windows": UNRATED},
        "ratings": {"windows": RATED},
        "model": {"registry": REGISTRY},
    }
    for name, change in coming.items():
        found = stages(snapshot, KAFKA)
        assert [stage.name for stage in found] == list(coming)
        assert next(stage.name for stage in found if not stage.done) == name
        assert all(stage.text for stage in found)
        snapshot = replace(snapshot, **change)
    assert all(stage.done for stage in stages(snapshot, KAFKA))


def test_a_model_is_asked_for_by_the_command_that_puts_it_in_service() -> None:
    assert stages(Snapshot(), KAFKA)[-1].command == "starcast retrain"  # `train` promotes none


def test_the_reason_of_a_broker_that_is_gone_is_told() -> None:
    stage = stages(Snapshot(broker=Link(False, "connection refused at broker:9092")), KAFKA)[0]
    assert stage.text == "connection refused at broker:9092"
    assert "broker:9092" in stages(Snapshot(), KAFKA)[0].text


def test_a_range_ends_at_the_newest_window() -> None:
    windows = windows_of([digest(at(5), [(3.0, 3.0)]), digest(at(95), [(3.0, 3.0)])], 100)
    assert [window.end_ms for window in in_range(windows, 10_000)] == [ms(100)]
    assert len(in_range(windows, None)) == len(windows)
    assert in_range((), 10_000) == []


def test_totals_count_each_step_once() -> None:
    windows = windows_of(
        [
            digest(at(5), [(4.0, 3.0)] * 3),
            digest(at(15), [(4.0, 3.0)] * 2, version=FIRST),
            digest(at(15), [(1.0, 3.0)], kind="review", tier=None),
        ],
        50,
    )
    found = totals(windows, "interaction")
    assert {version: scored.sums.count for version, scored in found.items()} == {
        LADDER: 3,
        FIRST: 2,
    }
    both = together(found.values())
    assert (both.sums.rated, both.sums.rmse) == (5, 1.0)
    assert both.tiers["full"].count == 5
    assert together(totals(windows, "review").values()).sums.rmse == 2.0
    assert totals(windows, "request") == {}


def test_now_is_not_yesterday() -> None:
    snapshot = Snapshot(windows=RATED)
    end = RATED[-1].end_ms
    assert newest(snapshot, "interaction", end + 39_000) is not None
    assert not silent(snapshot, end + 39_000)
    assert newest(snapshot, "interaction", end + 41_000) is None
    assert silent(snapshot, end + 41_000)
    assert silent(Snapshot(), 0)
    assert silent(snapshot, end - 3_600_000)  # written while a clock was an hour ahead


def test_windows_that_wait_long_for_late_digests_are_no_silence() -> None:
    insights = InsightsConfig(step_seconds=5, grace_seconds=30)
    steps = make_steps(insights)
    assert add(steps, digest(at(3), [(4.0, 3.0)]), ms(3))[0] == "counted"
    (end,) = due(steps, ms(36), quiet=True)
    window = close(steps, end, insights)
    assert window is not None
    snapshot = Snapshot(windows=(window,))
    assert not silent(snapshot, end + 49_000)
    assert silent(snapshot, end + 51_000)


def test_swaps_are_what_the_registry_tells() -> None:
    registry = Registry(
        stable=entry(FIRST, 60),
        history=[
            promoted(FIRST, 15),
            promoted(SECOND, 40),
            Change(**dict(entry("x-1", 50)), what="canary"),
            Change(**dict(entry(FIRST, 60)), what="rollback"),
        ],
    )
    found = swaps(Snapshot(registry=registry))
    assert [(swap.at_ms, swap.version, swap.how) for swap in found] == [
        (ms(15), FIRST, "promote"),
        (ms(40), SECOND, "promote"),
        (ms(60), FIRST, "rollback"),
    ]


def test_a_version_that_the_registry_does_not_know_counts_from_where_it_is_seen() -> None:
    windows = windows_of(
        [
            digest(at(5), [(3.0, 3.0)], version="a-1"),
            digest(at(25), [(3.0, 3.0)], version="a-1"),
            digest(at(35), [(3.0, 3.0)], version="b-2"),
        ],
        50,
    )
    found = swaps(Snapshot(windows=windows))
    # The first window's version came before the page can know.
    assert [(swap.at_ms, swap.version, swap.how) for swap in found] == [(ms(40), "b-2", "seen")]
    assert versions(Snapshot(windows=windows)) == [LADDER, "b-2", "a-1"]


@pytest.mark.parametrize(
    ("version", "name"),
    [(FIRST, "1a2b3c4d"), (LADDER, "cold start"), ("v1", "v1"), ("long-0123456789", "01234567")],
)
def test_short(version: str, name: str) -> None:
    assert short(version) == name


def test_model_rows_say_who_serves_since_when_and_how_well() -> None:
    windows = windows_of(
        [
            digest(at(5), [(4.0, 3.0)]),
            digest(at(25), [(3.5, 3.0)], version=FIRST),
            digest(at(25), [(3.5, None)], version=SECOND),
        ],
        50,
    )
    canary = Canary(**dict(entry(SECOND, 20)), share=0.1)
    snapshot = Snapshot(
        windows=windows,
        registry=Registry(stable=entry(FIRST, 15), canary=canary, history=[promoted(FIRST, 15)]),
    )
    rows = {row.name: row for row in model_rows(snapshot, totals(windows, "interaction"))}
    assert rows["1a2b3c4d"].role == "in service"
    assert rows["1a2b3c4d"].since_ms == ms(15)
    assert rows["1a2b3c4d"].sums.rmse == pytest.approx(0.5)
    assert rows["9f8e7d6c"].role == "canary 10%"
    assert rows["9f8e7d6c"].sums.rated == 0
    assert rows["cold start"].sums.rmse == 1.0
    assert rows["cold start"].role == ""
    # Without predictions only those with a part to play are left.
    assert {row.name for row in model_rows(snapshot, {})} == {"1a2b3c4d", "9f8e7d6c"}


def test_a_trial_is_that_of_the_version_on_trial_now() -> None:
    windows = windows_of(
        [
            digest(at(5), [(3.5, 3.0)], version=FIRST),
            digest(at(5), [(5.0, 3.0)], version=SECOND, role="shadow"),
        ],
        10,
    )
    canary = Canary(**dict(entry(SECOND, 20)), share=0)
    registry = Registry(stable=entry(FIRST, 15), canary=canary, history=[promoted(FIRST, 15)])
    snapshot = Snapshot(windows=windows, registry=registry)
    found = trial(snapshot)
    assert found is not None
    assert (found.stable.sums.rmse, found.canary.sums.rmse) == (0.5, 2.0)
    # The shadow is named, and counted nowhere else.
    assert versions(snapshot) == [LADDER, FIRST, SECOND]
    assert totals(windows, "interaction").keys() == {FIRST}
    rows = {row.version: row for row in model_rows(snapshot, totals(windows, "interaction"))}
    assert (rows[SECOND].role, rows[SECOND].since_ms, rows[SECOND].sums.count) == (
        "shadow",
        ms(20),
        0,
    )
    told = summary(snapshot, KAFKA, ms(11))
    assert told["canary"]["share"] == 0
    assert told["trial"]["canary"]["sums"]["mae"] == 2.0
    assert told["kinds"]["interaction"]["all"]["sums"]["count"] == 1
    for other in (
        replace(snapshot, registry=registry.model_copy(update={"canary": None})),
        replace(snapshot, windows=RATED),
        replace(snapshot, windows=()),
        replace(
            snapshot,
            registry=registry.model_copy(
                update={"canary": Canary(**dict(entry("another", 30)), share=0.1)}
            ),
        ),
    ):
        assert trial(other) is None
        assert summary(other, KAFKA, ms(11))["trial"] is None


def test_a_canary_that_answers_is_no_swap() -> None:
    windows = windows_of(
        [
            digest(at(5), [(3.0, 3.0)], version=FIRST),
            digest(at(25), [(3.0, 3.0)], version=SECOND, role="canary"),
        ],
        40,
    )
    history = [promoted(FIRST, 1), Change(**dict(entry(SECOND, 20)), what="canary")]
    found = swaps(Snapshot(windows=windows, registry=Registry(history=history)))
    assert [swap.version for swap in found] == [FIRST]


def test_the_newest_window_with_interactions() -> None:
    windows = windows_of(
        [
            digest(at(5), [(3.0, 3.0)], items={"a": 1}),
            digest(at(45), [(3.0, 3.0)], kind="review", tier=None),
        ],
        60,
    )
    busy = last_busy(windows)
    assert busy is not None
    assert busy.top_items == [("a", 1)]
    assert last_busy(()) is None


def test_summary_is_for_programs() -> None:
    snapshot = Snapshot(
        broker=UP,
        store=Link(False, "gone"),
        topics=Topics(events=7, predictions=3),
        windows=RATED,
        registry=REGISTRY,
    )
    told = summary(snapshot, KAFKA, RATED[-1].end_ms + 1_000)
    assert told["servers"]["kafka"] == {"up": True, "reason": None}
    assert told["servers"]["store"] == {"up": False, "reason": "gone"}
    assert told["waiting_for"] == ["store"]
    assert told["stable"]["version"] == FIRST
    assert told["kinds"]["interaction"]["window"]["rmse"] == 1.0
    assert told["kinds"]["interaction"]["models"][LADDER]["sums"]["count"] == 1
    assert datetime.fromtimestamp(told["last_window_ms"] / 1_000, UTC) == at(10)
    quiet = summary(snapshot, KAFKA, RATED[-1].end_ms + 3_600_000)
    assert quiet["silent"]
    assert quiet["kinds"]["interaction"]["lag"] is None
    assert quiet["kinds"]["interaction"]["per_second"] is None
    assert timedelta(milliseconds=quiet["now_ms"] - told["now_ms"]) > timedelta(minutes=59)
