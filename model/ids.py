"""Identifiers as numbers: what arrays, states and lookups carry in place of strings.

    hash(id) = xxh3_64(id)[63:31] · 2³¹ + murmur2(id) mod 2³¹

The low 31 bits are what Kafka's `murmur2_random` partitioner takes a key's partition from, so a
hash alone says which partition, and so which key of the store, an id belongs to, whatever the
number of partitions.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from model.compiled import compiled

Hashes = NDArray[np.uint64]

NONE = 0  # the hash of no id; an id whose hash happens to be 0 gets another

_SEED = 0x9747B28C
_MULTIPLIER = np.uint32(0x5BD1E995)
_WORD = 4  # bytes
_LOW = np.uint64(0x7FFF_FFFF)


def hash_ids(ids: Sequence[str | None], seed: int = 0) -> Hashes:
    """The hash of each id in UTF-8, shape (n,); `None` and the empty string give `NONE`."""
    try:
        keys = list(map(str.encode, ids))  # type: ignore[arg-type]
    except TypeError:  # None is there
        keys = [name.encode() if name else b"" for name in ids]
    high = np.fromiter(map(xxh3_64_intdigest, keys, repeat(seed)), np.uint64, len(keys))
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    hashes = np.empty(len(keys), np.uint64)
    _hash(np.frombuffer(b"".join(keys), np.uint8), lengths, high, hashes)
    return hashes


def partitions_of(hashes: Hashes, partitions: int) -> NDArray[np.int64]:
    """The Kafka partition of each hashed id, shape (n,)."""
    return ((hashes & _LOW) % np.uint64(partitions)).astype(np.int64)


def low_half(hashes: Hashes) -> NDArray[np.uint32]:
    """The low 32 bits of each hash: what a state can afford to keep of many items."""
    return (hashes & np.uint64(0xFFFF_FFFF)).astype(np.uint32)


def hash_names(names: Sequence[str | None]) -> NDArray[np.uint32]:
    """32-bit hashes of names from small vocabularies (brands, categories), shape (n,); 0: none."""
    keys = [name.encode() if name else b"" for name in names]
    digests = np.fromiter(map(xxh3_64_intdigest, keys), np.uint64, len(keys))
    hashes = np.maximum(digests.astype(np.uint32), 1)
    hashes[[not key for key in keys]] = NONE
    return hashes


@compiled
def _hash(data: Any, lengths: Any, high: Any, hashes: Any) -> None:
    """Fill `hashes` (n) from keys one after another and their xxh3_64 `high` (n)."""
    begin = 0
    for row in range(len(lengths)):
        end = begin + lengths[row]
        hashes[row] = NONE
        if begin < end:
            found = (high[row] & ~_LOW) | (np.uint64(_murmur2(data, begin, end)) & _LOW)
            hashes[row] = found or ~_LOW
        begin = end


@compiled
def _murmur2(data: Any, begin: int, end: int) -> Any:
    """Kafka's murmur2 of bytes begin to end.

    Source: `org.apache.kafka.common.utils.Utils.murmur2`. The client library that has it takes one
    key a call, keeps only the partition, and would bring a Kafka client into this package.
    """
    found = np.uint32(_SEED ^ (end - begin))
    while end - begin >= _WORD:
        word = np.uint32(_little(data, begin, _WORD) * _MULTIPLIER)
        word = np.uint32(word ^ (word >> np.uint32(24)))
        found = np.uint32(found * _MULTIPLIER) ^ np.uint32(word * _MULTIPLIER)
        begin += _WORD
    if begin < end:
        found = np.uint32((found ^ _little(data, begin, end - begin)) * _MULTIPLIER)
    found = np.uint32((found ^ (found >> np.uint32(13))) * _MULTIPLIER)
    return found ^ (found >> np.uint32(15))


@compiled
def _little(data: Any, begin: int, count: int) -> Any:
    """The number that up to four bytes are, the lowest first."""
    number = np.uint32(0)
    for at in range(count):
        number |= np.uint32(data[begin + at]) << np.uint32(8 * at)
    return np.uint32(number)
