from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from model.events import Rows
from model.state import LAYOUT_HASH
from model.state_bytes import to_bytes
from schemas.journal import Transaction
from streams import recount
from streams.config import ArchiveConfig, KafkaConfig, RedisConfig, StatesConfig
from streams.reader import USER_STATE, partition_keys
from streams.rebuild import Shop
from streams.store import Store
from streams.verification import Verification
from tests.unit.streams.journals import USERS, Partition, Step, events

PARTITION = 2
DAY_MS = 86_400_000
ONE = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 0, 2), (0, 0, 0, 0), (1, 0, 2, 3)]
TWO = [(2, 0, 0, 4), (0, 3, 1, 5), (0, 2, 0, 6)]


@pytest.fixture
def shop(store: str) -> Shop:
    kept = Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, 4)
    return Shop(kept, KafkaConfig(), ArchiveConfig(), StatesConfig())


@pytest.fixture
def partition(monkeypatch: pytest.MonkeyPatch) -> Partition:
    """A partition whose transactions are read in place of those in Kafka."""
    made = Partition()

    def read(_: Any, __: Any, number: int, start: int) -> Iterator[Transaction]:
        assert number == PARTITION
        return made.read(start)

    monkeypatch.setattr(recount, "read_journal", read)
    return made


def at(rows: list[tuple[int, int, int, int]], days: float) -> Rows:
    made = events(rows)
    made["time"] += int(days * DAY_MS)
    return made


def write(shop: Shop, step: Step, header: bytes = b"") -> None:
    """What a worker writes after a transaction; without a header, as one that died before it."""
    keys = partition_keys(shop.store, USER_STATE, PARTITION, step.users)
    claim = shop.store.claim(USER_STATE, PARTITION)
    shop.store.write(claim, keys, to_bytes(step.states), header)


def check(shop: Shop) -> Verification:
    report = Verification()
    recount._check_users(report, shop, PARTITION)
    return report


def test_states_as_they_were_written_agree(shop: Shop, partition: Partition) -> None:
    for rows in (ONE, TWO):
        step = partition.apply(events(rows))
        write(shop, step, step.header.tobytes())
    report = check(shop)
    assert report.clean
    assert report.compared == {"user state": 3, "user header": 1}
    assert report.notes == []


def test_what_is_written_meanwhile_is_left_out(shop: Shop, partition: Partition) -> None:
    step = partition.apply(events(ONE))
    write(shop, step, step.header.tobytes())
    write(shop, partition.apply(events(TWO)))  # users 0 and 2, and not yet the header
    report = check(shop)
    assert report.clean
    assert report.compared["user state"] == 1
    assert report.notes == ["partition 2: 2 users were written meanwhile"]


def test_who_is_erased_meanwhile_is_left_out(
    shop: Shop, partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = partition.apply(events(ONE))
    write(shop, step, step.header.tobytes())
    read = recount._stored

    def late(*given: Any) -> Any:
        erasing = partition.apply(events([(0, 0, 3, 0)]))
        write(shop, erasing, erasing.header.tobytes())
        return read(*given)

    monkeypatch.setattr(recount, "_stored", late)
    report = check(shop)
    assert report.clean, report.examples
    assert report.compared["user state"] == 1
    assert report.notes == ["partition 2: 1 users were written meanwhile"]


def test_a_header_that_belongs_to_other_states_differs(shop: Shop, partition: Partition) -> None:
    step = partition.apply(events(ONE))
    header = step.header.copy()
    header["partition"]["seq"] += 1
    write(shop, step, header.tobytes())
    assert check(shop).differences == {"user header": 1}


def test_a_state_that_should_have_been_written_differs(shop: Shop, partition: Partition) -> None:
    first, second = partition.apply(events(ONE)), partition.apply(events(TWO))
    write(shop, first, second.header.tobytes())
    report = check(shop)
    assert report.differences == {"user state": 2}  # 0 is old, 2 is missing
    assert [f"{int(USERS[user]):#x}" in "".join(report.examples) for user in (0, 1, 2)] == [
        True,
        False,
        True,
    ]


def test_a_header_that_was_never_written_is_told_where_events_were_read(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shop, "committed", lambda *_: {"reviews": 0})
    assert check(shop).differences == {}
    monkeypatch.setattr(Shop, "committed", lambda *_: {"reviews": 7})
    assert check(shop).differences == {"user header": 1}


def test_states_that_expired_between_are_left_out(shop: Shop, partition: Partition) -> None:
    """A user who comes back begins anew in the store, but not in the journal."""
    first = partition.apply(at(ONE, 0))
    write(shop, first, first.header.tobytes())
    keys = partition_keys(shop.store, USER_STATE, PARTITION, first.users)
    shop.store.client.delete(*keys)
    again = partition.apply(at(TWO, 9))
    alone = Partition(header=first.header.copy())
    alone.header["journal"] += 1
    fresh = alone.apply(at(TWO, 9))
    write(shop, replace(again, states=fresh.states), again.header.tobytes())
    assert check(shop).differences["user state"] > 0
    expiring = replace(shop, states=StatesConfig(expire_after_days=7))
    report = check(expiring)
    assert report.differences == {}
    assert report.compared["user state"] == 1  # user 2, who is new
    assert "expired" in report.notes[0]
    assert check(replace(shop, states=StatesConfig(expire_after_days=10))).differences
    assert np.isin(USERS[:3], again.users).any()


def test_a_journal_that_lacks_rows_is_told_and_the_other_checks_go_on(
    shop: Shop, partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the archiver stood still for longer than Kafka keeps the journal."""
    for rows in (ONE, TWO, ONE):
        step = partition.apply(events(rows))
        write(shop, step, step.header.tobytes())
    whole = list(partition.read(0))
    monkeypatch.setattr(recount, "read_journal", lambda *_: iter([whole[0], whole[2]]))
    for name in ("_check_items", "_check_item_attributes", "_check_user_attributes"):
        monkeypatch.setattr(recount, name, lambda report, *_: report.compared.update(["others"]))
    report = recount.check_states(shop, [PARTITION])
    assert report.differences == {"user states not compared": 1}
    assert report.compared == {"others": 3}
    assert report.notes[0].startswith("Journal partition 2 lacks row 5: ")
