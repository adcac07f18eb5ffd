from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from model.state import LAYOUT_HASH
from schemas.archive import Row
from schemas.exceptions import StarcastError
from schemas.journal import Transaction, encode
from streams import rebuild, user_states
from streams.archiver import Archive
from streams.claims import header_data, header_offset
from streams.config import ArchiveConfig, KafkaConfig, RedisConfig, StatesConfig
from streams.exceptions import FencedError, JournalGapError
from streams.reader import ITEM_STATE, USER_STATE
from streams.rebuild import Rebuilt, Shop, require_journal, require_updates
from streams.store import Store
from streams.user_states import decode_header
from tests.unit.streams.journals import Partition, events, told


@pytest.fixture
def shop(store: str) -> Shop:
    kept = Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, 4)
    return Shop(kept, KafkaConfig(), ArchiveConfig(), StatesConfig())


def fill(shop: Shop, partition: int, count: int = 1_200) -> list[bytes]:
    keys = [shop.store.key(ITEM_STATE, partition, b"%d" % number) for number in range(count)]
    shop.store.write(shop.store.claim(ITEM_STATE, partition), keys, keys, header_data(7))
    return keys


def test_a_partition_is_cleared_and_no_other(shop: Shop) -> None:
    mine, other = fill(shop, 1), fill(shop, 2)
    owner = shop.store.claim(ITEM_STATE, 1)
    shop.store.put([b"prices"], [b"many"])
    rebuild._clear(shop.store, ITEM_STATE, 1, header_data(0), b"prices")
    assert shop.store.read([*mine, b"prices"]) == [None] * (len(mine) + 1)
    assert header_offset(shop.store.header(ITEM_STATE, 1)) == 0
    assert shop.store.read(other) == other
    assert header_offset(shop.store.header(ITEM_STATE, 2)) == 7
    with pytest.raises(FencedError):
        shop.store.write(owner, [], [], header_data(8))


def test_the_header_is_cleared_before_the_states(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that claims while states are deleted must not take the rest for all."""
    keys = fill(shop, 1)
    write = shop.store.write

    def fenced(claim: Any, some: Any, values: Any, data: bytes) -> None:
        if some:
            shop.store.claim(ITEM_STATE, 1)
        write(claim, some, values, data)

    monkeypatch.setattr(shop.store, "write", fenced)
    with pytest.raises(FencedError):
        rebuild._clear(shop.store, ITEM_STATE, 1, header_data(0))
    assert header_offset(shop.store.header(ITEM_STATE, 1)) == 0
    assert shop.store.read(keys) == keys


def test_clearing_is_tried_again_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "PAUSE_SECONDS", 0)
    tries = iter([True] * 3)

    def clear() -> None:
        if next(tries, False):
            raise FencedError("taken")

    rebuild._insist(clear, "states", 1)
    assert next(tries, None) is None

    def never() -> None:
        raise FencedError("taken")

    with pytest.raises(StarcastError, match="Stop the workers"):
        rebuild._insist(never, "states", 1)


def test_a_worker_that_took_over_is_waited_for(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "PAUSE_SECONDS", 0)
    reached = iter([False, False, True, True])

    def fenced() -> None:
        raise FencedError("taken")

    done = rebuild._rebuild(shop, "states", 1, lambda: None, fenced, lambda: next(reached))
    assert isinstance(done, Rebuilt)
    assert done.taken_over


def test_a_worker_that_took_over_and_died_is_told(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "STALL_SECONDS", 0.01)
    with pytest.raises(StarcastError, match="has taken over the states of partition 1"):
        rebuild._wait(shop, "states", 1, lambda: False)


def test_states_that_end_too_early_are_told(shop: Shop) -> None:
    with pytest.raises(StarcastError, match="end before"):
        rebuild._rebuild(shop, "states", 1, lambda: None, lambda: None, lambda: False)


def test_user_states_that_take_long_are_applied_to_the_end(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim applies for some seconds only, as a worker that has to poll wants it."""
    journal = Partition()
    for number in range(6):
        journal.apply(events([(0, number % 5, 0, number)]))

    def read(
        _: Any, __: Any, starts: Mapping[int, int]
    ) -> Iterator[tuple[int, Transaction | None]]:
        return told(1, journal.read(starts[1]))

    monkeypatch.setattr(user_states, "read_journals", read)
    monkeypatch.setattr(user_states, "RECOVERY_ROWS", 1)
    monkeypatch.setattr(user_states, "CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(rebuild, "MARKER_SECONDS", 0.1)
    monkeypatch.setattr(Shop, "committed", lambda *_: journal.ends())
    rebuilt = rebuild._users(shop, 1)
    assert not rebuilt.taken_over
    header = decode_header(shop.store.header(USER_STATE, 1))
    assert header == journal.steps[-1].header


def test_item_states_lack_nothing_that_retention_takes_meanwhile(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.items.bounds", lambda *_: {1: (0, 9)})
    monkeypatch.setattr(Shop, "committed", lambda *_: {"item-updates": 0})

    def read(*_: Any, start: dict[int, int], strict: bool = False, **__: Any) -> Iterator[Any]:
        assert start == {1: 0}
        if strict:
            raise JournalGapError("Retention has deleted what was to be read next.")
        return iter([])

    monkeypatch.setattr(rebuild, "read_topic", read)
    with pytest.raises(JournalGapError):
        rebuild._items(shop, 1)


@pytest.mark.parametrize(
    ("steps", "missing"),
    [([], None), ([[0, 1], [], [2]], None), ([[1, 2]], 0), ([[0, 1], [3]], 2), ([[0], [0]], 1)],
)
def test_a_journal_with_a_gap_is_refused(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, steps: list[list[int]], missing: int | None
) -> None:
    class Entry:
        def __init__(self, rows: list[int]) -> None:
            self.steps = np.array(rows, np.uint64)
            self.journal = self

    def read(*_: Any) -> Iterator[Entry]:
        return map(Entry, steps)

    monkeypatch.setattr(rebuild, "read_journal", read)
    if missing is None:
        require_journal(shop, 1)
        return
    with pytest.raises(JournalGapError, match=f"partition 1 lacks row {missing}"):
        require_journal(shop, 1)


@pytest.mark.parametrize(
    ("first", "journal_from", "whole"),
    [(0, 1, True), (3, 0, True), (3, 1, False), (3, None, False)],
    ids=["all", "the first were aborted", "both begin late", "no journal"],
)
def test_item_updates_are_whole_where_archiving_began_with_the_shop(
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    first: int,
    journal_from: int | None,
    whole: bool,
) -> None:
    shop = replace(shop, archive=ArchiveConfig(url=str(tmp_path)))
    monkeypatch.setattr(rebuild, "bounds", lambda *_: {1: (6, 9)})
    kept = Archive(str(tmp_path))
    kept.append("item-updates", [Row(1, offset, 0, b"k", b"{}") for offset in range(first, 8)])
    if journal_from is not None:
        journal = Partition()
        for rows in ([(0, 0, 0, 0)], [(0, 1, 0, 1)]):
            journal.apply(events(rows))
        for step in journal.steps[journal_from:]:
            (value,) = encode(step.transaction.journal)
            kept.append("journal", [Row(2, step.transaction.first_offset, 0, b"2", value)])
    kept.commit()
    if whole:
        require_updates(shop, 1, 8)
        return
    with pytest.raises(JournalGapError, match="does not have all before"):
        require_updates(shop, 1, 8)
