import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from model.events import Rows, blank
from model.exceptions import GapError, LayoutError
from model.ids import Hashes
from model.state import LAYOUT_HASH, USER
from model.state_bytes import to_bytes
from schemas.journal import TOPICS, Transaction
from streams import store as stores
from streams import user_states
from streams.config import ArchiveConfig, KafkaConfig, RedisConfig, StatesConfig
from streams.exceptions import FencedError, JournalGapError, StoreAheadError, StoreError
from streams.reader import USER_STATE, hashes_of, partition_keys
from streams.store import Store
from streams.user_states import HEADER, Taken, UserStates, decode_header
from tests.unit.streams.journals import USERS, Partition, events, told

PARTITION = 2
DAY_MS = 86_400_000

history = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3), st.integers(0, 9)),
    min_size=1,
    max_size=40,
)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Partition], None]:
    """Has a partition's transactions read in place of those in Kafka."""

    def stands(partition: Partition) -> None:
        def read(
            kafka: KafkaConfig, archived: ArchiveConfig, starts: Mapping[int, int]
        ) -> Iterator[tuple[int, Transaction | None]]:
            assert starts.keys() == {PARTITION}
            return told(PARTITION, partition.read(starts[PARTITION]))

        monkeypatch.setattr(user_states, "read_journals", read)

    return stands


def read(states: UserStates, users: Hashes) -> Rows:
    (rows,), _ = states.read({PARTITION: users})
    return rows


def make(url: str, prefix: str = "shop", exactly_once: bool = True, **config: Any) -> UserStates:
    store = Store(RedisConfig(url=SecretStr(url), key_prefix=prefix), LAYOUT_HASH, 4)
    return UserStates(
        store,
        KafkaConfig(exactly_once=exactly_once),
        ArchiveConfig(),
        StatesConfig.model_validate(config),
    )


def batches(*rows: list[tuple[int, int, int, int]]) -> Partition:
    partition = Partition()
    for each in rows:
        partition.apply(events(each))
    return partition


def stored(states: UserStates) -> list[bytes | None]:
    keys = partition_keys(states._store, USER_STATE, PARTITION, USERS)
    return states._store.read(keys)


def expected(partition: Partition) -> list[bytes | None]:
    places = partition.users.place(USERS)
    rows = partition.users.rows[places]
    return [value or None for value in to_bytes(rows)]  # a blank state has no key


ONE = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 0, 2), (0, 0, 0, 0), (1, 0, 2, 3)]
TWO = [(2, 0, 0, 4), (0, 3, 1, 5), (0, 2, 0, 6), (1, 1, 1, 1)]


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=history, cuts=st.sets(st.integers(1, 39), max_size=6), data=st.data())
def test_recovery_from_any_prefix_is_the_whole(
    store: str,
    journal: Callable[[Partition], None],
    rows: list[tuple[int, int, int, int]],
    cuts: set[int],
    data: st.DataObject,
) -> None:
    """The store stands after any batch, with any part of the next one's states written as well."""
    made, partition = events(rows), Partition()
    for batch in np.split(made, sorted(cut for cut in cuts if cut < len(made))):
        partition.apply(batch)
    whole, whole_header = expected(partition), partition.steps[-1].header
    journal(partition)
    states = make(store, prefix=uuid4().hex)
    old = states._store.claim(USER_STATE, PARTITION)

    def write(users: Any, rows: Rows, header: bytes) -> None:
        keys = partition_keys(states._store, USER_STATE, PARTITION, users)
        states._store.write(old, keys, to_bytes(rows), header)

    reached = data.draw(st.integers(0, len(partition.steps)), label="batches in the store")
    for step in partition.steps[:reached]:
        write(step.users, step.states, step.header.tobytes())
    if reached < len(partition.steps):
        step = partition.steps[reached]
        part = data.draw(st.integers(0, len(step.users)), label="states of the next batch")
        write(step.users[:part], step.states[:part], b"")

    assert states.claim({PARTITION: partition.ends()})[PARTITION] == partition.ends()
    assert stored(states) == whole
    assert states[PARTITION].header == whole_header
    header = decode_header(states._store.header(USER_STATE, PARTITION))
    assert header == whole_header
    assert to_bytes(read(states, USERS)) == [value or b"" for value in whole]
    with pytest.raises(FencedError):
        write(USERS[:1], read(states, USERS[:1]), b"")


