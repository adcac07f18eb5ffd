from datetime import UTC, datetime

from schemas.records import DeadLetter, Item, Review
from streams.inputs import Inputs, split
from tests.unit.streams.messages import NOW_MS, PREFIX, message

TIME = datetime(2026, 11, 1, tzinfo=UTC)


def review(number: int) -> Review:
    return Review(event_id=f"r{number}", user_id="ann", item_id="cup", event_time=TIME, rating=4)


def test_records_come_by_topic_in_the_order_of_the_poll() -> None:
    item = Item(item_id="cup", event_time=TIME, title="Cup")
    polled = [
        message("reviews", review(0), 1, 5),
        message("items", item, 2, 9),
        message("reviews", review(1), 0, 3, timestamp=(2, NOW_MS + 1)),
    ]
    inputs, letters = split(polled, PREFIX, "scorer")
    assert not letters
    assert {topic: each.records for topic, each in inputs.items()} == {
        "reviews": [review(0), review(1)],
        "items": [item],
    }
    reviews = inputs["reviews"]
    assert reviews.messages == [polled[0], polled[2]]
    assert reviews.partitions().tolist() == [1, 0]
    assert reviews.offsets().tolist() == [5, 3]
    assert reviews.timestamps().tolist() == [NOW_MS, NOW_MS + 1]


def test_what_breaks_the_contract_is_a_dead_letter_and_the_rest_stays() -> None:
    bad = review(1).model_dump_json().replace("4.0", "7").encode()
    polled = [
        message("reviews", review(0), 0, 1),
        message("reviews", bad, 0, 2),
        message("reviews", None, 0, 3),
        message("reviews", review(2), 0, 4),
    ]
    inputs, letters = split(polled, PREFIX, "scorer")
    assert inputs["reviews"].records == [review(0), review(2)]
    assert inputs["reviews"].offsets().tolist() == [1, 4]
    found = [DeadLetter.model_validate_json(each.value or b"") for each in letters]
    assert [(each.source.topic, each.source.offset, each.field) for each in found] == [
        ("reviews", 2, "rating"),
        ("reviews", 3, None),
    ]
    assert all(each.processor == "scorer" for each in found)


def test_a_tombstone_stays_with_its_message() -> None:
    inputs, letters = split([message("items", None, 0, 4, key=b"cup")], PREFIX, "catalog")
    assert not letters
    assert inputs["items"].records == [None]
    assert inputs["items"].messages[0].key() == b"cup"


def test_rows_are_dropped_from_all_columns() -> None:
    polled = [message("reviews", review(at), 0, at) for at in range(4)]
    inputs = Inputs("reviews", polled, [review(at) for at in range(4)])
    inputs.drop([0, 2])
    assert inputs.records == [review(1), review(3)]
    assert inputs.offsets().tolist() == [1, 3]
