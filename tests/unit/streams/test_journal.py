"""Journals of several partitions, out of a scripted Kafka and archive."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from schemas import journal as contract
from schemas.exceptions import ContractError
from schemas.journal import Transaction
from streams import clients, journal
from streams.config import ArchiveConfig, KafkaConfig
from streams.exceptions import JournalGapError, StoreAheadError
from streams.journal import read_journal, read_journals
from tests.unit.schemas.test_journal import make

KAFKA = KafkaConfig(topic_prefix="eu.")
EOF, RESET = KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET
SHORT, LONG = contract.encode(make(3)), contract.encode(make(2_500))


def row(partition: int, offset: int, value: bytes = SHORT[0]) -> Message:
    return Message(topic="eu.journal", partition=partition, offset=offset, value=value)


def event(partition: int, code: int) -> Message:
    return Message(topic="eu.journal", partition=partition, error=KafkaError(code))


class Scripted:
    """A consumer that gives the next list of messages after each assignment."""

    def __init__(self, *rounds: list[Message]) -> None:
        self.rounds = list(rounds)
        self.assigned: list[dict[int, int]] = []
        self.closed = False

    def __call__(self, _: Any) -> "Scripted":
        return self

    def list_topics(self, topic: str, _: float) -> None:
        assert topic == "eu.journal"

    def assign(self, where: list[TopicPartition]) -> None:
        self.assigned.append({each.partition: each.offset for each in where})
        self.left = self.rounds.pop(0)

    def consume(self, count: int, _: float) -> list[Message]:
        assert count == 1
        return [self.left.pop(0)] if self.left else []

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has a consumer read; `lows` are where Kafka's partitions begin, 0 where it is not said."""

    def stands(consumer: Scripted, **lows: int) -> Scripted:
        begins = {int(name.removeprefix("p")): low for name, low in lows.items()}
        monkeypatch.setattr(clients, "Consumer", consumer)
        monkeypatch.setattr(
            journal,
            "bounds",
            lambda *where: {each: (begins.get(each, 0), 99) for each in where[-1]},
        )
        return consumer

    return stands


def archived(monkeypatch: pytest.MonkeyPatch, *offsets: int) -> None:
    def rows(_: str, __: int, ___: Any, start: int, on_torn: Any) -> Iterator[Transaction]:
        return contract.decode_all((at, SHORT[0]) for at in offsets if at >= start)

    monkeypatch.setattr(journal.archive, "journal", rows)


def read(kafka: KafkaConfig = KAFKA, **starts: int) -> list[tuple[int, tuple[int, int] | None]]:
    """By partition, the first and last offset of each transaction, None at the end."""
    wanted = {int(name.removeprefix("p")): start for name, start in starts.items()}
    return [
        (partition, each and (each.first_offset, each.last_offset))
        for partition, each in read_journals(kafka, ArchiveConfig(), wanted)
    ]


def test_partitions_come_mixed_and_end_one_by_one(kafka: Any) -> None:
    assert len(LONG) == 2
    script = [row(1, 5), row(2, 0, LONG[0]), row(1, 7), row(2, 1, LONG[1])]
    script += [event(1, EOF), row(1, 9), event(1, EOF), row(2, 3), event(2, EOF)]
    consumer = kafka(Scripted(script))
    assert read(p1=5, p2=0) == [
        (1, (5, 5)),
        (1, (7, 7)),
        (2, (0, 1)),
        (1, None),  # what is appended later is not of this claim
        (2, (3, 3)),
        (2, None),
    ]
    assert consumer.assigned == [{1: 5, 2: 0}]
    assert consumer.closed


def test_one_partition_comes_without_its_end(kafka: Any) -> None:
    kafka(Scripted([row(1, 5), event(1, EOF)]))
    (transaction,) = read_journal(KAFKA, ArchiveConfig(), 1, 5)
    assert transaction.first_offset == 5


