"""The store: states, attributes, vectors and partition headers in Redis or Valkey.

A partition's keys share a hash tag. Only the worker that claimed the partition last may write
them: each write carries the claim's token, and the store refuses an older one (`store.lua`). The
store counts an owner's writes, and refuses an owner whose count is another: a replica that took
over without the last of them.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from importlib.resources import files
from itertools import accumulate, chain, pairwise
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import redis
from redis.cluster import RedisCluster
from redis.connection import parse_url
from redis.exceptions import RedisClusterException
from redis.sentinel import Sentinel

from schemas.exceptions import UnreachableError
from schemas.urls import hide_password
from streams.config import RedisConfig
from streams.exceptions import FencedError, StoreError
from streams.partitions import hash_tags

WRITE_KEYS = 500  # keys in one guarded write: 2,000 block the server for 8 ms
READ_KEYS = 2_000  # keys in one MGET
SCAN_KEYS = 1_000  # keys that one SCAN looks at
CALLS_AT_ONCE = 32  # reads or writes in one round trip: few megabytes wait in memory
ANSWER_SECONDS = 5.0  # a store that hangs must not hold a worker past its session
CONNECT_SECONDS = 3.0  # a host that drops packets is told from one that is slow
Keys = Sequence[Sequence[bytes]]  # in groups or parts
# Schemes of URLs by which sentinels are asked which server is the primary.
SENTINELS = ("redis+sentinel", "rediss+sentinel")
SENTINEL_PORT = 26379
# What a client raises where no server answers; a cluster of which no node does, an error apart.
STORE_ERRORS = (redis.RedisError, RedisClusterException, OSError)


@dataclass
class Claim:
    """A worker's right to write one partition, until a newer claim."""

    kind: bytes
    partition: int
    token: int
    data: bytes | None  # the header that the last owner left
    writes: int = 0  # calls of `starcast_write` that the partition has seen, this owner's included


@dataclass(frozen=True)
class Writing:
    """States of one partition, and the header that says where they stand."""

    claim: Claim
    keys: Sequence[bytes]
    values: Sequence[bytes]  # empty ones delete
    data: bytes


@dataclass(frozen=True)
class Call:
    """One call of a function in `store.lua`."""

    claim: Claim
    function: str
    keys: list[bytes]
    arguments: list[Any]


def connect(config: RedisConfig) -> Any:
    """A client that answers bytes; it connects when first used."""
    options: dict[str, Any] = {
        "socket_timeout": ANSWER_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "health_check_interval": 10,
    }
    url = config.url.get_secret_value()
    try:
        parts, hosts = _read(url)
        if config.cluster:
            return _Cluster(url, options)
        if parts.scheme in SENTINELS:
            client = _primary(parts, hosts, options)
        else:
            client = redis.Redis.from_url(url, **options)
        pool: Any = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # takes what stands behind a question mark
    except (*STORE_ERRORS, ValueError, TypeError) as error:
        address = hide_password(url)
        raise UnreachableError(
            f"The store's address {address} is no good: {error}. Set STARCAST_REDIS__URL."
        ) from None
    return client


def _read(url: str) -> tuple[SplitResult, list[tuple[str, int | None]]]:
    """A URL's parts, its hosts and their ports.

    Raises ValueError in words of our own: Python's quote what may be a piece of the password.
    """
    unread = ValueError(
        "its host and port cannot be read; in a user or password / is written %2F, @ %40, ? %3F, "
        "# %23"
    )
    try:
        parts = urlsplit(url)
        each = [urlsplit(f"//{host}") for host in parts.netloc.rpartition("@")[2].split(",")]
        hosts = [(host.hostname or "", host.port) for host in each]
    except ValueError:
        raise unread from None
    if "@" in parts.path and parts.scheme != "unix":
        raise unread
    return parts, hosts


