"""A store with as many users and items as wanted, each with a state that a real history leaves.

The events of a sample of users are decoded and played through `model.replay.History`. Each user of
the store has the state of one of the sample, drawn at random, written as the scorer writes it: cut
by `to_bytes`, under the user's key, in guarded writes. So the sizes are those of histories, and a
million users need no replay of millions of events. Items likewise: attributes of generated items
under every item's key, and states and vectors of a sample.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.events import World, make_events, make_world
from bench.model import packaged_encoder
from model import encoder
from model.catalog import item_text
from model.events import Rows, from_behavior, from_reviews, joined
from model.ids import Hashes, hash_ids, partitions_of
from model.replay import History
from model.state_bytes import to_bytes
from schemas.codec import decode
from schemas.records import Item, User
from schemas.topics import BY_NAME
from streams.catalog import describe_log, item_value, price_table, user_value
from streams.claims import header_data
from streams.producer import Outgoing
from streams.reader import (
    ITEM_KIND,
    ITEM_STATE,
    USER_KIND,
    USER_STATE,
    VECTOR_DTYPE,
    partition_keys,
    vector_keys,
)
from streams.store import Store
from streams.user_states import decode_header

SAMPLE_USERS = 10_000  # whose histories are replayed
SAMPLE_ITEMS = 2_000  # generated items whose attributes all items share
ENCODED_TEXTS = 256  # item texts that the encoder sees; a vector's numbers cost nothing more
CHUNK = 100_000  # keys made at once: bounds memory
SETTLED_SECONDS = 10.0  # a hash table that is still moving would count twice; it moves no longer
PAUSE_SECONDS = 0.25


class Numbered(Sequence[Any]):
    """Records made when asked for: a million of them would take a gigabyte."""

    def __init__(self, make: Callable[[int], Any], size: int) -> None:
        self._make = make
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: Any) -> Any:
        return self._make(number)


@dataclass(frozen=True)
class Sample:
    """What users and items of any number are made of."""

    shop: World
    vectors: list[bytes]
    encoder_hash: str


@dataclass(frozen=True)
class Histories:
    """States that a sample's histories left."""

    user_states: list[bytes]
    item_states: list[bytes]
    header: bytes  # of a partition of users
    events: NDArray[np.int64]  # of each user


@dataclass(frozen=True)
class Filled:
    """What users took in a store, bytes a user."""

    users: int
    total: float  # growth of used_memory with the states
    value: float
    key: float
    attributes: float  # growth of used_memory with the attributes, which not all shops have

    @property
    def structure(self) -> float:
        """Objects, the hash table and what the allocator rounds up."""
        return self.total - self.value - self.key


def make_sample() -> Sample:
    """Generated items and review texts, and vectors of some of the items."""
    shop = make_world(1_000, SAMPLE_ITEMS)
    return Sample(shop, *_encoded([item_text(item) for item in shop.items]))


def put_vectors(store: Store, world: World) -> None:
    """Each item's text gets the vector of one of the texts that the encoder has seen."""
    texts = [item_text(item) for item in world.items]
    vectors, encoder_hash = _encoded(texts)
    keys = vector_keys(store, encoder_hash, hash_ids(texts))
    store.put(keys, [vectors[at % len(vectors)] for at in range(len(keys))])


def _encoded(texts: Sequence[str]) -> tuple[list[bytes], str]:
    """Vectors of the first texts as the store keeps them, and the hash of what made them."""
    loaded = encoder.load(packaged_encoder())
    vectors = loaded.project(loaded.encode(texts[:ENCODED_TEXTS])).astype(VECTOR_DTYPE)
    return [vector.tobytes() for vector in vectors], loaded.hash


def user_name(number: int) -> str:
    """A user's id."""
    return f"user-{number}"


def item_name(number: int) -> str:
    """An item's id."""
    return f"item-{number}"


def named_users(numbers: Sequence[int]) -> Sequence[User]:
    """These users; events need no more of them than their ids."""
    return [User.model_construct(user_id=user_name(number)) for number in numbers]


def make_users(count: int) -> Sequence[User]:
    """The first users."""
    return Numbered(lambda number: User.model_construct(user_id=user_name(number)), count)


def make_items(shop: World, count: int) -> Sequence[Item]:
    """The first items; events need no more of them than id and price."""
    known = shop.items

    def make(number: int) -> Item:
        price = known[number % len(known)].price
        return Item.model_construct(item_id=item_name(number), price=price)

    return Numbered(make, count)


