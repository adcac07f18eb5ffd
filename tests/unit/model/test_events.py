"""Records become rows; times and absent values are kept."""

from datetime import UTC, datetime
from typing import Any

import numpy as np

from model.events import (
    CART,
    EVENT,
    FORGET,
    REVIEW,
    TEXT,
    blank,
    duplicated,
    forget_rows,
    from_behavior,
    from_request,
    from_reviews,
    from_text_features,
    joined,
    opaque,
)
from model.ids import hash_ids
from model.state import ITEM_ATTRIBUTES, USER
from schemas.records import Behavior, Review, TextFeatures

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
IDS: dict[str, Any] = {"event_id": "e1", "user_id": "u1", "item_id": "i1", "event_time": NOON}


def test_reviews_become_rows() -> None:
    rows = from_reviews([Review(**IDS, rating=4.5, text="fine"), Review(**IDS)])
    assert rows.dtype == EVENT
    assert rows["action"].tolist() == [REVIEW, REVIEW]
    assert rows["rating"][0] == 4.5
    assert np.isnan(rows["rating"][1])
    assert rows["time"].tolist() == [1_714_564_800_000] * 2
    assert [rows[name][0] for name in ("user", "item", "event_id")] == hash_ids(
        ["u1", "i1", "e1"]
    ).tolist()


def test_behavior_becomes_rows() -> None:
    rows = from_behavior(
        [
            Behavior(**IDS, action="cart", price=2.5, quantity=3, session_id="s"),
            Behavior(**IDS, action="view"),
        ]
    )
    assert rows["action"][0] == CART
    assert rows["price"][0] == 2.5
    assert rows["quantity"][0] == 3
    assert rows["session"].tolist() == [int(hash_ids(["s"])[0]), 0]
    assert np.isnan(rows["price"][1])
    assert np.isnan(rows["rating"]).all()


def test_a_text_is_no_repetition_of_its_review() -> None:
    text = TextFeatures(**IDS, distribution=[0, 0, 0.5, 0.5, 0], encoder="e")
    rows = np.concatenate([from_text_features([text]), from_reviews([Review(**IDS)])])
    assert rows["action"].tolist() == [TEXT, REVIEW]
    assert rows["text_stars"][0] == 3.5
    assert rows["event_id"][0] != rows["event_id"][1]
    assert rows["item"][0] == rows["item"][1]


def test_no_records_give_no_rows() -> None:
    assert [len(make([])) for make in (from_reviews, from_behavior, from_text_features)] == [0] * 3


def test_users_are_forgotten_by_rows_that_name_them_alone() -> None:
    rows = forget_rows(["u1", "u2"])
    assert rows["user"].tolist() == hash_ids(["u1", "u2"]).tolist()
    assert rows["action"].tolist() == [FORGET] * 2
    assert not any(rows[name].any() for name in ("item", "event_id", "time"))


def test_parts_are_joined_in_their_order() -> None:
    users, items = np.array([7, 7, 8], np.uint64), np.array([1, 2, 3], np.uint64)
    rows = from_request(users, items, np.full(3, 99))
    for cuts in ([], [1], [0, 2], [3]):
        whole = joined(np.split(rows, cuts))
        assert whole.dtype == EVENT
        assert whole.tobytes() == rows.tobytes()
    assert joined([np.array([1, 2]), np.array([3])]).tolist() == [1, 2, 3]


def test_a_request_asks_for_each_item() -> None:
    users, items = np.array([7, 8], np.uint64), np.array([1, 2], np.uint64)
    rows = from_request(users, items, np.array([99, 98]))
    assert rows["user"].tolist() == [7, 8]
    assert rows["item"].tolist() == [1, 2]
    assert rows["time"].tolist() == [99, 98]
    assert np.isnan(rows["rating"]).all()


def test_blank_rows_know_nothing() -> None:
    rows = blank(ITEM_ATTRIBUTES, 2)
    assert np.isnan(rows["price"]).all()
    assert np.isnan(rows["price_rank"]).all()
    assert not rows["version"].any()
    assert not any(blank(USER, 1).tobytes())


def test_a_copy_is_apart() -> None:
    rows = blank(EVENT, 2)
    copy = duplicated(rows)
    copy["item"] = 3
    assert rows["item"].tolist() == [0, 0]
    opaque(rows)[[1]] = opaque(copy)[[0]]
    assert rows["item"].tolist() == [0, 3]
