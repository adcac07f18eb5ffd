"""How events change states, on cases small enough to work out by hand."""

from typing import Any

import numpy as np

from model.events import CART, CODES, EVENT, FORGET, PURCHASE, REVIEW, TEXT, VIEW, Rows, blank
from model.state import (
    ITEM,
    OLDER,
    PARTITION,
    RECENT,
    SESSION_GAP,
    USER,
    Change,
    advance,
    apply_items,
    duplicates,
    item_deltas,
    layout_hash,
    run_partition,
)

START = 1_700_000_000_000
MINUTE = 60_000


def event(number: int, item: int, action: int = VIEW, at: int = 0, **fields: Any) -> Rows:
    row = blank(EVENT, 1)
    row["user"], row["item"], row["event_id"] = 1, item, number
    row["action"], row["time"] = action, START + at * MINUTE
    for name, value in fields.items():
        row[name] = value
    return row


def apply(*events: Rows, mean: float = 4.0, item_bias: float = 0.0) -> tuple[Change, Rows]:
    """What one new user's events change; the user's state after them."""
    rows = np.concatenate(events)
    index = np.zeros(len(rows), np.intp)
    change = advance(
        blank(USER, 1),
        index,
        rows,
        duplicates(blank(USER, 1), index, rows),
        np.full(len(rows), item_bias, np.float32),
        np.full(len(rows), mean, np.float32),
        np.arange(len(rows), dtype=np.uint64),
    )
    return change, change.states[0]


def test_counts_and_sums_of_ratings() -> None:
    _, user = apply(
        event(1, 10, REVIEW, rating=5), event(2, 11, REVIEW, rating=2.5), item_bias=0.25
    )
    assert user["actions"][REVIEW] == 2
    assert user["rating_count"] == 2
    assert user["rating_sum"] == 7.5
    assert user["rating_square_sum"] == 31.25
    assert user["histogram"].tolist() == [0, 0, 1, 0, 1]  # halves round up
    assert user["residual_sum"] == (5 - 4.25) + (2.5 - 4.25)
    assert user["step"] == 2


def test_every_number_of_stars_has_its_place() -> None:
    ratings = (1, 1.25, 1.5, 2, 2.5, 3.5, 4, 4.5, 5)
    events = [event(k, 10 + k, REVIEW, rating=rating) for k, rating in enumerate(ratings, 1)]
    change, user = apply(*events)
    assert user["histogram"].tolist() == [2, 2, 1, 2, 2]
    rows = np.concatenate(events)
    partition = run_partition(blank(PARTITION, ()), rows, change.duplicate)[-1]
    assert partition["histogram"].tolist() == [2, 2, 1, 2, 2]
    (deltas,) = item_deltas(rows, change)
    assert deltas["histogram"].sum(0).tolist() == [2, 2, 1, 2, 2]


