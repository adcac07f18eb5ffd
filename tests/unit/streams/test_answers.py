import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from model import registry
from model.canary import is_chosen
from model.events import blank
from model.ids import hash_ids, partitions_of
from model.state import ITEM, LAYOUT_HASH, USER
from model.state_bytes import to_bytes
from schemas.records import DeadLetter, PredictedRating, ScoreDigest, ScoreRequest
from streams.answers import Answers, _ranks
from streams.config import ModelsConfig, RedisConfig, ScorerConfig
from streams.metrics import make_metrics
from streams.models import Models
from streams.processor import Outcome
from streams.reader import ITEM_STATE, USER_STATE, Reader, store_keys
from streams.store import Store
from streams.user_states import decode_header
from tests.unit.model.bundles import write
from tests.unit.streams.messages import NOW_MS, PREFIX, message

PARTITIONS = 4


@pytest.fixture
def answers(store: str, tmp_path: Path) -> Answers:
    metrics = make_metrics(CollectorRegistry())
    kept = Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, PARTITIONS)
    models = Models(ModelsConfig(url=str(tmp_path), encoder="none"), metrics)
    config = ScorerConfig(digest_seconds=1e-9)
    return Answers(config, PREFIX, kept, Reader(kept), models, metrics, "answers-0")


def rate(answers: Answers, **stars: Sequence[float]) -> None:
    """Item states with these ratings."""
    rows = blank(ITEM, len(stars))
    for row, given_ in zip(rows, stars.values(), strict=True):
        row["rating_count"], row["rating_sum"] = len(given_), sum(given_)
        row["histogram"] = np.bincount(np.array(given_, int), minlength=6)[1:]
        row["actions"][0] = len(given_)
        row["offset"] = 1
    answers._asking._store.put(
        store_keys(answers._asking._store, ITEM_STATE, hash_ids(list(stars))), to_bytes(rows)
    )


def like(answers: Answers, user: str, residual: float) -> None:
    """The state of a user who has given ten ratings, each so much above the mean."""
    row = blank(USER, 1)
    row["rating_count"], row["rating_sum"], row["residual_sum"] = 10, 40, 10 * residual
    row["actions"][0][0], row["step"] = 10, 10
    answers._asking._store.put(
        store_keys(answers._asking._store, USER_STATE, hash_ids([user])), to_bytes(row)
    )


def request(name: str, *items: str, user: str = "ann", **changes: Any) -> ScoreRequest:
    fields: dict[str, Any] = {
        "request_id": name,
        "user_id": user,
        "item_ids": list(items),
        "event_time": datetime.now(UTC),
    }
    return ScoreRequest.model_validate(fields | changes)


def asked(*requests: ScoreRequest | bytes) -> list[Message]:
    return [message("score-requests", each, 1, offset) for offset, each in enumerate(requests)]


def told(outcome: Outcome) -> list[PredictedRating]:
    assert {batch.topic for batch in outcome.batches} <= {"predicted-ratings"}
    return [
        PredictedRating.model_validate_json(each["value"])
        for batch in outcome.batches
        for each in batch.messages
    ]


def test_items_come_ranked(answers: Answers) -> None:
    rate(answers, good=[5] * 20, bad=[1] * 20, fair=[3] * 20)
    found = told(answers.process(asked(request("q", "bad", "good", "unknown", "fair"))))
    assert [each.item_id for each in found] == ["bad", "good", "unknown", "fair"]
    ratings = [each.rating or 0 for each in found]
    assert [each.rank for each in found] == [
        1 + sum(other > rating for other in ratings) for rating in ratings
    ]
    ranked = {each.rank: each.item_id for each in found}
    assert (ranked[1], ranked[4]) == ("good", "bad")
    for each in found:
        assert (each.kind, each.status, each.of) == ("request", "ok", 4)
        assert (each.request_id, each.event_id, each.seq) == ("q", None, None)
        assert each.source.model_dump() == {"topic": "score-requests", "partition": 1, "offset": 0}
        assert sum(each.distribution or ()) == pytest.approx(1, abs=1e-3)
        low, high = each.interval or (0, 0)
        assert 1 <= low <= (each.rating or 0) <= high <= 5
        assert each.model_version == "ladder"
    assert {each.item_id: each.tier for each in found} == {
        "bad": "item_state",
        "good": "item_state",
        "unknown": "global",
        "fair": "item_state",
    }


