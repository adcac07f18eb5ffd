from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import SecretStr

from schemas.examples import EXAMPLES
from schemas.records import PredictedRating
from streams.config import KafkaConfig, RedisConfig
from streams.dashboard_data import Feed, _follow_store, _show, _titles
from streams.embedded import HOST, free_port
from streams.store import Store
from streams.windows import WINDOW_FIELD, Window


def test_a_cluster_that_is_down_is_told_and_asked_again() -> None:
    feed, rounds = Feed(), iter([True, True, False])
    url = SecretStr(f"redis://{HOST}:{free_port()}")
    store = Store(RedisConfig(url=url, cluster=True), "abcd", 1)
    _follow_store(feed, store, "windows", lambda _: next(rounds))
    assert next(rounds, None) is None
    assert feed.snapshot.store.up is False
    assert "STARCAST_REDIS__URL" in feed.snapshot.store.reason


def test_windows_that_began_anew_are_followed(store: str) -> None:
    """As where a clock was put back: their ends are before those that were there."""
    kept, feed = Store(RedisConfig(url=SecretStr(store)), "abcd", 1), Feed()
    seen: list[list[int]] = []

    def write(*ends: int) -> None:
        for end in ends:
            told = Window(start_ms=0, end_ms=end, step_ms=5, kinds={}).model_dump_json()
            kept.client.xadd("windows", {WINDOW_FIELD: told.encode()}, id=f"{end}-0")

    then = [lambda: kept.client.delete("windows"), lambda: write(20, 30), lambda: write(40)]

    def wait(_: float) -> bool:
        seen.append([window.end_ms for window in feed.snapshot.windows])
        if then:
            then.pop(0)()
        return len(seen) < 4

    write(10, 25, 3_600)
    _follow_store(feed, kept, "windows", wait)
    assert seen == [[10, 25, 3_600], [10, 25, 3_600], [10, 20, 30], [10, 20, 30, 40]]
    kept.close()


def test_topics_that_were_made_anew_bring_new_predictions() -> None:
    """Their offsets begin at 0 again, and a file that is played again has the same items."""
    feed, nobody = (
        Feed(),
        Store(RedisConfig(url=SecretStr(f"redis://{HOST}:{free_port()}")), "a", 1),
    )
    consumer: Any = None  # requests have no event to be read
    told = {**EXAMPLES["predicted-ratings"], "kind": "request"}
    for hour, rating in ((1, 2.0), (2, 3.0), (1, 2.0)):
        at = datetime(2026, 11, 24, hour, tzinfo=UTC)
        record = PredictedRating.model_validate({**told, "predicted_at": at, "rating": rating})
        _show(feed, KafkaConfig(), nobody, consumer, [record])
    assert [each.rating for each in feed.snapshot.predictions] == [3.0]


def test_titles_that_are_shown_are_the_last_to_be_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.dashboard_data.TITLES", 2)
    feed, store = Feed(), Store(RedisConfig(), "a", 1)
    monkeypatch.setattr(store, "read", lambda keys: [None for _ in keys])
    shown = [SimpleNamespace(item_id=name) for name in ("a", "c")]
    feed.update(titles={"a": "A", "b": "B"})
    titles = _titles(feed, store, cast(Any, shown))
    assert sorted(titles) == ["a", "c"]
    assert feed.snapshot.titles == titles
