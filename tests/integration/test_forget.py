"""Erasing a user on a real Kafka, a real store and a real archive."""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer
from typer.testing import CliRunner, Result

from model.events import EVENT
from model.ids import hash_ids
from model.state import USER
from schemas import journal
from schemas.journal import TOPICS
from schemas.records import Review, ScoreRequest, User
from starcast.main import app
from starcast.shop import shop as generated_shop
from streams import rebuild
from streams.admin import TopicError
from streams.clients import client_config
from streams.config import KafkaConfig
from streams.embedded import embedded
from streams.erasure import ErasureError
from streams.forget import Told, tell, unarchived
from streams.producer import Outgoing
from streams.recount import check_states
from streams.tail import read_topic
from streams.verify import verify_replay
from tests.shops import PARTITIONS, Shop, make_shop, until
from trainer.archived import from_archive

EVENTS = 1_000
END = datetime(2026, 1, 1, tzinfo=UTC)
WORKERS = ("scorer", "items", "catalog", "texts")


def place(shop: Shop) -> rebuild.Shop:
    settings = shop.settings
    return rebuild.Shop(shop.store, settings.kafka, settings.archive, settings.states)


def generated() -> list[tuple[str, Any]]:
    return list(generated_shop(seed=7, events=EVENTS, end=END))


def busiest(sent: Sequence[tuple[str, Any]]) -> str:
    """The user of most events."""
    users = [each.user_id for topic, each in sent if topic in ("reviews", "behavior")]
    return max(sorted(set(users)), key=users.count)


def is_blank(shop: Shop, user: str) -> bool:
    return shop.users([user]).tobytes() == np.zeros(1, USER).tobytes()


def run(shop: Shop, *arguments: str) -> Result:
    """A command with the shop's settings."""
    return CliRunner().invoke(app, [*arguments], env=shop.environment)


def files_with(shop: Shop, user: str) -> list[Path]:
    """Files of the archive in which something is of a user, whatever version names them."""
    hash_, told = hash_ids([user])[0], (user, base64.b64encode(user.encode()).decode())
    found: list[Path] = []
    for path in Path(shop.settings.archive.url).rglob("*.parquet"):
        if "_delta_log" in path.parts:
            continue
        rows = pq.read_table(path)
        if path.parent.name == "journal":
            values = [journal.decode(each).journal for each in rows["kafka_value"].to_pylist()]
            theirs = any((each.events.view(EVENT)["user"] == hash_).any() for each in values)
        else:
            theirs = any(name in str(each) for each in rows.to_pylist() for name in told)
        if theirs:
            found.append(path)
    return found


