"""Dead letters that are sent again, each once and in order, on a real and an embedded broker."""

import base64
import threading
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Message, Producer
from structlog.testing import capture_logs

from model.ids import hash_ids, partitions_of
from schemas import archive
from schemas.codec import encode
from schemas.records import DeadLetter, Source
from schemas.topics import BY_NAME
from streams import redrive as redriving
from streams.admin import TopicError, apply_topics
from streams.archiver import Archiver
from streams.clients import client_config, topic_name
from streams.config import ArchiveConfig, KafkaConfig
from streams.dead_letters import (
    LEFT_OUT_HEADER,
    MARK_HEADER,
    Letter,
    Wanted,
    dead_letter,
    read_letters,
)
from streams.exceptions import BrokerError
from streams.metrics import make_metrics
from streams.producer import Outgoing, Sent, play
from streams.redrive import _Redriver, redrive
from streams.tail import read_topic
from tests.odd_headers import NoName, send_with
from tests.shops import make_shop

TIME = datetime(2026, 1, 1, tzinfo=UTC)


def config(servers: str, exactly_once: bool = True) -> KafkaConfig:
    made = KafkaConfig(
        bootstrap_servers=servers,
        topic_prefix=f"{uuid.uuid4().hex[:8]}.",
        partitions=3,
        exactly_once=exactly_once,
    )
    apply_topics(made)
    return made


@pytest.fixture(params=["kafka", "embedded_broker"])
def cluster(request: pytest.FixtureRequest) -> KafkaConfig:
    return config(request.getfixturevalue(request.param), request.param == "kafka")


@pytest.fixture
def real(kafka: str) -> KafkaConfig:
    return config(kafka)


def letter(number: int, user: str = "ann", **changes: object) -> DeadLetter:
    values: dict[str, object] = {
        "key": base64.b64encode(user.encode()).decode(),
        "value": base64.b64encode(b"%s %d" % (user.encode(), number)).decode(),
        "source": Source(topic="reviews", partition=0, offset=number),
        "processor": "scorer",
        "reason": "not JSON",
        "first_failed_at": TIME + timedelta(days=number),
    }
    return DeadLetter.model_validate(values | changes)


def write(kafka: KafkaConfig, *letters: DeadLetter) -> None:
    sent = play([Outgoing("dead-letters", b"reviews", encode(each)) for each in letters], kafka)
    assert not sent.failed


def read(kafka: KafkaConfig, topic: str) -> list[Message]:
    return [message for batch in read_topic(kafka, topic) for message in batch]


def values(kafka: KafkaConfig, topic: str = "reviews") -> list[bytes | None]:
    return [message.value() for message in read(kafka, topic)]


def numbers(kafka: KafkaConfig, wanted: Wanted | None = None, redriven: bool = False) -> list[int]:
    return [each.letter.source.offset for each in read_letters(kafka, wanted, redriven)]


def test_a_letter_is_sent_once_however_often_it_is_asked_for(cluster: KafkaConfig) -> None:
    write(cluster, *(letter(number) for number in range(3)))
    assert redrive(cluster).delivered == Counter(reviews=3)
    assert redrive(cluster).delivered == Counter()
    assert values(cluster) == [b"ann 0", b"ann 1", b"ann 2"]
    assert numbers(cluster) == []
    assert numbers(cluster, redriven=True) == [0, 1, 2]
    write(cluster, letter(3))
    assert numbers(cluster) == [3]
    assert [each.redriven for each in read_letters(cluster, redriven=True)] == [True] * 3 + [False]
    assert redrive(cluster).delivered == Counter(reviews=1)
    assert redrive(cluster, Wanted(positions=frozenset(["0/1"]))).delivered == Counter()
    again = redrive(cluster, Wanted(positions=frozenset(["0/1"])), again=True)
    assert again.delivered == Counter(reviews=1)
    assert values(cluster)[-1] == b"ann 1"
    assert len(values(cluster)) == 5