def replay(sample: Sample, items: int, events_a_user: int, seed: int = 7) -> Histories:
    """Play the histories of a sample of users with so many items."""
    world = World(make_users(SAMPLE_USERS), make_items(sample.shop, items), sample.shop.texts)
    events = event_rows(make_events(world, SAMPLE_USERS * events_a_user, seed=seed))
    history = History()
    history.apply(events)
    header = decode_header(None)
    header["partition"] = history.partition
    _, counts = np.unique(events["user"], return_counts=True)
    return Histories(
        to_bytes(history.users.rows), to_bytes(history.items.rows), header.tobytes(), counts
    )


def event_rows(events: Iterable[Outgoing]) -> Rows:
    """EVENT rows of generated events, decoded as the scorer decodes them, in order of time."""
    values: dict[str, list[bytes]] = {"reviews": [], "behavior": []}
    for event in events:
        values[event.topic].append(event.value or b"")
    decoded: dict[str, list[Any]] = {
        topic: decode(BY_NAME[topic], each, [(0, at) for at in range(len(each))], topic).records
        for topic, each in values.items()
    }
    rows = joined([from_reviews(decoded["reviews"]), from_behavior(decoded["behavior"])])
    return rows.take(np.argsort(rows["time"], kind="stable"))


def put_items(store: Store, sample: Sample, histories: Histories, count: int) -> None:
    """Attributes, states and vectors of the first items."""
    shop = sample.shop
    entries = [(item.item_id, item, at + 1) for at, item in enumerate(shop.items)]
    described, _ = describe_log(entries, {}, price_table(None))
    random = np.random.default_rng(1)
    for begin in range(0, count, CHUNK):
        numbers = range(begin, min(begin + CHUNK, count))
        hashes = hash_ids([item_name(number) for number in numbers])
        values: list[bytes] = []
        for number, text in zip(numbers, hashes, strict=True):
            at = number % len(described)
            row = described[at].copy()
            row["text"] = text  # each item has a text, and so a vector, of its own
            values.append(item_value(row, shop.items[at]))
        _write(store, ITEM_KIND, hashes, values, header_data(0))
        _write(
            store,
            ITEM_STATE,
            hashes,
            _drawn(random, histories.item_states, len(hashes)),
            header_data(0),
        )
        vectors = [sample.vectors[number % len(sample.vectors)] for number in numbers]
        store.put(vector_keys(store, sample.encoder_hash, hashes), vectors)


def put_users(store: Store, sample: Sample, histories: Histories, count: int) -> Filled:
    """States, and then attributes, of the first users; what they took."""
    random = np.random.default_rng(2)
    before, sizes = used_memory(store), np.zeros(2)
    for hashes in _hashes(user_name, count):
        states = _drawn(random, histories.user_states, len(hashes))
        sizes += _write(store, USER_STATE, hashes, states, histories.header)
    with_states = used_memory(store)
    attributes = [user_value(user, 1) for user in sample.shop.users]
    for hashes in _hashes(user_name, count):
        values = _drawn(random, attributes, len(hashes))
        _write(store, USER_KIND, hashes, values, header_data(0))
    key, value = (sizes / count).tolist()
    return Filled(
        count,
        (with_states - before) / count,
        value,
        key,
        (used_memory(store) - with_states) / count,
    )


def used_memory(store: Store) -> int:
    """The store's memory, once it stands still: a hash table that grows is there twice."""
    until = time.monotonic() + SETTLED_SECONDS
    last, now = -1, _used(store)
    while now != last and time.monotonic() < until:
        time.sleep(PAUSE_SECONDS)
        last, now = now, _used(store)
    return now


def _used(store: Store) -> int:
    return int(store.client.info("memory")["used_memory"])


def _hashes(name: Callable[[int], str], count: int) -> Iterable[Hashes]:
    for begin in range(0, count, CHUNK):
        yield hash_ids([name(number) for number in range(begin, min(begin + CHUNK, count))])


def _drawn(random: np.random.Generator, values: Sequence[bytes], count: int) -> list[bytes]:
    return [values[at] for at in random.integers(len(values), size=count).tolist()]


def _write(
    store: Store, kind: bytes, hashes: Hashes, values: Sequence[bytes], header: bytes
) -> NDArray[np.float64]:
    """Write values by partition, guarded; bytes of the keys and of the values."""
    partitions = partitions_of(hashes, store.partitions)
    sizes = np.zeros(2)
    for partition in np.unique(partitions).tolist():
        mine = np.flatnonzero(partitions == partition)
        keys = partition_keys(store, kind, partition, hashes[mine])
        written = [values[at] for at in mine.tolist()]
        store.write(store.claim(kind, partition), keys, written, header)
        sizes += [sum(map(len, keys)), sum(map(len, written))]
    return sizes
