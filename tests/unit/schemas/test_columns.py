"""Columns hold what the contract takes, and nothing else."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from schemas.codec import decode
from schemas.columns import Columns, columns_of, decode_columns, milliseconds
from schemas.examples import EXAMPLES
from schemas.records import PredictedRating, Record
from schemas.topics import BY_NAME
from tests.faults.spoiling import WRONG

TOPICS = ("reviews", "behavior", "text-features")
EXAMPLE: dict[str, dict[str, Any]] = {topic: dict(EXAMPLES[topic]) for topic in TOPICS}


def record_of(topic: str) -> type[Record]:
    record = BY_NAME[topic].record
    assert record is not None
    return record


def value(topic: str, **changes: Any) -> bytes:
    return orjson.dumps({**EXAMPLE[topic], **changes})


def same(left: Columns, right: Columns) -> None:
    assert left.keys() == right.keys()
    for name, column in left.items():
        if isinstance(column, np.ndarray):
            assert column.dtype == right[name].dtype
            np.testing.assert_array_equal(column, right[name])
        else:
            assert column == right[name]


def check(topic: str, values: list[bytes]) -> bool:
    """What columns are made of is what the contract takes; whether they were made."""
    columns = decode_columns(record_of(topic), values)
    if columns is None:
        return False
    decoded = decode(BY_NAME[topic], values, [(0, 0)] * len(values))
    assert not decoded.rejections
    same(columns, columns_of(record_of(topic), [each for each in decoded.records if each]))
    return True


@pytest.mark.parametrize("topic", TOPICS)
def test_no_values_are_no_rows(topic: str) -> None:
    assert check(topic, [])


def test_columns_by_hand() -> None:
    values = [
        value("behavior", event_time="2026-11-24T10:15:00.9999Z", price=3, quantity=None),
        value("behavior", event_time="2026-11-24T11:15:00+01:00", session_id=None, action="cart"),
    ]
    columns = decode_columns(record_of("behavior"), values)
    assert columns is not None
    start = int(datetime(2026, 11, 24, 10, 15, tzinfo=UTC).timestamp() * 1_000)
    assert columns["event_time"].tolist() == [start + 999, start]
    assert columns["price"].tolist() == [3.0, EXAMPLE["behavior"]["price"]]
    assert np.isnan(columns["quantity"]).tolist() == [True, False]
    assert columns["session_id"] == [EXAMPLE["behavior"]["session_id"], None]
    assert columns["action"][1] == "cart"
    assert check("behavior", values)


@pytest.mark.parametrize("share", [-1e-9, 1.5, 1e308])
def test_a_share_beyond_its_limits_is_refused(share: float) -> None:
    """A user's state would be infinite from then on."""
    shares = [0.2, share, 0.2, 0.2, 0.2]
    refused = value("text-features", distribution=shares)
    assert not check("text-features", [refused])
    assert decode(BY_NAME["text-features"], [refused], [(0, 0)]).rejections
    assert check("text-features", [value("text-features", distribution=[0, 0.0, 0, 0, 1])])


names = st.text(min_size=1, max_size=20)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


times = st.datetimes(
    datetime(1989, 12, 30), datetime(2100, 1, 2), timezones=st.just(UTC)
) | st.datetimes(
    datetime(1989, 12, 30),
    datetime(2100, 1, 2),
    timezones=st.builds(lambda m: timezone(timedelta(minutes=m)), st.integers(-1439, 1439)),
)
written = times.map(lambda time: time.isoformat()) | times.map(
    lambda time: time.isoformat(timespec="seconds").replace("+00:00", "Z")
)
numbers = st.floats(-1, 6) | st.integers(-1, 6) | st.floats(0, 2e9)
FIELDS: dict[str, dict[str, Any]] = {
    "reviews": {"rating": maybe(numbers), "title": maybe(names), "text": maybe(names)},
    "behavior": {
        "action": st.sampled_from(["view", "click", "cart", "purchase", "stare"]),
        "price": maybe(numbers),
        "quantity": maybe(numbers),
        "session_id": maybe(names),
    },
    "text-features": {
        "distribution": st.lists(
            st.floats(0, 1) | st.sampled_from([-0.1, 1.1, 1e308, 1]), min_size=4, max_size=6
        ),
        "encoder": st.text(max_size=5),
    },
}
SHARED = {"event_id": names, "user_id": names, "item_id": names, "event_time": written}


@given(st.data(), st.sampled_from(TOPICS))
def test_what_records_may_hold(data: st.DataObject, topic: str) -> None:
    rows = st.fixed_dictionaries({**SHARED, **FIELDS[topic]})
    values = [orjson.dumps(row) for row in data.draw(st.lists(rows, max_size=4))]
    made = check(topic, values)
    assert made or decode(BY_NAME[topic], values, [(0, 0)] * len(values)).rejections


