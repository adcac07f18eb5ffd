"""The processors together on a real Kafka and a real store, exactly-once."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from confluent_kafka import Message, Producer, TopicPartition
from deltalake import write_deltalake
from numpy.typing import NDArray

from model.events import EVENT
from model.features import INDEX
from model.ids import hash_ids
from schemas import archive, journal
from schemas.archive import Row
from schemas.codec import encode
from schemas.records import (
    Behavior,
    ItemUpdate,
    PredictedRating,
    Review,
    ScoreRequest,
    TextFeatures,
    UpdateSource,
)
from schemas.topics import BY_NAME
from starcast.shop import shop as generated_shop
from streams import embedded
from streams.clients import client_config, reach
from streams.embedded import HOST, Child, free_port, start_child
from streams.exceptions import StoreAheadError
from streams.producer import Outgoing
from streams.reader import ITEM_STATE, USER_STATE, store_keys
from streams.verification import Verification
from streams.verify import verify_replay
from tests.shops import (
    PARTITIONS,
    PIPELINE,
    Shop,
    check_each_once,
    check_states,
    make_shop,
    partition_of,
    until,
)

EVENTS = 3_000
END = datetime(2026, 1, 1, tzinfo=UTC)
Sent = list[tuple[str, Any]]


def events(count: int, seed: int = 7) -> Sent:
    """A generated shop's records: users, items, then events; and what some texts say."""
    records: Sent = list(generated_shop(seed=seed, events=count, end=END))
    random = np.random.default_rng(seed)
    reviews = [record for _, record in records if isinstance(record, Review)]
    return records + [
        ("text-features", what_a_text_says(record, random.dirichlet(np.ones(5))))
        for record in reviews
        if random.random() < 0.3
    ]


def what_a_text_says(record: Review, shares: NDArray[np.float64]) -> TextFeatures:
    return TextFeatures(
        event_id=record.event_id,
        user_id=record.user_id,
        item_id=record.item_id,
        event_time=record.event_time,
        distribution=shares.round(4).tolist(),
        encoder="none",
    )


def only_events(records: Sent) -> Sent:
    return [each for each in records if each[0] in ("reviews", "behavior")]


@pytest.fixture
def shop(kafka: str, store_server: str, tmp_path: Path) -> Shop:
    return make_shop(kafka, store_server, tmp_path)


@dataclass
class Whole:
    """A shop whose events have gone all the way."""

    shop: Shop
    sent: Sent
    predictions: list[PredictedRating]
    folder: Path