def test_large_requests_come_in_smaller_batches(answers: Answers) -> None:
    """A batch of 200 may ask for 20,000 items: 100 of each. Of 800 each, 25 come at a time."""
    assert answers.batch_size == 200
    answers.process(asked(*[request(name, *map(str, range(800))) for name in ("q", "r")]))
    assert answers.batch_size == 25
    answers.process(asked(request("s", "good")))
    assert answers.batch_size == 200
    answers.process(asked(b"{"))
    assert answers.batch_size == 200


def test_a_users_state_counts(answers: Answers) -> None:
    rate(answers, fair=[3] * 20)
    like(answers, "ann", 1.0)
    like(answers, "bob", -1.0)
    batch = asked(*(request(user, "fair", user=user) for user in ("ann", "bob", "new")))
    ann, bob, new = (each.rating or 0 for each in told(answers.process(batch)))
    assert ann > new > bob
    assert [each.tier for each in told(answers.process(batch))] == ["full", "full", "item_state"]


def test_a_request_gets_the_same_alone_and_among_others(answers: Answers) -> None:
    rate(answers, a=[5, 4], b=[1] * 9, c=[2])
    like(answers, "ann", 1.0)
    header = decode_header(None)
    header["partition"]["rating_count"], header["partition"]["rating_sum"] = 100, 450
    (partition,) = partitions_of(hash_ids(["bob"]), PARTITIONS)
    claim = answers._asking._store.claim(USER_STATE, int(partition))
    answers._asking._store.write(claim, [], [], header.tobytes())
    requests = [
        request(f"{user} {count}", *"abcd"[:count], user=user)
        for user in ("ann", "bob", "cleo")
        for count in (1, 4, 2)
    ]
    together = told(answers.process(asked(*requests)))
    alone = [each for one in requests for each in told(answers.process(asked(one)))]

    def said(found: list[PredictedRating]) -> list[tuple[object, ...]]:
        return [(each.request_id, each.item_id, each.rating, each.rank) for each in found]

    assert said(together) == said(alone)
    means = {each.user_id: each.rating for each in together if each.item_id == "d"}
    assert means["bob"] != means["cleo"]  # of another partition, and so another running mean


def test_a_request_that_waited_past_its_deadline_is_answered_as_expired(answers: Answers) -> None:
    rate(answers, good=[5] * 20)
    old = datetime.now(UTC) - timedelta(seconds=20)
    arrived = (2, int(old.timestamp() * 1_000))
    requests = [
        request("late", "x", "good", event_time=old, deadline_ms=1_000),
        request("in time", "x", "good", event_time=old, deadline_ms=60_000),
        request("patient", "good", event_time=old - timedelta(days=100)),
    ]
    batch = [
        message("score-requests", each, 1, offset, timestamp=arrived)
        for offset, each in enumerate(requests)
    ]
    outcome = answers.process(batch)
    found = told(outcome)
    assert {(each.request_id, each.status) for each in found} == {
        ("late", "expired"),
        ("in time", "ok"),
        ("patient", "ok"),
    }
    assert outcome.finish is not None
    outcome.finish({})
    counted = answers._metrics.registry.get_sample_value
    kinds = {"request": 2, "expired": 1}
    for kind, count in kinds.items():
        labels = {"processor": "answers", "kind": kind}
        assert counted("starcast_events_total", labels) == count
    late = [each for each in found if each.request_id == "late"]
    assert [each.item_id for each in late] == ["x", "good"]
    assert {(each.rating, each.rank, each.of) for each in late} == {(None, None, 2)}
    assert {(each.tier, each.model_version) for each in late} == {(None, None)}  # none predicted
    assert {each.source.offset for each in late} == {0}


@pytest.mark.parametrize(
    ("asked_ms", "waited_ms", "expired"),
    [
        (0, 200, False),  # within the deadline
        (0, 201, True),
        (-900, 100, False),  # a producer's clock is a little slow
        (3_600_000, 201, True),  # a fast one does not keep a request alive
        (3_600_000, 200, False),
        (-1_300, 0, True),  # held back by its producer
        (0, -2_000, False),  # a worker's clock is slow: answered
    ],
)
def test_a_request_waits_from_its_arrival_in_kafka(
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
    asked_ms: int,
    waited_ms: int,
    expired: bool,
) -> None:
    monkeypatch.setattr(time, "time", lambda: (NOW_MS + waited_ms) / 1_000)
    event_time = datetime.fromtimestamp((NOW_MS + asked_ms) / 1_000, UTC)
    each = request("q", "x", event_time=event_time, deadline_ms=200)
    (found,) = told(answers.process(asked(each)))
    assert found.status == ("expired" if expired else "ok")


