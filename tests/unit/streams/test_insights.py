import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from schemas.codec import encode
from schemas.records import DeadLetter, ScoreDigest
from streams.config import InsightsConfig, KafkaConfig, RedisConfig
from streams.embedded import HOST, free_port
from streams.insights import (
    FIRST_SECONDS,
    QUIET_SECONDS,
    Readiness,
    _acknowledge,
    _close_due,
    _count,
    _resume,
    _Run,
    _turn,
    _write,
    run_insights,
)
from streams.metrics import make_metrics
from streams.processor import Output
from streams.steps import add, make_steps
from streams.store import connect
from streams.windows import WINDOW_FIELD, Trial, Window
from tests.digests import at, digest, ms


def in_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """What comes of it, in a thread of its own: a browser's test leaves a loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def test_a_cluster_that_is_down_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.insights.FIRST_PAUSE_SECONDS", 0.0)
    url = SecretStr(f"redis://{HOST}:{free_port()}")
    run = _Run(InsightsConfig(), connect(RedisConfig(url=url, cluster=True)), "windows")
    in_loop(_resume(run))
    assert run.steps is None
    assert "the store does not answer" in (run.readiness.reason or "")
    window = Window(start_ms=0, end_ms=60_000, step_ms=60_000, kinds={})
    run.unwritten.append(window)
    in_loop(_write(run, make_metrics()))
    assert list(run.unwritten) == [window]


def test_it_is_not_ready_while_there_is_no_kafka(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.insights.REACH_SECONDS", 0.2)
    readiness, stop = Readiness(), threading.Event()
    kafka = KafkaConfig(bootstrap_servers=f"{HOST}:{free_port()}")
    metrics = make_metrics()
    arguments = kafka, RedisConfig(), InsightsConfig(), stop, metrics, readiness
    thread = threading.Thread(target=run_insights, args=arguments)
    thread.start()
    until = time.monotonic() + 20
    while "No Kafka broker" not in (readiness.reason or "") and time.monotonic() < until:
        time.sleep(0.05)
    stop.set()
    thread.join()
    assert "No Kafka broker answers" in (readiness.reason or "")
    told = {"processor": "insights", "reason": "contract"}
    assert metrics.registry.get_sample_value("starcast_dead_letters_total", told) == 0


def test_a_store_that_refuses_is_waited_for(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is full, or a replica: an app that starts again would send its alerts again."""
    monkeypatch.setattr("streams.insights.FIRST_PAUSE_SECONDS", 0.0)
    client = connect(RedisConfig(url=SecretStr(store)))
    run = _Run(InsightsConfig(), client, "windows")
    window = Window(start_ms=0, end_ms=60_000, step_ms=60_000, kinds={})
    run.unwritten.append(window)
    client.config_set("maxmemory", 1)
    try:
        with capture_logs() as told:
            in_loop(_write(run, make_metrics()))
            in_loop(_write(run, make_metrics()))
        assert "the store" in (run.readiness.reason or "")
        assert [line["event"] for line in told] == ["insights waits for the store"]
    finally:
        client.config_set("maxmemory", 0)
    assert list(run.unwritten) == [window]
    in_loop(_write(run, make_metrics()))
    assert (client.xlen("windows"), list(run.unwritten)) == (1, [])
    assert run.readiness.reason is None


@pytest.mark.parametrize("field", [WINDOW_FIELD, b"other"])
def test_a_window_of_another_release_tells_where_it_ends(store: str, field: bytes) -> None:
    client = connect(RedisConfig(url=SecretStr(store)))
    client.xadd("windows", {field: b'{"start_ms": 0}'}, id="60000-0")
    run = _Run(InsightsConfig(), client, "windows")
    in_loop(_resume(run))
    assert run.readiness.reason is None
    assert run.steps is not None
    assert run.steps.closed == 60_000


