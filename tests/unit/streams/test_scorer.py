import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from confluent_kafka import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from structlog.testing import capture_logs

from model import bundle, registry
from model.canary import is_chosen
from model.events import EVENT, blank
from model.features import INDEX
from model.ids import hash_ids, partitions_of
from model.ladder import TIERS
from model.predict import Predictions, Predictor
from model.state import ITEM, ITEM_ATTRIBUTES, LAYOUT_HASH, USER, USER_ATTRIBUTES
from model.state_bytes import from_bytes, to_bytes
from schemas import journal
from schemas.records import (
    DeadLetter,
    ItemUpdate,
    PredictedRating,
    ScoreDigest,
)
from streams import user_states
from streams.config import (
    ArchiveConfig,
    KafkaConfig,
    ModelsConfig,
    RedisConfig,
    ScorerConfig,
    StatesConfig,
)
from streams.exceptions import FencedError
from streams.metrics import make_metrics
from streams.models import Models
from streams.pace import Pace
from streams.processor import Outcome, Output
from streams.reader import (
    ITEM_KIND,
    ITEM_STATE,
    USER_KIND,
    USER_STATE,
    VECTOR_DTYPE,
    Reader,
    partition_keys,
    store_keys,
    vector_keys,
)
from streams.scorer import Scorer
from streams.store import Store
from streams.user_states import Held, UserStates, decode_header
from tests.unit.model.bundles import write
from tests.unit.model.encoders import bert
from tests.unit.model.shop import WIDTH
from tests.unit.schemas.test_agreement import valid
from tests.unit.schemas.test_agreement import values as taken_by_schema
from tests.unit.streams.events import KINDS, PARTITIONS, START, log, record
from tests.unit.streams.journals import told as of_journal
from tests.unit.streams.messages import NOW_MS, PREFIX, message

Make = Callable[[], Scorer]


@pytest.fixture
def make(store: str, tmp_path: Path) -> Iterator[Make]:
    """Scorers that own all partitions of a shop of their own, and serve what is in `tmp_path`."""
    opened: list[Store] = []

    def scorer() -> Scorer:
        metrics = make_metrics(CollectorRegistry())
        redis = RedisConfig(url=SecretStr(store), key_prefix=uuid4().hex)
        kept = Store(redis, LAYOUT_HASH, PARTITIONS)
        opened.append(kept)
        states = UserStates(kept, KafkaConfig(), ArchiveConfig(), StatesConfig())
        for partition in range(PARTITIONS):
            claim = kept.claim(USER_STATE, partition)
            states._held[partition] = Held(claim, decode_header(None))
        models = Models(ModelsConfig(url=str(tmp_path), encoder="none", device="cpu"), metrics)
        models.refresh()
        config = ScorerConfig(digest_seconds=1e-9)
        return Scorer(config, PREFIX, states, Reader(kept), models, metrics, "scorer-0")

    yield scorer
    for each in opened:
        each.close()


def single(outcome: Outcome) -> list[Output]:
    """All that it sends record by record."""
    return [*outcome.outputs, *(outcome.late() if outcome.late else [])]


def finish(scorer: Scorer, outcome: Outcome) -> None:
    """As the loop does after a commit."""
    assert outcome.write is not None
    assert outcome.finish is not None
    delivered = {("journal", partition): 10 for partition in range(PARTITIONS)}
    outcome.write(delivered)
    outcome.finish(delivered)


def values(outcome: Outcome, topic: str) -> list[bytes]:
    batches = [
        each["value"]
        for batch in outcome.batches
        if batch.topic == topic
        for each in batch.messages
    ]
    return batches + [each.value or b"" for each in single(outcome) if each.topic == topic]


def told(outcome: Outcome) -> list[PredictedRating]:
    return [
        PredictedRating.model_validate_json(each) for each in values(outcome, "predicted-ratings")
    ]


def updates(outcome: Outcome) -> list[ItemUpdate]:
    return [ItemUpdate.model_validate_json(each) for each in values(outcome, "item-updates")]


def letters(outcome: Outcome) -> list[DeadLetter]:
    return [DeadLetter.model_validate_json(each) for each in values(outcome, "dead-letters")]


def users(scorer: Scorer, partition: int, *names: str) -> Any:
    """USER rows as the store has them."""
    kept = scorer._states._store
    return from_bytes(kept.read(partition_keys(kept, USER_STATE, partition, hash_ids(names))), USER)


