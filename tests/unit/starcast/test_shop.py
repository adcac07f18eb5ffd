from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from schemas.codec import decode, encode
from schemas.exceptions import StarcastError
from schemas.records import Behavior, Item, Record, Review
from schemas.topics import BY_NAME
from starcast.shop import SPAN, shop

END = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture(scope="module")
def records() -> list[tuple[str, Record]]:
    return list(shop(seed=7, end=END))


def reviews_of(records: list[tuple[str, Record]]) -> list[Review]:
    return [record for _, record in records if isinstance(record, Review)]


def test_users_then_items_then_events_in_order(records: list[tuple[str, Record]]) -> None:
    topics = [topic for topic, _ in records]
    assert topics[:300] == ["users"] * 300
    assert topics[300:540] == ["items"] * 240
    assert set(topics[540:]) == {"reviews", "behavior"}
    assert len(records) == 540 + 20_000
    times = [record.event_time for _, record in records[540:]]  # type: ignore[attr-defined]
    assert times == sorted(times)
    assert times[0] == END - SPAN
    assert abs(times[-1] - END) < timedelta(milliseconds=1)


def test_every_record_keeps_the_contract(records: list[tuple[str, Record]]) -> None:
    by_topic: dict[str, list[Record]] = defaultdict(list)
    for topic, record in records:
        by_topic[topic].append(record)
    for topic, members in by_topic.items():
        values: list[bytes | None] = [encode(record) for record in members]
        decoded = decode(BY_NAME[topic], values, [(0, place) for place in range(len(values))])
        assert decoded.records == members
        assert not decoded.rejections


def test_the_same_arguments_give_the_same_records() -> None:
    one = list(shop(3, users=20, items=15, events=300, end=END))
    assert one == list(shop(3, users=20, items=15, events=300, end=END))
    assert one != list(shop(4, users=20, items=15, events=300, end=END))


@pytest.mark.parametrize(("users", "items", "events"), [(1, 1, 1), (1, 1, 50), (2, 3, 500)])
def test_small_shops(users: int, items: int, events: int) -> None:
    made = list(shop(1, users, items, events, END))
    assert len(made) == users + items + events


@pytest.mark.parametrize("year", [1, 1000, 1990, 2101])
def test_no_shop_of_times_outside_the_contract(year: int) -> None:
    with pytest.raises(StarcastError, match=rf"cannot end at 0*{year}-01-01.*1990-01-22"):
        next(shop(end=datetime(year, 1, 1, tzinfo=UTC)))


def test_no_shop_of_nothing() -> None:
    with pytest.raises(StarcastError, match="at least one"):
        next(shop(users=0))


def test_ids_are_distinct_and_known(records: list[tuple[str, Record]]) -> None:
    events = [record for _, record in records if isinstance(record, Review | Behavior)]
    assert len({event.event_id for event in events}) == len(events)
    items = {record.item_id for _, record in records if isinstance(record, Item)}
    assert {event.item_id for event in events} <= items


def test_three_in_ten_events_are_rated_reviews(records: list[tuple[str, Record]]) -> None:
    rated = [review for review in reviews_of(records) if review.rating is not None]
    assert 0.25 < len(rated) / 20_000 < 0.35
    stars = Counter(review.rating for review in rated)
    assert set(stars) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert min(stars.values()) > 100


def test_a_user_reviews_an_item_once() -> None:
    made = list(shop(2, users=10, items=10, events=2_000, end=END))
    reviews = reviews_of(made)
    assert len({(review.user_id, review.item_id) for review in reviews}) == len(reviews) > 30


def test_behaviour_has_every_action_and_prices(records: list[tuple[str, Record]]) -> None:
    behavior = [record for _, record in records if isinstance(record, Behavior)]
    actions = Counter(event.action for event in behavior)
    assert len(actions) == 7
    assert all(event.price for event in behavior if event.action == "purchase")


def test_words_tell_the_stars(records: list[tuple[str, Record]]) -> None:
    """Words of the first half, averaged, predict the stars of the second far better than chance."""
    worded = [each for each in reviews_of(records) if each.text and each.rating]
    half = len(worded) // 2
    sums: dict[str, list[float]] = defaultdict(list)
    for review in worded[:half]:
        for word in set((review.text or "").split()):
            sums[word].append(review.rating or 0)
    mean = {word: float(np.mean(stars)) for word, stars in sums.items()}
    guess = [
        np.mean([mean.get(word, 3.7) for word in (review.text or "").split()])
        for review in worded[half:]
    ]
    stars = [review.rating or 0 for review in worded[half:]]
    assert np.corrcoef(guess, stars)[0, 1] > 0.8
    assert len({review.text for review in worded}) > 0.5 * len(worded)


def test_tastes_can_be_learnt(records: list[tuple[str, Record]]) -> None:
    """A user's mean residual in a department beats user + item bias by a tenth and more."""
    category = {
        item.item_id: (item.category or [""])[0] for _, item in records if isinstance(item, Item)
    }
    total: dict[object, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def damped(key: object, damping: float) -> float:
        return total[key][1] / (total[key][0] + damping)

    def learn(key: object, residual: float) -> None:
        total[key][0] += 1
        total[key][1] += residual

    bias, crossed = [], []
    rated = [each for each in reviews_of(records) if each.rating is not None]
    for place, review in enumerate(rated):
        rating = review.rating or 0
        user, item = ("user", review.user_id), ("item", review.item_id)
        taste = ("taste", review.user_id, category[review.item_id])
        mean = damped("mean", 1)
        plain = mean + damped(item, 10) + damped(user, 5)
        if place > 0.8 * len(rated):
            bias.append(np.clip(plain, 1, 5) - rating)
            crossed.append(np.clip(plain + damped(taste, 1), 1, 5) - rating)
        learn(taste, rating - plain)
        learn(user, rating - mean - damped(item, 10))
        learn(item, rating - mean)
        learn("mean", rating)
    rmse = {"bias": np.std(bias), "crossed": np.std(crossed)}
    assert rmse["crossed"] < 0.9 * rmse["bias"]


def test_evenings_are_busier_than_nights(records: list[tuple[str, Record]]) -> None:
    hours = Counter(review.event_time.hour for review in reviews_of(records))
    assert sum(hours[hour] for hour in (18, 19, 20, 21)) > 3 * sum(hours[h] for h in (1, 2, 3, 4))