def test_it_goes_on_with_what_the_last_window_says(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(RedisConfig(url=SecretStr(store)))
    run = _Run(InsightsConfig(), client, "windows")
    in_loop(_resume(run))
    assert run.steps is not None
    assert (run.steps.closed, run.steps.trial, run.firing) == (None, None, [])
    trial = Trial(version="b", start_ms=0, end_ms=60_000)
    last = Window(start_ms=0, end_ms=60_000, step_ms=5_000, kinds={}, trial=trial, firing=["lag/x"])
    run.unwritten.append(last)
    in_loop(_write(run, make_metrics()))
    monkeypatch.setattr("streams.insights.time", SimpleNamespace(monotonic=lambda: 7.0))
    in_loop(_resume(run))
    assert run.steps is not None
    assert (run.steps.closed, run.steps.trial, run.firing) == (60_000, trial, ["lag/x"])
    assert run.last_arrival == 7 + FIRST_SECONDS  # the first digests may come late


async def no_alert(_: Output) -> None:
    pytest.fail("an alert was sent")


class TestOneRun:
    insights = InsightsConfig(
        window_seconds=30, step_seconds=10, grace_seconds=2, keep_windows=3, highest_lag=10
    )

    def run_of(self, *digests: ScoreDigest, last_arrival: float = 0.0) -> _Run:
        run = _Run(self.insights, None, "windows", last_arrival=last_arrival)
        run.steps = make_steps(self.insights, closed=ms(0))
        for each in digests:
            assert add(run.steps, each, ms(25))[0] == "counted"
        return run

    def closed(self, run: _Run, now: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Rules of the alerts that are raised at a time, of either clock."""
        clock = SimpleNamespace(time=lambda: ms(now) / 1_000, monotonic=lambda: now)
        monkeypatch.setattr("streams.insights.time", clock)
        assert run.steps is not None
        return [alert.rule for alert in _close_due(run, run.steps)]

    def test_steps_are_closed_while_it_is_quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        heard = 22.0
        run = self.run_of(digest(at(5), [], lag=50), digest(at(12), [], lag=9), last_arrival=heard)
        assert self.closed(run, heard + QUIET_SECONDS, monkeypatch) == ["lag"]
        assert [window.end_ms for window in run.unwritten] == [ms(10)]  # more may still come
        assert run.firing == ["lag/interaction"]
        assert self.closed(run, heard + QUIET_SECONDS + 1, monkeypatch) == []
        assert [window.end_ms for window in run.unwritten] == [ms(10), ms(20)]
        assert run.firing == []

    def test_a_rule_that_fires_is_told_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = self.run_of(digest(at(5), [], lag=50), digest(at(12), [], lag=50))
        assert self.closed(run, 13, monkeypatch) == ["lag"]
        assert self.closed(run, 23, monkeypatch) == []
        assert run.firing == ["lag/interaction"]

    def test_no_more_windows_wait_than_the_store_keeps(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = self.run_of(digest(at(5), [(3.0, 3.0)]), digest(at(15), [(3.0, 3.0)]))
        self.closed(run, 63, monkeypatch)
        # A last one tells of silence; what follows is not written.
        assert [window.end_ms for window in run.unwritten] == [ms(30), ms(40), ms(50)]

    def test_digests_are_acknowledged_when_no_later_window_needs_them(self) -> None:
        run, acknowledged = self.run_of(), list[int]()

        def told(number: int) -> Any:
            return SimpleNamespace(ack=lambda: acknowledged.append(number))

        places = [ms(70), 0, ms(80), ms(90), ms(70)]  # the second is a dead letter
        run.pending.extend((place, told(number)) for number, place in enumerate(places))
        steps = make_steps(self.insights)
        _acknowledge(run, steps)
        assert acknowledged == []
        steps.closed = ms(100)  # the next window is (80, 110]
        _acknowledge(run, steps)
        assert acknowledged == [0, 1, 2]
        steps.closed = ms(110)
        _acknowledge(run, steps)
        assert acknowledged == [0, 1, 2, 3, 4]

    def test_while_the_store_is_gone_digests_are_kept_for_the_windows_that_wait(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("streams.insights.FIRST_PAUSE_SECONDS", 0.0)
        run = self.run_of(*(digest(at(end), [(3.0, 3.0)]) for end in (5, 15, 25)))
        run.client = connect(RedisConfig(url=SecretStr(f"redis://{HOST}:{free_port()}")))
        acknowledged = list[int]()
        for place in (10, 20, 30):
            event = SimpleNamespace(ack=partial(acknowledged.append, place))
            run.pending.append((ms(place), event))
        clock = SimpleNamespace(time=lambda: ms(63) / 1_000, monotonic=lambda: 63)
        monkeypatch.setattr("streams.insights.time", clock)
        in_loop(_turn(run, make_metrics(), no_alert))
        assert [window.start_ms for window in run.unwritten] == [ms(10), ms(20), ms(30)]
        assert acknowledged == [10]

    def test_a_partition_may_go_while_a_window_is_written(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = self.run_of(digest(at(5), [(3.0, 3.0)]))
        run.client = SimpleNamespace(xadd=lambda *_, **__: run.reset(owned=False))
        clock = SimpleNamespace(time=lambda: ms(13) / 1_000, monotonic=lambda: 13)
        monkeypatch.setattr("streams.insights.time", clock)
        in_loop(_turn(run, make_metrics(), no_alert))
        assert (run.steps, list(run.unwritten)) == (None, [])

    @pytest.mark.parametrize("running", [True, False])
    def test_windows_begin_anew_where_the_clock_was_put_back(
        self, store: str, monkeypatch: pytest.MonkeyPatch, running: bool
    ) -> None:
        """The store takes no window that ends before its last: for an hour none would come."""
        run, metrics, acknowledged = self.run_of(), make_metrics(), list[str]()
        up = count(0, 100)  # which no clock puts back
        run.client = connect(RedisConfig(url=SecretStr(store)))
        trial = Trial(version="b", start_ms=0, end_ms=60_000)
        last = Window(
            start_ms=0, end_ms=ms(3_700), step_ms=10_000, kinds={}, trial=trial, firing=["lag/x"]
        )

        def turn(now: float) -> list[int]:
            """Windows in the store, as milliseconds of their ends, after a turn."""
            clock = SimpleNamespace(time=lambda: ms(now) / 1_000, monotonic=lambda: next(up))
            monkeypatch.setattr("streams.insights.time", clock)
            in_loop(_turn(run, metrics, no_alert))
            return [int(name.partition(b"-")[0]) for name, _ in run.client.xrange("windows")]

        run.unwritten.append(last)
        in_loop(_write(run, metrics))
        run.steps = None  # it starts
        turn(3_702)
        event = SimpleNamespace(ack=lambda: acknowledged.append("waited"))
        run.pending.append((ms(3_700), event))
        assert turn(3_671) == [ms(3_700)]  # put back by less than a window: the next is waited for
        if running:
            run.unwritten.append(last)
        else:
            run.reset(owned=True)
            turn(100)
        assert turn(100) == []
        assert run.steps is not None
        assert add(run.steps, digest(at(99), [(3.0, 3.0)]), ms(100)) == ("counted", ms(100))
        assert turn(130) == [ms(100), ms(110), ms(120)]
        assert (run.steps.trial, run.firing) == (trial, ["lag/x"])
        assert acknowledged == ["waited"] * running

    def test_of_each_digest_it_is_told_what_became_of_it(self) -> None:
        run, metrics = self.run_of(), make_metrics()
        assert run.steps is not None
        steps = run.steps

        def count(value: bytes) -> tuple[int, DeadLetter | None]:
            message = SimpleNamespace(
                topic="score-digests", partition=0, offset=4, key=b"w", value=value, headers=()
            )
            place, letter = _count(steps, message, metrics)
            return place, letter and DeadLetter.model_validate_json(letter.value or b"")

        mixed = digest(at(5), []).model_copy(update={"kinds": {"review": 1, "request": 1}})
        for value, field in ((b"{}", "worker"), (encode(mixed), None)):
            place, letter = count(value)
            assert place == 0
            assert letter is not None
            assert (letter.field, letter.source.offset, letter.processor) == (field, 4, "insights")
        late = ms(-50)
        assert count(encode(digest(at(-50), []))) == (late, None)
        value = metrics.registry.get_sample_value
        told = {"processor": "insights", "reason": "contract"}
        assert value("starcast_dead_letters_total", told) == 2
        assert value("starcast_events_total", {"processor": "insights", "kind": "late"}) == 1
        twice = encode(digest(datetime.now(UTC), []))
        assert len({count(twice) for _ in range(2)}) == 1  # to acknowledge with the first one
        assert value("starcast_duplicates_total", {"processor": "insights"}) == 1