def test_a_null_value_erases_its_user_between_two_events(make: Make) -> None:
    scorer = make()
    first = log("reviews", 1, [record("reviews", at) for at in range(2)])
    null = message("reviews", None, 1, 2, key=b"ann")
    outcome = scorer.process(
        [*first, message("behavior", record("behavior", 0, "bob"), 1, 0), null]
    )
    assert [(each.user_id, each.seq) for each in told(outcome)] == [
        ("ann", 0),
        ("ann", 1),
        ("bob", 2),
    ]
    finish(scorer, outcome)
    assert users(scorer, 1, "ann", "bob")["actions"].sum(1).tolist() == [0, 1]
    keys = partition_keys(scorer._states._store, USER_STATE, 1, hash_ids(["ann"]))
    assert scorer._states._store.read(keys) == [None]  # not even a blank one
    (entry,) = [journal.decode(each).journal for each in values(outcome, "journal")]
    assert entry.steps.tolist() == [0, 1, 2, 3]
    assert entry.ends == (3, 1, -1)
    # What comes next is of a new user, though it repeats what had come: from the worker's memory.
    again = scorer.process([message("reviews", record("reviews", 0), 1, 3)])
    (predicted,) = told(again)
    assert predicted.tier not in ("user_state", "full")
    finish(scorer, again)
    assert users(scorer, 1, "ann")["rating_count"].tolist() == [1]
    assert not letters(outcome)
    assert count(scorer, "events", kind="forget") == 1


def test_an_event_is_predicted_before_it_is_applied(make: Make) -> None:
    scorer = make()
    first = record("reviews", 0, rating=1)
    outcome = scorer.process(log("reviews", 1, [first, record("reviews", 1, item="pot", rating=1)]))
    one, two = told(outcome)
    assert (one.event_id, one.user_id, one.item_id) == ("reviews-0", "ann", "cup")
    assert (one.event_time, one.kind, one.model_version) == (START, "interaction", "ladder")
    assert one.source.model_dump() == {"topic": "reviews", "partition": 1, "offset": 0}
    assert (one.tier, two.tier) == ("global", "user_state")
    assert one.rating is not None
    assert two.rating is not None
    assert two.rating < one.rating  # the second knows of the first, which knew of nothing
    assert (
        one.rating
        == told(make().process(log("reviews", 1, [record("reviews", 0, rating=5)])))[0].rating
    )


def test_predictions_go_where_their_users_events_are_and_count_up(make: Make) -> None:
    scorer = make()
    polled = [
        *log("behavior", 2, [record("behavior", 0, "bob"), record("behavior", 1, "bob")]),
        *log("reviews", 0, [record("reviews", 0)]),
    ]
    outcome = scorer.process(polled)
    (batch,) = [each for each in outcome.batches if each.topic == "predicted-ratings"]
    assert [(each["key"], each["partition"]) for each in batch.messages] == [
        (b"ann", 0),
        (b"bob", 2),
        (b"bob", 2),
    ]
    assert [each.seq for each in told(outcome)] == [0, 0, 1]
    finish(scorer, outcome)
    later = scorer.process(log("behavior", 2, [record("behavior", 2, "bob")], 2))
    assert [each.seq for each in told(later)] == [2]


def test_texts_are_applied_but_not_predicted(make: Make) -> None:
    scorer = make()
    outcome = scorer.process(log("text-features", 0, [record("text-features", 0)]))
    assert not told(outcome)
    assert not updates(outcome)
    finish(scorer, outcome)
    assert users(scorer, 0, "ann")["text_count"].tolist() == [1]


def test_item_updates_sum_up_what_a_batch_did(make: Make) -> None:
    bought = record("behavior", 2, "bob", action="purchase", price=20)
    outcome = make().process(
        [
            *log(
                "behavior", 1, [record("behavior", 0), record("behavior", 1, item="pot"), bought], 5
            ),
            *log(
                "reviews",
                1,
                [record("reviews", 3, rating=4), record("reviews", 4, "bob", rating=2)],
            ),
        ]
    )
    (batch,) = [each for each in outcome.batches if each.topic == "item-updates"]
    assert [each["key"].decode() for each in batch.messages] == [
        each.item_id for each in updates(outcome)
    ]
    assert all("partition" not in each for each in batch.messages)  # the item's key decides
    found = {(each.item_id, each.source.topic): each for each in updates(outcome)}
    assert len(found) == len(updates(outcome)) == 3
    cup, reviewed = found["cup", "behavior"], found["cup", "reviews"]
    assert cup.counts == {"view": 1, "purchase": 1}
    assert (cup.source.partition, cup.source.first_offset, cup.source.last_offset) == (1, 5, 7)
    assert (cup.first_event_time, cup.last_event_time) == (START, START + timedelta(minutes=2))
    assert (reviewed.rating_count, reviewed.rating_sum) == (2, 6)
    assert reviewed.rating_histogram == [0, 1, 0, 1, 0]
    assert (reviewed.source.first_offset, reviewed.source.last_offset) == (0, 1)


def test_a_repeated_event_is_predicted_but_not_applied(make: Make) -> None:
    scorer = make()
    once = record("reviews", 0)
    finish(scorer, scorer.process(log("reviews", 0, [once])))
    outcome = scorer.process(log("reviews", 0, [once], 1))
    finish(scorer, outcome)
    assert len(told(outcome)) == 1
    assert not updates(outcome)
    assert users(scorer, 0, "ann")["rating_count"].tolist() == [1]
    assert scorer._metrics.duplicates.labels("scorer")._value.get() == 1