def _primary(
    parts: SplitResult, hosts: Sequence[tuple[str, int | None]], options: dict[str, Any]
) -> Any:
    """A client of the primary that sentinels name: redis+sentinel://[:password@]a:1,b:2/name[/0].

    What `redis://` takes behind a question mark goes for primary and sentinels, whose own login is
    `sentinel_username` and `sentinel_password` there. `rediss+sentinel` is TLS to both.
    """
    user, _, password = map(unquote, parts.netloc.rpartition("@")[0].partition(":"))
    name, _, database = parts.path.strip("/").partition("/")
    if not name or not all(host for host, _ in hosts):
        raise ValueError(
            f"{parts.scheme}://HOST:PORT,HOST:PORT/NAME names sentinels and the primary"
        )
    given = options | parse_url(f"redis://?{parts.query}") | {"ssl": parts.scheme == SENTINELS[1]}
    login = {each: given.pop(f"sentinel_{each}", None) for each in ("username", "password")}
    sentinels = [(host, port or SENTINEL_PORT) for host, port in hosts]
    return Sentinel(sentinels, sentinel_kwargs=given | login, **given).master_for(
        name, db=int(database or 0), username=user or None, password=password or None
    )


class _Cluster:
    """The methods of a cluster's client, which connects as it is made: so it is made by a call.

    Threads that call at once may each make one, of which the last stays: a lock would have each
    wait for all others while no node answers.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        address = parse_url(url)
        if "path" in address or address.get("db"):
            raise ValueError("a cluster has no Unix socket, and no database but 0")
        self._make = partial(RedisCluster.from_url, url, **options)
        self._made: RedisCluster | None = None

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._made is None:
                self._made = self._make()
            return getattr(self._made, method)(*arguments, **options)

        return call

    def close(self) -> None:
        """Give the connections back, if there are any."""
        if self._made is not None:
            self._made.close()


class Store:
    """Reads and guarded writes of one shop's keys.

    `layout` stands in each key, so that a new layout of states is built beside the old one.
    Every method raises `StoreError` when the store does not answer.
    """

    def __init__(self, config: RedisConfig, layout: str, partitions: int) -> None:
        self.client = connect(config)
        self.partitions = partitions
        self._cluster = config.cluster
        self._stem = f"{config.key_prefix}:{layout}:".encode()
        self._plain = config.key_prefix.encode()
        self._tags = hash_tags(partitions)
        self._numbers = {tag: partition for partition, tag in enumerate(self._tags)}

    def key(self, kind: bytes, partition: int, id: bytes) -> bytes:
        """The key of one state, attributes row or title."""
        return b"%b%b:{%b}:%b" % (self._stem, kind, self._tags[partition], id)

    def prefix(self, kind: bytes, partition: int) -> bytes:
        """What all keys of a kind and partition begin with."""
        return b"%b%b:{%b}:" % (self._stem, kind, self._tags[partition])

    def plain_key(self, name: str) -> bytes:
        """A key outside the layout: vectors, windows of insights."""
        return b"%b:%b" % (self._plain, name.encode())

    def header_key(self, kind: bytes, partition: int) -> bytes:
        """The key of a partition's header."""
        return b"%bh:{%b}:%b" % (self._stem, self._tags[partition], kind)

    def ping(self) -> None:
        """Raise `StoreError` unless the store answers."""
        with _answering():
            self.client.ping()

    def claim(self, kind: bytes, partition: int) -> Claim:
        """Take a partition over from whoever had it, and read the header that they left."""
        return self.claim_all(kind, [partition])[0]

    def claim_all(self, kind: bytes, partitions: Iterable[int]) -> list[Claim]:
        """The same for distinct partitions, several in one round trip."""
        calls = [
            Call(
                Claim(kind, partition, 0, None),
                "starcast_claim",
                [self.header_key(kind, partition)],
                [],
            )
            for partition in partitions
        ]
        answers, _ = self._answered(calls)
        return [
            Claim(kind, call.claim.partition, int(token), data, int(writes))
            for call, (token, data, writes) in zip(calls, answers, strict=True)
        ]

    def header(self, kind: bytes, partition: int) -> bytes | None:
        """A partition's header, without claiming it."""
        with _answering():
            return self.client.hget(self.header_key(kind, partition), "data")

    def write(
        self, claim: Claim, keys: Sequence[bytes], values: Sequence[bytes], data: bytes
    ) -> None:
        """Write states in chunks and the header last; an empty value deletes its key.

        Raises `FencedError` when a newer owner has claimed the partition, or the store has lost
        some of what this one wrote.
        """
        self.write_all([Writing(claim, keys, values, data)])

    def write_all(self, writings: Sequence[Writing]) -> None:
        """The same for distinct partitions, several chunks in one round trip.

        A partition that is refused keeps none of the others from being written.
        """
        calls: list[Call] = []
        for each in writings:
            header = self.header_key(each.claim.kind, each.claim.partition)
            for number, start in enumerate(range(0, max(len(each.keys), 1), WRITE_KEYS)):
                part = slice(start, start + WRITE_KEYS)
                last = part.stop >= len(each.keys)
                keys, values = each.keys[part], each.values[part]
                data = each.data if last else b""
                arguments = [each.claim.token, each.claim.writes + number, data, *values]
                calls.append(Call(each.claim, "starcast_write", [header, *keys], arguments))
        refused: Claim | None = None
        for call, done in zip(calls, self._answered(calls)[0], strict=True):
            if done:
                call.claim.writes += 1
            else:
                refused = call.claim
        if refused:
            raise _refused(refused)

    def read_all_owned(
        self, wanted: Sequence[tuple[Claim, Sequence[bytes]]]
    ) -> list[list[bytes | None]]:
        """The values of keys of claimed, distinct partitions, None where there is none.

        Several go in one round trip. Without keys it only asks whether a claim holds. Raises
        `FencedError` when a newer owner has claimed a partition, or the store has lost it or some
        of what was written to it.
        """
        return self.read_beside(wanted, [])[0]

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of keys, None where there is none."""
        return self.read_each([keys])[0]

    def read_each(self, groups: Keys) -> list[list[bytes | None]]:
        """The same for each of several sequences of keys, in as few round trips."""
        return self.read_beside([], groups)[1]

    def read_beside(
        self, wanted: Sequence[tuple[Claim, Sequence[bytes]]], groups: Keys
    ) -> tuple[list[list[bytes | None]], list[list[bytes | None]]]:
        """What `read_all_owned` and `read_each` give, in as few round trips as one of them."""
        calls = [
            Call(claim, "starcast_read", [header, *part], [claim.token, claim.writes])
            for claim, keys in wanted
            for header in [self.header_key(claim.kind, claim.partition)]
            for part in _parts(keys) or [()]
        ]
        keys = [key for group in groups for key in group]
        answers, found = self._answered(calls, _parts(keys))
        owned: dict[tuple[bytes, int], list[bytes | None]] = {
            (claim.kind, claim.partition): [] for claim, _ in wanted
        }
        for call, values in zip(calls, answers, strict=True):
            if values is None:
                raise _refused(call.claim)
            owned[call.claim.kind, call.claim.partition] += values
        ends = accumulate(map(len, groups), initial=0)
        values = list(chain.from_iterable(found))
        return list(owned.values()), [values[begin:end] for begin, end in pairwise(ends)]

    def put(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Write values that never change under their key, and so need no claim."""
        with _answering():
            for start in range(0, len(keys), WRITE_KEYS):
                part = slice(start, start + WRITE_KEYS)
                pairs = dict(zip(keys[part], values[part], strict=True))
                if self._cluster:
                    self.client.mset_nonatomic(pairs)
                else:
                    self.client.mset(pairs)

    def scan(self, kind: bytes, partition: int) -> Iterator[bytes]:
        """All keys of a kind and partition; walks the whole store, so for checks only."""
        return chain.from_iterable(self._scanned(self.prefix(kind, partition)))

    def walk(self, kind: bytes) -> Iterator[dict[int, list[bytes]]]:
        """All keys of a kind, by partition; each step looks at some `SCAN_KEYS` keys of the store.

        Steps may be far apart: a key that is there all the while comes, perhaps twice.
        """
        begin = b"%b%b:{" % (self._stem, kind)
        for keys in self._scanned(begin):
            found = defaultdict[int, list[bytes]](list)
            for key in keys:
                tag, _, _ = key.removeprefix(begin).partition(b"}")
                if (partition := self._numbers.get(tag)) is not None:
                    found[partition].append(key)
            yield found

    def _scanned(self, prefix: bytes) -> Iterator[list[bytes]]:
        """All keys that begin so, of one server after the other."""
        options: dict[str, Any] = {
            "match": re.sub(rb"([\\*?[])", rb"\\\1", prefix) + b"*",
            "count": SCAN_KEYS,
        }
        with _answering():
            nodes = self.client.get_primaries() if self._cluster else [None]
        for node in nodes:
            where = {} if node is None else {"target_nodes": node}
            cursor: Any = None
            while cursor != 0:
                with _answering():
                    cursor, keys = self.client.scan(cursor or 0, **options, **where)
                if node is not None:
                    cursor = cursor[node.name]
                yield keys

    def close(self) -> None:
        """Give the connections back."""
        self.client.close()

    def _answered(
        self, calls: Sequence[Call], parts: Keys = ()
    ) -> tuple[list[Any], list[list[bytes | None]]]:
        """The answer to each call, and the values of each part of keys."""
        if self._cluster and parts:  # whose keys lie in many places
            with _answering():
                found = list(map(self.client.mget_nonatomic, parts))
            return self._answered(calls)[0], found
        answers: list[Any] = []
        asked = len(calls) + len(parts)
        with _answering():
            for start in range(0, asked, CALLS_AT_ONCE):
                end = start + CALLS_AT_ONCE
                rest = slice(max(start - len(calls), 0), max(end - len(calls), 0))
                answers += self._round_trip(calls[start:end], parts[rest])
        return answers[: len(calls)], answers[len(calls) :]

    def _round_trip(self, calls: Sequence[Call], parts: Keys = ()) -> list[Any]:
        """Call store functions and get values; load the library where it is not there yet.

        A write that had been done before that is refused when it is sent again: its owner then
        claims anew.
        """
        try:
            return self._send(calls, parts)
        except redis.ResponseError as error:
            if "unction not found" not in str(error):
                raise
        self.client.function_load(_library()[1], replace=True)
        return self._send(calls, parts)

    def _send(self, calls: Sequence[Call], parts: Keys) -> list[Any]:
        version, _ = _library()
        with self.client.pipeline(transaction=False) as pipeline:
            for call in calls:
                name = f"{call.function}_{version}"
                pipeline.fcall(name, len(call.keys), *call.keys, *call.arguments)
            for part in parts:
                pipeline.mget(part)
            return pipeline.execute()