@pytest.fixture(scope="module")
def whole(kafka: str, store_server: str, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    shop, sent = make_shop(kafka, store_server, folder), events(EVENTS)
    played = only_events(sent)
    with shop.workers("archiver"):
        with shop.workers("scorer", "items", "catalog") as workers:
            half = next(i for i, each in enumerate(sent) if each is played[EVENTS // 2])
            shop.play(sent[:half])
            shop.until_predicted(EVENTS // 2)
            shop.until_items_are_applied()  # or a slow worker for them would let none be known
            shop.play(sent[half:])
            predictions = shop.until_predicted(EVENTS)
            shop.until_items_are_applied()
            shop.until_attributes_are_kept()
            shop.until_users_are_written()
            until(lambda: all(each.lag == 0 for each in workers.processors.values()))
        shop.until_archived()
    return Whole(shop, sent, predictions, folder)


def test_each_event_is_predicted_once_and_in_order(whole: Whole) -> None:
    check_each_once(whole.predictions, whole.sent)
    for message in whole.shop.read("predicted-ratings"):
        record = PredictedRating.model_validate_json(message.value() or b"")
        assert message.partition() == record.source.partition == partition_of(record.user_id)
        assert message.key() == record.user_id.encode()
    assert whole.shop.letters() == []


def test_predictions_learn_from_what_came_before(whole: Whole) -> None:
    truth = {r.event_id: r.rating for topic, r in whole.sent if topic == "reviews" and r.rating}
    rated = [each for each in whole.predictions if each.event_id in truth]
    assert {"full", "user_state", "item_state"} <= {each.tier for each in whole.predictions}
    later = rated[len(rated) // 2 :]
    error = np.sqrt(np.mean([(each.rating - truth[each.event_id]) ** 2 for each in later]))  # pyright: ignore[reportOptionalOperand, reportArgumentType]
    spread = np.std([truth[each.event_id] for each in later])  # pyright: ignore[reportArgumentType]
    assert error < spread


def test_states_are_what_a_recount_gives(whole: Whole) -> None:
    check_states(whole.shop, whole.sent)


def test_archive_rows_equal_topic_rows(whole: Whole) -> None:
    for topic in PIPELINE:
        rows = archive.read(whole.shop.settings.archive.url, topic).collect()
        messages = whole.shop.read(topic)
        assert len(rows) == len(messages)
        for row, message in zip(rows.iter_rows(named=True), messages, strict=True):
            assert (row["kafka_partition"], row["kafka_offset"]) == (
                message.partition(),
                message.offset(),
            )
            assert row["kafka_key"] == message.key()
            assert row["kafka_value"] == message.value()
            stamp = row["kafka_timestamp"].timestamp() * 1_000
            assert round(stamp) == message.timestamp()[1]
    assert set(archive.tables(whole.shop.settings.archive.url)) <= BY_NAME.keys()


def verify(whole: Whole, url: str | None = None) -> Verification:
    archived = whole.shop.settings.archive
    if url is not None:
        archived = archived.model_copy(update={"url": url})
    return verify_replay(archived, whole.shop.settings.models, whole.shop.store)


def test_a_replay_finds_no_difference(whole: Whole) -> None:
    report = verify(whole)
    assert report.differences == {}, report.examples
    assert report.notes == []
    assert report.clean
    assert report.compared["prediction"] == EVENTS
    texts = sum(topic == "text-features" for topic, _ in whole.sent)
    assert report.compared["feature row"] == EVENTS + texts
    assert report.compared["user state"] == len({r.user_id for _, r in only_events(whole.sent)})
    assert report.compared["item state"] == len({r.item_id for _, r in only_events(whole.sent)})


@pytest.mark.parametrize(("kind", "what"), [(USER_STATE, "user state"), (ITEM_STATE, "item state")])
def test_a_changed_state_is_found(whole: Whole, kind: bytes, what: str) -> None:
    record = whole.sent[-400][1]
    (name,) = hash_ids([record.user_id if kind == USER_STATE else record.item_id]).tolist()
    (key,) = store_keys(whole.shop.store, kind, np.array([name], np.uint64))
    (value,) = whole.shop.store.read([key])
    assert value is not None
    changed = bytearray(value)
    changed[40] ^= 1
    whole.shop.store.put([key], [bytes(changed)])
    try:
        report = verify(whole)
    finally:
        whole.shop.store.put([key], [value])
    assert report.differences == {what: 1}
    assert f"{name:#x}" in report.examples[0]


def rewritten(whole: Whole, topic: str, change: Callable[[list[Row]], list[Row]]) -> str:
    """A copy of the archive in which a topic has other rows."""
    copy = whole.folder / f"copy-{topic}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole.shop.settings.archive.url, copy)
    rows = [
        Row(
            message.partition() or 0,
            message.offset() or 0,
            message.timestamp()[1],
            as_bytes(message.key()),
            as_bytes(message.value()),
        )
        for message in whole.shop.read(topic)
    ]
    table = archive.table(topic, change(rows))
    write_deltalake(str(copy / topic), table, mode="overwrite")
    return str(copy)


def as_bytes(value: bytes | str | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def altered(rows: list[Row], at: int, value: bytes) -> list[Row]:
    return [*rows[:at], rows[at]._replace(value=value), *rows[at + 1 :]]


def test_an_altered_prediction_is_found(whole: Whole) -> None:
    def change(rows: list[Row]) -> list[Row]:
        record = PredictedRating.model_validate_json(rows[500].value or b"")
        lower = max((record.rating or 0) - 0.01, 1)
        return altered(rows, 500, encode(record.model_copy(update={"rating": lower})))

    report = verify(whole, rewritten(whole, "predicted-ratings", change))
    assert report.differences == {"prediction": 1}
    source = whole.predictions[500].source
    assert f"partition {source.partition} offset {source.offset}" in report.examples[0]


def test_a_missing_or_doubled_prediction_is_found(whole: Whole) -> None:
    report = verify(whole, rewritten(whole, "predicted-ratings", lambda rows: rows[:-1]))
    assert report.differences == {"predicted": 1}

    def double(rows: list[Row]) -> list[Row]:
        return [*rows, rows[-1]._replace(offset=rows[-1].offset + 1)]

    report = verify(whole, rewritten(whole, "predicted-ratings", double))
    assert report.differences == {"one prediction a position": 1}


def test_a_missing_input_is_found(whole: Whole) -> None:
    report = verify(whole, rewritten(whole, "reviews", lambda rows: rows[:7] + rows[8:]))
    assert report.differences["archived input"] == 1
    assert not report.clean


def test_an_altered_item_update_is_found(whole: Whole) -> None:
    def change(rows: list[Row]) -> list[Row]:
        record = ItemUpdate.model_validate_json(rows[3].value or b"")
        other = record.model_copy(update={"sessions": record.sessions + 7})
        return altered(rows, 3, encode(other))

    report = verify(whole, rewritten(whole, "item-updates", change))
    assert report.differences["item update"] == 1
    assert report.differences["item state"] == 1


def test_an_altered_feature_row_is_found(whole: Whole) -> None:
    def change(rows: list[Row]) -> list[Row]:
        piece = journal.decode(rows[2].value or b"")
        features = piece.journal.features.copy()
        features[0, INDEX["global_mean"]] += 0.1
        (value,) = journal.encode(replace(piece.journal, features=features))
        return altered(rows, 2, value)

    report = verify(whole, rewritten(whole, "journal", change))
    assert report.differences == {"feature row": 1}
    assert "global_mean" in report.examples[0]


def test_a_lost_store_is_rebuilt_from_the_journal(whole: Whole) -> None:
    shop = whole.shop
    before = shop.states()
    assert len(before) > 200
    shop.empty_store()
    assert not any(shop.states().values())
    with shop.workers("scorer", "items", "catalog"):
        until(lambda: shop.states() == before)
    shop.until_items_are_applied()
    shop.until_users_are_written()
    assert verify(whole).clean
    assert len(shop.predictions()) == EVENTS


# -- takeovers -----------------------------------------------------------------------------------


def test_a_killed_worker_is_taken_over(shop: Shop) -> None:
    sent = only_events(events(2_000))
    check_each_once(shop.predicted_over_a_kill(sent), sent)
    check_states(shop, sent)


def test_a_worker_that_wakes_late_changes_nothing(shop: Shop) -> None:
    """It sleeps over a batch for so long that the group goes on without it, then commits."""
    sent = only_events(events(1_000))
    asleep, wake = threading.Event(), threading.Event()
    options = {"max.poll.interval.ms": "4000"}
    with shop.workers("scorer", "items", slot=0, options=options) as late:
        process = late.processors["scorer"].process

        def sleep(messages: list[Message]) -> Any:
            outcome = process(messages)
            if not asleep.is_set():
                asleep.set()
                wake.wait(60)
            return outcome

        with patch.object(late.processors["scorer"], "process", sleep):
            shop.play(sent)
            assert asleep.wait(60)
            with shop.workers("scorer", slot=1):
                shop.until_predicted(1_000)
                wake.set()
                until(lambda: late.value("rebalances_total", processor="scorer") >= 2)
                more = [
                    (topic, record.model_copy(update={"event_id": f"{record.event_id} more"}))
                    for topic, record in sent
                    if topic == "behavior"
                ]
                shop.play(more)
                predictions = shop.until_predicted(1_000 + len(more))
                shop.until_items_are_applied()
                shop.until_users_are_written()
    check_each_once(predictions, sent + more)
    check_states(shop, sent + more)


def test_a_fenced_producer_is_replaced_once(shop: Shop) -> None:
    sent = only_events(events(600))
    with shop.workers("scorer") as workers:
        shop.play(sent[:200])
        shop.until_predicted(200)
        config = {"transactional.id": workers.loops["scorer"]._sender._transactional_id}
        for part in (sent[200:400], sent[400:]):
            Producer(client_config(shop.settings.kafka, **config)).init_transactions(30)
            shop.play(part)
            until(lambda: bool(workers.errors) or len(shop.predictions()) == 400)
        until(lambda: bool(workers.errors))
        assert "give each host its own name" in str(workers.errors.pop())
    assert len(shop.predictions()) == 400
    with shop.workers("scorer", "items"):
        predictions = shop.until_predicted(600)
        shop.until_items_are_applied()
        shop.until_users_are_written()
    check_each_once(predictions, sent)
    check_states(shop, sent)


def test_two_workers_of_a_kip_848_group_share_the_work(shop: Shop) -> None:
    sent = only_events(events(1_200))
    modern = {"group_protocol": "consumer"}
    with shop.workers("scorer", "items", slot=0, **modern) as first:
        shop.play(sent[:400])
        shop.until_predicted(400)
        with shop.workers("scorer", slot=1, **modern) as second:
            until(lambda: bool(second.loops["scorer"].live))
            until(lambda: not first.loops["scorer"].waiting)
            shop.play(sent[400:800])
            shop.until_predicted(800)
            mine, its = first.loops["scorer"].live, second.loops["scorer"].live
            assert not mine & its
            assert len(mine) + len(its) == 3 * PARTITIONS
        shop.play(sent[800:])
        predictions = shop.until_predicted(1_200)
        shop.until_items_are_applied()
        shop.until_users_are_written()
    check_each_once(predictions, sent)
    check_states(shop, sent)


# -- bad input -----------------------------------------------------------------------------------


def review(name: str, user: str = "ann", item: str = "i", **changes: Any) -> Review:
    fields: dict[str, Any] = {
        "event_id": name,
        "user_id": user,
        "item_id": item,
        "event_time": END,
        "rating": 4.0,
    }
    return Review.model_validate(fields | changes)


GOOD = encode(review("good"))
BAD: dict[str, tuple[bytes | None, str, str | None]] = {
    "malformed": (GOOD[:-1], "not JSON in UTF-8", None),
    "no object": (b"[1]", "JSON object", None),
    "wrong type": (GOOD.replace(b"4.0", b'"4"'), "number", "rating"),
    "out of range": (GOOD.replace(b"4.0", b"5.5"), "less than or equal to 5", "rating"),
    "not a number": (GOOD.replace(b"4.0", b"NaN"), "not JSON", None),
    "missing id": (GOOD.replace(b'"user_id":"ann",', b""), "missing", "user_id"),
    "empty id": (GOOD.replace(b'"ann"', b'""'), "at least 1 character", "user_id"),
    "long text": (GOOD.replace(b"4.0", b'4,"text":"%b"' % (b"x" * 1_000_000)), "65536", "text"),
    "long ago": (GOOD.replace(b"2026-01", b"1026-01"), "from 1990", "event_time"),
    "far away": (GOOD.replace(b"2026-01", b"2099-01"), "in the future", "event_time"),
    "no offset": (GOOD.replace(b"00Z", b"00"), "with an offset", "event_time"),
    "milliseconds": (
        GOOD.replace(b'"2026-01-01T00:00:00.000Z"', b"1767225600000"),
        "RFC 3339",
        "event_time",
    ),
    "null": (None, "null value", None),
    "latin-1": (encode(review("ü")).decode().encode("latin-1"), "not JSON in UTF-8", None),
    "utf-16": (GOOD.decode().encode("utf-16"), "not JSON in UTF-8", None),
    "nothing": (b"", "not JSON", None),
}
BAD_BEHAVIOR: dict[str, tuple[bytes | None, str, str | None]] = {
    "unknown action": (
        encode(
            Behavior(event_id="b", user_id="u", item_id="i", event_time=END, action="cart")
        ).replace(b'"cart"', b'"stare"'),
        "'view', 'click'",
        "action",
    ),
}


def test_bad_input_becomes_dead_letters_and_the_rest_is_as_without_it(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    good = [each for each in events(1_500) if each[0] == "reviews"]
    plain, spoilt = (make_shop(kafka, store_server, tmp_path / name) for name in "ab")
    plain.play(good)
    mixed: list[Any] = list(good)
    for at, (value, _, _) in enumerate(BAD.values()):
        key = good[at * 20][1].user_id.encode()  # into the partitions that the good ones take
        if value is None:
            key = b"\xff"  # under a user's key it is good, and erases the user
        headers = [("trace", b"%d" % at)]
        mixed.insert(at * 21, Outgoing("reviews", key, value, headers))
    for value, _, _ in BAD_BEHAVIOR.values():
        mixed.append(Outgoing("behavior", b"u", value))
    spoilt.play(mixed)
    found: list[dict[str | None, tuple[Any, ...]]] = []
    for shop in (plain, spoilt):
        with shop.workers("scorer", "archiver"):  # not items: predictions hang on users alone
            predictions = shop.until_predicted(len(good))
            if shop is spoilt:
                until(lambda: len(spoilt.letters()) >= len(BAD) + len(BAD_BEHAVIOR))
                shop.until_archived()
        check_each_once(predictions, good)
        found.append(
            {
                each.event_id: (each.rating, each.distribution, each.interval, each.tier, each.seq)
                for each in predictions
            }
        )
    assert found[0] == found[1]
    sources = {
        (
            str(each.topic()).removeprefix(spoilt.settings.kafka.topic_prefix),
            each.partition(),
            each.offset(),
        ): each
        for topic in ("reviews", "behavior")
        for each in spoilt.read(topic)
    }
    letters = spoilt.letters()
    wanted = {
        value: (reason, field) for value, reason, field in [*BAD.values(), *BAD_BEHAVIOR.values()]
    }
    assert len(letters) == len(wanted)
    for letter in letters:
        source = letter.source
        message = sources[source.topic, source.partition, source.offset]
        reason, field = wanted.pop(message.value())
        assert reason in letter.reason
        assert (letter.field, letter.processor, letter.attempts) == (field, "scorer", 1)
    assert wanted == {}
    report = verify_replay(spoilt.settings.archive, spoilt.settings.models, spoilt.store)
    assert report.clean, report.examples


def test_a_repeated_event_is_answered_and_not_applied_and_an_edit_replaces(shop: Shop) -> None:
    first, edited = review("r1", rating=2.0), review("r2", rating=5.0)
    view = Behavior(
        event_id="b1", user_id="ann", item_id="i", event_time=END, action="view", session_id="s"
    )
    sent: Sent = [("reviews", first), ("behavior", view)] * 3
    with shop.workers("scorer", "items") as workers:
        shop.play(sent)
        shop.until_predicted(6)
        assert workers.value("duplicates_total", processor="scorer") == 4
        shop.play([("reviews", edited), ("reviews", review("r3", user="bob"))])
        predictions = shop.until_predicted(8)
        shop.until_items_are_applied()
        shop.until_users_are_written()
    check_each_once(predictions, [*sent, ("reviews", edited), ("reviews", review("r3"))])
    (ann,) = shop.users(["ann"])
    assert (ann["rating_count"], ann["rating_sum"], ann["rating_square_sum"]) == (1, 5, 25)
    assert ann["histogram"].tolist() == [0, 0, 0, 0, 1]
    assert ann["actions"][:2].tolist() == [1, 1]  # an edit replaces, it is no second review
    (item,) = shop.items(["i"])
    assert (item["rating_count"], item["rating_sum"]) == (2, 9)
    assert item["actions"][:2].tolist() == [2, 1]


def test_a_prediction_lies_where_its_event_lay(shop: Shop) -> None:
    """Also where a producer chose another key than the user."""
    stray = [
        Outgoing("reviews", b"key %d" % at, encode(review(f"r{at}", user=f"user {at}")))
        for at in range(20)
    ]
    with shop.workers("scorer"):
        shop.play(stray)
        shop.until_predicted(20)
    places = [
        (message.partition(), PredictedRating.model_validate_json(message.value() or b""))
        for message in shop.read("predicted-ratings")
    ]
    assert all(partition == record.source.partition for partition, record in places)
    assert any(partition_of(record.user_id) != partition for partition, record in places)


# -- answers -------------------------------------------------------------------------------------


def test_requests_pass_the_backlog_and_are_ranked(shop: Shop) -> None:
    records = events(1_000)
    known = sorted({record.item_id for _, record in only_events(records)})
    with shop.workers("scorer", "items", "catalog"):
        shop.play(records)
        shop.until_predicted(1_000)
        shop.until_items_are_applied()
        shop.until_users_are_written()
    user = next(record.user_id for topic, record in records if topic == "reviews")
    shop.play((topic, record) for topic, record in only_events(events(1_000, seed=8)))  # a backlog
    now = datetime.now(UTC)
    asked = ScoreRequest(
        request_id="q", user_id=user, item_ids=[*known[:50], "never seen"], event_time=now
    )
    late = asked.model_copy(
        update={"request_id": "late", "event_time": now - timedelta(seconds=5), "deadline_ms": 100}
    )
    bad = Outgoing("score-requests", b"u", encode(asked).replace(b'["item', b'[7,"item'))
    with shop.workers("answers"):
        shop.play([("score-requests", asked), ("score-requests", late), bad])
        answers = shop.until_predicted(2 * 51, kind="request")
        until(lambda: len(shop.letters()) == 1)
    assert len(shop.predictions()) == 1_000  # the backlog still waits
    assert len(answers) == 2 * 51
    ranked = sorted((each for each in answers if each.request_id == "q"), key=lambda e: e.rank or 0)
    assert [each.rank for each in ranked] == list(range(1, 52))
    assert {each.item_id for each in ranked} == {*known[:50], "never seen"}
    ratings = [each.rating or 0 for each in ranked]
    assert ratings == sorted(ratings, reverse=True)
    assert len(set(ratings)) > 10
    assert {each.status for each in ranked} == {"ok"}
    expired = [each for each in answers if each.request_id == "late"]
    assert {(each.status, each.rating, each.rank, each.of) for each in expired} == {
        ("expired", None, None, 51)
    }
    (letter,) = shop.letters()
    assert (letter.processor, letter.source.topic) == ("answers", "score-requests")


# -- outages -------------------------------------------------------------------------------------


def store_at(port: int, folder: Path) -> Child:
    url = f"redis://{HOST}:{port}/0"
    command = [embedded._store_binary(), "--port", str(port), "--bind", HOST, "--save", ""]

    def answers() -> bool:
        return embedded._store_answers(url)

    return start_child("store", command, url, folder, answers)


def test_a_store_outage_pauses_and_drops_nothing(kafka: str, tmp_path: Path) -> None:
    """The store ends and comes back empty, twice: once in the middle, once between batches."""
    port = free_port()
    sent = only_events(events(1_500))
    child = store_at(port, tmp_path)
    try:
        # Few states at hand, so that a worker has to ask the empty store for what it knew.
        shop = make_shop(kafka, child.address, tmp_path, states={"cache_users": 10})
        with shop.workers("scorer", "items", "archiver"):
            playing = threading.Thread(target=shop.play, args=(sent[:1_000],), kwargs={"rate": 300})
            playing.start()
            shop.until_predicted(200)
            child.stop()
            playing.join()
            time.sleep(1)
            assert len(shop.predictions()) < 1_000
            child = store_at(port, tmp_path)
            shop.until_predicted(1_000)
            child.stop()
            child = store_at(port, tmp_path)
            shop.play(sent[1_000:])
            predictions = shop.until_predicted(1_500)
            shop.until_items_are_applied()
            shop.until_users_are_written()
            shop.until_archived()
        check_each_once(predictions, sent)
        check_states(shop, sent)
        report = verify_replay(shop.settings.archive, shop.settings.models, shop.store)
        assert report.clean, report.examples
    finally:
        child.stop()


def test_topics_made_anew_are_told_from_the_old_ones(shop: Shop) -> None:
    sent = events(300)
    with shop.workers("scorer", "items", "catalog", "archiver"):
        shop.play(sent)
        shop.until_predicted(300)
        shop.until_items_are_applied()
        shop.until_users_are_written()
        shop.until_archived()
    anew = make_shop(
        shop.settings.kafka.bootstrap_servers, "redis://unused:1", Path(shop.settings.archive.url)
    )
    kafka = anew.settings.kafka
    mixed = Shop(shop.settings.model_copy(update={"kafka": kafka}))
    for name in ("scorer", "items", "catalog", "archiver"):
        with mixed.workers(name) as workers:
            until(lambda: bool(workers.errors))
            error = workers.errors.pop()
        assert isinstance(error, StoreAheadError)
        assert "made anew" in str(error)
        assert kafka.topic_prefix in str(error) or name == "scorer"  # which is told of the journal


def test_records_that_retention_took_are_told(shop: Shop) -> None:
    partition, store = partition_of("i"), shop.store

    def applied() -> int:
        return int(store.header(ITEM_STATE, partition) or 0)

    updates = [("item-updates", one_rating("i"))] * 30
    with shop.workers("items"):
        shop.play(updates)
        until(lambda: applied() == 30)
    shop.play(updates)
    name = f"{shop.settings.kafka.topic_prefix}item-updates"
    admin = reach(shop.settings.kafka)  # its answers end with it
    for future in admin.delete_records([TopicPartition(name, partition, 40)]).values():
        future.result()
    with shop.workers("items") as workers:
        until(lambda: applied() == 60)
        labels = {"processor": "items", "topic": "item-updates", "partition": str(partition)}
        assert workers.value("lost_records_total", **labels) == 10
    assert shop.items(["i"])["rating_count"].tolist() == [30 + 20]


def test_a_shop_at_rest_for_longer_than_retention_goes_on(shop: Shop) -> None:
    sent = only_events(events(200))
    with shop.workers("scorer", "items", "archiver"):
        shop.play(sent[:100])
        shop.until_predicted(100)
        shop.until_users_are_written()
        shop.until_items_are_applied()
        shop.until_archived()
    shop.cut("reviews", "behavior", "predicted-ratings", "journal", "item-updates")
    with shop.workers("scorer", "items", "archiver") as workers:
        shop.play(sent[100:])
        shop.until_predicted(100)
        shop.until_users_are_written()
        shop.until_items_are_applied()
        registry = workers.metrics.registry
        found = [each for metric in registry.collect() for each in metric.samples]
        lost = {each.value for each in found if each.name == "starcast_lost_records_total"}
        assert lost == {0}
    check_states(shop, sent)


def test_a_review_is_predicted_before_what_is_read_off_it_is_known(shop: Shop) -> None:
    """Where both wait, as after a pause, one fetch has more of the short records: here all."""
    count, random = 1_800, np.random.default_rng(1)
    reviews = [
        Review(
            event_id=f"r{number}",
            user_id=f"u{number}",
            item_id="i",
            rating=4,
            text=random.bytes(2_000).hex(),
            event_time=END,
        )
        for number in range(count)
    ]
    shop.play([("reviews", each) for each in reviews])
    shop.play([("text-features", what_a_text_says(each, np.full(5, 0.2))) for each in reviews])

    with shop.workers("scorer", options={"max.partition.fetch.bytes": "50000"}):
        shop.until_predicted(count)
        until(lambda: len(applied(shop)[0]) == 2 * count)
    users, topics = applied(shop)
    _, first = np.unique(users, return_index=True)
    assert np.bincount(topics[first]).tolist() == [count]  # reviews, and nothing else


def test_what_is_read_off_reviews_is_applied_on_the_embedded_broker_too(
    embedded_broker: str, store_server: str, tmp_path: Path
) -> None:
    """It tells where partitions end."""
    shop = make_shop(embedded_broker, store_server, tmp_path)
    shop.settings.kafka.exactly_once = False
    reviews = [
        Review(event_id=f"r{at}", user_id=f"u{at}", item_id="i", event_time=END, rating=5)
        for at in range(9)
    ]
    shop.play([("reviews", each) for each in reviews])
    shop.play([("text-features", what_a_text_says(each, np.full(5, 0.2))) for each in reviews])
    with shop.workers("scorer"):
        until(lambda: sorted(applied(shop)[1].tolist()) == [0] * 9 + [2] * 9)


def applied(shop: Shop) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Of the journal's rows, by partition, the users and the topics."""
    pieces = [journal.decode(each.value() or b"").journal for each in shop.read("journal")]
    users = [np.zeros(0, np.uint64), *(each.events.view(EVENT)["user"] for each in pieces)]
    return np.concatenate(users), np.concatenate(
        [np.zeros(0, np.uint8), *(each.topics for each in pieces)]
    )


def one_rating(item: str) -> ItemUpdate:
    return ItemUpdate(
        item_id=item,
        source=UpdateSource(topic="reviews", partition=0, first_offset=0, last_offset=0),
        counts={"review": 1},
        rating_count=1,
        rating_sum=4.0,
        rating_square_sum=16.0,
        rating_histogram=[0, 0, 0, 1, 0],
        first_event_time=END,
        last_event_time=END,
    )


def test_a_clean_stop_archives_what_waits(shop: Shop) -> None:
    settings = shop.settings.model_copy(deep=True)
    settings.archive.flush_seconds = 600
    patient, url = Shop(settings), settings.archive.url
    with patient.workers("archiver") as workers:
        patient.play(only_events(events(100)))
        until(lambda: waiting(workers.processors["archiver"]) == 100)
        assert archive.tables(url) == []
    positions = [archive.positions(url, topic) for topic in ("reviews", "behavior")]
    assert sum(end for each in positions for end in each.values()) == 100


def waiting(archiver: Any) -> int:
    """Rows that an archiver has taken and not committed."""
    return sum(len(each) for tables in list(archiver._archive._pending.values()) for each in tables)