@given(st.data(), st.sampled_from(TOPICS))
def test_wrong_fields(data: st.DataObject, topic: str) -> None:
    row: dict[str, Any] = dict(EXAMPLE[topic])
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([*row, "unknown"]))
        row[name] = data.draw(st.sampled_from([each for each in WRONG if _plain(each)]))
    check(topic, [value(topic), orjson.dumps(row)])


def _plain(each: Any) -> bool:
    try:
        orjson.dumps(each)
    except orjson.JSONEncodeError:
        return False
    return True


@given(st.data(), st.sampled_from(TOPICS))
def test_bytes_that_were_changed(data: st.DataObject, topic: str) -> None:
    good = bytearray(value(topic))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good)))
        other = data.draw(st.sampled_from(ODD) | st.binary(max_size=2))
        good[at : at + data.draw(st.integers(0, 2))] = other
    check(topic, [bytes(good), value(topic)])


ODD = [
    *(b'"', b"\\", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"\x00", b"\n", b"\t", b"\x80"),
    *(b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"0", b"00", b"-", b"+", b".", b"e9", b"e999", b"1"),
    *(b"NaN", b"Infinity", b"{}", b"}", b"{", b"[", b"]", b",", b":", b" ", b"null", b"true"),
    *("é".encode(), "🎸".encode(), b"/", b"T", b"Z", b"z", b"+00:00", b"\\/", b"\\x", b"\\u12"),
]

ZONED = ("Z", "z", "+00:00", "-00:00", "+23:59", "-23:59", "+24:00", "+00:60", "+0000", "+00", "")
CLOCKS = ("T10:15:00", "t10:15:00", " 10:15:00", "T24:00:00", "T10:15:60", "T10:60:00", "T10:15")
PARTS = ("", ".1", ".123456789", ".1234567890", ".", ",5")
DAYS = (
    "2026-11-24",
    "2026-02-29",
    "2024-02-29",
    "1989-12-31",
    "2026-W48-2",
    "20261124",
    "２026-11-24",
)


@pytest.mark.parametrize("day", DAYS)
def test_times_are_those_of_the_contract(day: str) -> None:
    for clock in CLOCKS:
        for part in PARTS:
            for zone in ZONED:
                check("reviews", [value("reviews", event_time=day + clock + part + zone)])


@pytest.mark.parametrize(
    ("time", "fine"),
    [
        ("1990-01-01T00:00:00Z", True),
        ("1989-12-31T23:59:59.999999Z", False),
        ("1990-01-01T00:59:59+01:00", False),
        ("2100-01-01T00:00:00.0000009Z", True),
        ("2100-01-01T00:00:00.000001Z", False),
        ("2026-11-24T10:15:00Z\n", False),
        ("2026-11-24T10:15:00Z\n2026-11-24T10:15:00Z", False),
    ],
)
def test_times_have_ends(time: str, fine: bool) -> None:
    assert check("reviews", [value("reviews", event_time=time)]) is fine


@pytest.mark.parametrize(
    "odd",
    [
        value("reviews", unknown=1),
        value("reviews", user_id="a\0"),
        value("reviews").replace(b'"rating":', b'"rating":true,"rating":'),
        value("reviews") + b"{}",
        b"\xef\xbb\xbf" + value("reviews"),
        b"[" * 100_000,
        b"null",
        b"",
        None,
    ],
)
def test_pydantic_has_the_rare_ones(odd: bytes | None) -> None:
    assert decode_columns(record_of("reviews"), [value("reviews"), odd]) is None


def test_a_field_of_another_kind_is_no_column() -> None:
    with pytest.raises(TypeError, match="no column"):
        columns_of(PredictedRating, [])


def test_a_limit_that_nobody_would_check_is_no_column() -> None:
    class Even(Record):
        name: str
        number: Annotated[float, Field(multiple_of=2)]

    with pytest.raises(TypeError, match="limits"):
        columns_of(Even, [])


def test_times_of_several_zones() -> None:
    here = timezone(timedelta(hours=2))
    found = milliseconds([datetime(2026, 1, 1, 2, tzinfo=here), datetime(2026, 1, 1, tzinfo=UTC)])
    assert found[0] == found[1]


def test_times_of_a_zone_with_summers() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    hours = [datetime(2026, month, 1, 12, tzinfo=berlin) for month in (1, 7)]
    assert milliseconds(hours).tolist() == [
        int(datetime(2026, month, 1, hour, tzinfo=UTC).timestamp()) * 1_000
        for month, hour in ((1, 11), (7, 10))
    ]


@given(st.integers(631_152_000_000, 4_102_444_800_000), st.integers(0, 999), st.integers(-720, 720))
def test_times_are_exact_to_the_millisecond(time: int, micro: int, offset: int) -> None:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time, microseconds=micro)
    elsewhere = moment.astimezone(timezone(timedelta(minutes=offset)))
    assert milliseconds([elsewhere]).tolist() == [time]
