"""Two versions at once on a real Kafka and a real store: who answers whom, and what is counted."""

import shutil
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from deltalake import write_deltalake

from model import registry
from model.canary import is_chosen
from model.ids import hash_ids
from schemas import archive
from schemas.archive import Row
from schemas.records import (
    Behavior,
    PredictedRating,
    Review,
    ScoreDigest,
    ScoreRequest,
)
from starcast.shop import shop as generated_shop
from streams.config import InsightsConfig
from streams.insights import Readiness, run_insights
from streams.metrics import make_metrics
from streams.store import connect
from streams.verification import Verification
from streams.verify import verify_replay
from streams.windows import WINDOWS_KEY, Trial, last_window
from tests.shops import Shop, Workers, check_each_once, check_states, make_shop, until
from tests.unit.model.bundles import write

SHARE = 0.5
END = datetime(2026, 1, 1, tzinfo=UTC)
Sent = list[tuple[str, Any]]


def events(count: int) -> Sent:
    return list(generated_shop(seed=7, events=count, end=END))


@dataclass(frozen=True)
class Tried:
    """A shop with a stable version and another that can be tried."""

    shop: Shop
    stable: str
    other: str
    sha256: str  # of the other

    @property
    def url(self) -> str:
        return self.shop.settings.models.url

    def share(self, share: float) -> None:
        """Name the other version the canary."""
        registry.set_canary(
            self.url, self.other, self.sha256, share, "a test", "to see", self.stable
        )

    def whose(self, user: str, share: float) -> str:
        chosen = is_chosen(hash_ids([user]), self.other, share)
        return self.other if chosen[0] else self.stable

    def digests(self) -> list[ScoreDigest]:
        return [
            ScoreDigest.model_validate_json(each.value() or b"")
            for each in self.shop.read("score-digests")
        ]

    def verify(self, url: str | None = None) -> Verification:
        archived = self.shop.settings.archive
        if url is not None:
            archived = archived.model_copy(update={"url": url})
        return verify_replay(archived, self.shop.settings.models, self.shop.store)


@pytest.fixture
def tried(kafka: str, store_server: str, tmp_path: Path) -> Tried:
    shop = make_shop(kafka, store_server, tmp_path)
    stable, other = (write(shop.settings.models.url, seed) for seed in (0, 1))
    registry.promote(shop.settings.models.url, stable.version, stable.sha256, "a test", "to see")
    return Tried(shop, stable.version, other.version, other.sha256)


def told_share(workers: Workers, version: str) -> float | None:
    return workers.metrics.registry.get_sample_value("starcast_canary_share", {"version": version})


def counted(digests: Sequence[ScoreDigest], role: str) -> tuple[int, int]:
    """Interactions in the digests of a role, and ratings that they were held against."""
    mine = [each for each in digests if each.role == role and "interaction" in each.kinds]
    return sum(each.kinds["interaction"] for each in mine), sum(each.errors.count for each in mine)


def answered(digests: Sequence[ScoreDigest]) -> tuple[int, int]:
    """Interactions that stable and that the canary answered."""
    return counted(digests, "stable")[0], counted(digests, "canary")[0]


def request(user: str) -> tuple[str, ScoreRequest]:
    asked = ScoreRequest(
        request_id=user, user_id=user, item_ids=["a", "b"], event_time=datetime.now(UTC)
    )
    return "score-requests", asked


def rated(sent: Sent) -> int:
    return sum(isinstance(each, Review) and each.rating is not None for _, each in sent)