def test_marks_are_null_and_name_their_letter(cluster: KafkaConfig) -> None:
    write(cluster, letter(0), letter(1))
    redrive(cluster, Wanted(positions=frozenset(["0/1"])))
    mark = read(cluster, "dead-letters")[-1]
    assert (mark.key(), mark.value(), mark.headers()) == (
        b"reviews",
        None,
        [(MARK_HEADER, b"0/1")],
    )
    with capture_logs() as logs:
        assert numbers(cluster) == [0]
    assert logs == []
    # A null value that marks nothing is still told of.
    play([Outgoing("dead-letters", b"reviews", None, [("other", b"0/0")])], cluster)
    with capture_logs() as logs:
        assert numbers(cluster) == [0]
    assert [each["event"] for each in logs] == ["not a dead letter"]


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        (Wanted(reason="MISSING"), [1, 3]),
        (Wanted(since=TIME + timedelta(days=2)), [2, 3]),
        (Wanted(until=TIME + timedelta(days=2)), [0, 1]),
        (Wanted(reason="missing", since=TIME + timedelta(days=2)), [3]),
        (Wanted(topic="behavior"), []),
        (Wanted(processor="scorer", positions=frozenset(["0/0", "0/3"])), [0, 3]),
    ],
)
def test_only_what_is_wanted_is_sent_and_marked(
    real: KafkaConfig, wanted: Wanted, sent: list[int]
) -> None:
    reasons = ["not JSON", "missing", "not JSON", "missing"]
    write(real, *(letter(number, reason=reason) for number, reason in enumerate(reasons)))
    for _ in range(2):
        redrive(real, wanted)
        assert values(real) == [b"ann %d" % number for number in sent]
        assert numbers(real) == [each for each in range(4) if each not in sent]


