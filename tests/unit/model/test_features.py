"""What the features say, on cases small enough to work out by hand."""

from typing import Any

import numpy as np
import pytest

from model import features
from model.events import CART, CLICK, EVENT, PURCHASE, REVIEW, VIEW, Rows, blank
from model.features import (
    FEATURE_HASH,
    FEATURES,
    INDEX,
    ITEM_DAMPING,
    NAMES,
    USER_DAMPING,
    compute,
)
from model.ids import hash_names
from model.state import ITEM, ITEM_ATTRIBUTES, PARTITION, RECENT, USER, USER_ATTRIBUTES

HOUR = 3_600_000
NOW = 20_000 * 24 * HOUR + 6 * HOUR  # six in the morning


def row(dtype: np.dtype[Any], **fields: Any) -> Rows:
    rows = blank(dtype, 1)
    for name, value in fields.items():
        rows[name] = value
    return rows


def features_of(
    user: Rows | None = None,
    item: Rows | None = None,
    person: Rows | None = None,
    attributes: Rows | None = None,
    recent: Rows | None = None,
    partition: Rows | None = None,
    event: Rows | None = None,
    **more: Any,
) -> dict[str, float]:
    """Features by name of one event; what is not given is blank."""
    rows = compute(
        row(USER) if user is None else user,
        row(ITEM) if item is None else item,
        row(USER_ATTRIBUTES) if person is None else person,
        row(ITEM_ATTRIBUTES) if attributes is None else attributes,
        blank(ITEM_ATTRIBUTES, (1, RECENT)) if recent is None else recent,
        blank(PARTITION, ()) if partition is None else partition,
        row(EVENT, time=NOW) if event is None else event,
        **more,
    )
    return dict(zip(NAMES, rows[0].tolist(), strict=True))


def recents(*slots: dict[str, Any]) -> Rows:
    user = row(USER)
    for place, slot in enumerate(slots):
        for name, value in slot.items():
            user["recent"][name][:, place] = value
    return user


def test_the_table_is_whole() -> None:
    assert len(set(NAMES)) == len(FEATURES)
    assert all(feature.meaning and feature.source for feature in FEATURES)
    assert {feature.group for feature in FEATURES} == {
        "user",
        "item",
        "behavior",
        "cross",
        "attributes",
        "text",
    }
    assert len(FEATURE_HASH) == 8
    assert list(INDEX) == list(NAMES)


def test_nothing_known() -> None:
    """Counts are 0, means are the prior's, all else is missing."""
    found = features_of()
    assert found["bias"] == found["global_mean"] == found["user_rating_mean"] == 4
    assert found["user_bias"] == found["item_bias"] == 0
    assert [found[f"item_share_{k}"] for k in range(1, 6)] == pytest.approx(
        [0.05, 0.05, 0.15, 0.35, 0.4]
    )
    zero = [name for name, value in found.items() if value == 0]
    missing = [name for name, value in found.items() if np.isnan(value)]
    assert {"user_events", "item_ratings", "session_position", "item_known", "text_known"} <= {
        *zero
    }
    assert {"user_recency", "item_price", "user_age", "item_rated"} & {*missing} == {
        "user_recency",
        "item_price",
        "user_age",
        "item_rated",
    }


def test_running_biases() -> None:
    found = features_of(
        row(USER, rating_count=2, rating_sum=4, residual_sum=-5),
        row(ITEM, rating_count=5, rating_sum=25, rating_square_sum=125, histogram=[0, 0, 0, 0, 5]),
        partition=row(PARTITION, rating_count=10, rating_sum=30)[0],
    )
    mean = (40 + 30) / 20
    item_bias = (25 - 5 * mean) / (5 + ITEM_DAMPING)
    user_bias = -5 / (2 + USER_DAMPING)
    assert found["global_mean"] == pytest.approx(mean)
    assert found["item_bias"] == pytest.approx(item_bias)
    assert found["user_bias"] == pytest.approx(user_bias)
    assert found["bias"] == pytest.approx(mean + item_bias + user_bias)
    assert found["user_rating_mean"] == pytest.approx(
        (4 + USER_DAMPING * mean) / (2 + USER_DAMPING)
    )
    assert found["item_rating_deviation"] == 0
    assert found["item_share_5"] == pytest.approx((5 + ITEM_DAMPING * 4 / 20) / (5 + ITEM_DAMPING))
    assert found["item_ratings"] == pytest.approx(np.log(6))


def test_newcomers_take_their_level_with_them_and_who_has_rated_less_of_it() -> None:
    """Who has rated as often as the damping takes a half."""
    storm = row(PARTITION, late_sum=-30, late_weight=15, storm=0.79)[0]  # 0.8 * -30 / (15 + 5)
    assert features_of(partition=storm)["bias"] == pytest.approx(4 - 1.2)
    user = row(USER, rating_count=int(USER_DAMPING))
    assert features_of(user, partition=storm)["bias"] == pytest.approx(4 - 0.6)