def test_a_long_recovery_goes_on_with_the_next_claim(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that does not poll leaves its group."""
    long, short = batches(ONE, TWO, ONE), batches(TWO)
    asked: list[Mapping[int, int]] = []

    def read(
        _: KafkaConfig, __: ArchiveConfig, starts: Mapping[int, int]
    ) -> Iterator[tuple[int, Transaction | None]]:
        asked.append(starts)
        if 1 in starts:
            yield from told(1, short.read(starts[1]))
        yield from told(PARTITION, long.read(starts[PARTITION]))

    monkeypatch.setattr(user_states, "read_journals", read)
    monkeypatch.setattr(user_states, "RECOVERY_ROWS", 1)
    monkeypatch.setattr(user_states, "CLAIM_SECONDS", 0.0)
    states = make(store)
    committed = {1: short.ends(), PARTITION: long.ends()}
    claimed = states.claim(committed)
    assert claimed == {}  # neither has been read to its end in no time
    while PARTITION not in claimed:
        claimed = states.claim({PARTITION: committed[PARTITION]})
    assert claimed == {PARTITION: long.ends()}
    assert stored(states) == expected(long)
    starts = [each[PARTITION] for each in asked]
    assert len(starts) > 3
    assert starts == sorted(starts)


def test_an_empty_partition_begins_at_the_beginning(
    store: str, journal: Callable[[Partition], None]
) -> None:
    journal(Partition())
    states = make(store)
    nothing: dict[str, int] = dict.fromkeys(TOPICS, -1)
    assert states.claim({PARTITION: nothing})[PARTITION] == nothing
    assert states[PARTITION].header == decode_header(None)
    assert stored(states) == [None] * len(USERS)


def test_a_long_journal_is_applied_in_portions(
    store: str, journal: Callable[[Partition], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_states, "RECOVERY_ROWS", 6)
    partition = batches(ONE, TWO, ONE, TWO, ONE)
    journal(partition)
    states = make(store)
    states.claim({PARTITION: partition.ends()})
    assert stored(states) == expected(partition)
    assert states[PARTITION].header == partition.steps[-1].header


def test_offsets_that_went_back_stop_the_partition(
    store: str, journal: Callable[[Partition], None]
) -> None:
    partition = batches(ONE, TWO)
    journal(partition)
    ends = partition.ends()
    with pytest.raises(
        StoreAheadError,
        match=rf"partition 2 have applied behavior up to offset {ends['behavior']}, .* is 0",
    ):
        make(store).claim({PARTITION: ends | {"behavior": -1}})


def test_offsets_that_kafka_has_forgotten_are_told_for_all_partitions(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a group without workers for a week."""
    long, short = batches(ONE, TWO), batches(ONE)

    def read(*arguments: Any) -> Iterator[tuple[int, Transaction | None]]:
        for number, partition in ((1, short), (PARTITION, long)):
            yield from told(number, partition.read(arguments[-1][number]))

    monkeypatch.setattr(user_states, "read_journals", read)
    nothing: dict[str, int] = dict.fromkeys(TOPICS, -1)
    with pytest.raises(StoreAheadError, match=r"no committed offsets of starcast-scorer") as error:
        make(store).claim({1: nothing, PARTITION: nothing})
    assert str(error.value).splitlines()[1:] == [
        f"{topic},{number},{end}"
        for number, partition in ((1, short), (PARTITION, long))
        for topic, end in partition.ends().items()
        if end >= 0
    ]


def test_a_journal_that_lost_its_end_stops_the_partition(
    store: str, journal: Callable[[Partition], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_states, "MARKER_SECONDS", 0.1)
    partition = batches(ONE)
    journal(partition)
    ends = partition.ends()
    with pytest.raises(JournalGapError, match="reviews partition 2 is 9, but the journal ends at"):
        make(store).claim({PARTITION: ends | {"reviews": 9}})


def test_a_journal_whose_marker_is_late_is_waited_for(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka writes a commit's markers to the partitions one by one, offsets perhaps first."""
    partition = batches(ONE, TWO)
    started = time.monotonic()

    def read(*arguments: Any) -> Iterator[tuple[int, Transaction | None]]:
        late = time.monotonic() < started + 0.2
        return told(
            PARTITION,
            [
                each
                for each in partition.read(arguments[-1][PARTITION])
                if not late or each is partition.steps[0].transaction
            ],
        )

    monkeypatch.setattr(user_states, "read_journals", read)
    states = make(store)
    assert states.claim({PARTITION: partition.ends()})[PARTITION] == partition.ends()
    assert stored(states) == expected(partition)
    assert time.monotonic() - started < 2


def test_without_transactions_the_journal_says_where_to_go_on(
    store: str, journal: Callable[[Partition], None]
) -> None:
    partition = batches(ONE, TWO)
    journal(partition)
    states = make(store, exactly_once=False)
    assert states.claim({PARTITION: dict.fromkeys(TOPICS, 1)})[PARTITION] == partition.ends()


def test_without_transactions_an_entry_that_came_late_is_not_applied(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch that was given up, and worked on again as part of a longer one."""
    partition = batches(ONE)
    given_up = deepcopy(partition).apply(events(TWO[1::-1])).transaction
    again = partition.apply(events(TWO))
    at = given_up.last_offset + 1
    entries = [
        partition.steps[0].transaction,
        given_up,
        replace(again.transaction, first_offset=at, last_offset=at),
    ]
    monkeypatch.setattr("streams.journal._entries", lambda *_: told(PARTITION, entries))
    states = make(store, exactly_once=False)
    states.claim({PARTITION: partition.ends()})
    assert stored(states) == expected(partition)
    assert states[PARTITION].header["partition"] == again.header["partition"]
    assert states[PARTITION].header["journal"] == at + 1
    with pytest.raises(GapError, match="missing"):
        make(store, "strict").claim({PARTITION: partition.ends()})


def test_a_hole_in_the_journal_is_an_error(
    store: str, journal: Callable[[Partition], None]
) -> None:
    partition = batches(ONE, TWO, ONE)
    del partition.steps[1]
    journal(partition)
    with pytest.raises(GapError, match="missing"):
        make(store).claim({PARTITION: partition.ends()})


@pytest.mark.parametrize("name", ["LAYOUT_HASH", "FEATURE_HASH"])
def test_a_journal_of_another_layout_is_refused(
    store: str,
    journal: Callable[[Partition], None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    partition = batches(ONE)
    journal(partition)
    monkeypatch.setattr(user_states, name, "12345678")
    with pytest.raises(JournalGapError, match=r"this version has .*12345678"):
        make(store).claim({PARTITION: partition.ends()})


def test_states_are_read_once_and_written_through(
    store: str, journal: Callable[[Partition], None]
) -> None:
    partition = batches(ONE)
    journal(partition)
    states = make(store)
    states.claim({PARTITION: partition.ends()})
    first = read(states, USERS[:4])  # the last of whom is in no batch
    step = partition.apply(events(TWO))
    states.take(taken := Taken(PARTITION, step.users, step.states, step.header))
    states.write([taken])
    assert stored(states) == expected(partition)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states._store, "_send", lambda *_: pytest.fail("read again"))
        again = read(states, USERS[:4])
    assert to_bytes(again) == [value or b"" for value in expected(partition)[:4]]
    assert to_bytes(first) != to_bytes(again)
    states.drop([PARTITION, 99])
    states.claim({PARTITION: partition.ends()})
    assert to_bytes(read(states, USERS[:4])) == to_bytes(again)


def test_few_states_at_hand_give_the_same(store: str, journal: Callable[[Partition], None]) -> None:
    partition = batches(ONE)
    journal(partition)
    states = make(store, cache_users=2)
    states.claim({PARTITION: partition.ends()})
    step = partition.apply(events(TWO))
    states.take(taken := Taken(PARTITION, step.users, step.states, step.header))
    states.write([taken])
    for user, value in zip(USERS, expected(partition), strict=True):
        assert to_bytes(read(states, np.array([user]))) == [value or b""]
    assert len(states[PARTITION].users.rows) <= len(step.users) + 1  # the last batch's, and one


def test_an_owner_that_was_replaced_is_refused(
    store: str, journal: Callable[[Partition], None]
) -> None:
    partition = batches(ONE)
    journal(partition)
    old, new = make(store), make(store)
    old.claim({PARTITION: partition.ends()})
    new.claim({PARTITION: partition.ends()})
    step = partition.steps[0]
    taken = [Taken(PARTITION, step.users, step.states, step.header)]
    with pytest.raises(FencedError):
        old.write(taken)
    new.write(taken)


def test_states_of_a_store_that_was_emptied_are_not_taken_for_blank(
    store: str, journal: Callable[[Partition], None]
) -> None:
    """A worker that has not read a user yet would score them as one who has just come."""
    partition = batches(ONE)
    journal(partition)
    states = make(store)
    states.claim({PARTITION: partition.ends()})
    states.drop([PARTITION])
    states.claim({PARTITION: partition.ends()})
    with redis.Redis.from_url(store) as client:
        client.flushall()
    with pytest.raises(FencedError, match="the store has lost writes"):
        read(states, USERS[:2])
    states.drop([PARTITION])
    states.claim({PARTITION: partition.ends()})
    assert to_bytes(read(states, USERS)) == [v or b"" for v in expected(partition)]


def test_states_expire_by_the_time_of_events(
    store: str, journal: Callable[[Partition], None]
) -> None:
    made = events([(0, 0, 0, 0), (1, 0, 0, 1), (2, 0, 0, 2)])
    made["time"] += np.array([0, 5, 10]) * DAY_MS
    partition = Partition()
    partition.apply(made)
    journal(partition)
    states = make(store, expire_after_days=6)
    states.claim({PARTITION: partition.ends()})
    kept = expected(partition)
    latest = int(made["time"].max())
    read(states, USERS)  # into the cache
    for watermark in (0, latest - 5 * DAY_MS):
        sweep(states, watermark)
        assert stored(states) == kept
    sweep(states, latest)
    assert stored(states) == [None, *kept[1:]]
    assert to_bytes(read(states, USERS)) == [b"", *(value or b"" for value in kept[1:])]
    sweep(states, latest)
    assert stored(states) == [None, *kept[1:]]
    assert decode_header(states._store.header(USER_STATE, PARTITION)) == partition.steps[0].header
    forever = make(store)
    forever.claim({PARTITION: partition.ends()})
    sweep(forever, latest + 999 * DAY_MS)
    assert stored(forever) == [None, *kept[1:]]


def test_an_expired_state_does_not_come_back_with_the_last_batch(
    store: str, journal: Callable[[Partition], None]
) -> None:
    """Few are at hand, and those of the last batch are held for the next."""
    made = events([(0, 0, 0, 0), (1, 0, 0, 1)])
    made["time"] += np.array([0, 10]) * DAY_MS
    partition = Partition()
    partition.apply(made)
    journal(partition)
    states = make(store, cache_users=0, expire_after_days=6)
    states.claim({PARTITION: partition.ends()})
    sweep(states, int(made["time"].max()))
    assert to_bytes(read(states, USERS[:1])) == [b""]


def test_a_user_of_whom_no_event_has_a_time_is_not_taken_for_an_old_one(
    store: str, journal: Callable[[Partition], None]
) -> None:
    partition = batches([(0, 0, 2, 0)])  # a text alone
    journal(partition)
    states = make(store, expire_after_days=6)
    states.claim({PARTITION: partition.ends()})
    sweep(states, NOW)
    assert stored(states) == expected(partition)


def test_claims_are_looked_at_now_and_then(
    store: str, journal: Callable[[Partition], None]
) -> None:
    journal(Partition())
    states = make(store)
    states.claim({PARTITION: dict.fromkeys(TOPICS, -1)})
    states.check()
    states._store.claim(USER_STATE, PARTITION)
    states.check()  # it has just looked
    states._check_at = 0.0
    with pytest.raises(FencedError):
        states.check()
    states.drop([PARTITION])  # another's by now
    states._check_at = 0.0
    states.check()


NOW = 1_700_000_000_000
PARTITIONS = (0, 1, 2)


@pytest.fixture
def aged(store: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], UserStates]:
    """Makes states whose users, numbered from 1, are so many days old and lie in `PARTITIONS`."""

    def read(
        _: KafkaConfig, __: ArchiveConfig, starts: Mapping[int, int]
    ) -> Iterator[tuple[int, Transaction | None]]:
        return chain(*(told(partition, []) for partition in starts))

    def make_aged(days: list[int]) -> UserStates:
        states = make(store, prefix=uuid4().hex, expire_after_days=6)
        nothing: dict[str, int] = dict.fromkeys(TOPICS, -1)
        states.claim(dict.fromkeys(PARTITIONS, nothing))
        for partition in PARTITIONS:
            users = np.arange(1 + partition, 1 + len(days), 3).astype(np.uint64)
            rows = blank(USER, len(users))
            rows["last_time"] = NOW - np.array(days[partition::3], np.int64) * DAY_MS
            taken = Taken(partition, users, rows, states[partition].header)
            states.take(taken)
            states.write([taken])
        return states

    monkeypatch.setattr(user_states, "read_journals", read)
    return make_aged


def left(states: UserStates) -> set[int]:
    """The users in the store."""
    return {
        int(user)
        for partition in PARTITIONS
        for user in hashes_of(states._store.scan(USER_STATE, partition))
    }


def begin_sweep(states: UserStates, watermark: int = NOW) -> None:
    states._sweep_at = 0.0
    states.expire(PARTITIONS, watermark)


def sweep(states: UserStates, watermark: int) -> None:
    """A whole walk."""
    states._sweep_at = 0.0
    states.expire([*states._held], watermark)
    while states._walk is not None:
        states.expire([*states._held], watermark)


@pytest.fixture
def begun(aged: Callable[[list[int]], UserStates], monkeypatch: pytest.MonkeyPatch) -> UserStates:
    """States that are all too old, after the first slice of a sweep by single steps."""
    monkeypatch.setattr(stores, "SCAN_KEYS", 5)
    monkeypatch.setattr(user_states, "SLICE_STEPS", 1)
    states = aged([9] * 300)
    begin_sweep(states)
    return states


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(days=st.lists(st.integers(0, 12), max_size=200), steps=st.integers(1, 5))
def test_a_sweep_in_slices_deletes_what_a_whole_one_does(
    aged: Callable[[list[int]], UserStates], days: list[int], steps: int
) -> None:
    whole, sliced = aged(days), aged(days)
    sweep(whole, NOW)
    asked: list[int] = []
    ask = sliced._store._answered

    def counted(*arguments: Any) -> Any:
        asked.append(len(arguments))
        return ask(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "SCAN_KEYS", 5)
        patch.setattr(user_states, "SLICE_STEPS", steps)
        patch.setattr(sliced._store, "_answered", counted)
        begin_sweep(sliced)
        while sliced._walk is not None:
            asked.clear()
            sliced.expire(PARTITIONS, NOW)
            assert len(asked) <= 2 * steps  # a read and a write each
        assert time.monotonic() < sliced._sweep_at  # the next is not due yet
        sliced.expire(PARTITIONS, NOW)
        assert sliced._walk is None
    kept = {user for user, age in enumerate(days, 1) if age <= 6}
    assert left(whole) == left(sliced) == kept


def test_a_slice_ends_in_time(
    aged: Callable[[list[int]], UserStates], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SCAN_KEYS", 5)
    monkeypatch.setattr(user_states, "SLICE_SECONDS", 0.0)
    states = aged([9] * 300)
    begin_sweep(states)
    assert len(left(states)) > 200


def test_a_sweep_leaves_a_partition_that_went(begun: UserStates) -> None:
    before = left(begun)
    begun.drop([1])
    while begun._walk is not None:
        begun.expire([0, 2], NOW)
    assert left(begun) == {user for user in before if user % 3 == 2}
    assert before


def test_a_user_who_came_back_between_slices_stays(begun: UserStates) -> None:
    back = np.array([user for user in left(begun) if user % 3 == 1], np.uint64)
    (rows,), _ = begun.read({0: back})
    rows["last_time"] = NOW
    taken = Taken(0, back, rows, begun[0].header)
    begun.take(taken)
    begun.write([taken])
    while begun._walk is not None:
        begun.expire(PARTITIONS, NOW)
    assert left(begun) == set(back.tolist())
    assert (begun.read({0: back})[0][0]["last_time"] == NOW).all()


def test_a_sweep_that_failed_begins_anew(
    begun: UserStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(begun._store.client, "scan", Mock(side_effect=redis.ConnectionError))
        with pytest.raises(StoreError):
            begun.expire(PARTITIONS, NOW)
    begun.expire(PARTITIONS, NOW)
    assert begun._walk is None
    assert left(begun)
    sweep(begun, NOW)
    assert not left(begun)


def test_a_sweep_by_an_old_owner_deletes_nothing(aged: Callable[[list[int]], UserStates]) -> None:
    states = aged([9] * 300)
    for partition in PARTITIONS:
        states._store.claim(USER_STATE, partition)
    with pytest.raises(FencedError):
        begin_sweep(states)
    assert len(left(states)) == 300


@given(
    st.integers(0, 2**63),
    st.lists(st.integers(-1, 2**62), min_size=3, max_size=3),
    st.integers(0, 2**63),
    st.floats(0, 1e15),
)
def test_a_header_is_read_as_it_was_written(
    at: int, ends: list[int], step: int, total: float
) -> None:
    header = decode_header(None)
    header["journal"], header["ends"] = at, ends
    header["partition"]["step"], header["partition"]["rating_sum"] = step, total
    assert decode_header(header.tobytes()) == header
    assert decode_header(header.tobytes()).dtype == HEADER


def test_a_header_of_another_size_is_refused() -> None:
    with pytest.raises(LayoutError, match="has 3 bytes"):
        decode_header(b"abc")
    assert decode_header(None)["ends"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("cache_users", [0, 2, 1_000])
def test_states_that_were_taken_are_read_before_they_are_written(
    store: str, journal: Callable[[Partition], None], cache_users: int
) -> None:
    """The next batch goes on from them, however few are kept at hand."""
    partition = batches(ONE)
    journal(partition)
    states = make(store, cache_users=cache_users)
    states.claim({PARTITION: partition.ends()})
    before = stored(states)
    step = partition.apply(events(TWO))
    states.take(taken := Taken(PARTITION, step.users, step.states, step.header))
    for user, value in zip(USERS, expected(partition), strict=True):
        assert to_bytes(read(states, np.array([user]))) == [value or b""]
    assert stored(states) == before
    states.write([taken])
    assert stored(states) == expected(partition)
