"""The scorer without Kafka: messages made here, states read from and written to a real store.

What a batch costs is processor time: of this process for `Scorer.process` and the write of states
that follows a commit, and of the store meanwhile. Consuming, producing and committing are left out,
since they do not know how many users or items there are. Several scorers, each with a store of its
own, take the same batch in turn, so that whatever else the machine does meets all of them.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import psutil
from confluent_kafka import Message

from bench.events import World, make_events
from bench.population import item_name, make_items, named_users, user_name
from bench.watch import INNER, seconds_of
from model.events import EVENT, blank
from model.ids import hash_ids, partitions_of
from model.state import LAYOUT_HASH, USER
from schemas.journal import TOPICS
from starcast.log import LogConfig, configure
from streams.config import (
    ArchiveConfig,
    KafkaConfig,
    ModelsConfig,
    RedisConfig,
    ScorerConfig,
    StatesConfig,
)
from streams.memory import settle
from streams.metrics import make_metrics
from streams.models import Models
from streams.processor import Offsets, Position
from streams.producer import Outgoing
from streams.reader import Reader
from streams.scorer import Scorer
from streams.store import Store
from streams.user_states import UserStates

FIRST_EVENT = 100_000_000  # numbers above those of the events that the states have seen
WARM_UP = 3  # batches that are not counted: code is loaded, connections are made
WARMED_AT_ONCE = 20_000  # users or items read at once while copies are filled
MICROSECONDS = 1e6  # in a second


@dataclass(frozen=True)
class Shop:
    """A store that has been filled."""

    users: int
    items: int
    partitions: int
    redis: RedisConfig


@dataclass(frozen=True)
class Batches:
    """What is scored: events of as many distinct users in each batch, whatever the shop's size."""

    count: int
    events: int
    users: int  # drawn for a batch; how many of them act is the same in all shops
    cache_users: int  # states that the worker keeps for each partition
    warm: bool = False  # read everything first, as a worker has that has run for long


@dataclass(frozen=True)
class Cost:
    """One batch."""

    events: int
    users: int  # distinct
    worker: float  # processor seconds
    store: float
    phases: dict[str, float]  # seconds of clock

    @property
    def total(self) -> float:
        """Processor microseconds an event, of worker and store."""
        return (self.worker + self.store) / self.events * MICROSECONDS


@dataclass(frozen=True)
class Scored:
    """Batches of one shop, and the memory of the worker after them."""

    costs: list[Cost]
    memory: int  # bytes, resident

    def summary(self) -> dict[str, float | dict[str, float]]:
        """Medians over the batches, microseconds an event."""

        def typical(values: Iterable[float]) -> float:
            return round(median(values), 2)

        return {
            "cpu_us_per_event": typical(each.total for each in self.costs),
            "worker_us": typical(each.worker / each.events * MICROSECONDS for each in self.costs),
            "store_us": typical(each.store / each.events * MICROSECONDS for each in self.costs),
            "distinct_users_a_batch": typical(each.users for each in self.costs),
            "clock_us": {
                name: typical(each.phases[name] / each.events * MICROSECONDS for each in self.costs)
                for name in self.costs[0].phases
            },
        }


def score_batches(
    shops: Sequence[Shop], world: World, models: ModelsConfig, batches: Batches
) -> list[Scored]:
    """Score the same batches in each shop; the process that calls this has nothing else to do."""
    configure(LogConfig(level="warning"))
    lanes = [_Lane(shop, world, models, batches) for shop in shops]
    settle()
    costs: list[list[Cost]] = [[] for _ in shops]
    for number in range(WARM_UP + batches.count):
        order = np.random.default_rng(number).permutation(len(lanes))  # none is always the last
        for at in order.tolist():
            cost = lanes[at].score(number)
            if number >= WARM_UP:
                costs[at].append(cost)
    memory = psutil.Process().memory_info().rss
    for lane in lanes:
        lane.close()
    return [Scored(each, memory) for each in costs]


class UnjournaledStates(UserStates):
    """User states of partitions whose store is as it should be: there is no journal to read."""

    def _recover(self, partitions: Iterable[int]) -> Offsets:
        return {partition: dict.fromkeys(TOPICS, -1) for partition in partitions}