def test_what_retention_has_taken_comes_from_the_archive(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived(monkeypatch, 0, 2, 4, 6)
    first = [event(1, RESET), row(2, 3), event(2, EOF)]
    consumer = kafka(Scripted(first, [row(1, 6), event(1, EOF)]), p1=5)
    assert read(p1=2, p2=3) == [
        (2, (3, 3)),
        (2, None),
        (1, (2, 2)),
        (1, (4, 4)),
        (1, (6, 6)),
        (1, None),
    ]
    assert consumer.assigned == [{1: 2, 2: 3}, {1: 5}]


def test_a_transaction_that_retention_cut_comes_from_the_archive_in_whole(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [(2, SHORT[0]), (4, LONG[0]), (5, LONG[1]), (7, SHORT[0])]
    monkeypatch.setattr(
        journal.archive,
        "journal",
        lambda _, __, ___, start, on_torn: contract.decode_all(
            each for each in values if each[0] >= start
        ),
    )
    rest = [row(1, 5, LONG[1]), row(1, 7), event(1, EOF)]

    class Kafka(Scripted):
        def assign(self, where: list[TopicPartition]) -> None:
            super().assign(where)
            self.left = [
                each
                for each in self.left
                if each.error() is not None or (each.offset() or 0) >= where[0].offset
            ]

    consumer = kafka(Kafka([event(1, RESET)], rest), p1=5)
    assert read(p1=2) == [(1, (2, 2)), (1, (4, 5)), (1, (7, 7)), (1, None)]
    assert consumer.assigned == [{1: 2}, {1: 6}]


def test_retention_that_passes_twice_costs_no_row_and_doubles_none(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived(monkeypatch, 0, 2, 4)
    lows = iter([1, 4])
    kafka(Scripted([event(1, RESET)], [event(1, RESET)], [row(1, 4), event(1, EOF)]))
    monkeypatch.setattr(
        journal, "bounds", lambda *where: {each: (next(lows), 9) for each in where[-1]}
    )
    assert read(p1=0) == [(1, (0, 0)), (1, (2, 2)), (1, (4, 4)), (1, None)]


@pytest.mark.parametrize(("high", "rest"), [(4, []), (6, [4])])
def test_where_retention_took_the_end_of_a_transaction_alone_nothing_is_missing(
    kafka: Any, monkeypatch: pytest.MonkeyPatch, high: int, rest: list[int]
) -> None:
    """The states stand after row 2, whose transaction ended at 3."""
    archived(monkeypatch, 2, *rest)
    monkeypatch.setattr(journal, "archived_end", lambda *_: 5 if rest else 3)
    consumer = kafka(Scripted([event(1, RESET)], [*[row(1, at) for at in rest], event(1, EOF)]))
    monkeypatch.setattr(journal, "bounds", lambda *where: dict.fromkeys(where[-1], (4, high)))
    assert read(p1=3) == [*[(1, (at, at)) for at in rest], (1, None)]
    assert consumer.assigned == [{1: 3}, {1: 4}]


def test_where_all_is_gone_that_a_lost_store_needs_it_is_an_error(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived(monkeypatch)
    kafka(Scripted([event(1, RESET)]))
    monkeypatch.setattr(journal, "bounds", lambda *_: {1: (4, 4)})
    with pytest.raises(JournalGapError, match="the store stands at 0"):
        read(p1=0)


def test_an_archive_that_does_not_reach_back_is_an_error(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    archived(monkeypatch, 7)
    kafka(Scripted([event(1, RESET)]), p1=5)
    with pytest.raises(JournalGapError, match="begins at offset 5 in Kafka, the store stands at 2"):
        read(p1=2)


def test_a_journal_that_ends_before_its_start_was_made_anew(kafka: Any) -> None:
    consumer = kafka(Scripted([event(1, RESET)]))
    with pytest.raises(StoreAheadError, match=r"partition 1 stand at offset 7 .* made anew"):
        read(p1=7)
    assert consumer.closed


def test_retention_that_passes_while_it_is_read_is_left_to_the_next_claim(kafka: Any) -> None:
    kafka(Scripted([row(1, 2), event(1, RESET)]), p1=5)
    with pytest.raises(KafkaException):
        read(p1=2)


def test_a_transaction_without_its_end_is_an_error(kafka: Any) -> None:
    kafka(Scripted([row(1, 2, LONG[0]), event(1, EOF)]))
    with pytest.raises(ContractError, match="has more"):
        read(p1=2)


def test_without_transactions_what_a_worker_did_not_come_to_the_end_of_is_left_out(
    kafka: Any,
) -> None:
    plain = KAFKA.model_copy(update={"exactly_once": False})
    again = [row(1, 3, LONG[0]), row(1, 4, LONG[1])]
    kafka(Scripted([row(1, 2, LONG[0]), *again, row(1, 5, LONG[0]), event(1, EOF)]))
    assert read(plain, p1=2) == [(1, (3, 4)), (1, None)]


def stood(offset: int, reached: int) -> Message:
    """An entry of a worker that had read the journal up to `reached`."""
    state = reached.to_bytes(8, "little") + b"the rest of a header"
    return row(1, offset, contract.encode(replace(make(3), partition_state=state))[0])


PLAIN = KAFKA.model_copy(update={"exactly_once": False})


@pytest.mark.parametrize(
    ("entries", "standing"),
    [
        ([(0, 0), (1, 1), (2, 1)], [0, 2]),  # nothing tells yet: the later one
        ([(0, 0), (1, 1), (2, 1), (3, 3)], [0, 2, 3]),
        ([(0, 0), (1, 1), (2, 1), (3, 2)], [0, 1, 3]),
        ([(0, 0), (1, 1), (2, 2), (3, 1), (4, 3)], [0, 1, 2, 4]),  # two batches late
        ([(0, 0), (1, 1), (2, 2), (3, 1)], [0, 1, 2]),
        ([(0, 0), (1, 1), (2, 1), (3, 1), (4, 3)], [0, 2, 4]),  # two were given up
        ([(2, 1), (3, 2)], [3]),  # the states in the store stand on another
        ([(2, 1)], []),
        ([(0, 0), (2, 2), (4, 4)], [0, 2, 4]),  # once there were transactions
    ],
)
def test_without_transactions_an_entry_that_another_took_the_place_of_is_left_out(
    kafka: Any, entries: list[tuple[int, int]], standing: list[int]
) -> None:
    first = entries[0][0]
    kafka(Scripted([*(stood(*each) for each in entries), event(1, EOF)]))
    assert read(PLAIN, p1=first) == [*((1, (at, at)) for at in standing), (1, None)]
    kafka(Scripted([*(stood(*each) for each in entries), event(1, EOF)]))
    assert read(p1=first) == [*((1, (at, at)) for at, _ in entries), (1, None)]


@given(st.data())
def test_entries_that_come_late_change_nothing(data: st.DataObject) -> None:
    """Whenever they come, and wherever reading begins, the last worker's journal is read."""
    entries: list[tuple[int, Transaction | None]] = []
    ends = [0]  # of the entries on which the last worker stands
    for late in data.draw(st.lists(st.booleans(), max_size=12)):
        reached = data.draw(st.sampled_from(ends)) if late else ends[-1]
        at = len(entries)
        (entry,) = contract.decode_all([(at, stood(at, reached).value() or b"")])
        entries.append((1, entry))
        if not late:
            ends.append(at + 1)
    del entries[ends[-1] :]  # on which nothing stands yet
    start = data.draw(st.sampled_from(ends))
    found = journal._standing(iter([*entries[start:], (1, None)]), {1: start})
    told = [each and each.last_offset + 1 for _, each in found]
    assert told == [*(end for end in ends if end > start), None]


def test_a_journal_that_gives_nothing_is_not_waited_for_for_ever(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka(Scripted([]))
    monkeypatch.setattr(journal, "END_SECONDS", 0.0)
    with pytest.raises(KafkaException, match="gave nothing"):
        read(p1=2)


def test_who_takes_long_over_a_transaction_is_not_taken_for_a_broker_that_does(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a command that compiles its loops at the first one."""
    kafka(Scripted([row(1, 5), row(1, 7), event(1, EOF)]))
    monkeypatch.setattr(journal, "END_SECONDS", 0.1)
    found: list[int] = []
    for transaction in read_journal(KAFKA, ArchiveConfig(), 1, 5):
        found.append(transaction.first_offset)
        time.sleep(0.2)
    assert found == [5, 7]