def test_a_storm_is_told_while_its_partition_is_owned(make: Make) -> None:
    scorer = make()

    def told_level() -> float | None:
        labels = {"processor": "scorer", "partition": "0"}
        return scorer._metrics.registry.get_sample_value("starcast_newcomers_level_stars", labels)

    assert told_level() is None
    stars = [4.0, 5.0] * 60 + [1.0] * 30
    sent = [record("reviews", at, f"new-{at}", rating=each) for at, each in enumerate(stars)]
    finish(scorer, scorer.process(log("reviews", 0, sent[:120])))
    assert abs(told_level() or 9) < 0.1
    finish(scorer, scorer.process(log("reviews", 0, sent[120:], 120)))
    assert -4 < (told_level() or 9) < -1
    scorer.drop([0])
    assert told_level() is None


APPENDED = datetime.fromtimestamp(NOW_MS / 1_000, UTC)  # when Kafka took what `message` makes
DAY = timedelta(days=1)


def count(scorer: Scorer, name: str, **labels: str) -> float | None:
    return scorer._metrics.registry.get_sample_value(
        f"starcast_{name}_total", {"processor": "scorer", **labels}
    )


def test_events_from_the_future_are_dead_letters(make: Make) -> None:
    scorer = make()
    ahead = record("reviews", 1, event_time=APPENDED + DAY + timedelta(milliseconds=1))
    polled = [
        *log("reviews", 0, [record("reviews", 0), ahead]),
        *log("behavior", 0, [b"{", record("behavior", 2, "bob", event_time=APPENDED + DAY)]),
    ]
    outcome = scorer.process(polled)
    assert [each.event_id for each in told(outcome)] == ["reviews-0", "behavior-2"]
    assert [(each.source.topic, each.source.offset, each.field) for each in letters(outcome)] == [
        ("behavior", 0, None),
        ("reviews", 1, "event_time"),
    ]
    assert "86400 s in the future" in letters(outcome)[1].reason
    finish(scorer, outcome)
    # What was set aside has been read all the same.
    assert scorer._states[0].header["ends"].tolist() == [2, 2, -1]