def test_each_event_meets_the_state_before_it() -> None:
    change, _ = apply(event(1, 10, REVIEW, rating=5), event(2, 11, at=1), event(3, 12, CART, at=2))
    assert change.met["rating_count"].tolist() == [0, 1, 1]
    assert change.met["actions"][:, VIEW].tolist() == [0, 0, 1]
    assert change.met["last_time"].tolist() == [0, START, START + MINUTE]
    assert change.met["first_second"].tolist() == [0, START // 1000, START // 1000]
    assert change.met["recent"]["item"][:, :2].tolist() == [[0, 0], [10, 0], [11, 10]]


def test_prices_and_payments() -> None:
    nine = round(np.log(10) * 256) / 256
    bought = [event(2, 10, PURCHASE, price=0), event(4, 10, PURCHASE, price=9)]
    _, user = apply(event(1, 10, price=9), *bought, event(3, 11), event(5, 10, PURCHASE))
    assert (user["price_count"], user["price_log_sum"]) == (3, 2 * nine)
    assert (user["paid_count"], user["paid_log_sum"]) == (2, nine)


def test_recent_items_are_distinct_and_newest_first() -> None:
    _, user = apply(event(1, 10, REVIEW, rating=3.5), event(2, 11, at=1), event(3, 10, CART, at=2))
    recent = user["recent"]
    assert recent["item"][:3].tolist() == [10, 11, 0]
    assert recent["rating"][:3].tolist() == [112, 0, 0]  # 3.5 stars in 1/32
    assert recent["actions"][:2].tolist() == [1 << REVIEW | 1 << CART, 1 << VIEW]
    assert recent["second"][:2].tolist() == [START // 1000 + 120, START // 1000 + 60]
    assert recent["event_id"][:4].tolist() == [3, 2, 1, 0]


def test_the_oldest_item_is_forgotten() -> None:
    _, user = apply(*(event(number, 100 + number) for number in range(1, RECENT + 3)))
    assert user["recent"]["item"].tolist() == list(range(118, 102, -1))


def test_ratings_of_forgotten_items_are_kept_for_a_while() -> None:
    high = 7 << 32  # of which the state keeps nothing
    rated = [
        event(number, high | number, REVIEW, rating=1 + number % 5)
        for number in range(1, RECENT + OLDER + 3)
    ]
    _, user = apply(*rated, event(500, 900), event(501, 901))
    assert user["left"] == OLDER + 4
    older = user["older"]
    assert older["item"][:5].tolist() == [OLDER + 1, OLDER + 2, OLDER + 3, OLDER + 4, 5]
    assert older["rating"][4] == 32 * (1 + 5 % 5)
    _, viewer = apply(*(event(number, number) for number in range(1, RECENT + 9)))
    assert (viewer["left"], viewer["older"]["item"].any()) == (0, False)


def test_a_repeated_event_changes_nothing_but_the_step() -> None:
    once, twice = event(1, 10, REVIEW, rating=5), event(1, 10, REVIEW, at=9, rating=1)
    change, user = apply(once, twice, event(2, 11))
    assert change.duplicate.tolist() == [False, True, False]
    expected = apply(once, event(2, 11))[1]
    assert user["step"] == 3
    user["step"] = expected["step"]
    assert user.tobytes() == expected.tobytes()


def test_a_repetition_takes_no_place_among_the_events_remembered() -> None:
    events = [event(number, 10) for number in range(1, RECENT + 1)]
    change, user = apply(*events, event(RECENT, 10), event(1, 10), event(2, 10))
    assert change.duplicate[RECENT:].all()
    assert user["actions"][VIEW] == RECENT
    assert user["recent"]["event_id"].tolist() == list(range(RECENT, 0, -1))
    change, user = apply(*events, event(RECENT + 1, 10), event(2, 10), event(1, 10))
    assert change.duplicate[RECENT:].tolist() == [False, True, False]
    assert user["recent"]["event_id"].tolist() == [1, *range(RECENT + 1, 2, -1)]


def test_an_edited_review_replaces_its_stars() -> None:
    change, user = apply(event(1, 10, REVIEW, rating=5), event(2, 10, REVIEW, at=1, rating=2))
    assert user["actions"][REVIEW] == 1
    assert user["rating_count"] == 1
    assert user["rating_sum"] == 2
    assert user["rating_square_sum"] == 4
    assert user["histogram"].tolist() == [0, 1, 0, 0, 0]
    assert user["residual_sum"] == -2
    assert user["recent"]["rating"][0] == 64
    assert user["last_time"] == START + MINUTE
    assert not change.duplicate.any()


def test_a_later_review_without_stars_keeps_them() -> None:
    _, user = apply(event(1, 10, REVIEW, rating=5), event(2, 10, REVIEW))
    assert user["actions"][REVIEW] == 2
    assert user["rating_sum"] == 5
    assert user["recent"]["rating"][0] == 160


def test_a_text_counts_its_stars_only() -> None:
    review, text = event(1, 10, REVIEW, rating=5), event(99, 10, TEXT, at=50, text_stars=4.5)
    change, user = apply(review, text, text)
    assert change.duplicate.tolist() == [False, False, True]
    assert (user["text_count"], user["text_sum"]) == (1, 4.5)
    assert user["last_time"] == START
    assert user["actions"].sum() == 1
    assert user["recent"]["actions"][0] == 1 << REVIEW
    assert len(item_deltas(text, apply(text)[0])[0]) == 0
    assert apply(event(98, 10, TEXT))[1]["text_count"] == 0  # nobody could read stars off it


def test_a_late_event_never_turns_time_back() -> None:
    _, user = apply(event(1, 10, at=60), event(2, 10, at=0))
    assert user["last_time"] == START + 60 * MINUTE
    assert user["recent"]["second"][0] == START // 1000 + 3600
    assert user["actions"][VIEW] == 2


def test_sessions_open_by_name_or_after_silence() -> None:
    change, user = apply(
        event(1, 10),  # opens: the first
        event(2, 10, at=10),
        event(3, 10, at=41),  # opens: 31 minutes later
        event(4, 10, at=42, session=7),  # opens: a name
        event(5, 11, REVIEW, at=43),  # within session 7
        event(6, 10, at=90, session=7),  # the same, in spite of the silence
        event(7, 10, at=91, session=8),  # opens
        event(8, 10, at=92, session=8),
    )
    assert change.met["sessions"].tolist() == [0, 1, 1, 2, 3, 3, 3, 4]
    assert change.met["session_events"].tolist() == [0, 1, 2, 1, 1, 2, 3, 1]
    assert (user["sessions"], user["session_events"], user["session"]) == (4, 2, 8)
    assert user["session_second"] == (START + 91 * MINUTE) // 1000
    assert change.new_touch.tolist() == [True, False, True, True, True, False, True, False]
    change, _ = apply(event(1, 10, session=7), event(2, 10, session=8))  # within a second
    assert change.new_touch.tolist() == [True, True]


def test_a_session_ends_after_more_than_its_gap() -> None:
    still, over = event(2, 10), event(2, 10)
    still["time"] += SESSION_GAP
    over["time"] += SESSION_GAP + 1
    assert [apply(event(1, 10), each)[1]["sessions"] for each in (still, over)] == [1, 2]


def test_users_without_events_stay_as_they_are() -> None:
    states = blank(USER, 3)
    states["sessions"] = [5, 6, 7]
    nothing = np.zeros(1, np.float32)
    change = advance(
        states,
        np.array([1]),
        event(1, 10),
        np.zeros(1, np.bool_),
        nothing,
        nothing,
        np.array([4], np.uint64),
    )
    assert change.states["sessions"].tolist() == [5, 7, 7]
    assert change.states["step"].tolist() == [0, 5, 0]
    assert states["sessions"].tolist() == [5, 6, 7]


def test_partition_counts_rows_predictions_and_ratings() -> None:
    events = np.concatenate(
        [
            event(1, 10, REVIEW, rating=5),
            event(2, 11),
            event(3, 10, TEXT, text_stars=2),
            event(1, 10, REVIEW, rating=5),
            event(4, 12, REVIEW, rating=3),
        ]
    )
    duplicate = np.array([False, False, False, True, False])
    rows = run_partition(blank(PARTITION, ()), events, duplicate)
    assert rows["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows["seq"].tolist() == [0, 1, 2, 2, 3, 4]
    assert rows["rating_count"].tolist() == [0, 1, 1, 1, 1, 2]
    assert rows["rating_sum"].tolist() == [0, 5, 5, 5, 5, 8]
    assert rows["histogram"][-1].tolist() == [0, 0, 1, 0, 1]


def test_item_deltas_by_item_and_topic() -> None:
    events = (
        event(1, 10, REVIEW, rating=4),
        event(2, 10, at=1, price=9),
        event(3, 9, at=2),
        event(4, 10, REVIEW, at=3, rating=5),
        event(4, 10, REVIEW, at=3, rating=5),
    )
    change, _ = apply(*events)
    (deltas,) = item_deltas(np.concatenate(events), change)
    assert deltas["item"].tolist() == [9, 10, 10]
    assert deltas["source"].tolist() == [1, 0, 1]
    assert deltas["rating_count"].tolist() == [0, 1, 0]
    assert deltas["rating_sum"].tolist() == [0, 5, 0]
    assert deltas["rating_square_sum"].tolist() == [0, 25, 0]
    assert deltas["histogram"].tolist() == [[0] * 5, [0, 0, 0, 0, 1], [0] * 5]
    assert deltas["actions"][:, [REVIEW, VIEW]].tolist() == [[0, 1], [1, 0], [0, 1]]
    assert deltas["price_count"].tolist() == [0, 0, 1]
    assert deltas["sessions"].tolist() == [1, 1, 0]
    assert deltas["first_time"].tolist() == [START + m * MINUTE for m in (2, 0, 1)]
    assert deltas["last_time"].tolist() == [START + m * MINUTE for m in (2, 3, 1)]
    (late,) = item_deltas(np.concatenate(events[::-1]), apply(*events[::-1])[0])
    assert late["first_time"].tolist() == deltas["first_time"].tolist()
    assert late["last_time"].tolist() == deltas["last_time"].tolist()


def test_item_deltas_of_each_partition() -> None:
    """The first of one and the last of the one before may do the same to one item."""
    events = (event(1, 10), event(2, 11, at=1), event(3, 11, at=2), event(4, 10, at=3))
    change, _ = apply(*events)
    parts = item_deltas(np.concatenate(events), change, [0, 2, 3, 3, 4, 4])
    assert [each["item"].tolist() for each in parts] == [[], [10, 11], [11], [], [10], []]
    assert [each["last_time"].tolist() for each in parts[1:3]] == [
        [START, START + MINUTE],
        [START + 2 * MINUTE],
    ]


def test_item_states_apply_each_delta_once() -> None:
    events = (event(1, 10, REVIEW, rating=4), event(2, 10, at=1, price=9), event(3, 9, at=2))
    (deltas,) = item_deltas(np.concatenate(events), apply(*events)[0])
    index, offsets = np.array([0, 1, 1]), np.array([5, 6, 9], np.uint64)
    states = apply_items(blank(ITEM, 2), index, deltas, offsets)
    assert states["offset"].tolist() == [6, 10]
    assert states["rating_count"].tolist() == [0, 1]
    assert states["rating_sum"].tolist() == [0, 4]
    assert states["rating_square_sum"].tolist() == [0, 16]
    assert states["histogram"].tolist() == [[0] * 5, [0, 0, 0, 1, 0]]
    assert states["price_count"].tolist() == [0, 1]
    assert states["price_log_sum"].tolist() == [0, round(np.log(10) * 256) / 256]
    assert states["sessions"].tolist() == [1, 1]
    assert states["actions"][:, VIEW].tolist() == [1, 1]
    assert states["first_time"].tolist() == [START + 2 * MINUTE, START]
    assert states["last_time"].tolist() == [START + 2 * MINUTE, START + MINUTE]
    assert apply_items(states, index, deltas, offsets).tobytes() == states.tobytes()
    later = apply_items(states, index[1:], deltas[1:], np.array([8, 10], np.uint64))
    assert later["rating_sum"].tolist() == [0, 4]
    assert later["actions"][:, VIEW].tolist() == [1, 2]
    earlier = deltas[2:].copy()
    earlier["first_time"] = earlier["last_time"] = START - MINUTE  # of a user whose events are late
    later = apply_items(states, index[2:], earlier, np.array([10], np.uint64))
    assert later["first_time"].tolist() == [START + 2 * MINUTE, START - MINUTE]
    assert later["last_time"].tolist() == states["last_time"].tolist()


def test_layout_hash_follows_the_fields() -> None:
    assert layout_hash([USER]) != layout_hash([ITEM])
    assert len(layout_hash([USER])) == 8


def test_actions_of_the_contract_have_codes() -> None:
    assert [name for name, code in CODES.items() if code == TEXT] == ["text"]
    assert CODES["remove_from_cart"] == 6


def forget() -> Rows:
    row = blank(EVENT, 1)
    row["user"], row["action"] = 1, FORGET
    return row


def test_a_forgotten_user_is_as_one_that_was_never_seen() -> None:
    before = [event(1, 10, REVIEW, rating=5), event(2, 11, CART, price=3.0), event(3, 0, TEXT)]
    change, user = apply(*before, forget())
    assert user.tobytes() == blank(USER, 1).tobytes()  # not even a step: the store keeps no key
    assert change.met[3].tobytes() == blank(USER, 1).tobytes()  # nor does a feature row tell
    # The same events come again: none repeats one, and all is counted from the beginning.
    change, user = apply(*before, forget(), *before)
    assert not change.duplicate.any()
    _, anew = apply(*before)
    anew["step"] = 7
    assert user.tobytes() == anew.tobytes()
    assert change.first.tolist() == [True, False, False, True, True, False, False]


def test_forgetting_counts_as_a_step_and_as_nothing_else() -> None:
    events = np.concatenate([event(1, 10, REVIEW, rating=5), forget()])
    change, _ = apply(event(1, 10, REVIEW, rating=5), forget())
    rows = run_partition(blank(PARTITION, ()), events, change.duplicate)
    assert rows["step"].tolist() == [0, 1, 2]
    assert rows["seq"].tolist() == [0, 1, 1]
    assert rows["rating_sum"].tolist() == [0, 5, 5]
    assert item_deltas(events, change)[0]["item"].tolist() == [10]
