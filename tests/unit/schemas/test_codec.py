import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas import codec
from schemas.codec import (
    Decoded,
    decode,
    encode,
    encode_columns,
    encode_many,
    format_times,
)
from schemas.columns import milliseconds
from schemas.examples import EXAMPLES
from schemas.exceptions import ContractError
from schemas.records import Behavior, Record, Review
from schemas.topics import BY_NAME, TOPICS

REVIEWS = BY_NAME["reviews"]
BEHAVIOR = BY_NAME["behavior"]
ITEMS = BY_NAME["items"]

REVIEW: dict[str, Any] = dict(EXAMPLES["reviews"])
EVENT: dict[str, Any] = dict(EXAMPLES["behavior"])


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def review(**changes: Any) -> bytes:
    return dumps({**REVIEW, **changes})


def without(name: str) -> bytes:
    return dumps({key: value for key, value in REVIEW.items() if key != name})


def only(value: bytes | None) -> Decoded:
    return decode(REVIEWS, [value], [(3, 41)])


# Each bad value, the field that the rejection names, and a word of its reason.
BAD: dict[str, tuple[bytes | None, str | None, str]] = {
    "no bytes": (b"", None, "JSON"),
    "malformed": (b'{"event_id": "e"', None, "JSON"),
    "two values": (b"{} {}", None, "JSON"),
    "utf-16": (REVIEW["text"].encode("utf-16"), None, "JSON"),
    "latin-1": (review(text="caf\u00e9").replace(b"\\u00e9", b"\xe9"), None, "JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + review(), None, "JSON"),
    "lone surrogate": (review().replace(b"u-204", b"\\ud800"), None, "JSON"),
    "not a number": (review(rating=float("nan")), None, "JSON"),
    "too deep": (b"[" * 100_000, None, "JSON"),
    "JSON null": (b"null", None, "object"),
    "an array": (dumps([REVIEW]), None, "object"),
    "a string": (dumps("x"), None, "object"),
    "missing id": (without("event_id"), "event_id", "missing"),
    "missing time": (without("event_time"), "event_time", "missing"),
    "null in a required field": (review(user_id=None), "user_id", "null"),
    "empty id": (review(item_id=""), "item_id", "at least 1"),
    "long id": (review(item_id="i" * 257), "item_id", "at most 256"),
    "id with NUL": (review(user_id="u\0"), "user_id", "pattern"),
    "id of a wrong type": (review(user_id=204), "user_id", "string"),
    "rating of a wrong type": (review(rating="4"), "rating", "number"),
    "rating true": (review(rating=True), "rating", "number"),
    "rating below": (review(rating=0.9), "rating", "greater"),
    "rating above": (review(rating=5.1), "rating", "less"),
    "huge rating": (review(rating=10**40), "rating", "less"),
    "text of 1 MB": (review(text="x" * 1_000_000), "text", "at most"),
    "text of a wrong type": (review(text=["x"]), "text", "string"),
    "time without offset": (review(event_time="2026-11-24T10:15:00"), "event_time", "RFC 3339"),
    "time as a number": (review(event_time=1795515300), "event_time", "RFC 3339"),
    "no such day": (review(event_time="2026-02-30T10:15:00Z"), "event_time", "RFC 3339"),
    "time of 1969": (review(event_time="1969-12-31T23:59:59Z"), "event_time", "1990"),
    "time of 9999": (review(event_time="9999-12-31T23:59:59Z"), "event_time", "2100"),
    "a date": (review(event_time="2026-11-24"), "event_time", "RFC 3339"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_rejected_with_position_field_and_reason(name: str) -> None:
    value, field, word = BAD[name]
    decoded = decode(REVIEWS, [review(), value, review()], [(2, 7), (3, 41), (3, 42)], "eu.reviews")
    assert [record is None for record in decoded.records] == [False, True, False]
    (rejection,) = decoded.rejections
    assert (rejection.index, rejection.topic) == (1, "eu.reviews")
    assert (rejection.partition, rejection.offset, rejection.field) == (3, 41, field)
    assert word in rejection.reason
    message = str(rejection)
    assert message.startswith("eu.reviews partition 3 offset 41: ")
    assert len(message) < 300
    assert message.isascii()


def test_unknown_actions_are_rejected() -> None:
    (rejection,) = decode(BEHAVIOR, [dumps({**EVENT, "action": "stare"})], [(0, 0)]).rejections
    assert rejection.field == "action"
    assert "'view'" in rejection.reason


def test_a_reason_repeats_little_of_the_input() -> None:
    (rejection,) = only(review(text="secret" * 100_000)).rejections
    assert len(rejection.reason) < 200
    assert rejection.reason.count("secret") <= 10


def test_a_nested_field_is_named_by_its_path() -> None:
    request = {**EXAMPLES["score-requests"], "item_ids": ["i-1", ""]}
    (rejection,) = decode(BY_NAME["score-requests"], [dumps(request)], [(0, 0)]).rejections
    assert rejection.field == "item_ids.1"


def test_null_deletes_in_compacted_topics_only() -> None:
    item = dumps(EXAMPLES["items"])
    decoded = decode(ITEMS, [item, None, b"{"], [(0, 0), (0, 1), (0, 2)])
    assert decoded.tombstones == [1]
    assert [rejection.index for rejection in decoded.rejections] == [2]
    assert decoded.records[0] is not None
    assert decoded.records[1] is None


def test_a_null_value_says_something_in_some_topics_alone() -> None:
    assert only(None).tombstones == [0]
    (rejected,) = decode(BY_NAME["score-requests"], [None], [(0, 1)]).rejections
    assert "null value" in rejected.reason


def test_absent_null_and_unknown_fields() -> None:
    plain = only(without("title")).records[0]
    assert plain == only(review(title=None)).records[0]
    assert plain == only(dumps({**json.loads(without("title")), "colour": {"r": 1}})).records[0]


def test_fields_of_a_form_may_be_empty() -> None:
    """Stars are not lost for a title that was left empty."""
    found = only(review(title="", text=""))
    assert not found.rejections
    assert found.records[0] is not None
    assert not decode(ITEMS, [dumps({**EXAMPLES["items"], "description": ""})], [(0, 0)]).rejections


def test_times_are_utc_aware_and_keep_milliseconds() -> None:
    record = only(review(event_time="2026-11-24t12:15:00.123987+02:00")).records[0]
    assert isinstance(record, Review)
    expected = datetime(2026, 11, 24, 10, 15, 0, 123_000, tzinfo=UTC)
    assert codec.time_ms(record.event_time) == expected.timestamp() * 1000
    assert json.loads(encode(record))["event_time"] == "2026-11-24T10:15:00.123Z"


@given(
    st.integers(631_152_000_000, 4_102_444_800_000),
    st.integers(0, 999),
    st.integers(-23 * 60, 23 * 60),
)
@example(2_168_948_239_062, 0, 0)  # 61.99 ms in seconds as floats have them
def test_a_time_is_cut_to_its_millisecond(ms: int, more: int, minutes: int) -> None:
    zone = timezone(timedelta(minutes=minutes))
    time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms, microseconds=more)
    assert codec.time_ms(time.astimezone(zone)) == ms == milliseconds([time])[0]


def test_our_own_code_builds_records_from_datetimes_in_range() -> None:
    aware: Any = datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    assert b"2025-12-31T22:00:00.000Z" in encode(Review(**{**REVIEW, "event_time": aware}))
    naive: Any = datetime(2026, 1, 1)
    early: Any = datetime(1970, 1, 1, tzinfo=UTC)
    for bad in (naive, early):
        with pytest.raises(ValidationError, match="RFC 3339"):
            Review(**{**REVIEW, "event_time": bad})


def test_the_journal_is_not_json() -> None:
    with pytest.raises(ContractError, match="journal"):
        decode(BY_NAME["journal"], [b""], [(0, 0)])


@pytest.mark.parametrize("topic", [topic for topic in TOPICS if topic.record])
def test_every_record_survives_encoding(topic: Any) -> None:
    value = dumps(EXAMPLES[topic.name])
    (record,) = decode(topic, [value], [(0, 0)]).records
    assert record is not None
    assert decode(topic, encode_many([record]), [(0, 0)]).records == [record]
    assert b"null" not in encode(record)


def test_columns_are_encoded_as_rows() -> None:
    times = format_times(np.array([1795515300123, 1795515300000]))
    assert times == ["2026-11-24T10:15:00.123Z", "2026-11-24T10:15:00.000Z"]
    array = np.array([1795515300123, 1795515300000], "M8[ms]")
    written = [b'{"at":"2026-11-24T10:15:00.123Z"}', b'{"at":"2026-11-24T10:15:00Z"}']
    assert encode_columns({"at": array}) == written
    columns = {
        **{name: EVENT[name] for name in ("event_id", "user_id", "item_id")},
        "action": ["view", "view"],
        "event_time": times,
        "price": [2.5, None],
    }
    first, second = decode(BEHAVIOR, encode_columns(columns), [(0, 0), (0, 1)]).records
    assert isinstance(first, Behavior)
    assert isinstance(second, Behavior)
    assert (first.price, second.price) == (2.5, None)
    with pytest.raises(ValueError, match="shorter"):
        encode_columns({"event_id": ["a", "b"], "user_id": ["u"]})


def test_a_quote_and_a_comma_at_the_end_of_an_id() -> None:
    columns = {"user_id": ['a",', "b"], "item_id": ["c\\\\", 'd"']}
    assert [orjson.loads(row) for row in encode_columns(columns)] == [
        {"user_id": 'a",', "item_id": "c\\\\"},
        {"user_id": "b", "item_id": 'd"'},
    ]


awkward = st.text(st.sampled_from('",{}[]%:\\aé1'), max_size=9) | st.just('"},{"id":"')
cells = st.one_of(
    awkward,
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.lists(st.integers(0, 3) | awkward, max_size=3),
    st.dictionaries(awkward, awkward, max_size=2),
)


@given(st.data(), st.integers(0, 4))
def test_cells_are_encoded_as_each_alone(data: st.DataObject, size: int) -> None:
    """Columns of one kind of cell and of many, with all that a cut could mistake."""
    kinds = [awkward, st.integers(-9, 9), st.floats(), cells]
    columns = {
        str(at): data.draw(st.lists(kind, min_size=size, max_size=size))
        for at, kind in enumerate(kinds)
    }
    constant, name = data.draw(awkward), data.draw(awkward)
    numbers = np.arange(6 * size).reshape(size, 6) / 4
    rows = encode_columns(
        {
            **columns,
            name: constant,
            "inner": {"constant": constant, "number": numbers[:, 1]},
            "numbers": numbers[:, ::2],
            "written": [b"[1]"] * size,
        }
    )
    for at, row in enumerate(rows):
        alone = {key: column[at] for key, column in columns.items()} | {
            name: constant,
            "inner": {"constant": constant, "number": numbers[at, 1].item()},
            "numbers": numbers[at, ::2].tolist(),
            "written": [1],
        }
        assert row == orjson.dumps(alone)
    assert len(rows) == size


ids = st.text(st.characters(codec="utf-8"), max_size=6)
values = st.one_of(
    st.builds(
        review,
        user_id=ids,
        rating=st.one_of(st.none(), st.floats(-1, 8), st.integers(), st.text(max_size=3)),
        text=st.one_of(st.none(), st.text(max_size=20)),
        event_time=st.one_of(
            st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat), st.text(max_size=25)
        ),
    ),
    st.sampled_from([value for value, _, _ in BAD.values()]),
    st.binary(max_size=12),
)


@given(st.lists(values, max_size=12), st.sampled_from([REVIEWS, ITEMS, BEHAVIOR]))
def test_a_batch_decodes_as_its_values_alone(batch: list[bytes | None], topic: Any) -> None:
    positions = [(index % 3, 100 + index) for index in range(len(batch))]
    together = decode(topic, batch, positions)
    records: list[Record | None] = []
    rejections: list[str] = []
    tombstones: list[int] = []
    for index, value in enumerate(batch):
        alone = decode(topic, [value], [positions[index]])
        records += alone.records
        rejections += map(str, alone.rejections)
        tombstones += [index for _ in alone.tombstones]
    assert together.records == records
    assert [str(rejection) for rejection in together.rejections] == rejections
    assert together.tombstones == tombstones
    # Every value is a record, a rejection or a tombstone, and only one of these.
    gone = {rejection.index for rejection in together.rejections} | set(tombstones)
    assert [record is None for record in records] == [at in gone for at in range(len(batch))]


@given(st.lists(values, max_size=8))
def test_what_was_decoded_can_be_encoded(batch: list[bytes | None]) -> None:
    decoded = decode(REVIEWS, batch, [(0, index) for index in range(len(batch))])
    good = [record for record in decoded.records if record is not None]
    again = decode(REVIEWS, encode_many(good), [(0, index) for index in range(len(good))])
    assert not again.rejections
    # Only what lies below milliseconds is lost.
    assert encode_many([record for record in again.records if record]) == encode_many(good)