@pytest.mark.parametrize("jump", [-2, 0, 2])
def test_a_workers_clock_does_not_say_what_is_the_future(
    make: Make, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """Good events stay good when the clock jumps back, and a bad one bad when it jumps ahead."""
    clock = NOW_MS / 1_000 + jump * DAY.total_seconds()
    monkeypatch.setattr(time, "time", lambda: clock)
    good = record("reviews", 0, event_time=APPENDED)
    bad = record("reviews", 1, event_time=APPENDED + DAY * 1.5)
    outcome = make().process(log("reviews", 0, [good, bad]))
    assert [each.event_id for each in told(outcome)] == ["reviews-0"]
    assert [each.source.offset for each in letters(outcome)] == [1]


def test_letters_and_disorder_are_counted_after_the_commit(make: Make) -> None:
    scorer = make()
    at = {
        "now": APPENDED,
        "on time": APPENDED - DAY,
        "late": APPENDED - DAY - timedelta(milliseconds=1),
        "future": APPENDED + 2 * DAY,
    }
    events = [
        record("behavior", 0, "ann", event_time=at["late"]),  # late
        record("behavior", 1, "ann", event_time=at["now"]),
        record("behavior", 2, "ann", event_time=at["on time"]),  # out of order
        record("behavior", 3, "bob", event_time=at["on time"]),
        record("behavior", 4, "ann", event_time=at["late"]),  # both
        record("behavior", 4, "ann", event_time=at["late"]),  # a repetition, and nothing else
        record("behavior", 5, "ann", event_time=at["now"]),
        record("behavior", 6, "cyd", event_time=at["future"]),
        b"{",
        b"null",
    ]
    outcome = scorer.process(log("behavior", 0, events))
    counters = [
        ("dead_letters", {"reason": "contract"}, 2),
        ("dead_letters", {"reason": "future"}, 1),
        ("disorder", {"kind": "late"}, 2),
        ("disorder", {"kind": "out_of_order"}, 2),
        ("disorder", {"kind": "future"}, 1),
        ("duplicates", {}, 1),
        ("events", {"kind": "view"}, 7),
        ("state_writes", {"outcome": "written"}, 2),
    ]
    assert [count(scorer, name, **labels) for name, labels, _ in counters] == [None] * 8
    finish(scorer, outcome)
    assert [count(scorer, name, **labels) for name, labels, _ in counters] == [
        expected for _, _, expected in counters
    ]
    # In the next batch the user's latest time is known from the state.
    more = [record("behavior", 7, "ann", event_time=at["on time"])]
    finish(scorer, scorer.process(log("behavior", 0, more, 10)))
    assert count(scorer, "disorder", kind="out_of_order") == 3


def test_events_elsewhere_than_their_users_partition_are_counted_and_told_once(make: Make) -> None:
    scorer = make()
    (home,) = partitions_of(hash_ids(["ann"]), PARTITIONS).tolist()
    away = (home + 1) % PARTITIONS
    batches = [
        log("reviews", home, [record("reviews", 0)]),
        log("reviews", away, [record("reviews", 1), record("reviews", 2)]),
        log("behavior", away, [record("behavior", 0)]),
        log("text-features", away, [record("text-features", 0)]),  # ours, of an event that counted
    ]
    with capture_logs() as logs:
        for batch in batches:
            finish(scorer, scorer.process(batch))
    assert count(scorer, "misplaced") == 3
    (told_of,) = [each for each in logs if "help" in each]
    assert (told_of["topic"], told_of["partition"], told_of["offset"]) == ("reviews", away, 0)
    assert told_of["expected"] == home


@given(st.data())
@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_of_any_events_that_the_schemas_take_it_sends_what_the_schemas_take(
    make: Make, data: st.DataObject
) -> None:
    later = 4_102_444_800_000  # no event is from the future
    events = [
        (topic, value)
        for topic in ("reviews", "behavior")
        for value in data.draw(st.lists(taken_by_schema(topic), min_size=1, max_size=8))
    ]
    scorer = make()
    outcome = scorer.process(
        [
            message(topic, json.dumps(value).encode(), 0, at, timestamp=(2, later))
            for at, (topic, value) in enumerate(events)
        ]
    )
    finish(scorer, outcome)
    digests = scorer.idle()
    sent = [(each.topic, one["value"]) for each in outcome.batches for one in each.messages]
    sent += [(each.topic, each.value) for each in digests.outputs] if digests else []
    assert Counter(topic for topic, _ in sent)["predicted-ratings"] == len(events)
    assert not outcome.outputs
    for topic, value in sent:
        assert valid(topic)(json.loads(value)), value


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(-3, 1), st.integers(0, 5), st.sampled_from(KINDS[:2])
        ),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_disorder_is_what_a_look_at_each_event_finds(
    make: Make, rows: list[tuple[int, int, int, str]]
) -> None:
    expected = {"late": 0, "out_of_order": 0}
    latest: dict[int, int] = {}
    seen: dict[tuple[int, str, int], None] = {}
    polled: list[Message] = []
    offsets = dict.fromkeys(KINDS, 0)
    for at, (user, days, number, kind) in enumerate(rows):
        event_time = APPENDED + days * DAY
        polled.append(
            message(
                kind,
                record(kind, number, f"user-{user}", event_time=event_time),
                0,
                offsets[kind],
                timestamp=(2, NOW_MS + at),
            )
        )
        offsets[kind] += 1
        mine = [key for key in seen if key[0] == user][-16:]
        if (user, kind, number) in mine or days * 86_400_000 > at + 86_400_000:
            continue
        seen.pop((user, kind, number), None)
        seen[user, kind, number] = None
        expected["late"] += days * 86_400_000 < at - 86_400_000
        expected["out_of_order"] += days < latest.get(user, -10)
        latest[user] = max(days, latest.get(user, -10))
    scorer = make()
    cut = len(polled) // 2
    for part in (polled[:cut], polled[cut:]):
        if part:
            finish(scorer, scorer.process(part))
    assert {kind: count(scorer, "disorder", kind=kind) or 0 for kind in expected} == expected


def test_a_repetition_is_known_among_the_last_sixteen_events_of_its_user(make: Make) -> None:
    once = record("behavior", 0)
    for between, applied in ((15, 16), (16, 18)):
        scorer = make()
        others = [record("behavior", number) for number in range(1, between + 1)]
        outcome = scorer.process(log("behavior", 0, [once, *others, once]))
        finish(scorer, outcome)
        assert len(told(outcome)) == between + 2  # each is answered
        assert users(scorer, 0, "ann")["actions"].sum() == applied
        assert count(scorer, "duplicates") == between + 2 - applied


