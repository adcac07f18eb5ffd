"""What waits for records of another topic, and until when."""

import pytest
from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

from streams.precedence import Precedence

TOPICS = ("reviews", "behavior", "text-features")
REVIEWS, TEXTS, OTHER = ("reviews", 3), ("text-features", 3), ("reviews", 4)


def messages(*times: int, first: int = 0) -> list[Message]:
    return [
        Message(offset=first + at, timestamp=(TIMESTAMP_LOG_APPEND_TIME, time))
        for at, time in enumerate(times)
    ]


@pytest.mark.parametrize("topics", [("reviews", "behavior"), ("text-features", "items"), ()])
def test_where_a_topic_is_not_read_nothing_waits_for_it(topics: tuple[str, ...]) -> None:
    order = Precedence(topics)
    assert not order
    order.read(TEXTS, messages(5))
    assert order.early() == {}


def test_nothing_is_told_of_reviews_that_have_not_come() -> None:
    order = Precedence(TOPICS)
    assert order
    texts = messages(12, 25, 19)
    order.read(TEXTS, texts)
    order.read(OTHER, messages(90))
    order.read(REVIEWS, messages(10, 20))  # in the same poll, and behind the texts
    assert order.early() == {TEXTS: texts[1]}
    assert (order.early(), order.due()) == ({}, [])
    order.read(REVIEWS, messages(24, first=2))
    assert order.due() == []
    order.read(REVIEWS, messages(25, first=3))
    assert (order.due(), order.due()) == ([TEXTS], [])


def test_at_the_end_of_the_reviews_nothing_waits_until_there_are_more() -> None:
    order = Precedence(TOPICS)
    order.ended(REVIEWS, 0)
    order.read(TEXTS, messages(99))
    assert order.early() == {}
    order.read(REVIEWS, messages(100, 101))  # since then: what is at 2 is not known
    texts = messages(102)
    order.read(TEXTS, texts)
    assert order.early() == {TEXTS: texts[0]}
    order.ended(OTHER, 9)
    assert order.due() == []
    order.ended(REVIEWS, 2)
    assert order.due() == [TEXTS]


def test_a_partition_that_goes_takes_what_is_known_of_it_along() -> None:
    order = Precedence(TOPICS)
    order.ended(REVIEWS, 5)
    order.read(TEXTS, messages(7))
    order.drop([REVIEWS, TEXTS])
    assert order.early() == {}
    texts = messages(7)
    order.read(TEXTS, texts)
    assert order.early() == {TEXTS: texts[0]}
    order.drop([TEXTS, REVIEWS])
    order.ended(REVIEWS, 5)
    assert order.due() == []
