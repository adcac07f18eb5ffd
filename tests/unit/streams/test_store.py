import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import SSLConnection
from redis.crc import key_slot
from redis.sentinel import SentinelManagedSSLConnection

from schemas.exceptions import UnreachableError
from streams import embedded
from streams import store as stores
from streams.config import RedisConfig
from streams.embedded import HOST, Child, free_port, start_child, start_store
from streams.exceptions import FencedError, StoreError
from streams.partitions import SLOTS, hash_tags
from streams.store import STORE_ERRORS, Call, Claim, Keys, Store, Writing

KIND = b"u"


def make(url: str, layout: str = "abcd", **changes: Any) -> Store:
    config = RedisConfig.model_validate({"url": url, "key_prefix": "shop", **changes})
    return Store(config, layout, partitions=8)


def keys_of(store: Store, count: int, partition: int = 3, kind: bytes = KIND) -> list[bytes]:
    return [store.key(kind, partition, b"%d" % number) for number in range(count)]


def read_owned(store: Store, claim: Claim, keys: Sequence[bytes]) -> list[bytes | None]:
    return store.read_all_owned([(claim, keys)])[0]


def intercept(store: Store, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Have `before` called with the number of each call of a store function."""
    monkeypatch.setattr(stores, "CALLS_AT_ONCE", 1)
    send, numbers = store._round_trip, iter(range(1_000))

    def counted(calls: Sequence[Call], parts: Keys) -> list[Any]:
        if calls:
            before(next(numbers))
        return send(calls, parts)

    monkeypatch.setattr(store, "_round_trip", counted)


def test_a_claim_hands_the_last_owners_header_on(store: str) -> None:
    mine = make(store)
    first = mine.claim(KIND, 3)
    assert (first.kind, first.partition, first.data) == (KIND, 3, None)
    mine.write(first, keys_of(mine, 2), [b"a", b"b"], b"header")
    assert mine.header(KIND, 3) == b"header"
    second = make(store).claim(KIND, 3)
    assert second.data == b"header"
    assert second.token > first.token
    assert mine.claim(KIND, 4).data is None
    with patch("streams.store.CALLS_AT_ONCE", 3):
        several = mine.claim_all(KIND, range(1, 8))
    assert [each.partition for each in several] == [*range(1, 8)]
    assert [each.data for each in several] == [None, None, b"header", *[None] * 4]
    assert several[2].token > second.token
    assert mine.claim_all(KIND, []) == []
    assert mine.claim(b"i", 3).data is None


def test_an_older_owner_changes_nothing(store: str) -> None:
    mine = make(store)
    old = mine.claim(KIND, 3)
    new = mine.claim(KIND, 3)
    keys = keys_of(mine, 3)
    mine.write(new, keys, [b"a", b"b", b"c"], b"new")
    with pytest.raises(FencedError, match="claimed partition 3"):
        mine.write(old, [*keys, keys_of(mine, 4)[3]], [b"x", b"", b"z", b"w"], b"old")
    assert mine.read(keys_of(mine, 4)) == [b"a", b"b", b"c", None]
    assert mine.header(KIND, 3) == b"new"


def test_an_owner_reads_until_another_claims(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "READ_KEYS", 7)
    mine = make(store)
    old = mine.claim(KIND, 3)
    keys = keys_of(mine, 23)
    mine.write(old, keys[::2], [b"%d" % number for number in range(0, 23, 2)], b"")
    expected = [b"%d" % number if number % 2 == 0 else None for number in range(23)]
    assert read_owned(mine, old, keys) == expected
    assert read_owned(mine, old, []) == []
    new = mine.claim(KIND, 3)
    with pytest.raises(FencedError):
        read_owned(mine, old, keys)
    assert read_owned(mine, new, keys) == expected
    with redis.Redis.from_url(store) as client:
        client.flushall()
    with pytest.raises(FencedError):
        read_owned(mine, new, keys)
    assert mine.read(keys) == [None] * 23


@pytest.mark.parametrize("at_once", [1, 2, 32])
def test_partitions_are_read_and_written_together(
    store: str, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(stores, "CALLS_AT_ONCE", at_once)
    monkeypatch.setattr(stores, "WRITE_KEYS", 2)
    monkeypatch.setattr(stores, "READ_KEYS", 2)
    mine = make(store)
    claims = {partition: mine.claim(KIND, partition) for partition in (3, 4, 5)}
    keys = {partition: keys_of(mine, 3, partition) for partition in claims}
    values = [b"a", b"b", b"c"]

    def write(header: bytes) -> None:
        mine.write_all([Writing(claims[at], keys[at], values, header) for at in claims])

    write(b"one")
    wanted = [(claims[at], keys[at]) for at in (5, 3)]
    assert mine.read_all_owned(wanted) == [values, values]
    assert [claim.writes for claim in claims.values()] == [2, 2, 2]
    mine.claim(KIND, 4)
    with pytest.raises(FencedError, match="claimed partition 4"):
        write(b"two")
    assert [mine.header(KIND, at) for at in claims] == [b"two", b"one", b"two"]
    assert [claim.writes for claim in claims.values()] == [4, 2, 4]
    with pytest.raises(FencedError, match="claimed partition 4"):
        mine.read_all_owned([(claims[at], []) for at in claims])
    assert mine.read_all_owned([]) == []
    mine.write_all([])


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_what_is_owned_and_what_is_not_are_read_together(
    store: str, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(stores, "CALLS_AT_ONCE", at_once)
    monkeypatch.setattr(stores, "READ_KEYS", 2)
    mine = make(store)
    claims = [mine.claim(KIND, partition) for partition in (3, 4)]
    keys = [keys_of(mine, 3, claim.partition) for claim in claims]
    for claim, names in zip(claims, keys, strict=True):
        mine.write(claim, names[:2], [b"%d" % claim.partition, b"b"], b"header")
    other = keys_of(mine, 3, kind=b"i")
    mine.put(other[1:], [b"y", b"z"])
    groups = [other, [], other[2:]]
    owned = [[b"3", b"b", None], [b"4", b"b", None]]
    free = [[None, b"y", b"z"], [], [b"z"]]
    assert mine.read_beside(list(zip(claims, keys, strict=True)), groups) == (owned, free)
    assert mine.read_beside([], groups) == ([], free)
    mine.claim(KIND, 4)
    with pytest.raises(FencedError, match="claimed partition 4"):
        mine.read_beside(list(zip(claims, keys, strict=True)), groups)


def test_a_write_under_way_does_not_keep_its_owner_from_reading(store: str) -> None:
    mine = make(store)
    claim, keys = mine.claim(KIND, 3), keys_of(mine, 2)
    mine.write(claim, keys, [b"a", b"b"], b"one")
    before = replace(claim)
    mine.write(claim, keys[:1], [b"A"], b"two")
    assert read_owned(mine, before, keys) == [b"A", b"b"]  # its answer has not come yet
    with pytest.raises(FencedError):
        mine.write(before, keys[:1], [b"a"], b"two")


def test_an_owner_from_before_the_store_was_emptied_changes_nothing(store: str) -> None:
    mine = make(store)
    old = mine.claim(KIND, 3)
    with redis.Redis.from_url(store) as client:
        client.flushall()
    with pytest.raises(FencedError):
        mine.write(old, keys_of(mine, 1), [b"old"], b"old")
    new = mine.claim(KIND, 3)
    assert (new.token > old.token, new.writes) == (True, old.writes)  # the token alone tells
    with pytest.raises(FencedError):
        mine.write(old, keys_of(mine, 1), [b"old"], b"old")
    mine.write(new, keys_of(mine, 1), [b"new"], b"new")
    with pytest.raises(FencedError):
        mine.write(old, keys_of(mine, 1), [b"old"], b"old")
    assert mine.read(keys_of(mine, 1)) == [b"new"]


def test_a_store_that_lost_the_last_writes_is_noticed(store: str) -> None:
    """As when a replica takes over before it had them: the token is the same, a state is old."""
    mine = make(store)
    claim = mine.claim(KIND, 3)
    keys = keys_of(mine, 2)
    mine.write(claim, keys, [b"a", b"b"], b"one")
    with redis.Redis.from_url(store) as client:
        header = client.dump(mine.header_key(KIND, 3).decode())
        mine.write(claim, keys[:1], [b"A"], b"two")
        assert read_owned(mine, claim, []) == []
        client.restore(mine.header_key(KIND, 3).decode(), 0, header, replace=True)  # pyright: ignore[reportArgumentType]
        client.set(keys[0].decode(), b"a")
    for act in (
        lambda: read_owned(mine, claim, []),
        lambda: read_owned(mine, claim, keys),
        lambda: mine.write(claim, keys[1:], [b"B"], b"three"),
    ):
        with pytest.raises(FencedError, match="failed over"):
            act()
    assert mine.read(keys) == [b"a", b"b"]
    again = mine.claim(KIND, 3)
    assert (again.data, again.writes) == (b"one", 1)
    mine.write(again, keys, [b"A", b"B"], b"three")
    assert read_owned(mine, again, keys) == [b"A", b"B"]


@pytest.mark.parametrize(
    "url",
    ["redis+sentinel://127.0.0.1:1", "redis+sentinel:///shop", "redis+sentinel://h:port/shop"],
)
def test_a_sentinel_address_that_is_none(url: str) -> None:
    with pytest.raises(UnreachableError, match="STARCAST_REDIS__URL"):
        make(url)


def test_credentials_for_a_primary_are_decoded() -> None:
    client = make("redis+sentinel://a%40b:c%2Fd%3A@one/shop").client
    told = client.connection_pool.connection_kwargs
    assert (told["username"], told["password"]) == ("a@b", "c/d:")


def test_sentinels_and_primary_speak_tls_and_have_logins_of_their_own() -> None:
    url = "rediss+sentinel://bob:pw@one:1,[::1]/shop?ssl_ca_certs=/ca.pem&sentinel_password=other"
    pool = make(url).client.connection_pool
    assert pool.connection_class is SentinelManagedSSLConnection
    sentinels = [each.connection_pool for each in pool.sentinel_manager.sentinels]
    assert {each.connection_class for each in sentinels} == {SSLConnection}
    told = [each.connection_kwargs for each in (pool, *sentinels)]
    assert [each["ssl_ca_certs"] for each in told] == ["/ca.pem"] * 3
    assert [each["username"] for each in told] == ["bob", None, None]
    assert [each["password"] for each in told] == ["pw", "other", "other"]
    assert [(each["host"], each["port"]) for each in told[1:]] == [("one", 1), ("::1", 26379)]


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel"])
@pytest.mark.parametrize(
    "password", ["secret/x", "1/secret", "secret?x", "secret#x", "sec\u2100ret"]
)
def test_a_password_that_is_not_encoded_is_not_told(scheme: str, password: str) -> None:
    with pytest.raises(UnreachableError, match=r"%2F") as caught:
        make(f"{scheme}://:{password}@h:1/shop")
    assert "sec" not in str(caught.value).replace("cannot be read", "")


@pytest.mark.parametrize("url", ["redis://h", "redis+sentinel://h/shop"])
def test_an_option_that_an_address_does_not_take(url: str) -> None:
    with pytest.raises(UnreachableError, match=r"ssl_ca_certs.*STARCAST_REDIS__URL"):
        make(f"{url}?ssl_ca_certs=/ca.pem")


def test_tokens_rise_though_the_clock_goes_back(store: str) -> None:
    mine = make(store)
    first = mine.claim(KIND, 3)
    ahead = first.token + 10**12
    with redis.Redis.from_url(store) as client:
        client.hset(mine.header_key(KIND, 3).decode(), "token", str(ahead))
    assert [mine.claim(KIND, 3).token for _ in range(3)] == [ahead + 1, ahead + 2, ahead + 3]


def test_a_write_goes_in_chunks_and_the_header_comes_last(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make(store)
    claim = mine.claim(KIND, 3)
    keys = keys_of(mine, 1_234)
    seen: list[tuple[int, bytes | None]] = []

    def look(_: int) -> None:
        there = sum(value is not None for value in mine.read(keys))
        seen.append((there, mine.header(KIND, 3)))

    intercept(mine, monkeypatch, look)
    mine.write(claim, keys, [b"%d" % number for number in range(1_234)], b"header")
    assert seen == [(0, None), (500, None), (1_000, None)]
    assert mine.header(KIND, 3) == b"header"
    assert mine.read(keys) == [b"%d" % number for number in range(1_234)]


def test_an_owner_that_loses_the_partition_between_two_chunks_stops(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make(store)
    claim = mine.claim(KIND, 3)
    mine.write(claim, [], [], b"before")
    new: list[Claim] = []

    def lose(number: int) -> None:
        if number == 1:
            new.append(make(store).claim(KIND, 3))

    intercept(mine, monkeypatch, lose)
    keys = keys_of(mine, 700)
    with pytest.raises(FencedError):
        mine.write(claim, keys, [b"x"] * 700, b"after")
    assert mine.read(keys) == [b"x"] * 500 + [None] * 200
    assert new[0].data == mine.header(KIND, 3) == b"before"


def test_an_empty_value_deletes_and_an_empty_header_stays(store: str) -> None:
    mine = make(store)
    claim = mine.claim(KIND, 3)
    keys = keys_of(mine, 3)
    mine.write(claim, keys, [b"a", b"b", b"c"], b"header")
    mine.write(claim, keys, [b"", b"B", b""], b"")
    assert mine.read(keys) == [None, b"B", None]
    assert mine.header(KIND, 3) == b"header"
    mine.write(claim, [], [], b"later")
    assert mine.header(KIND, 3) == b"later"


def test_values_come_in_the_order_of_their_keys(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "READ_KEYS", 7)
    monkeypatch.setattr(stores, "WRITE_KEYS", 5)
    mine = make(store)
    keys = keys_of(mine, 23)
    mine.put(keys[::2], [bytes([number, 0, 255]) for number in range(0, 23, 2)])
    expected = [bytes([number, 0, 255]) if number % 2 == 0 else None for number in range(23)]
    assert mine.read(keys) == expected
    assert mine.read(keys[::-1]) == expected[::-1]
    assert mine.read([]) == []


def test_a_scan_finds_one_kind_of_one_partition(store: str) -> None:
    shops = [
        make(store, key_prefix=prefix) for prefix in ("shop", "sh?p", "s*", "[s]hop", "s\\hop")
    ]
    for each in shops:
        for kind, partition in ((KIND, 3), (KIND, 4), (b"i", 3)):
            each.put(keys_of(each, 5, partition, kind), [b"x"] * 5)
        each.write(each.claim(KIND, 3), [], [], b"header")
    for each in shops:
        assert set(each.scan(KIND, 3)) == set(keys_of(each, 5))


def walked(store: Store) -> dict[int, set[bytes]]:
    found = {partition: set[bytes]() for partition in range(8)}
    for step in store.walk(KIND):
        for partition, keys in step.items():
            found[partition].update(keys)
    return found


def test_a_walk_finds_one_kind_of_all_partitions(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SCAN_KEYS", 10)
    shops = [make(store, key_prefix=prefix) for prefix in ("shop", "s*")]
    for each in shops:
        for partition in range(1, 8):
            each.put(keys_of(each, 5 * partition, partition), [b"x"] * 5 * partition)
        each.put(keys_of(each, 5, 3, b"i"), [b"x"] * 5)
        each.write(each.claim(KIND, 3), [], [], b"header")
    for each in shops:
        assert walked(each) == {at: set(keys_of(each, 5 * at, at)) for at in range(8)}
        steps = [sum(map(len, step.values())) for step in each.walk(KIND)]
        assert len(steps) > 5
        assert max(steps) < 50


def test_layouts_stand_side_by_side(store: str) -> None:
    old, new = make(store), make(store, layout="ef01")
    old.write(old.claim(KIND, 3), keys_of(old, 1), [b"old"], b"old header")
    claim = new.claim(KIND, 3)
    assert claim.data is None
    new.write(claim, keys_of(new, 1), [b"new"], b"new header")
    assert (old.read(keys_of(old, 1)), old.header(KIND, 3)) == ([b"old"], b"old header")
    assert old.plain_key("v:x") == new.plain_key("v:x")


@pytest.fixture
def full(store: str) -> Iterator[str]:
    """A store that has no memory left."""
    with redis.Redis.from_url(store) as client:
        client.config_set("maxmemory", "1")
        yield store
        client.config_set("maxmemory", "0")


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.claim(KIND, 3),
        lambda store: store.write(Claim(KIND, 3, 1, None), keys_of(store, 1), [b"x"], b""),
        lambda store: store.write(Claim(KIND, 3, 1, None), keys_of(store, 1), [b""], b""),
        lambda store: store.put(keys_of(store, 1), [b"x"]),
    ],
    ids=["claim", "write", "delete", "put"],
)
def test_a_full_store_says_so(full: str, act: Callable[[Store], object]) -> None:
    mine = make(full)
    with redis.Redis.from_url(full) as client:
        client.config_set("maxmemory", "0")
        claim = mine.claim(KIND, 3)  # loads the functions
        client.config_set("maxmemory", "1")
    with pytest.raises(StoreError, match=r"full.*maxmemory'\. Give.*deletes nothing either"):
        act(mine)
    assert mine.read(keys_of(mine, 1)) == read_owned(mine, claim, keys_of(mine, 1)) == [None]


ACTS: Sequence[Callable[[Store], object]] = (
    lambda store: store.claim(KIND, 3),
    lambda store: store.header(KIND, 3),
    lambda store: store.write(Claim(KIND, 3, 1, None), keys_of(store, 1), [b"x"], b""),
    lambda store: store.read(keys_of(store, 1)),
    lambda store: read_owned(store, Claim(KIND, 3, 1, None), keys_of(store, 1)),
    lambda store: store.put(keys_of(store, 1), [b"x"]),
    lambda store: list(store.scan(KIND, 3)),
    lambda store: list(store.walk(KIND)),
    lambda store: store.ping(),
)


def test_a_store_that_is_not_there() -> None:
    nowhere = make(f"redis://{HOST}:{free_port()}/0")
    for act in ACTS:
        with pytest.raises(StoreError, match=r"answer: .*[^.]\. Check.*STARCAST_REDIS__URL"):
            act(nowhere)


def test_a_store_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "ANSWER_SECONDS", 0.2)
    with start_store(tmp_path) as child:
        mine = make(child.address)
        mine.ping()
        os.kill(child.process.pid, signal.SIGSTOP)
        try:
            for act in ACTS:
                started = time.monotonic()
                with pytest.raises(StoreError, match="does not answer"):
                    act(mine)
                assert time.monotonic() - started < 2
        finally:
            os.kill(child.process.pid, signal.SIGCONT)
        mine.ping()


def test_an_address_that_is_none() -> None:
    with pytest.raises(UnreachableError, match="STARCAST_REDIS__URL"):
        make("http://127.0.0.1")


@contextmanager
def one_node_cluster(folder: Path, port: int | None = None) -> Generator[Child]:
    port = port or free_port()
    command = [embedded._store_binary(), "--port", str(port), "--bind", HOST, "--save", ""]
    command += ["--cluster-enabled", "yes", "--dir", str(folder)]
    command += ["--cluster-port", str(free_port())]

    def ready() -> bool:
        try:
            with redis.Redis(HOST, port) as client:
                state: Any = client.execute_command("CLUSTER INFO")
                if state["cluster_slots_assigned"] == "0":
                    client.execute_command("CLUSTER ADDSLOTSRANGE", 0, SLOTS - 1)
                return state["cluster_state"] == "ok"
        except redis.ConnectionError:
            return False

    with start_child("cluster", command, f"redis://{HOST}:{port}", folder, ready) as child:
        yield child


def test_a_cluster_takes_the_same(tmp_path: Path) -> None:
    with one_node_cluster(tmp_path) as child:
        mine = make(child.address, cluster=True)
        old, new = mine.claim(KIND, 3), mine.claim(KIND, 3)
        keys = keys_of(mine, 1_100)
        mine.write(new, keys, [b"x"] * 1_100, b"header")
        with pytest.raises(FencedError):
            mine.write(old, keys[:1], [b"old"], b"")
        others = keys_of(mine, 3, partition=6)
        mine.put(others, [b"a", b"b", b"c"])
        vectors = [mine.plain_key(f"v:{number}") for number in range(9)]  # in slots of their own
        mine.put(vectors, [b"v"] * 9)
        assert mine.read(vectors) == [b"v"] * 9
        assert read_owned(mine, new, keys) == [b"x"] * 1_100
        assert mine.read([*others, *keys]) == [b"a", b"b", b"c"] + [b"x"] * 1_100
        assert mine.header(KIND, 3) == b"header"
        assert set(mine.scan(KIND, 3)) == set(keys)
        everything = {at: set[bytes]() for at in range(8)} | {3: set(keys), 6: set(others)}
        assert walked(mine) == everything
        mine.ping()
        mine.close()


def test_a_cluster_that_is_down_is_waited_for(tmp_path: Path) -> None:
    port = free_port()
    mine = make(f"redis://{HOST}:{port}", cluster=True)  # connects when first used

    def is_down() -> None:
        for act in ACTS:
            with pytest.raises(StoreError, match=r"does not answer.*STARCAST_REDIS__URL"):
                act(mine)

    is_down()
    for _ in range(2):
        with one_node_cluster(tmp_path, port):
            mine.ping()
            assert mine.claim(KIND, 3).partition == 3
        is_down()
        with pytest.raises(STORE_ERRORS):
            mine.client.xrevrange("windows")
    mine.close()


@pytest.mark.parametrize("url", [f"http://{HOST}", f"redis://{HOST}/1", "unix:///store.sock"])
def test_a_cluster_address_that_is_none(url: str) -> None:
    with pytest.raises(UnreachableError, match="STARCAST_REDIS__URL"):
        make(url, cluster=True)
    make(f"redis://{HOST}/0", cluster=True).close()


@given(st.integers(1, 512))
def test_tags_spread_evenly_over_the_slots(partitions: int) -> None:
    slots = [key_slot(b"{%b}" % tag) for tag in hash_tags(partitions)]
    assert slots == sorted(set(slots))
    for partition, slot in enumerate(slots):
        assert partition * SLOTS // partitions <= slot < (partition + 1) * SLOTS // partitions


@given(st.integers(0, 7), st.binary(max_size=20), st.sampled_from([b"u", b"i", b"a", b"b"]))
def test_a_partition_lies_in_one_slot(partition: int, id: bytes, kind: bytes) -> None:
    store = make("redis://127.0.0.1:1/0")
    slot = key_slot(b"{%b}" % hash_tags(8)[partition])
    assert key_slot(store.key(kind, partition, id)) == slot
    assert key_slot(store.header_key(kind, partition)) == slot
    assert store.key(kind, partition, id).startswith(store.prefix(kind, partition))