def test_nothing_is_counted_before_the_commit(answers: Answers) -> None:
    registry = answers._metrics.registry
    answers._digests.due(0)
    outcome = answers.process(asked(request("q", "a", "b"), b"broken", request("r", "c")))

    def counts() -> list[float | None]:
        return [
            registry.get_sample_value("starcast_events_total", labels)
            for labels in ({"processor": "answers", "kind": "request"},)
        ] + [
            registry.get_sample_value(
                "starcast_predictions_total",
                {"kind": "request", "tier": "global", "model_version": "ladder"},
            ),
            registry.get_sample_value(
                "starcast_dead_letters_total", {"processor": "answers", "reason": "contract"}
            ),
        ]

    assert counts() == [None, None, None]
    assert answers.idle() is None
    assert outcome.finish is not None
    outcome.finish({})
    assert counts() == [2, 3, 1]
    digest = answers.idle()
    assert digest is not None
    (output,) = digest.outputs
    record = ScoreDigest.model_validate_json(output.value or b"")
    assert record.kinds == {"request": 3}
    assert record.errors.count == 0


def test_bad_requests_become_dead_letters(answers: Answers) -> None:
    bad = request("q", "a").model_copy(update={"item_ids": []})
    batch = asked(b"\xff", bad, request("r", "a"))
    batch.append(message("score-requests", None, 1, 3))
    outcome = answers.process(batch)
    letters = [DeadLetter.model_validate_json(each.value or b"") for each in outcome.outputs]
    assert [(each.source.offset, each.field) for each in letters] == [
        (0, None),
        (1, "item_ids"),
        (3, None),
    ]
    assert [each.request_id for each in told(outcome)] == ["r"]
    only_bad = answers.process(batch[:2])
    assert (told(only_bad), len(only_bad.outputs)) == ([], 2)


def test_latency_is_told_from_the_time_of_arrival(answers: Answers) -> None:
    now = int(time.time() * 1_000)
    arrived = message("score-requests", request("q", "a"), timestamp=(2, now - 5_000))
    outcome = answers.process([arrived])
    assert outcome.finish is not None
    outcome.finish({})
    (scored,) = answers._digests._scored["ladder", "stable", None]
    assert 5_000 <= scored.latencies_ms[0] < 10_000
    assert now > NOW_MS  # of messages whose time does not matter


@given(st.lists(st.lists(st.sampled_from([1.0, 2.5, 4.0]), min_size=1, max_size=6), max_size=5))
def test_ranks_are_those_of_each_request(requests: list[list[float]]) -> None:
    ratings = np.array([rating for each in requests for rating in each], np.float32)
    request = np.repeat(np.arange(len(requests)), [len(each) for each in requests])
    expected = [
        1 + sorted(range(len(each)), key=lambda at: -each[at]).index(place)
        for each in requests
        for place in range(len(each))
    ]
    assert _ranks(ratings, request).tolist() == expected


def test_a_canary_answers_its_users_and_a_shadow_none(answers: Answers, tmp_path: Path) -> None:
    rate(answers, good=[5] * 20, bad=[1] * 20)
    stable, other = (write(str(tmp_path), seed) for seed in (0, 1))
    registry.promote(str(tmp_path), stable.version, stable.sha256, "a test", "to see")
    users = [f"user-{at}" for at in range(30)]
    batch = asked(*(request(user, "bad", "good", user=user) for user in users))
    for share in (0.0, 0.5):
        registry.set_canary(str(tmp_path), other.version, other.sha256, share, "a test", "")
        answers._models.refresh()
        outcome = answers.process(batch)
        found = told(outcome)
        assert [each.user_id for each in found] == [user for user in users for _ in range(2)]
        chosen = is_chosen(hash_ids([each.user_id for each in found]), other.version, share)
        names = np.where(chosen, other.version, stable.version).tolist()
        assert [each.model_version for each in found] == names
        for one, two in zip(found[::2], found[1::2], strict=True):
            assert {one.rank, two.rank} == {1, 2}
            assert ((one.rating or 0) >= (two.rating or 0)) == (one.rank == 1)
        assert outcome.finish is not None
        outcome.finish({})
        digests = answers.idle()
        assert digests is not None
        read = [ScoreDigest.model_validate_json(each.value or b"") for each in digests.outputs]
        assert {each.role: each.kinds["request"] for each in read} == (
            {"stable": 60}
            if not share
            else {"stable": 60 - int(chosen.sum()), "canary": int(chosen.sum())}
        )
