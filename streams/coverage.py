"""How far the vectors of items reach, by encoder.

A header in the store says, for an encoder and a partition of `items`, up to which offset the texts
have vectors. Another encoder's vectors cover those of the one before when they reach as far.
"""

from collections.abc import Iterable, Sequence

from streams.claims import header_data, header_offset
from streams.store import Store


def reached(store: Store, encoder: str, partitions: Iterable[int]) -> list[int]:
    """The next offset of each partition of `items` whose vectors are not there yet."""
    return [header_offset(each) for each in store.read(_keys(store, encoder, partitions))]


def reach(store: Store, encoder: str, ends: dict[int, int]) -> None:
    """Say, by partition, up to where there are vectors."""
    store.put(_keys(store, encoder, ends), [header_data(end) for end in ends.values()])


def share(store: Store, before: str, after: str) -> float:
    """How much of what the encoder before has read another has, 0 to 1; 1: all of it.

    Counted in offsets, so items that were written often count more while it goes on.
    """
    every = range(store.partitions)
    wanted, found = reached(store, before, every), reached(store, after, every)
    if not any(wanted):
        return 1.0
    return sum(map(min, wanted, found)) / sum(wanted)


def _keys(store: Store, encoder: str, partitions: Iterable[int]) -> Sequence[bytes]:
    return [store.plain_key(f"texts:{encoder}:{each}") for each in partitions]
