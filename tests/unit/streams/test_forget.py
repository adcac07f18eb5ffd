"""What is waited for before a user counts as forgotten, and until when Kafka keeps the rest."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import KafkaError, KafkaException, Message
from pydantic import SecretStr

from model.state import LAYOUT_HASH
from streams import forget
from streams.claims import header_data
from streams.config import ArchiveConfig, KafkaConfig, RedisConfig, StatesConfig
from streams.exceptions import BrokerError
from streams.forget import Told, _kept, unanswered, unapplied, unarchived, undeleted
from streams.reader import USER_KIND, USER_STATE
from streams.rebuild import Shop
from streams.store import Store
from streams.user_states import decode_header
from tests.unit.streams.messages import message

NOW = datetime(2026, 11, 1, tzinfo=UTC)
TOLD = [
    Told("ann", 7, 1, {"reviews": 10, "behavior": 20, "text-features": 2, "users": 30}),
    Told("bob", 8, 1, {"reviews": 11, "behavior": 21, "text-features": 3, "users": 31}),
]


@pytest.fixture
def shop(store: str) -> Shop:
    kept = Store(RedisConfig(url=SecretStr(store), key_prefix=uuid4().hex), LAYOUT_HASH, 3)
    return Shop(kept, KafkaConfig(partitions=3), ArchiveConfig(), StatesConfig())


def applied(shop: Shop, reviews: int, behavior: int, texts: int, partition: int = 1) -> None:
    header = decode_header(None)
    header["ends"] = reviews, behavior, texts
    shop.store.write(shop.store.claim(USER_STATE, partition), [], [], header.tobytes())


def kept(shop: Shop, users: int) -> None:
    shop.store.write(shop.store.claim(USER_KIND, 1), [], [], header_data(users))


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what `texts` has committed of partition 1, and what is left to read of any topic."""

    def say(texts: int | None, *left: Message) -> None:
        read = {} if texts is None else {"reviews": {1: texts}}
        monkeypatch.setattr(forget, "committed", lambda *_: read)

        def rest(
            _: Any, topic: str, *, start: dict[int, int], **__: Any
        ) -> Iterator[list[Message]]:
            yield [each for each in left if (each.offset() or 0) >= start[1]]

        monkeypatch.setattr(forget, "read_topic", rest)

    return say


def test_a_broker_that_goes_away_meanwhile_is_told(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> Any:
        raise KafkaException(KafkaError(KafkaError.OFFSET_NOT_AVAILABLE, "gone"))

    monkeypatch.setattr(forget, "tell", gone)
    with pytest.raises(BrokerError, match=r"gone. Run the command again"):
        forget.forget(shop, ["ann"], 0)


def test_all_null_values_have_to_be_read(shop: Shop, kafka: Callable[..., None]) -> None:
    kafka(None)
    assert unapplied(shop, TOLD) == {"scorer"}  # which has never worked; nobody else has to
    for ends, waiting in (
        ((11, 22, 4), {"scorer"}),
        ((12, 21, 4), {"scorer"}),
        ((12, 22, 3), {"scorer"}),
        ((12, 22, 4), set[str]()),
    ):
        applied(shop, *ends)
        assert unapplied(shop, TOLD) == waiting
    elsewhere = Told("cem", 9, 2, {"reviews": 98, "behavior": 98, "text-features": 98})
    assert unapplied(shop, [*TOLD, elsewhere]) == {"scorer"}
    applied(shop, 99, 99, 99, partition=2)
    assert not unapplied(shop, [*TOLD, elsewhere])
    assert not undeleted(shop, TOLD)
    kept(shop, 31)
    assert undeleted(shop, TOLD) == {"catalog"}
    kept(shop, 32)
    assert not undeleted(shop, TOLD)


def test_texts_that_are_read_late_are_waited_for(shop: Shop, kafka: Callable[..., None]) -> None:
    applied(shop, 12, 22, 4)
    kafka(11)
    assert unapplied(shop, TOLD) == {"texts"}
    # It has read them and sent them on, and the scorer is behind.
    sent = [
        message("text-features", None, 1, at, key=key) for at, key in ((4, b"ann"), (5, b"bob"))
    ]
    kafka(12, *sent)
    assert unapplied(shop, TOLD) == {"scorer"}
    applied(shop, 12, 22, 5)
    assert unapplied(shop, TOLD) == {"scorer"}
    applied(shop, 12, 22, 6)
    assert not unapplied(shop, TOLD)
    # What follows is of one who has come back, and of somebody else.
    after = [message("text-features", b"{}", 1, 6, key=b"ann"), message("reviews", None, 1, 7)]
    kafka(12, *sent, *after)
    assert not unapplied(shop, TOLD)


def test_texts_that_have_come_to_items_alone_are_waited_for(
    shop: Shop, kafka: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have what the user wrote before them, and the archive would take it."""
    applied(shop, 12, 22, 4)
    kafka(None)
    monkeypatch.setattr(forget, "committed", lambda *_: {"items": {0: 5}, "reviews": {2: 7}})
    assert unapplied(shop, TOLD) == {"texts"}


def test_requests_from_before_are_to_be_answered(
    shop: Shop, kafka: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {("score-requests", 1): 8, ("score-requests", 2): 0}
    request = message("score-requests", b"", 1, 7)
    kafka(None, request)
    assert not unanswered(shop, asked)  # nobody has ever answered
    for read, waiting in (({0: 3}, {"answers"}), ({1: 7}, {"answers"}), ({1: 8}, set[str]())):
        monkeypatch.setattr(forget, "committed", lambda *_, read=read: {"score-requests": read})
        assert unanswered(shop, asked) == waiting
    kafka(None)  # what is left is the end of a producer's transaction alone
    monkeypatch.setattr(forget, "committed", lambda *_: {"score-requests": {1: 7}})
    assert not unanswered(shop, asked)


def test_the_archive_has_to_hold_all_before_an_end(
    shop: Shop, kafka: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forget.archive, "positions", lambda *_: {1: 5})
    decided = {1: 9}
    monkeypatch.setattr(forget, "_decided", lambda *_: decided)
    kafka(None, message("journal", b"", 1, 7))
    assert unarchived(shop, {("journal", 1): 8}) == {"journal"}
    assert not unarchived(shop, {("journal", 1): 7})  # between are ends of transactions alone
    assert not unarchived(shop, {("journal", 1): 5})
    assert unarchived(shop, {("journal", 1): 7, ("reviews", 1): 8}) == {"reviews"}
    kafka(None)
    assert not unarchived(shop, {("journal", 1): 8})
    decided[1] = 7  # a transaction is open from there on
    assert unarchived(shop, {("journal", 1): 8}) == {"journal"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"retention.ms": "86400000", "segment.ms": "3600000"},
            "by 2026-11-02 00:00 UTC; what shares a segment with newer records, "
            "by 2026-11-02 01:00 UTC",
        ),
        ({"retention.ms": "-1"}, "never: its retention has no end"),
        (
            {"cleanup.policy": "compact", "retention.ms": "-1", "segment.ms": "3600000"},
            "when Kafka compacts it; its segment is closed by 2026-11-01 01:00 UTC",
        ),
        (
            {"retention.ms": str(2**63 - 1)},
            "never; what shares a segment with newer records, never",
        ),
    ],
)
def test_kafka_keeps_the_rest_for_a_while(config: dict[str, str], said: str) -> None:
    assert _kept(config, NOW) == said