def _parts(keys: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [keys[start : start + READ_KEYS] for start in range(0, len(keys), READ_KEYS)]


@cache
def _library() -> tuple[str, str]:
    """The version of our store functions and their text.

    The version stands in their names, so that workers before and after an upgrade each call theirs.
    """
    text = files("streams").joinpath("store.lua").read_text()
    version = sha256(text.encode()).hexdigest()[:8]
    return version, text.replace("VERSION", version)


def _refused(claim: Claim) -> FencedError:
    return FencedError(
        f"A newer worker or `starcast state rebuild` has claimed partition {claim.partition}, or "
        "the store has lost writes (emptied, or failed over); nothing was written."
    )


def _said(error: Exception) -> str:
    """As part of a sentence: some errors end with a full stop of their own."""
    return str(error).rstrip(".")


@contextmanager
def _answering() -> Generator[None]:
    try:
        yield
    except redis.OutOfMemoryError as error:
        raise StoreError(
            f"The store is full and, as it must, evicts nothing: {_said(error)}. Give it more "
            "memory (maxmemory): until then it deletes nothing either. After that "
            "STARCAST_STATES__EXPIRE_AFTER_DAYS keeps it from growing."
        ) from error
    except STORE_ERRORS as error:
        raise StoreError(
            f"The store does not answer: {_said(error)}. Check that Redis or Valkey runs where "
            "STARCAST_REDIS__URL says; work goes on when it is back."
        ) from error