@contextmanager
def insights(shop: Shop) -> Generator[None]:
    stop = threading.Event()
    config = InsightsConfig(window_seconds=6, step_seconds=1, grace_seconds=1)
    settings = shop.settings
    # Left out of its group on a busy machine it would read late what it counts.
    kafka = settings.kafka.model_copy(update={"session_timeout_ms": 10_000})
    arguments = kafka, settings.redis, config, stop, make_metrics(), Readiness()
    thread = threading.Thread(target=run_insights, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(15)
        assert not thread.is_alive()


def trial(shop: Shop) -> Trial | None:
    client = connect(shop.settings.redis)
    window = last_window(client, f"{shop.settings.redis.key_prefix}:{WINDOWS_KEY}")
    client.close()
    return window.trial if window else None


def test_a_canary_then_a_shadow_then_neither(tried: Tried) -> None:
    shop, sent = tried.shop, events(2_400)
    numbered = [each for each in sent if isinstance(each[1], Review | Behavior)]
    others = [each for each in sent if not isinstance(each[1], Review | Behavior)]
    first, second, third = numbered[:1_000], numbered[1_000:2_000], numbered[2_000:]
    tried.share(SHARE)
    with shop.workers("archiver"), insights(shop):
        with shop.workers("scorer", "answers", "items", "catalog") as workers:
            assert told_share(workers, tried.other) == SHARE
            users = sorted({record.user_id for _, record in first})[:40]
            shop.play([*others, *first, *map(request, users)])
            shop.until_predicted(1_000)
            answers = shop.until_predicted(2 * len(users), "request")

            tried.share(0)
            until(lambda: told_share(workers, tried.other) == 0)
            shop.play(second)
            shop.until_predicted(2_000)
            until(lambda: counted(tried.digests(), "shadow") == (1_000, rated(second)))

            registry.clear_canary(tried.url, "a test", "seen")
            until(lambda: told_share(workers, tried.other) is None)
            shop.play(third)
            predictions = shop.until_predicted(2_400)
            until(lambda: sum(answered(tried.digests())) == 2_400)
            shop.until_items_are_applied()
            shop.until_users_are_written()
        shop.until_archived()
        digests = tried.digests()
        until(lambda: (found := trial(shop)) is not None and found.canary.sums.count > 1_000)
        found = trial(shop)
    check_each_once(predictions, numbered)

    # Each user by the same version, in requests too; a shadow and an ended canary answer nobody.
    at = {record.event_id: number for number, (_, record) in enumerate(numbered)}
    for each in predictions:
        share = SHARE if at[str(each.event_id)] < 1_000 else 0.0
        assert each.model_version == tried.whose(each.user_id, share)
    for each in answers:
        assert each.model_version == tried.whose(each.user_id, SHARE)
    versions = Counter(each.model_version for each in predictions if at[str(each.event_id)] < 1_000)
    assert min(versions[tried.stable], versions[tried.other]) > 200
    assert len({each.model_version for each in answers}) == 2

    # What was published is counted once; the shadow beside it.
    published = versions[tried.other]
    its = rated([pair for pair in first if tried.whose(pair[1].user_id, SHARE) == tried.other])
    assert counted(digests, "canary") == (published, its)
    assert counted(digests, "stable") == (2_400 - published, rated(numbered) - its)
    assert counted(digests, "shadow") == (1_000, rated(second))
    assert {each.model_version for each in digests if each.role != "stable"} == {tried.other}
    assert found is not None
    assert (found.version, found.canary.sums.count) == (tried.other, published + 1_000)
    assert found.canary.sums.rated == its + rated(second)
    # Stable's of the same time: not of the events after the trial, but for the step it ended in.
    assert 0 <= found.stable.sums.rated - (rated(first) - its + rated(second)) < rated(third)
    assert found.standard_errors is not None

    report = tried.verify()
    assert report.clean, report.examples
    assert report.notes == []
    assert report.compared["prediction"] == 2_400
    # Held against the version that it names: with the other's name a prediction is another's.
    report = tried.verify(renamed(tried, predictions[10]))
    assert report.differences == {"prediction": 1}


def renamed(tried: Tried, chosen: PredictedRating) -> str:
    """A copy of the archive in which one prediction names the other version."""
    url = tried.shop.settings.archive.url
    copy = f"{url}-renamed"
    shutil.copytree(url, copy)
    names = tried.stable.encode(), tried.other.encode()
    swapped = dict(zip(names, reversed(names), strict=True))
    rows: list[Row] = []
    for each in tried.shop.read("predicted-ratings"):
        value, key = each.value() or b"", each.key()
        record = PredictedRating.model_validate_json(value)
        if record == chosen:
            old = str(record.model_version).encode()
            value = value.replace(old, swapped[old])
        assert isinstance(key, bytes)
        rows.append(Row(each.partition() or 0, each.offset() or 0, each.timestamp()[1], key, value))
    table = archive.table("predicted-ratings", rows)
    write_deltalake(f"{copy}/predicted-ratings", table, mode="overwrite")
    return copy


def test_a_kill_under_a_canary_changes_nothing(tried: Tried) -> None:
    shop = tried.shop
    sent = [each for each in events(1_500) if isinstance(each[1], Review | Behavior)]
    tried.share(SHARE)
    with shop.workers("archiver"):
        predictions = shop.predicted_over_a_kill(sent)
        shop.until_archived()
    check_each_once(predictions, sent)
    check_states(shop, sent)
    assert {each.model_version for each in predictions} == {tried.stable, tried.other}
    for each in predictions:
        assert each.model_version == tried.whose(each.user_id, SHARE)
    report = tried.verify()
    assert report.clean, report.examples
    assert report.compared["prediction"] == 1_500