def test_an_event_out_of_order_turns_no_time_back(make: Make) -> None:
    scorer = make()
    early, noon = APPENDED - timedelta(hours=8), APPENDED
    polled = log(
        "behavior",
        0,
        [
            record("behavior", 0, event_time=noon, session_id="late"),
            record(
                "behavior", 1, item="pot", event_time=early
            ),  # in no session: in the current one
            record("behavior", 2, event_time=early, session_id="early"),  # opens a session
            record("behavior", 3, event_time=noon),
        ],
    )
    outcome = scorer.process(polled)
    finish(scorer, outcome)
    (ann,) = users(scorer, 0, "ann")
    assert ann["last_time"] == NOW_MS  # a maximum
    assert ann["first_second"] == NOW_MS // 1_000  # of the event applied first, not the earliest
    assert ann["sessions"] == 2
    assert ann["session_second"] == int(early.timestamp())
    assert ann["session_events"] == 2
    cup, pot = ann["recent"][0], ann["recent"][1]
    assert cup["second"] == NOW_MS // 1_000  # the newest event with the item
    assert pot["second"] == int(early.timestamp())
    (entry,) = [journal.decode(each).journal for each in values(outcome, "journal")]
    features = {
        name: entry.features[:, INDEX[name]].tolist()
        for name in ("user_recency", "user_tenure", "session_age", "item_seen")
    }
    nan = pytest.approx(np.nan, nan_ok=True)
    # A time that lies behind what is known counts as no time at all, never as a negative one.
    assert features["user_recency"] == [nan, 0, 0, 0]
    assert features["user_tenure"] == [nan, 0, 0, 0]
    assert features["session_age"][:3] == [0, 0, 0]
    assert features["session_age"][3] == pytest.approx(np.log1p(8 * 60))
    assert features["item_seen"] == [nan, nan, 0, 0]


def test_a_batch_of_bad_records_still_moves_on(make: Make) -> None:
    scorer = make()
    outcome = scorer.process(log("reviews", 0, [b"{", b"[]"]))
    assert len(letters(outcome)) == 2
    finish(scorer, outcome)
    header = decode_header(scorer._states._store.header(USER_STATE, 0))
    assert (header["ends"].tolist(), int(header["journal"])) == ([2, -1, -1], 10)
    (piece,) = [journal.decode(each) for each in values(outcome, "journal")]
    assert len(piece.journal) == 0
    assert piece.journal.ends == (2, -1, -1)


def test_the_journal_holds_what_was_read_and_done(make: Make) -> None:
    scorer = make()
    records = [record("reviews", at, rating=1 + at) for at in range(3)]
    finish(scorer, scorer.process(log("reviews", 1, records[:1])))
    before = scorer._states[1].header.tobytes()
    outcome = scorer.process(log("reviews", 1, records[1:], 1))
    (output,) = [each for each in single(outcome) if each.topic == "journal"]
    assert (output.key, output.partition) == (b"1", 1)
    entry = journal.decode(output.value or b"").journal
    assert entry.partition_state == before
    assert entry.ends == (3, -1, -1)
    assert entry.offsets.tolist() == [1, 2]
    assert entry.steps.tolist() == [1, 2]
    assert entry.seqs.tolist() == [each.seq for each in told(outcome)] == [1, 2]
    assert entry.events.view(EVENT)["rating"].tolist() == [2, 3]
    bias = np.clip(entry.features[:, INDEX["bias"]], 1.02, 4.98)
    np.testing.assert_allclose([each.rating or 0 for each in told(outcome)], bias, atol=1e-4)


events = st.lists(
    # Of a number below 0: a null value, which erases the user.
    st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 3), st.integers(-8, 30)),
    min_size=1,
    max_size=25,
)


@given(events, st.sets(st.integers(0, 25)))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_change_nothing(
    make: Make, rows: list[tuple[str, int, int, int]], cuts: set[int]
) -> None:
    """User states, numbers and predictions are the same however the events are cut into batches."""
    polled: list[Message] = []
    counts = dict.fromkeys(KINDS, 0)
    for at, (kind, user, item, number) in enumerate(rows):
        each = record(kind, number, f"user-{user}", f"item-{item}") if number >= 0 else None
        said = {"timestamp": (2, NOW_MS + at), "key": f"user-{user}".encode()}
        polled.append(message(kind, each, 0, counts[kind], **said))
        counts[kind] += 1
    whole, cut = make(), make()
    outcome = whole.process(polled)
    finish(whole, outcome)
    several: list[PredictedRating] = []
    journals: list[bytes] = []
    edges = [0, *sorted(each for each in cuts if 0 < each < len(polled)), len(polled)]
    for low, high in pairwise(edges):
        part = cut.process(polled[low:high])
        several += told(part)
        journals += values(part, "journal")
        finish(cut, part)
    names = [f"user-{user}" for user in range(4)]
    assert users(whole, 0, *names).tobytes() == users(cut, 0, *names).tobytes()
    assert whole._states[0].header.tobytes() == cut._states[0].header.tobytes()
    together = told(outcome)
    written = [_rows(each) for each in (values(outcome, "journal"), journals)]
    assert written[0] == written[1]
    drop = {"predicted_at"}
    assert [each.model_dump(exclude=drop) for each in together] == [
        each.model_dump(exclude=drop) for each in several
    ]
    assert {each.tier for each in together} <= set(TIERS)


def _rows(values: Sequence[bytes]) -> list[bytes]:
    """Bytes of the columns of a journal, whatever its transactions."""
    whole = journal.join([journal.decode(each).journal for each in values])
    names = ("topics", "offsets", "steps", "seqs", "events", "duplicates", "features")
    return [getattr(whole, name).tobytes() for name in names]


