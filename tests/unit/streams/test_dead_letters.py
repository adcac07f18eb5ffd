import base64
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import encode
from schemas.records import DeadLetter
from streams.dead_letters import (
    ATTEMPTS_HEADER,
    BUNCH_LETTERS,
    FIRST_FAILED_HEADER,
    HEADER_PREFIX,
    REDRIVEN_HEADER,
    Letter,
    _bunches,
    dead_letter,
    redriven,
)
from streams.producer import Outgoing
from tests.unit.streams.messages import message

contents = st.none() | st.binary(max_size=50)
headers = st.lists(st.tuples(st.text(max_size=10), contents), max_size=4)


def letter_of(letter_message: Message, **changes: Any) -> DeadLetter:
    fields = {"topic": "reviews", "processor": "scorer", "reason": "not JSON", **changes}
    output = dead_letter(letter_message, **fields)
    assert (output.topic, output.key) == ("dead-letters", fields["topic"].encode())
    found = DeadLetter.model_validate_json(output.value or b"")
    assert output.value == encode(found)
    return found


def again(outgoing: Outgoing) -> Message:
    """A redriven record as the processor gets it."""
    return message(
        outgoing.topic,
        outgoing.value,
        1,
        99,
        key=outgoing.key,
        headers=list(outgoing.headers),
    )


def test_a_letter_says_what_failed_where_and_why() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    found = letter_of(message("reviews", b"{", 3, 17, key=b"u"), field="rating")
    assert (found.source.topic, found.source.partition, found.source.offset) == ("reviews", 3, 17)
    assert (found.processor, found.reason, found.field) == ("scorer", "not JSON", "rating")
    assert base64.b64decode(found.value or "") == b"{"
    assert base64.b64decode(found.key or "") == b"u"
    assert (found.headers, found.attempts) == ([], 1)
    assert before <= found.first_failed_at <= datetime.now(UTC)


@given(key=contents, value=contents, headers=headers)
def test_a_record_comes_back_as_it_was(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> None:
    found = letter_of(message("reviews", value, key=key, headers=headers))
    sent = redriven(Letter(0, 5, found))
    assert (sent.topic, sent.key, sent.value) == ("reviews", key, value)
    kept = [each for each in headers if not each[0].startswith(HEADER_PREFIX)]
    assert [each for each in sent.headers if not each[0].startswith(HEADER_PREFIX)] == kept


def test_a_record_that_fails_again_keeps_its_history() -> None:
    first = letter_of(message("reviews", b"{", headers=[("trace", b"1")]))
    found = first
    for attempt in range(2, 5):
        sent = redriven(Letter(0, attempt, found))
        assert dict(sent.headers)[REDRIVEN_HEADER] == f"0/{attempt}".encode()
        found = letter_of(again(sent), reason=f"attempt {attempt}")
        assert (found.attempts, found.reason) == (attempt, f"attempt {attempt}")
        assert found.first_failed_at == first.first_failed_at
        assert sum(header.key == ATTEMPTS_HEADER for header in found.headers) == 1
        assert [header.key for header in found.headers].count("trace") == 1


@pytest.mark.parametrize(
    ("attempts", "first"),
    [
        (b"many", b"yesterday"),
        (b"-3", b"2026-01-01T00:00:00"),  # without an offset
        (b"\xff", b"\xff"),
        (None, None),
        (b"", b""),
        ("²".encode(), b"0"),
        (b"99999999999999999999", b"1970-01-01T00:00:00Z"),
        (b"9" * 5_000, b"0001-01-01T00:00:00+23:00"),
        (b"1000000000", b"9999-12-31T23:59:59-23:00"),
    ],
)
def test_headers_that_make_no_sense_begin_a_new_history(
    attempts: bytes | None, first: bytes | None
) -> None:
    odd = [(ATTEMPTS_HEADER, attempts), (FIRST_FAILED_HEADER, first)]
    before = datetime.now(UTC).replace(microsecond=0)
    found = letter_of(message("reviews", b"{", headers=odd))
    assert found.attempts == 1
    assert found.first_failed_at >= before


def test_a_null_value_is_not_an_empty_one() -> None:
    null = letter_of(message("reviews", None, key=None))
    assert (null.value, null.key) == (None, None)
    empty = letter_of(message("reviews", b"", key=b""))
    assert (empty.value, empty.key) == ("", "")


def test_bunches_are_bounded_by_letters_and_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (letter_of(message("reviews", b"x" * size)) for size in (30, 3_000))
    letters = [Letter(0, at, small) for at in range(BUNCH_LETTERS + 1)]
    assert [len(bunch) for bunch in _bunches(letters)] == [BUNCH_LETTERS, 1]
    monkeypatch.setattr("streams.dead_letters.BUNCH_CHARACTERS", 8_000)
    letters = [Letter(0, at, large) for at in range(5)]
    assert [[each.offset for each in bunch] for bunch in _bunches(letters)] == [[0, 1], [2, 3], [4]]
    assert list(_bunches([])) == []
