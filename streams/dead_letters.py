"""Dead letters: what could not be used, with all that is needed to send it again.

`redrive` sends a letter's record to the topic that it came from, with its key and headers. A
header counts the attempts, so a record that fails again returns with its history.
"""

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from confluent_kafka import Message

from schemas.codec import decode, encode
from schemas.records import DeadLetter, Header, Source, format_time
from schemas.topics import BY_NAME
from streams.config import KafkaConfig
from streams.loop import Output
from streams.producer import Outgoing, Sender, Sent
from streams.tail import read_topic

HEADER_PREFIX = "starcast-"
ATTEMPTS_HEADER = "starcast-attempts"
FIRST_FAILED_HEADER = "starcast-first-failed-at"
REDRIVEN_HEADER = "starcast-redriven-from"

_LOG = structlog.get_logger(__name__)


def _text(value: bytes | str | None) -> str | None:
    raw = value.encode() if isinstance(value, str) else value
    return None if raw is None else base64.b64encode(raw).decode()


def dead_letter(
    message: Message, topic: str, processor: str, reason: str, field: str | None = None
) -> Output:
    """The record for `dead-letters` that tells why a message could not be used.

    `topic` is the message's topic without the prefix in settings.
    """
    found = message.headers() or []
    headers = list(found.items()) if isinstance(found, dict) else found
    history = dict(headers)
    attempts = history.get(ATTEMPTS_HEADER)
    first = history.get(FIRST_FAILED_HEADER)
    now = datetime.now(UTC)
    letter = DeadLetter(
        key=_text(message.key()),
        value=_text(message.value()),
        headers=[Header(key=name, value=_text(value)) for name, value in headers],
        source=Source(
            topic=topic, partition=message.partition() or 0, offset=message.offset() or 0
        ),
        processor=processor,
        reason=reason,
        field=field,
        first_failed_at=_time(first) or now,
        attempts=_count(attempts) + 1,
    )
    return Output("dead-letters", topic.encode(), encode(letter))


def _count(value: bytes | str | None) -> int:
    text = value.decode(errors="replace") if isinstance(value, bytes) else (value or "")
    return int(text) if text.isdecimal() else 0


def _time(value: bytes | str | None) -> datetime | None:
    text = value.decode(errors="replace") if isinstance(value, bytes) else (value or "")
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else None


@dataclass(frozen=True)
class Letter:
    """A dead letter and where it lies in `dead-letters`."""

    partition: int
    offset: int
    letter: DeadLetter

    @property
    def position(self) -> str:
        """As the command line takes it and a redriven record's header tells it."""
        return f"{self.partition}/{self.offset}"


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


def read_letters(kafka: KafkaConfig, wanted: Wanted | None = None) -> Iterator[Letter]:
    """The letters that are meant, in order, up to the end of the topic as it is now.

    Left out are letters of records that were redriven and failed again, since a newer letter tells
    of them; and, with a line in the log, what lies in the topic but is no dead letter. What fails
    while the letters are taken is not among them. Raises UnreachableError.
    """
    told_again: set[str | None] = set()
    last: dict[int, int] = {}
    for letter in _all_letters(kafka):
        told_again.add(_redriven_from(letter.letter))
        last[letter.partition] = letter.offset
    for letter in _all_letters(kafka):
        if letter.offset > last.get(letter.partition, -1) or letter.position in told_again:
            continue
        if wanted is None or wanted.takes(letter):
            yield letter


def redrive(kafka: KafkaConfig, letters: Iterable[Letter]) -> Sent:
    """Sends each letter's record to the topic it came from; raises UnreachableError."""
    sender = Sender(kafka)
    for letter in letters:
        sender.send(redriven(letter))
    return sender.finish()


def redriven(letter: Letter) -> Outgoing:
    """The record of a letter as it was, with headers that tell its history."""
    about = letter.letter
    kept = [header for header in _headers(about) if not header[0].startswith(HEADER_PREFIX)]
    history = [
        (ATTEMPTS_HEADER, str(about.attempts).encode()),
        (FIRST_FAILED_HEADER, format_time(about.first_failed_at).encode()),
        (REDRIVEN_HEADER, letter.position.encode()),
    ]
    return Outgoing(about.source.topic, _bytes(about.key), _bytes(about.value), [*kept, *history])


def _all_letters(kafka: KafkaConfig) -> Iterator[Letter]:
    topic = BY_NAME["dead-letters"]
    for batch in read_topic(kafka, topic.name):
        positions = [(message.partition() or 0, message.offset() or 0) for message in batch]
        decoded = decode(topic, [message.value() for message in batch], positions)
        for rejection in decoded.rejections:
            _LOG.warning("not a dead letter", reason=str(rejection))
        for (partition, offset), record in zip(positions, decoded.records, strict=True):
            if isinstance(record, DeadLetter):
                yield Letter(partition, offset, record)


def _redriven_from(letter: DeadLetter) -> str | None:
    """The position of the older letter that this one's record was redriven from."""
    values = [value for name, value in _headers(letter) if name == REDRIVEN_HEADER]
    return (values[-1] or b"").decode(errors="replace") if values else None


def _headers(letter: DeadLetter) -> list[tuple[str, bytes | None]]:
    return [(header.key, _bytes(header.value)) for header in letter.headers]


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