def test_the_bias_stays_within_the_stars() -> None:
    assert features_of(row(USER, rating_count=100, residual_sum=400))["bias"] == 5
    assert features_of(row(USER, rating_count=100, residual_sum=-400))["bias"] == 1


def test_shares_and_deviation_of_a_user() -> None:
    found = features_of(
        row(
            USER,
            rating_count=4,
            rating_sum=15,
            rating_square_sum=67,
            histogram=[1, 0, 0, 1, 2],
        )
    )
    assert found["user_ratings"] == pytest.approx(np.log(5))
    assert found["user_five_share"] == 0.5
    assert found["user_low_share"] == 0.25
    assert found["user_rating_deviation"] == pytest.approx(np.std([1, 4, 5, 5]))
    found = features_of(
        row(USER, rating_count=1, rating_sum=2, rating_square_sum=4, histogram=[0, 1, 0, 0, 0])
    )
    assert found["user_low_share"] == 1
    assert np.isnan(found["user_rating_deviation"])  # of one rating there is none


def test_times_and_sessions() -> None:
    user = row(
        USER,
        last_time=NOW - HOUR // 4,
        first_second=(NOW - 48 * HOUR) // 1000,
        session=9,
        session_second=(NOW - HOUR) // 1000,
        session_events=3,
    )
    same, unnamed, silent, other = (
        features_of(user, event=row(EVENT, **fields))
        for fields in (
            {"time": NOW, "session": 9},
            {"time": NOW + HOUR // 4},  # half an hour after the event before
            {"time": NOW + HOUR // 4 + 1},
            {"time": NOW, "session": 8},
        )
    )
    assert same["user_recency"] == pytest.approx(np.log(1.25))
    assert same["user_tenure"] == pytest.approx(np.log(3))
    assert same["session_position"] == pytest.approx(np.log(4))
    assert same["session_age"] == pytest.approx(np.log(61))
    assert unnamed["session_position"] == pytest.approx(np.log(4))
    assert unnamed["session_age"] == pytest.approx(np.log(76))
    assert [silent[name] for name in ("session_position", "session_age")] == [0, 0]
    assert [other[name] for name in ("session_position", "session_age")] == [0, 0]
    assert (same["hour_sine"], same["hour_cosine"]) == pytest.approx((1, 0), abs=1e-6)
    late = features_of(user, event=row(EVENT, time=NOW - HOUR))
    assert late["user_recency"] == 0


def test_age_of_an_item_counts_from_its_first_sign() -> None:
    seen, listed = NOW - 48 * HOUR, NOW - 24 * HOUR
    item, attributes = (
        row(ITEM, first_time=seen),
        row(ITEM_ATTRIBUTES, first_time=listed, version=1),
    )
    assert features_of(item=item, attributes=attributes)["item_age"] == pytest.approx(np.log(3))
    assert features_of(attributes=attributes)["item_age"] == pytest.approx(np.log(2))
    assert features_of(attributes=attributes)["item_known"] == 1
    assert features_of(item=item)["item_age"] == pytest.approx(np.log(3))
    item["first_time"], attributes["first_time"] = listed, seen
    assert features_of(item=item, attributes=attributes)["item_age"] == pytest.approx(np.log(3))


def test_sessions_are_counted() -> None:
    found = features_of(row(USER, sessions=3), row(ITEM, sessions=6))
    assert found["user_sessions"] == pytest.approx(np.log(4))
    assert found["item_sessions"] == pytest.approx(np.log(7))


def test_prices() -> None:
    item = row(ITEM, price_count=2, price_log_sum=4)
    listed = row(ITEM_ATTRIBUTES, price=np.e**3 - 1, price_rank=0.75)
    user = row(USER, price_count=1, price_log_sum=1.5, paid_count=2, paid_log_sum=5)
    event = row(EVENT, time=NOW, action=PURCHASE, price=np.e**2.5 - 1, quantity=1)
    assert features_of(item=item)["item_price"] == 2
    found = features_of(user, item, attributes=listed, event=event)
    assert found["item_price"] == pytest.approx(3)
    assert found["item_price_rank"] == 0.75
    assert found["event_price"] == pytest.approx(2.5)
    assert found["event_price_gap"] == pytest.approx(-0.5)
    assert found["price_against_user"] == pytest.approx(1.5)
    assert (found["user_price"], found["user_paid"]) == (1.5, 2.5)
    assert found["event_quantity"] == pytest.approx(np.log(2))
    assert found["action_purchase"] == 1
    assert found["action_review"] == 0


def test_rates() -> None:
    actions = np.zeros(8)
    actions[[VIEW, CLICK, CART, PURCHASE]] = [9, 6, 4, 3]
    found = features_of(row(USER, actions=actions), row(ITEM, actions=actions))
    for side in ("user", "item"):
        assert found[f"{side}_cart_rate"] == pytest.approx(4 / 20)
        assert found[f"{side}_purchase_rate"] == pytest.approx(3 / 24)
        assert found[f"{side}_events"] == pytest.approx(np.log(23))


def test_crosses_with_recent_items() -> None:
    user = recents(
        {"item": 10, "rating": 160, "actions": 1 << REVIEW},
        {"item": 11, "rating": 64, "actions": 1 << REVIEW},
        {"item": 12, "actions": 1 << VIEW},
    )
    attributes = row(ITEM_ATTRIBUTES, category=[1, 2, 0, 0], brand=7, price=10)
    recent = blank(ITEM_ATTRIBUTES, (1, RECENT))
    recent["category"][0, :3] = [[1, 2, 3, 0], [1, 5, 0, 0], [1, 2, 0, 0]]
    recent["brand"][0, :3] = [7, 0, 8]
    recent["price"][0, :3] = [12, np.nan, 30]
    found = features_of(user, attributes=attributes, recent=recent)
    assert [found[f"{name}_count"] for name in ("category", "leaf", "brand", "price_band")] == [
        3,
        2,
        1,
        1,
    ]
    assert found["category_rating"] == pytest.approx((5 + 2 - 2 * 4) / (2 + features.CROSS_DAMPING))
    assert found["leaf_rating"] == pytest.approx(1 / (1 + features.CROSS_DAMPING))
    assert found["user_last_rating"] == 5
    assert found["user_recent_rating"] == 3.5
    user["residual_sum"], user["rating_count"] = -1 - USER_DAMPING, 1  # a star below the mean
    found = features_of(user, attributes=attributes, recent=recent)
    assert found["leaf_rating"] == pytest.approx((5 - 3) / (1 + features.CROSS_DAMPING))
    recent["category"][0, :3] = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 0, 0, 0]]
    for path, alike in (([1, 2, 3, 4], 1), ([1, 2, 3, 0], 2), ([1, 0, 0, 0], 3)):
        leaf = features_of(user, attributes=row(ITEM_ATTRIBUTES, category=path), recent=recent)
        assert (leaf["category_count"], leaf["leaf_count"]) == (3, alike)
    nothing = features_of(user, attributes=row(ITEM_ATTRIBUTES), recent=recent)
    assert [nothing[f"{name}_count"] for name in ("category", "leaf", "brand", "price_band")] == [
        0
    ] * 4


