import base64
from datetime import UTC, datetime

import pytest

from schemas.records import DeadLetter, Item, Review
from streams.inputs import split, split_columns, user_of
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
        message("reviews", None, 0, 3, key=b""),
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
    assert "the key is no user's id" in found[1].reason
    assert all(each.processor == "scorer" for each in found)


@pytest.mark.parametrize("depth", [250, 1_000, 10_000, 100_000])
@pytest.mark.parametrize(("begin", "end"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_no_depth_of_a_value_ends_more_than_its_record(
    depth: int, begin: bytes, end: bytes
) -> None:
    good, deep = review(0).model_dump_json().encode(), begin * depth + b"0" + end * depth
    known = good.replace(b'"ann"', deep)
    polled = [message("reviews", each, 0, at) for at, each in enumerate((deep, known, good))]
    for take in (split, split_columns):
        inputs, letters = take(polled, PREFIX, "scorer")
        assert inputs["reviews"].offsets().tolist() == [2]
        found = [DeadLetter.model_validate_json(each.value or b"") for each in letters]
        assert [base64.b64decode(each.value or "") for each in found] == [deep, known]
        # An unknown field is left out, as far down as it can be read.
        odd = [message("reviews", good[:-1] + b',"odd":' + deep + b"}")]
        _, letters = take(odd, PREFIX, "scorer")
        assert len(letters) == (depth > 1_000)


def test_a_tombstone_stays_with_its_message() -> None:
    inputs, letters = split([message("items", None, 0, 4, key=b"cup")], PREFIX, "catalog")
    assert not letters
    assert inputs["items"].records == [None]
    assert inputs["items"].messages[0].key() == b"cup"


def test_columns_hold_what_records_do() -> None:
    bad = review(1).model_dump_json().replace("4.0", "7").encode()
    polled = [message("reviews", review(0), 0, 1), message("reviews", review(2), 1, 4)]
    for batch in (polled, [polled[0], message("reviews", bad, 0, 2), polled[1]]):
        columns, letters = split_columns(batch, PREFIX, "scorer")
        inputs, wanted = split(batch, PREFIX, "scorer")
        assert [each.key for each in letters] == [each.key for each in wanted]
        assert len(letters) == len(batch) - 2
        found = columns["reviews"]
        assert found.messages == inputs["reviews"].messages == polled
        assert found.records["event_id"] == ["r0", "r2"]
        assert found.records["rating"].tolist() == [4, 4]
        assert found.partitions().tolist() == [0, 1]


def test_what_erases_a_user_stands_beside_the_columns() -> None:
    polled = [
        message("reviews", review(0), 0, 1),
        message("reviews", None, 0, 2, key=b"ann"),
        message("reviews", None, 0, 3, key=b"\xff"),
        message("reviews", review(2), 0, 4),
    ]
    columns, letters = split_columns(polled, PREFIX, "scorer")
    assert columns["reviews"].messages == [polled[0], polled[3]]
    assert columns["reviews"].records["event_id"] == ["r0", "r2"]
    assert columns["reviews"].tombstones == [polled[1]]
    (letter,) = letters
    assert DeadLetter.model_validate_json(letter.value or b"").source.offset == 3
    inputs, _ = split(polled, PREFIX, "texts")
    assert inputs["reviews"].records == [review(0), None, review(2)]


def test_a_key_names_a_user_or_nobody() -> None:
    assert user_of("ann") == user_of(b"ann") == "ann"
    for key in (None, b"", "", b"\xff", b"a\0", "x" * 257):
        assert user_of(key) is None