def test_a_null_value_erases_a_state_in_the_order_of_its_partition(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    shop = make_shop(kafka, store_server, tmp_path)
    sent = generated()
    user = busiest(sent)
    with shop.workers("archiver"):
        with shop.workers(*WORKERS) as workers:
            shop.play(sent)
            shop.until_predicted(EVENTS)
            shop.until_users_are_written()
            assert not is_blank(shop, user)
            shop.play([Outgoing(topic, user.encode(), None) for topic in ("reviews", "behavior")])
            until(lambda: is_blank(shop, user))
            # Once more by way of texts, which had not read all of what the user wrote.
            until(lambda: workers.value("events_total", processor="scorer", kind="forget") == 3)
            again = Review(
                event_id="again", user_id=user, item_id="cup", event_time=END, rating=4.0
            )
            shop.play([("reviews", again)])
            predicted = shop.until_predicted(EVENTS + 1)
            shop.until_users_are_written()
            shop.until_items_are_applied()
        shop.until_archived()
    (mine,) = [each for each in predicted if each.event_id == "again"]
    assert mine.tier in ("global", "item_text", "item_state")
    assert shop.users([user])["rating_count"].tolist() == [1]
    settings = shop.settings
    report = verify_replay(settings.archive, settings.models, shop.store)
    assert report.differences == {}, report.examples
    before = shop.states()
    shop.empty_store()
    for partition in range(PARTITIONS):
        list(rebuild.rebuild(place(shop), partition))
    assert shop.states() == before
    checked = check_states(place(shop), list(range(PARTITIONS)))
    assert checked.differences == {}, checked.examples
    assert not shop.letters()


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's log would go on writing to what captured its output."""
    monkeypatch.setattr("starcast.log.configure", lambda _: None)


def test_forget_erases_a_user_everywhere_and_nothing_brings_them_back(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    shop = make_shop(kafka, store_server, tmp_path)
    sent = generated()
    user = busiest(sent)
    others = {each.user_id for topic, each in sent if topic in ("reviews", "behavior")} - {user}
    bad = Outgoing("reviews", user.encode(), b'{"rating": "much"}')
    request = ScoreRequest(
        request_id="q", user_id=user, item_ids=["a cup"], event_time=END, deadline_ms=60_000
    )
    with shop.workers("archiver", "scorer", "items", "catalog", "texts", "answers"):
        shop.play([("users", User(user_id=user, event_time=END, age=44.0))])
        shop.play([*sent, bad, ("score-requests", request)])
        shop.until_predicted(EVENTS)
        shop.until_predicted(1, "request")
        shop.until_archived()
        assert {path.parent.name for path in files_with(shop, user)} >= {
            "reviews",
            "users",
            "score-requests",
            "predicted-ratings",
            "journal",
        }
        before = from_archive(shop.settings.archive.url)
        result = run(shop, "forget", user, "--yes")
        assert result.exit_code == 0, result.output
        shop.until_users_are_written()
        shop.until_items_are_applied()
        assert is_blank(shop, user)
        assert files_with(shop, user) == []
        # The user's own are gone, all others are there.
        after = from_archive(shop.settings.archive.url)
        mine = int((before.events["user"] == hash_ids([user])[0]).sum())
        assert mine > 10
        assert len(after) == len(before) - mine
        assert set(after.reviews["user_id"]) == set(before.reviews["user_id"]) - {user}
        assert set(np.unique(after.events["user"])) == set(hash_ids(sorted(others)))
        # They come back as a new user.
        again = Review(event_id="again", user_id=user, item_id="cup", event_time=END, rating=4.0)
        shop.play([("reviews", again)])
        (mine_,) = [each for each in shop.until_predicted(EVENTS + 1) if each.event_id == "again"]
        assert mine_.tier not in ("user_state", "full")
        shop.until_users_are_written()
        shop.until_items_are_applied()
        shop.until_archived()
    assert shop.users([user])["rating_count"].tolist() == [1]
    settings = shop.settings
    report = verify_replay(settings.archive, settings.models, shop.store)
    assert report.differences == {}, report.examples
    assert any("passed over" in note for note in report.notes)
    # Retention has taken the topics: all is rebuilt from the archive.
    states = shop.states()
    shop.cut("reviews", "behavior", "text-features", "journal", "item-updates")
    shop.empty_store()
    rebuilt = run(shop, "state", "rebuild")
    assert rebuilt.exit_code == 0, rebuilt.output
    assert shop.states() == states
    checked = check_states(place(shop), list(range(PARTITIONS)))
    assert checked.differences == {}, checked.examples


def test_forget_erases_in_embedded_mode_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its broker has no transactions, and its word for where a topic ends is too low."""
    monkeypatch.setattr("streams.forget.COPIED_SECONDS", 0.0)  # nobody comes back in this one
    with embedded(tmp_path) as ends:
        made = make_shop(ends.bootstrap_servers, ends.redis_url, tmp_path).settings
        kafka = made.kafka.model_copy(update={"exactly_once": False})
        shop = Shop(made.model_copy(update={"kafka": kafka}))
        sent = generated()[:600]
        user = busiest(sent)
        count = sum(topic in ("reviews", "behavior") for topic, _ in sent)
        with shop.workers("archiver", *WORKERS):
            shop.play(sent)
            shop.until_predicted(count)
            shop.until_archived()
            assert files_with(shop, user)
            result = run(shop, "forget", user, "--yes")
            assert result.exit_code == 0, result.output
            assert is_blank(shop, user)
            assert files_with(shop, user) == []
            shop.until_users_are_written()
            shop.until_items_are_applied()
            shop.until_archived()
        settings = shop.settings
        report = verify_replay(settings.archive, settings.models, shop.store)
        assert report.differences == {}, report.examples


def test_what_a_transaction_may_still_commit_is_waited_for(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    """An answer of a slow worker would come to the archive when that is erased."""
    shop = make_shop(kafka, store_server, tmp_path)
    topic = shop.settings.kafka.topic_prefix + "predicted-ratings"
    producer = Producer(client_config(shop.settings.kafka, transactional_id=topic))
    producer.init_transactions(30)

    def send() -> None:
        producer.begin_transaction()
        producer.produce(topic, b"{}", partition=0)
        assert producer.flush(30) == 0

    def waits(end: int) -> bool:
        return unarchived(place(shop), {("predicted-ratings", 0): end}) == {"predicted-ratings"}

    send()
    assert waits(1)
    producer.abort_transaction(30)
    until(lambda: not waits(1))
    send()  # behind the record that was aborted, and the mark that says so
    assert waits(3)
    producer.commit_transaction(30)
    assert waits(3)
    with shop.workers("archiver"):
        until(lambda: not waits(3))


def test_what_texts_may_still_commit_is_waited_for(
    kafka: str, store_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would come to the archive when that is erased, and readers see nothing of it yet."""
    shop = make_shop(kafka, store_server, tmp_path)
    topic = shop.settings.kafka.topic_prefix + "text-features"
    producer = Producer(client_config(shop.settings.kafka, transactional_id=topic))
    producer.init_transactions(30)

    def tell_first(kafka: KafkaConfig, told: Sequence[Told], topics: Sequence[str]) -> list[Told]:
        found = tell(kafka, told, topics)
        if topics == TOPICS:
            producer.begin_transaction()
            producer.produce(topic, b"{}", partition=found[0].partition)
            assert producer.flush(30) == 0
        return found

    with shop.workers("scorer"):
        with monkeypatch.context() as patch:
            patch.setattr("streams.forget.tell", tell_first)
            half = run(shop, "forget", "ann", "--yes", "--wait", "8")
        assert "✗ states: not yet: scorer has not read the null values" in half.stdout
        producer.abort_transaction(30)
        done = run(shop, "forget", "ann", "--yes")
    assert "✓ states: erased" in done.stdout


def test_forget_tells_what_waits_for_a_worker_and_may_be_repeated(
    kafka: str, store_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.forget.COPIED_SECONDS", 0.0)  # nobody comes back in this one
    shop = make_shop(kafka, store_server, tmp_path)
    sent = generated()
    user = busiest(sent)
    other = busiest([(topic, r) for topic, r in sent if getattr(r, "user_id", user) != user])
    early = run(shop, "forget", user, "--yes", "--wait", "0")
    assert early.exit_code == 1
    assert "✗ states: not yet: scorer has not read the null values" in early.stdout
    assert "✓ archive: nothing at" in early.stdout
    with shop.workers("scorer", "items", "catalog"):
        asked = [user, other, "o'hara; a user -- of none"]
        request = ScoreRequest(request_id="q", user_id=user, item_ids=["cup"], event_time=END)
        with shop.workers("archiver"):
            with shop.workers("answers"):
                shop.play([*sent, ("score-requests", request)])
                shop.until_predicted(EVENTS)
                shop.until_predicted(1, "request")
            shop.play([("score-requests", request)])
            shop.until_archived()
            # Nobody answers: what is answered later would say what was asked.
            half = run(shop, "forget", *asked, "--yes", "--wait", "8")
            assert half.exit_code == 1
            assert "✗ archive: not erased: answers is behind" in half.stdout
        with shop.workers("answers"):
            shop.until_predicted(2, "request")
        # Nobody archives: states are erased, the archive has to wait.
        half = run(shop, "forget", *asked, "--yes", "--wait", "8")
        assert half.exit_code == 1
        assert "✓ states: erased" in half.stdout
        assert "✗ archive: not erased: the archiver is behind in" in half.stdout
        assert is_blank(shop, user)
        assert is_blank(shop, other)
        assert files_with(shop, user)
        settings = shop.settings
        report = verify_replay(settings.archive, settings.models, shop.store)
        assert report.differences == {}, report.examples
        assert any("ahead of the archive" in note for note in report.notes)
        with shop.workers("archiver"):
            done = run(shop, "forget", *asked, "--yes")
            assert done.exit_code == 0, done.output
            assert files_with(shop, user) == files_with(shop, other) == []
            done = run(shop, "forget", *asked, "--yes")
            assert done.exit_code == 0, done.output
            assert files_with(shop, user) == files_with(shop, other) == []
            assert "✓ archive: predicted-ratings: 0 rows erased" in done.stdout
            assert "✓ archive: reviews: 3 rows erased" in done.stdout  # its own null values
            shop.until_items_are_applied()
            shop.until_archived()
    report = verify_replay(settings.archive, settings.models, shop.store)
    assert report.differences == {}, report.examples
    refused = run(shop, "forget", "x" * 257, "--yes")
    assert isinstance(refused.exception, ErasureError)
    asked_first = CliRunner().invoke(app, ["forget", user], input="n\n")
    assert asked_first.exit_code == 1
    assert "Aborted" in asked_first.output


def test_forget_sends_nothing_where_topics_have_other_partition_counts(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    """Null values would erase the user where they are not, and be told as done."""
    shop = make_shop(kafka, store_server, tmp_path)
    more = {**shop.environment, "STARCAST_KAFKA__PARTITIONS": str(PARTITIONS + 1)}
    result = CliRunner().invoke(app, ["forget", "ann", "--yes"], env=more)
    assert isinstance(result.exception, TopicError)
    assert not list(read_topic(shop.settings.kafka, "users"))