def test_an_item_met_before() -> None:
    user = recents(
        {"item": 11},
        {
            "item": 10,
            "rating": 96,
            "actions": 1 << REVIEW | 1 << CART,
            "second": (NOW - HOUR) // 1000,
        },
    )
    found = features_of(user, event=row(EVENT, time=NOW, item=10))
    assert [found[f"item_{what}"] for what in ("viewed", "carted", "bought", "rated")] == [
        0,
        1,
        0,
        3,
    ]
    assert found["item_seen"] == pytest.approx(np.log(2))
    for action, what in ((VIEW, "viewed"), (CLICK, "viewed"), (PURCHASE, "bought")):
        met = features_of(
            recents({"item": 10, "actions": 1 << action}), event=row(EVENT, time=NOW, item=10)
        )
        assert [name for name in ("viewed", "carted", "bought") if met[f"item_{name}"]] == [what]
    other = features_of(user, event=row(EVENT, time=NOW, item=9))
    assert other["item_carted"] == 0
    assert np.isnan([other["item_rated"], other["item_seen"]]).all()


def test_attributes_of_users() -> None:
    gender = hash_names(["f"])[0]
    found = features_of(person=row(USER_ATTRIBUTES, age=40, gender=gender))
    assert found["user_age"] == pytest.approx(0.4)
    assert [found["gender_0"], found["gender_1"]] == [gender & 1, gender >> 1 & 1]
    assert np.isnan(found["region_0"])


def test_similar_texts() -> None:
    user = recents({"item": 10, "rating": 160}, {"item": 11, "rating": 32}, {"item": 12})
    similarity = np.full((1, RECENT), np.nan, np.float32)
    similarity[0, :4] = [0.5, -0.5, 0.75, 0.25]
    found = features_of(user, text_known=np.array([True]), similarity=similarity)
    assert found["text_known"] == 1
    assert found["text_similarity"] == 0.25
    assert found["text_similarity_highest"] == 0.75
    assert found["text_rating"] == pytest.approx(0.5 / (0.5 + features.CROSS_DAMPING))
    user["residual_sum"], user["rating_count"] = -1 - USER_DAMPING, 1  # a star below the mean
    found = features_of(user, text_known=np.array([True]), similarity=similarity)
    assert found["text_rating"] == pytest.approx((0.5 * 2) / (0.5 + features.CROSS_DAMPING))
    lonely = features_of(
        text_known=np.array([True]), similarity=np.full((1, RECENT), np.nan, np.float32)
    )
    assert lonely["text_known"] == 1
    assert np.isnan([lonely["text_similarity"], lonely["text_rating"]]).all()


def test_stars_of_own_texts() -> None:
    found = features_of(row(USER, text_count=2, text_sum=4))
    assert found["user_text_stars"] == pytest.approx(
        (4 + features.CROSS_DAMPING * 4) / (2 + features.CROSS_DAMPING)
    )