def test_a_forgotten_partition_is_read_again_from_the_store(make: Make) -> None:
    scorer = make()
    finish(scorer, scorer.process(log("reviews", 0, [record("reviews", 0)])))
    held = scorer._states[0]
    scorer.drop([0])
    scorer._states._held[0] = Held(held.claim, held.header)
    finish(scorer, scorer.process(log("reviews", 0, [record("reviews", 1, item="pot")], 1)))
    assert users(scorer, 0, "ann")["rating_count"].tolist() == [2]


def test_timed_work_looks_at_ages_and_at_claims(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        user_states,
        "read_journals",
        lambda *where: chain(*(of_journal(partition, []) for partition in where[-1])),
    )
    scorer = make()
    scorer._states._config = StatesConfig(expire_after_days=6)
    scorer.claim({partition: dict.fromkeys(journal.TOPICS, -1) for partition in (0, 1)})
    sent = [record("reviews", 0), record("reviews", 1, "bob", event_time=START + 7 * DAY)]
    finish(scorer, scorer.process([*log("reviews", 0, sent), *log("reviews", 1, sent[:1])]))
    late = [record("reviews", 2, "bob", "pot", event_time=START + 2 * DAY)]
    finish(scorer, scorer.process(log("reviews", 0, late, 2)))  # turns no time back
    scorer.drop([1])
    scorer._states._sweep_at = 0.0
    scorer.idle()
    assert users(scorer, 0, "ann", "bob")["rating_count"].tolist() == [0, 2]
    assert users(scorer, 1, "ann")["rating_count"].tolist() == [1]  # another worker's by now
    scorer._states._store.claim(USER_STATE, 1)
    scorer._states._check_at = 0.0
    scorer.idle()
    scorer._states._store.claim(USER_STATE, 0)
    scorer._states._check_at = 0.0
    with pytest.raises(FencedError):
        scorer.idle()


def test_the_next_transaction_is_smaller_after_one_that_took_long(make: Make) -> None:
    scorer = make()
    scorer._pace = Pace(2_000, 1e-9)
    finish(scorer, scorer.process(log("reviews", 0, [record("reviews", 0)])))
    assert scorer.batch_size == 1_000


