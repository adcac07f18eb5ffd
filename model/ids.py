"""Identifiers as numbers: what arrays, states and lookups carry in place of strings.

    hash(id) = xxh3_64(id)[63:31] · 2³¹ + murmur2(id) mod 2³¹

The low 31 bits are what Kafka's `murmur2_random` partitioner takes a key's partition from, so a
hash alone says which partition, and so which key of the store, an id belongs to, whatever the
number of partitions.
"""

from collections.abc import Sequence
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
    keys = [name.encode() if name else b"" for name in ids]
    high = np.fromiter((xxh3_64_intdigest(key, seed) for key in keys), np.uint64, len(keys))
    hashes = (high & ~_LOW) | (murmur2(keys).astype(np.uint64) & _LOW)
    hashes[hashes == NONE] = ~_LOW
    hashes[[not key for key in keys]] = NONE
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
    digests = np.fromiter((xxh3_64_intdigest(key) for key in keys), np.uint64, len(keys))
    hashes = np.maximum(digests.astype(np.uint32), 1)
    hashes[[not key for key in keys]] = NONE
    return hashes


def murmur2(keys: Sequence[bytes]) -> NDArray[np.uint32]:
    """Kafka's murmur2 of each key, shape (n,).

    Source: `org.apache.kafka.common.utils.Utils.murmur2`. The client library that has it takes one
    key a call, keeps only the partition, and would bring a Kafka client into this package.
    """
    ends = np.cumsum(np.fromiter(map(len, keys), np.int64, len(keys)))
    hashes = np.empty(len(keys), np.uint32)
    _murmur2(np.frombuffer(b"".join(keys), np.uint8), ends, hashes)
    return hashes


@compiled
def _murmur2(data: Any, ends: Any, hashes: Any) -> None:
    begin = 0
    for row in range(len(ends)):
        end = ends[row]
        found = np.uint32(_SEED ^ (end - begin))
        while end - begin >= _WORD:
            word = np.uint32(_little(data, begin, _WORD) * _MULTIPLIER)
            word = np.uint32(word ^ (word >> np.uint32(24)))
            found = np.uint32(found * _MULTIPLIER) ^ np.uint32(word * _MULTIPLIER)
            begin += _WORD
        if begin < end:
            found = np.uint32((found ^ _little(data, begin, end - begin)) * _MULTIPLIER)
        found = np.uint32((found ^ (found >> np.uint32(13))) * _MULTIPLIER)
        hashes[row] = found ^ (found >> np.uint32(15))
        begin = end


@compiled
def _little(data: Any, begin: int, count: int) -> Any:
    """The number that up to four bytes are, the lowest first."""
    number = np.uint32(0)
    for at in range(count):
        number |= np.uint32(data[begin + at]) << np.uint32(8 * at)
    return np.uint32(number)
