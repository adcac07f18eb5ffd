import base64
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from schemas.codec import encode
from schemas.records import DeadLetter
from schemas.topics import LARGEST_MESSAGE
from streams import dead_letters
from streams.config import KafkaConfig
from streams.dead_letters import (
    ATTEMPTS_HEADER,
    FIRST_FAILED_HEADER,
    HEADER_PREFIX,
    LARGEST_LETTER,
    LEFT_OUT_HEADER,
    REDRIVEN_HEADER,
    Letter,
    dead_letter,
    read_letters,
    redriven,
)
from streams.exceptions import LetterError
from streams.producer import Outgoing
from streams.redrive import OVERHEAD_BYTES
from tests.unit.streams.messages import letter_of, message

contents = st.none() | st.binary(max_size=50)
headers = st.lists(st.tuples(st.text(max_size=10), contents), max_size=4)


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
    told = [("trace", b"1"), (FIRST_FAILED_HEADER, b"2026-01-01T00:00:00Z")]
    first = letter_of(message("reviews", b"{", headers=told))
    assert first.first_failed_at == datetime(2026, 1, 1, tzinfo=UTC)
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


LARGE = bytes(LARGEST_MESSAGE * 3 // 4)


@pytest.mark.parametrize(
    ("left_out", "changes"),
    [
        ("value", {"value": LARGE}),
        ("key", {"key": LARGE}),
        ("headers", {"headers": [("trace", b"1"), ("blob", LARGE)]}),
        ("key, value, headers", {"key": LARGE, "value": LARGE, "headers": [("blob", LARGE)]}),
    ],
)
def test_a_letter_leaves_out_what_is_too_large_for_it(
    left_out: str, changes: dict[str, Any]
) -> None:
    record: dict[str, Any] = {"value": b"{", "key": b"u", "headers": [("trace", b"1")]}
    found = letter_of(message("reviews", partition=3, offset=17, **record | changes))
    assert Letter(0, 5, found).left_out == left_out
    assert found.reason == f"not JSON ({left_out} left out: too large for a dead letter)"
    assert (found.source.topic, found.source.partition, found.source.offset) == ("reviews", 3, 17)
    assert (found.value is None, found.key is None) == ("value" in left_out, "key" in left_out)
    assert len(found.headers) == (1 if "headers" in left_out else 2)


def test_a_reason_that_is_too_large_is_cut() -> None:
    found = letter_of(message("reviews", b"{"), reason="\x01" * LARGEST_MESSAGE)
    assert (Letter(0, 5, found).left_out, found.value) == ("", base64.b64encode(b"{").decode())


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_largest_letters_have_room_in_a_message(parts: int) -> None:
    most = bytes((LARGEST_LETTER // parts - 800) // 4 * 3)  # in base64 they fill a letter
    record: dict[str, Any] = {"value": most, "key": b"", "headers": []}
    record |= {"key": most} if parts > 1 else {}
    record |= {"headers": [("a", most)]} if parts > 2 else {}
    output = dead_letter(message("reviews", **record), "reviews", "scorer", "\x01" * 1_000)
    # lz4 adds a 255th to what it cannot compress.
    assert len(output.value or b"") * 256 / 255 + OVERHEAD_BYTES < LARGEST_MESSAGE


def test_a_letter_that_left_something_out_is_not_sent_again() -> None:
    found = letter_of(message("reviews", bytes(LARGEST_MESSAGE), 3, 17))
    with pytest.raises(LetterError, match=r"0/5 .*value .*reviews partition 3 offset 17"):
        redriven(Letter(0, 5, found))


def test_a_header_from_outside_leaves_nothing_out() -> None:
    record = message("reviews", b"{", headers=[(LEFT_OUT_HEADER, b"value")])
    letter = Letter(0, 5, letter_of(record))
    assert letter.left_out == ""
    assert redriven(letter).value == b"{"


@pytest.mark.parametrize("part", ["key", "value", "headers"])
def test_a_letter_of_another_writer_that_is_not_base64_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    good = letter_of(message("reviews", b"{"))
    text: Any = [{"key": "trace", "value": "plain"}] if part == "headers" else "plain"
    foreign = DeadLetter.model_validate({**good.model_dump(), part: text})
    sent = [message("dead-letters", encode(each), 0, at) for at, each in enumerate([foreign, good])]
    monkeypatch.setattr(dead_letters, "read_topic", lambda *_: [sent])
    with capture_logs() as logs:
        assert [each.position for each in read_letters(KafkaConfig())] == ["0/1"]
    assert [each["reason"] for each in logs] == ["0/0 has a part that is not base64"]