def test_a_worker_of_many_partitions_takes_larger_transactions(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = make()
    monkeypatch.setattr(scorer._states, "claim", lambda committed: committed)
    scorer.claim({partition: {} for partition in range(32)})
    assert scorer.batch_size == 4_000
    scorer.drop(range(16))
    assert scorer.batch_size == 2_000


def test_digests_tell_of_what_was_scored(make: Make) -> None:
    scorer = make()
    finish(scorer, scorer.process(log("reviews", 0, [record("reviews", 0, rating=2)])))
    time.sleep(0.001)
    outcome = scorer.idle()
    assert outcome is not None
    (output,) = single(outcome)
    assert output.topic == "score-digests"
    assert b'"kinds":{"interaction":1}' in (output.value or b"")


def test_a_repetitions_stars_are_no_answer(make: Make) -> None:
    """Its user's state had them when it was predicted: it would err by next to nothing."""
    scorer = make()
    reviews = [record("reviews", number) for number in (0, 1, 1)]
    finish(scorer, scorer.process(log("reviews", 0, reviews)))
    outcome = scorer.process(log("reviews", 0, reviews[:2], 3))
    finish(scorer, outcome)
    first, second = (digests(each).values() for each in (outcome, scorer.idle()))
    assert [(each.kinds, each.errors.count, each.errors.rating) for each in (*first, *second)] == [
        ({"interaction": 3}, 2, 2.0 + 1.0),
        ({"interaction": 2}, 0, 0.0),
    ]


def test_digests_that_are_due_go_with_a_batch(make: Make) -> None:
    """Under load nothing is ever idle."""
    scorer = make()
    finish(scorer, scorer.process(log("reviews", 0, [record("reviews", 0, rating=2)])))
    outcome = scorer.process(log("reviews", 0, [record("reviews", 1, rating=2)], 1))
    (digest,) = [each for each in outcome.outputs if each.topic == "score-digests"]
    assert b'"kinds":{"interaction":1}' in (digest.value or b"")
    assert scorer.idle() is None


def tried(url: Path, share: float | None) -> tuple[str, str]:
    """The versions of a stable bundle and of one on trial (None: of one that is not)."""
    stable, other = (write(str(url), seed) for seed in (0, 1))
    registry.promote(str(url), stable.version, stable.sha256, "a test", "to see")
    if share is not None:
        registry.set_canary(str(url), other.version, other.sha256, share, "a test", "to see")
    return stable.version, other.version


def shop_log(count: int = 60) -> list[Message]:
    """Reviews of a dozen users in two partitions, with texts' features between them."""
    polled: list[Message] = []
    for partition in (0, 2):
        users = [f"user-{partition}-{at % 12}" for at in range(count)]
        items = [f"item-{at % 7}" for at in range(count)]
        for kind in ("reviews", "text-features"):
            each = zip(range(100 * partition, 100 * partition + count), users, items, strict=True)
            polled += log(kind, partition, [record(kind, *row) for row in each])
    return polled


def digests(outcome: Outcome | None) -> dict[tuple[str, str], ScoreDigest]:
    """By version and role."""
    assert outcome is not None
    found = [ScoreDigest.model_validate_json(each) for each in values(outcome, "score-digests")]
    return {(each.model_version, each.role): each for each in found}


def ratings(outcome: Outcome) -> dict[str, float | None]:
    return {str(each.event_id): each.rating for each in told(outcome)}


def test_a_canary_answers_its_users_in_order(make: Make, tmp_path: Path) -> None:
    stable, other = tried(tmp_path, None)
    plain = make()
    all_stable = plain.process(shop_log())
    registry.promote(str(tmp_path), other, _sha256(tmp_path, other), "a test", "")
    all_other = make().process(shop_log())
    registry.rollback(str(tmp_path), "a test", "")
    registry.set_canary(str(tmp_path), other, _sha256(tmp_path, other), 0.4, "a test", "")
    scorer = make()
    outcome = scorer.process(shop_log())
    found = told(outcome)
    assert [each.event_id for each in found] == [each.event_id for each in told(all_stable)]
    assert [each.seq for each in found] == [each.seq for each in told(all_stable)]
    chosen = is_chosen(hash_ids([each.user_id for each in found]), other, 0.4)
    assert 20 < chosen.sum() < 100
    by_version = {stable: ratings(all_stable), other: ratings(all_other)}
    assert by_version[stable] != by_version[other]
    for each, its in zip(found, chosen.tolist(), strict=True):
        assert each.model_version == (other if its else stable)
        assert each.rating == by_version[str(each.model_version)][str(each.event_id)]
    # The same states and journal, whoever answers.
    assert values(outcome, "journal") == values(all_stable, "journal")
    names = [f"user-0-{at}" for at in range(12)]
    finish(scorer, outcome)
    finish(plain, all_stable)
    assert users(scorer, 0, *names).tobytes() == users(plain, 0, *names).tobytes()
    counted = digests(scorer.idle())
    assert {key: each.kinds["interaction"] for key, each in counted.items()} == {
        (stable, "stable"): int((~chosen).sum()),
        (other, "canary"): int(chosen.sum()),
    }
    truths = {f"reviews-{number}": 1 + number % 5 for number in range(300)}
    errors = [
        abs(float(each.rating or 0) - truths[str(each.event_id)])
        for each, its in zip(found, chosen.tolist(), strict=True)
        if its
    ]
    assert counted[other, "canary"].errors.count == len(errors)
    assert counted[other, "canary"].errors.absolute == pytest.approx(sum(errors), rel=1e-3)
    total = scorer._metrics.registry.get_sample_value
    kinds = {"processor": "scorer", "kind": "review"}
    assert total("starcast_events_total", kinds) == len(found)


def test_a_shadow_predicts_after_the_commit_and_answers_nobody(make: Make, tmp_path: Path) -> None:
    stable, other = tried(tmp_path, 0.0)
    scorer = make()
    outcome = scorer.process(shop_log())
    assert {each.model_version for each in told(outcome)} == {stable}
    assert scorer.idle() is None  # nothing is committed yet
    finish(scorer, outcome)
    counted = digests(scorer.idle())
    assert counted.keys() == {(stable, "stable"), (other, "shadow")}
    shadow, answered = counted[other, "shadow"], counted[stable, "stable"]
    assert shadow.kinds == answered.kinds == {"interaction": 120}
    assert shadow.tiers == answered.tiers
    assert shadow.errors.count == answered.errors.count == 120
    assert shadow.errors.rating == answered.errors.rating
    assert (shadow.actions, shadow.top_items, shadow.latency_ms) == ({}, {}, None)
    # What it would have said: as it errs when it answers.
    registry.promote(str(tmp_path), other, _sha256(tmp_path, other), "a test", "")
    served = make()
    finish(served, served.process(shop_log()))
    asked = digests(served.idle())[other, "stable"]
    assert shadow.errors == asked.errors
    assert shadow.errors.squared != answered.errors.squared
    published = scorer._metrics.registry.get_sample_value
    for version, count in ((stable, 120), (other, None)):
        tiers = [
            published(
                "starcast_predictions_total",
                {"kind": "interaction", "tier": tier, "model_version": version},
            )
            for tier in TIERS
        ]
        known = [each for each in tiers if each is not None]
        assert (sum(known) or None) == count


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_version_on_trial_that_cannot_predict_stops_nothing(
    make: Make, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stable, other = tried(tmp_path, None)
    plain = told(make().process(shop_log()))
    registry.set_canary(str(tmp_path), other, _sha256(tmp_path, other), share, "a test", "")
    scorer, predict = make(), Predictor.predict

    def fails(self: Predictor, *given_: Any) -> Predictions:
        if self.version == other:
            raise RuntimeError("out of memory")
        return predict(self, *given_)

    monkeypatch.setattr(Predictor, "predict", fails)
    with capture_logs() as logs:
        finish(scorer, scorer.process(shop_log()))
        outcome = scorer.process(shop_log())
        finish(scorer, outcome)
    assert {each.model_version for each in told(outcome)} == {stable}
    assert len(told(outcome)) == len(plain)
    assert digests(scorer.idle()).keys() == {(stable, "stable")}
    (refused,) = [line for line in logs if line["event"] == "bundle refused"]
    assert other in refused["reason"]
    assert "out of memory" in refused["reason"]
    # It is not tried again; stable answers all.
    scorer._models.refresh()
    assert scorer._models.serving.canary is None


def describe(scorer: Scorer, items: list[str]) -> None:
    """Attributes of items, and vectors of their texts."""
    kept, found = scorer._states._store, scorer._models.serving.encoder_hash
    rows, names = blank(ITEM_ATTRIBUTES, len(items)), hash_ids(items)
    rows["version"], rows["text"] = 1, names
    kept.put(store_keys(kept, ITEM_KIND, names), to_bytes(rows))
    random = np.random.default_rng(5)
    vectors = [random.normal(size=WIDTH).astype(VECTOR_DTYPE).tobytes() for _ in items]
    kept.put(vector_keys(kept, found, names), vectors)


def test_the_journal_tells_which_versions_were_read(make: Make, tmp_path: Path) -> None:
    """From these a proof comes to the same features."""
    bert(tmp_path / "encoder")
    written = write(str(tmp_path), encoder=tmp_path / "encoder")
    registry.promote(str(tmp_path), written.version, written.sha256, "a test", "")
    scorer = make()
    describe(scorer, ["cup", "pot"])
    kept, (cup, pot, mug) = scorer._states._store, hash_ids(["cup", "pot", "mug"]).tolist()
    state, person = blank(ITEM, 1), blank(USER_ATTRIBUTES, 1)
    state["offset"], person["version"] = 7, 5
    kept.put(store_keys(kept, ITEM_STATE, hash_ids(["pot"])), to_bytes(state))
    kept.put(store_keys(kept, USER_KIND, hash_ids(["ann"])), to_bytes(person))
    reviews = [record("reviews", at, item=name) for at, name in enumerate(("cup", "pot"))]
    other = [record("reviews", 0, "bob", "mug")]
    outcome = scorer.process([*log("reviews", 1, reviews), *log("reviews", 2, other)])
    ann, bob = (journal.decode(each).journal for each in values(outcome, "journal"))
    for entry, versions in ((ann, ([0, 7], [1, 1], [5, 5])), (bob, ([0], [0], [0]))):
        assert entry.item_versions.tolist() == versions[0]
        assert entry.item_attributes_versions.tolist() == versions[1]
        assert entry.user_attributes_versions.tolist() == versions[2]
        assert entry.encoder == scorer._models.serving.encoder_hash
    assert (ann.item_vectors.tolist(), bob.item_vectors.tolist()) == ([cup, pot], [0])
    assert sorted(ann.recents.tolist()) == sorted([[cup, cup, 1], [pot, pot, 1]])
    assert bob.recents.tolist() == [[mug, 0, 0]]


def test_a_shadow_meets_what_its_batch_met_though_the_next_one_was_read(
    make: Make, tmp_path: Path
) -> None:
    """The loop has processed the next batch, with vectors of its own, when one is finished."""
    bert(tmp_path / "encoder")
    url = str(tmp_path)
    stable, other = (write(url, seed, encoder=tmp_path / "encoder") for seed in (0, 1))
    registry.promote(url, stable.version, stable.sha256, "a test", "")
    registry.set_canary(url, other.version, other.sha256, 0, "a test", "")
    items = [f"item-{at}" for at in range(90)]
    batches = [
        log(
            "reviews",
            0,
            [record("reviews", at, f"user-{at % 5}", items[at]) for at in part],
            part[0],
        )
        for part in (range(10), range(10, 90))
    ]
    counted: list[ScoreDigest] = []
    for version, role in ((other.version, "shadow"), (other.version, "stable")):
        scorer = make()
        describe(scorer, items)
        outcomes = [scorer.process(batch) for batch in batches]
        for outcome in outcomes:
            finish(scorer, outcome)
        counted.append(digests(scorer.idle())[version, role])
        if role == "shadow":
            registry.promote(url, other.version, other.sha256, "a test", "")
    shadow, served = counted
    assert shadow.errors == served.errors
    assert shadow.stars == served.stars
    assert shadow.tiers == served.tiers
    assert "item_text" in shadow.tiers or "full" in shadow.tiers


def _sha256(url: Path, version: str) -> str:
    return bundle.load(str(url), version).sha256
