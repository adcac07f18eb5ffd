"""Dead letters: what could not be used, with all that is needed to send it again.

`redrive` sends a letter's record to the topic that it came from, with its key and headers. A
header counts the attempts, so a record that fails again returns with its history. In the same
transaction it writes a *mark* to `dead-letters`: a null value with the letter's position in a
header. A letter that is marked has been sent and is left alone from then on.
"""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import methodcaller
from typing import Any

import orjson
import structlog
from confluent_kafka import Message

from schemas.codec import decode
from schemas.records import EARLIEST_TIME, LATEST_TIME, DeadLetter, format_time
from schemas.topics import BY_NAME, LARGEST_MESSAGE
from streams.config import KafkaConfig
from streams.exceptions import LetterError
from streams.processor import Output
from streams.producer import Outgoing
from streams.tail import read_topic

HEADER_PREFIX = "starcast-"
ATTEMPTS_HEADER = "starcast-attempts"
FIRST_FAILED_HEADER = "starcast-first-failed-at"
REDRIVEN_HEADER = "starcast-redriven-from"  # of a record sent again: its letter's position
MARK_HEADER = "starcast-redriven"  # of a mark: the position of the letter that was sent
LEFT_OUT_HEADER = "starcast-left-out"  # in a letter: what of its record it could not take

LARGEST_LETTER = LARGEST_MESSAGE - 64 * 1024  # bytes: Kafka and vain compression add to them
LONGEST_REASON = 1_000  # characters, in a letter that was too large
MOST_DIGITS = 9  # of a count of attempts; a header comes from outside

_ask_headers: Callable[[Any], Any] = methodcaller("headers")
UNREADABLE = (LEFT_OUT_HEADER, b"headers")  # in place of headers that the client cannot read
_LOG = structlog.get_logger(__name__)


def headers_of(message: Message) -> list[tuple[str, Any]]:
    """A message's headers; only LEFT_OUT_HEADER in place of those that cannot be read.

    A name may be any bytes in Kafka. At one that is not UTF-8 confluent-kafka (2.16) gives a list
    that lacks an object, and an error: Python looks for it where C calls, while after some calls
    in Python itself it takes the list, and dies. So does who asks a second time.
    """
    try:
        found = _ask_headers(message) or []
    except SystemError:
        return [UNREADABLE]
    return list(found.items()) if isinstance(found, dict) else found


def _text(value: bytes | str | None) -> str | None:
    raw = value.encode() if isinstance(value, str) else value
    return None if raw is None else base64.b64encode(raw).decode()


def dead_letter(
    message: Message,
    topic: str,
    processor: str,
    reason: str,
    field: str | None = None,
    headers: list[tuple[str, Any]] | None = None,
) -> Output:
    """The record for `dead-letters` that tells why a message could not be used.

    `topic` is the message's topic without the prefix in settings; `headers` are those that
    `headers_of` gave to who has asked it already. What is too large is left out,
    since Kafka would refuse the letter, and its transaction, each time anew.
    """
    headers = headers_of(message) if headers is None else headers
    if headers and headers[0] is UNREADABLE:
        reason += " (headers left out: a name is not UTF-8)"
    else:
        headers = [each for each in headers if each[0] != LEFT_OUT_HEADER]  # that is ours to say
    history = dict(headers)
    attempts = history.get(ATTEMPTS_HEADER)
    first = history.get(FIRST_FAILED_HEADER)
    failed_at = _time(first) or datetime.now(UTC)
    # A flood of bad records comes through here: a plain dict costs a third of a DeadLetter.
    letter: dict[str, Any] = {
        "key": _text(message.key()),
        "value": _text(message.value()),
        "headers": [_present(key=name, value=_text(value)) for name, value in headers],
        "source": {
            "topic": topic,
            "partition": message.partition() or 0,
            "offset": message.offset() or 0,
        },
        "processor": processor,
        "reason": reason,
        "field": field,
        "first_failed_at": format_time(failed_at),
        "attempts": _count(attempts) + 1,
    }
    value = orjson.dumps(_present(**letter))
    if len(value) > LARGEST_LETTER:
        value = orjson.dumps(_present(**_shortened(letter)))
    return Output("dead-letters", topic.encode(), value)


def _shortened(letter: dict[str, Any]) -> dict[str, Any]:
    """A letter without each part of its record that takes more than a third of the room."""
    shortened = letter | {"reason": letter["reason"][:LONGEST_REASON]}
    left_out = [
        part
        for part in ("key", "value", "headers")
        if len(orjson.dumps(letter[part])) > LARGEST_LETTER // 3
    ]
    if left_out:
        parts = ", ".join(left_out)
        mark = {"key": LEFT_OUT_HEADER, "value": _text(parts)}
        shortened |= dict.fromkeys(left_out)
        shortened["headers"] = [*(shortened["headers"] or []), mark]
        shortened["reason"] += f" ({parts} left out: too large for a dead letter)"
    return shortened


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _count(value: bytes | str | None) -> int:
    text = value.decode(errors="replace") if isinstance(value, bytes) else (value or "")
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else 0


def _time(value: bytes | str | None) -> datetime | None:
    text = value.decode(errors="replace") if isinstance(value, bytes) else (value or "")
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    # Another time would make a letter that breaks its own contract.
    return time if time.tzinfo and EARLIEST_TIME <= time <= LATEST_TIME else None


