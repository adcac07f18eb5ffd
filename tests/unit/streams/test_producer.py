from datetime import UTC, datetime

import orjson
import pytest

from schemas.records import User
from streams.producer import Outgoing, _pace, outgoing


def record(time: object) -> Outgoing:
    return Outgoing("reviews", b"u", orjson.dumps({"event_time": time}))


def test_records_carry_their_topics_keys() -> None:
    (made,) = outgoing([("users", User(user_id="ü", event_time=datetime(2026, 1, 1, tzinfo=UTC)))])
    assert made.key == "ü".encode()
    assert made.topic == "users"
    assert orjson.loads(made.value or b"") == {
        "user_id": "ü",
        "event_time": "2026-01-01T00:00:00.000Z",
    }


def test_as_fast_as_possible_nothing_waits() -> None:
    due = _pace(None, None)
    assert [due(index, record("x")) for index in range(3)] == [0, 0, 0]


def test_a_rate_spaces_records_evenly() -> None:
    due = _pace(4, None)
    assert [due(index, record("x")) for index in range(3)] == [0, 0.25, 0.5]


def test_speed_follows_the_records_own_times() -> None:
    due = _pace(None, 10)
    times = ["2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z", "2026-01-01T01:01:00+01:00"]
    assert [due(index, record(time)) for index, time in enumerate(times)] == [0, 6, 6]


@pytest.mark.parametrize("time", [None, "yesterday", 3])
def test_speed_goes_on_after_a_record_without_a_time(time: object) -> None:
    due = _pace(None, 1)
    assert due(0, record("2026-01-01T00:00:00Z")) == 0
    assert due(1, record("2026-01-01T00:00:05Z")) == 5
    assert due(2, record(time)) == 5
    assert due(3, Outgoing("reviews", b"u", b"\xff")) == 5
    assert due(4, Outgoing("items", b"u", None)) == 5
    assert due(5, record("2026-01-01T00:00:03Z")) == 5
    assert due(6, record("2026-01-01T00:00:06Z")) == 6