class _Lane:
    """A scorer with its shop."""

    def __init__(self, shop: Shop, world: World, models: ModelsConfig, batches: Batches) -> None:
        self._shop = shop
        self._batches = batches
        self._world = World([], make_items(world, shop.items), world.texts)
        self._metrics = make_metrics()
        self._store = Store(shop.redis, LAYOUT_HASH, shop.partitions)
        states = UnjournaledStates(
            self._store,
            KafkaConfig(partitions=shop.partitions),
            ArchiveConfig(),
            StatesConfig(cache_users=batches.cache_users),
        )
        reader = Reader(self._store)
        self._models = Models(models, self._metrics).start()
        self._scorer = Scorer(
            ScorerConfig(batch_events=batches.events),
            "",
            states,
            reader,
            self._models,
            self._metrics,
            "scorer-0",
        )
        self._offsets = Counter[Position]()
        self._scorer.claim(
            {partition: dict.fromkeys(TOPICS, -1) for partition in range(shop.partitions)}
        )
        if batches.warm:
            reader.use_encoder(self._models.serving.encoder_hash)
            _warm(shop, states, reader)

    def score(self, number: int) -> Cost:
        """One batch."""
        messages = list(self._messages(number))
        phases, store = self._phases(), self._store_seconds()
        began, worker = time.perf_counter(), time.process_time()
        outcome = self._scorer.process(messages)
        processed = time.perf_counter()
        assert outcome.late is not None
        assert outcome.write is not None
        assert outcome.finish is not None
        outcome.late()
        delivered = {("journal", each): number + 1 for each in range(self._shop.partitions)}
        outcome.write(delivered)
        outcome.finish(delivered)
        worker, ended = time.process_time() - worker, time.perf_counter()
        spent = {name: now - phases[name] for name, now in self._phases().items()}
        spent["write"] = ended - processed
        spent["other"] = processed - began - sum(spent[name] for name in INNER)
        users = len({message.key() for message in messages})
        return Cost(len(messages), users, worker, self._store_seconds() - store, spent)

    def close(self) -> None:
        """Stop following models, give the connections back."""
        self._models.close()
        self._store.close()

    def _messages(self, number: int) -> Iterator[Message]:
        """A batch as a poll gives it: the same ranks of users and items in shops of one size."""
        random = np.random.default_rng(number)
        users = random.choice(self._shop.users, self._batches.users, replace=False)
        world = World(named_users(users.tolist()), self._world.items, self._world.texts)
        count = self._batches.events
        first = FIRST_EVENT + number * count
        events = list(make_events(world, count, seed=number, first=first))
        names = [(event.key or b"").decode() for event in events]
        partitions = partitions_of(hash_ids(names), self._shop.partitions).tolist()
        for event, partition in zip(events, partitions, strict=True):
            yield self._message(event, partition)

    def _message(self, event: Outgoing, partition: int) -> Message:
        at = event.topic, partition
        self._offsets[at] += 1
        return Message(
            topic=event.topic,
            partition=partition,
            offset=self._offsets[at] - 1,
            key=event.key,
            value=event.value,
            timestamp=(2, int(time.time() * 1_000)),
        )

    def _phases(self) -> dict[str, float]:
        return seconds_of(self._metrics, "scorer", INNER)

    def _store_seconds(self) -> float:
        used = self._store.client.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def _warm(shop: Shop, states: UserStates, reader: Reader) -> None:
    """Have at hand what a worker has that has met every user and every item."""
    for begin in range(0, shop.users, WARMED_AT_ONCE):
        numbers = range(begin, min(begin + WARMED_AT_ONCE, shop.users))
        hashes = hash_ids([user_name(number) for number in numbers])
        partitions = partitions_of(hashes, shop.partitions)
        states.read({each: hashes[partitions == each] for each in range(shop.partitions)})
    for begin in range(0, shop.items, WARMED_AT_ONCE):
        numbers = range(begin, min(begin + WARMED_AT_ONCE, shop.items))
        events = blank(EVENT, len(numbers))
        events["item"] = hash_ids([item_name(number) for number in numbers])
        events["user"] = hash_ids([user_name(0)])[0]
        reader.lookups(events, blank(USER, 1))