@dataclass(frozen=True)
class Letter:
    """A dead letter and where it lies in `dead-letters`."""

    partition: int
    offset: int
    letter: DeadLetter
    redriven: bool = False  # it is marked as sent again

    @property
    def position(self) -> str:
        """As the command line takes it and a redriven record's header tells it."""
        return f"{self.partition}/{self.offset}"

    @property
    def left_out(self) -> str:
        """What of its record it could not take, as "value, headers"; empty for nothing."""
        found = dict(_headers(self.letter)).get(LEFT_OUT_HEADER)
        return (found or b"").decode(errors="replace")


@dataclass(frozen=True)
class Wanted:
    """Which letters are meant; what is not set does not matter."""

    reason: str | None = None  # a part of it, in any case
    topic: str | None = None  # that the record came from
    processor: str | None = None
    since: datetime | None = None  # of the first failure
    until: datetime | None = None
    positions: frozenset[str] = frozenset()

    def takes(self, letter: Letter) -> bool:
        """Whether a letter is meant."""
        about = letter.letter
        return (
            (self.reason is None or self.reason.lower() in about.reason.lower())
            and (self.topic is None or self.topic == about.source.topic)
            and (self.processor is None or self.processor == about.processor)
            and (self.since is None or self.since <= about.first_failed_at)
            and (self.until is None or about.first_failed_at < self.until)
            and (not self.positions or letter.position in self.positions)
        )


def read_letters(
    kafka: KafkaConfig, wanted: Wanted | None = None, redriven: bool = False
) -> Iterator[Letter]:
    """The letters that are meant, in order, up to the end of the topic as it is now.

    Left out are letters that are marked as sent again, unless `redriven`; letters of records that
    were sent again and failed again, since a newer letter tells of them; and, with a line in the
    log, what lies in the topic but is no dead letter. What fails while the letters are taken is
    not among them. Raises UnreachableError.
    """
    marked: set[str] = set()
    told_again: set[str | None] = set()
    last: dict[int, int] = {}
    for each in _entries(kafka):
        if isinstance(each, str):
            marked.add(each)
            continue
        told_again.add(_redriven_from(each.letter))
        last[each.partition] = each.offset
    for each in _entries(kafka, quiet=True):
        if (
            isinstance(each, str)
            or each.offset > last.get(each.partition, -1)
            or each.position in told_again
        ):
            continue
        letter = Letter(each.partition, each.offset, each.letter, each.position in marked)
        if (redriven or not letter.redriven) and (wanted is None or wanted.takes(letter)):
            yield letter


def redriven(letter: Letter) -> Outgoing:
    """The record of a letter as it was, with headers that tell its history.

    Raises LetterError when the letter left a part of it out.
    """
    about = letter.letter
    if letter.left_out:
        source = about.source
        where = f"{source.topic} partition {source.partition} offset {source.offset}"
        raise LetterError(
            f"Dead letter {letter.position} has no {letter.left_out} of {where}: it could not take "
            f"them. Take the record from there while {source.topic} keeps it, and produce it anew."
        )
    kept = [header for header in _headers(about) if not header[0].startswith(HEADER_PREFIX)]
    history = [
        (ATTEMPTS_HEADER, str(about.attempts).encode()),
        (FIRST_FAILED_HEADER, format_time(about.first_failed_at).encode()),
        (REDRIVEN_HEADER, letter.position.encode()),
    ]
    return Outgoing(about.source.topic, _bytes(about.key), _bytes(about.value), [*kept, *history])


def mark(letter: Letter) -> Outgoing:
    """What says in `dead-letters` that a letter's record was sent again."""
    key = letter.letter.source.topic.encode()
    return Outgoing("dead-letters", key, None, [(MARK_HEADER, letter.position.encode())])


def _entries(kafka: KafkaConfig, quiet: bool = False) -> Iterator[Letter | str]:
    """All of `dead-letters` in order: letters, and of marks the position of the letter marked."""
    topic = BY_NAME["dead-letters"]
    for batch in read_topic(kafka, topic.name):
        positions = [(message.partition() or 0, message.offset() or 0) for message in batch]
        marks = [_marked(message) for message in batch]
        decoded = decode(topic, [message.value() for message in batch], positions)
        for rejection in decoded.rejections:
            if not quiet and marks[rejection.index] is None:
                _LOG.warning("not a dead letter", reason=str(rejection))
        for (partition, offset), record, mark in zip(
            positions, decoded.records, marks, strict=True
        ):
            if isinstance(record, DeadLetter):
                letter = Letter(partition, offset, record)
                if _is_base64(record):
                    yield letter
                elif not quiet:
                    reason = f"{letter.position} has a part that is not base64"
                    _LOG.warning("not a dead letter", reason=reason)
            elif mark is not None:
                yield mark


def _marked(message: Message) -> str | None:
    """The position of the letter that a mark is about, when the message is a mark."""
    if message.value() is not None:
        return None
    found = dict(headers_of(message)).get(MARK_HEADER)
    return found.decode(errors="replace") if isinstance(found, bytes) else found


def _redriven_from(letter: DeadLetter) -> str | None:
    """The position of the older letter that this one's record was redriven from."""
    values = [value for name, value in _headers(letter) if name == REDRIVEN_HEADER]
    return (values[-1] or b"").decode(errors="replace") if values else None


def _headers(letter: DeadLetter) -> list[tuple[str, bytes | None]]:
    return [(header.key, _bytes(header.value)) for header in letter.headers]


def _is_base64(letter: DeadLetter) -> bool:
    parts = [letter.key, letter.value, *(header.value for header in letter.headers)]
    try:
        list(map(_bytes, parts))
    except ValueError:
        return False
    return True


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