def test_a_users_records_keep_their_order(
    real: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several bunches, and among other users, in the partition where the user's events lie."""
    monkeypatch.setattr(redriving, "BUNCH_LETTERS", 7)
    names = [f"user {number % 5}" for number in range(60)]
    write(real, *(letter(number, user) for number, user in enumerate(names)))
    assert redrive(real).delivered == Counter(reviews=60)
    found = read(real, "reviews")
    partitions = partitions_of(hash_ids(names), real.partitions).tolist()
    for user in set(names):
        mine = [each for each in found if each.key() == user.encode()]
        assert [each.value() for each in mine] == [
            b"%s %d" % (user.encode(), number) for number, name in enumerate(names) if name == user
        ]
        assert {each.partition() for each in mine} == {partitions[names.index(user)]}


def test_a_record_that_fails_again_is_a_new_letter_with_its_history(cluster: KafkaConfig) -> None:
    write(cluster, letter(0))
    for attempt in range(2, 5):
        redrive(cluster)
        message = read(cluster, "reviews")[-1]
        again = dead_letter(message, "reviews", "scorer", f"attempt {attempt}")
        play([Outgoing("dead-letters", again.key, again.value)], cluster)
        # Its older letters, though marked, are not told again: this one speaks for them.
        (waiting,) = read_letters(cluster, redriven=True)
        assert (waiting.letter.attempts, waiting.letter.reason) == (attempt, f"attempt {attempt}")
        assert waiting.letter.first_failed_at == TIME
    assert len(values(cluster)) == 3


class _Stopped:
    """A producer that sleeps before its commit, while another redrive begins and ends."""

    def __init__(self, producer: Any, kafka: KafkaConfig) -> None:
        self._producer = producer
        self._kafka = kafka
        self.other = Sent()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def commit_transaction(self, seconds: float) -> None:
        self._producer.flush(seconds)
        self.other = redrive(self._kafka)
        self._producer.commit_transaction(seconds)


def test_a_redrive_that_is_cut_off_sends_nothing_twice(
    real: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(real, letter(0), letter(1))
    first = _Redriver(real)
    letters = list(read_letters(real))
    first.send(letters[:1])
    stopped = _Stopped(first._producer, real)
    monkeypatch.setattr(first, "_producer", stopped)
    with pytest.raises(BrokerError, match=r"Another redrive.*1 records were sent"):
        first.send(letters[1:])
    assert stopped.other.delivered == Counter(reviews=1)
    assert values(real) == [b"ann 0", b"ann 1"]


def test_two_redrives_at_once_send_each_letter_once(
    real: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redriving, "BUNCH_LETTERS", 5)
    write(real, *(letter(number) for number in range(200)))
    outcomes: list[Sent | BrokerError] = []

    def work() -> None:
        try:
            outcomes.append(redrive(real))
        except BrokerError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 3
    assert any(isinstance(each, Sent) for each in outcomes)
    assert values(real) == [b"ann %d" % number for number in range(200)]
    assert numbers(real) == []


def test_marks_behind_what_a_worker_is_still_sending_count(
    real: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers of what is committed see nothing behind a transaction that is open."""
    write(real, letter(0))
    worker = Producer(client_config(real, transactional_id=f"{real.topic_prefix}scorer"))
    worker.init_transactions(10)
    send = _Redriver.send

    def meanwhile(redriver: _Redriver, letters: list[Letter]) -> None:
        worker.begin_transaction()
        worker.produce(topic_name(real, "dead-letters"), encode(letter(1)))
        worker.flush(10)
        send(redriver, letters)

    with monkeypatch.context() as patch:
        patch.setattr(_Redriver, "send", meanwhile)
        assert redrive(real).delivered == Counter(reviews=1)
    with monkeypatch.context() as patch:
        patch.setattr(redriving, "DECIDED_SECONDS", 0.0)
        with pytest.raises(BrokerError, match="hides, from offset 1 on, which letters were sent"):
            redrive(real)
    ending = threading.Timer(2, worker.abort_transaction)
    ending.start()
    assert redrive(real).delivered == Counter()
    ending.join()
    assert values(real) == [b"ann 0"]


def test_a_record_that_kafka_does_not_take_spoils_no_other(cluster: KafkaConfig) -> None:
    most = BY_NAME["reviews"].largest_message
    large, fits = (base64.b64encode(b"x" * size).decode() for size in (most - 200, most - 400))
    write(cluster, letter(0), letter(1, value=large), letter(2, value=fits), letter(3))
    sent = redrive(cluster)
    assert sent.failed == {"too large for its topic, with the headers of its history": 1}
    assert (sent.sent.total(), sent.delivered) == (4, Counter(reviews=3))
    assert [len(each or b"") for each in values(cluster)] == [5, most - 400, 5]
    assert numbers(cluster) == [1]


def test_a_header_whose_name_is_no_text_stops_nothing(real: KafkaConfig, tmp_path: Path) -> None:
    bad = b"{" * 300  # which compression makes smaller
    send_with([(NoName("trace"), b"1"), ("page", b"2")], real, "reviews", bad)
    send_with([("page", b"2")], real, "reviews", bad)
    for _ in range(100):  # Python calls in another way what it has called often
        dead_letter(Message(headers=[]), "reviews", "scorer", "not JSON")
    letters = [dead_letter(each, "reviews", "scorer", "not JSON") for each in read(real, "reviews")]
    write(real, *(DeadLetter.model_validate_json(each.value or b"") for each in letters))
    (spoilt, whole) = read_letters(real)
    assert (spoilt.left_out, whole.left_out) == ("headers", "")
    assert spoilt.letter.reason == "not JSON (headers left out: a name is not UTF-8)"
    assert base64.b64decode(spoilt.letter.value or "") == bad
    (failed,) = redrive(real).failed
    assert "0/0 has no headers of reviews" in failed
    archiver = Archiver(ArchiveConfig(url=str(tmp_path)), real.topic_prefix, make_metrics())
    archiver.process(read(real, "reviews"))
    archiver.close()
    rows = archive.read(str(tmp_path), "reviews").collect()["kafka_headers"].to_list()
    assert rows[0] == [{"key": LEFT_OUT_HEADER, "value": b"headers"}]
    assert rows[1] == [{"key": "page", "value": b"2"}]


def test_a_record_that_kafka_refuses_all_the_same_is_said(
    real: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redriving, "_size", lambda _: 0)
    large = base64.b64encode(b"x" * (BY_NAME["reviews"].largest_message + 1)).decode()
    write(real, letter(0), letter(1, value=large))
    with pytest.raises(BrokerError, match=r"(?i)too large.*0 records were sent"):
        redrive(real)
    assert numbers(real) == [0, 1]
    assert values(real) == []
    redrive(real, Wanted(positions=frozenset(["0/0"])))
    assert values(real) == [b"ann 0"]


def test_a_letter_of_a_topic_that_is_gone_is_said(real: KafkaConfig) -> None:
    elsewhere = real.model_copy(update={"topic_prefix": f"{uuid.uuid4().hex[:8]}."})
    redriver = _Redriver(elsewhere)
    write(real, letter(0))
    with pytest.raises(TopicError, match="starcast topics apply"):
        redriver.send(list(read_letters(real)))


def test_marks_are_archived_like_all_else(kafka: str, store_server: str, tmp_path: Path) -> None:
    shop = make_shop(kafka, store_server, tmp_path)
    write(shop.settings.kafka, letter(0))
    redrive(shop.settings.kafka)
    with shop.workers("archiver"):
        shop.until_archived()
    rows = archive.read(shop.settings.archive.url, "dead-letters").collect()
    assert [value is None for value in rows["kafka_value"]] == [False, True]
    assert rows["reason"].to_list() == ["not JSON", None]
