"""A shop on real servers: its own topics, keys, archive and models, and workers in threads."""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import redis
from confluent_kafka import Message, TopicPartition
from pydantic import SecretStr

from model.events import CODES, COUNTED
from model.ids import hash_ids, partitions_of
from model.state import ITEM, LAYOUT_HASH, USER
from model.state_bytes import from_bytes
from schemas import archive
from schemas.records import Behavior, DeadLetter, PredictedRating, Record, Review
from starcast.settings import Settings, variables
from streams.admin import apply_topics
from streams.clients import reach, topic_name
from streams.coverage import share
from streams.loop import Loop
from streams.metrics import make_metrics
from streams.models import Models
from streams.processor import Processor
from streams.producer import Outgoing, outgoing, play
from streams.reader import ITEM_KIND, ITEM_STATE, USER_KIND, USER_STATE, store_keys
from streams.run import _make, _Shared
from streams.store import Store
from streams.tail import read_topic
from streams.user_states import decode_header

PARTITIONS = 3
PIPELINE = (  # topics that end; digests come as long as a worker lives
    *("reviews", "behavior", "text-features", "items", "users"),
    *("predicted-ratings", "journal", "item-updates", "dead-letters"),
)
WAIT_SECONDS = 90.0  # on a machine that does much else
_WORKER = """
import sys, threading
from tests.shops import Shop, Settings
settings = Settings.model_validate_json(sys.argv[1])
settings.redis.url = type(settings.redis.url)(sys.argv[2])
with Shop(settings).workers(*sys.argv[3:], slot=1):
    threading.Event().wait()
"""


@dataclass
class Workers:
    """Processors at work, a thread each."""

    processors: dict[str, Processor]
    loops: dict[str, Loop]
    metrics: Any
    errors: list[BaseException] = field(default_factory=list[BaseException])

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"starcast_{name}", labels) or 0.0


@dataclass(frozen=True)
class Shop:
    """Where a shop's things lie."""

    settings: Settings

    @property
    def environment(self) -> dict[str, str]:
        """The settings, as a command reads them."""
        return variables(self.settings)

    @property
    def store(self) -> Store:
        return Store(self.settings.redis, LAYOUT_HASH, PARTITIONS)

    def play(self, records: Iterable[tuple[str, Record] | Outgoing], **pace: Any) -> None:
        each = (
            record if isinstance(record, Outgoing) else next(outgoing([record]))
            for record in records
        )
        report = play(each, self.settings.kafka, **pace)
        assert not report.failed

    def read(self, topic: str) -> list[Message]:
        """All committed messages of a topic, by partition and offset."""
        found = [each for batch in read_topic(self.settings.kafka, topic) for each in batch]
        return sorted(found, key=lambda each: (each.partition() or 0, each.offset() or 0))

    def ends(self, topic: str) -> dict[int, int]:
        """The offset after the last record of each partition that has one."""
        return {each.partition() or 0: (each.offset() or 0) + 1 for each in self.read(topic)}

    def predictions(self, kind: str = "interaction") -> list[PredictedRating]:
        """In the order of their partitions."""
        found = [
            PredictedRating.model_validate_json(each.value() or b"")
            for each in self.read("predicted-ratings")
        ]
        return [each for each in found if each.kind == kind]

    def letters(self) -> list[DeadLetter]:
        return [
            DeadLetter.model_validate_json(each.value() or b"")
            for each in self.read("dead-letters")
        ]

    def users(self, names: Sequence[str]) -> np.ndarray[Any, Any]:
        """Their USER rows in the store."""
        keys = store_keys(self.store, USER_STATE, hash_ids(names))
        return from_bytes(self.store.read(keys), USER)

    def items(self, names: Sequence[str]) -> np.ndarray[Any, Any]:
        """Their ITEM rows in the store."""
        keys = store_keys(self.store, ITEM_STATE, hash_ids(names))
        return from_bytes(self.store.read(keys), ITEM)

    def states(self) -> dict[bytes, bytes]:
        """All that the store holds of users and items, their headers too."""
        with redis.Redis.from_url(self.settings.redis.url.get_secret_value()) as client:
            found: dict[bytes, bytes] = {}
            for kind in (USER_STATE, ITEM_STATE):
                for partition in range(PARTITIONS):
                    for key in self.store.scan(kind, partition):
                        found[key] = client.get(key)  # pyright: ignore[reportArgumentType]
                    header = self.store.header(kind, partition)
                    found[self.store.header_key(kind, partition)] = header or b""
            return found

    def empty_store(self) -> None:
        """As a store that came back without its memory."""
        with redis.Redis.from_url(self.settings.redis.url.get_secret_value()) as client:
            prefix = self.settings.redis.key_prefix
            for key in list(client.scan_iter(match=f"{prefix}:*")):
                client.delete(key)
            client.function_flush()

    @contextmanager
    def workers(self, *names: str, slot: int = 0, **kafka: Any) -> Generator[Workers]:
        """Work until the block ends; raises what a worker raised, unless the block took it."""
        settings = self.settings.model_copy(
            update={"kafka": self.settings.kafka.model_copy(update=kafka)}
        )
        stop, metrics = threading.Event(), make_metrics()
        models = Models(settings.models, metrics, partial(share, self.store)).start()
        shared = _Shared(settings, self.store, lambda: models, metrics)
        processors = {name: _make(name, shared, slot) for name in names}
        loops = {
            name: Loop(processor, settings.kafka, metrics, stop, slot)
            for name, processor in processors.items()
        }
        workers = Workers(processors, loops, metrics)

        def run(loop: Loop) -> None:
            try:
                loop.run()
            except BaseException as error:  # noqa: BLE001  raised again below
                workers.errors.append(error)

        threads = [
            threading.Thread(target=run, args=(loop,), name=name) for name, loop in loops.items()
        ]
        for thread in threads:
            thread.start()
        try:
            yield workers
        finally:
            stop.set()
            for thread in threads:
                thread.join(WAIT_SECONDS)
            models.close()
        assert not any(thread.is_alive() for thread in threads)
        if workers.errors:
            raise workers.errors[0]

    @contextmanager
    def process(self, *names: str) -> Generator[subprocess.Popen[bytes]]:
        """The same in a process of its own, which is killed at the latest when the block ends."""
        secret = self.settings.redis.url.get_secret_value()
        command = [sys.executable, "-c", _WORKER, self.settings.model_dump_json(), secret, *names]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.kill()

    def predicted_over_a_kill(self, sent: Sequence[tuple[str, Record]]) -> list[PredictedRating]:
        """What is predicted of events whose worker is killed on the way, and another takes over."""
        with self.process("scorer", "items") as process:
            self.play(sent[:100])
            self.until_predicted(100)  # it has started, which on a busy machine takes long
            # So slow that such a one, too, sees some before all have been predicted.
            playing = threading.Thread(target=self.play, args=(sent[100:],), kwargs={"rate": 150})
            playing.start()
            reached = len(self.until_predicted(300))
            process.kill()
            process.wait()
            assert reached < len(sent)
            with self.workers("scorer", "items"):
                playing.join()
                predictions = self.until_predicted(len(sent))
                self.until_items_are_applied()
                self.until_users_are_written()
        return predictions

    def cut(self, *topics: str) -> None:
        """As retention does: nothing is left of these topics."""
        ends = [
            TopicPartition(topic_name(self.settings.kafka, topic), partition, -1)
            for topic in topics
            for partition in range(PARTITIONS)
        ]
        admin = reach(self.settings.kafka)  # held until its futures have ended
        for future in admin.delete_records(ends).values():
            future.result(30)

    def until_predicted(self, count: int, kind: str = "interaction") -> list[PredictedRating]:
        """Wait until so many records are predicted, and return them all."""
        found: list[PredictedRating] = []

        def enough() -> bool:
            found[:] = self.predictions(kind)
            return len(found) >= count

        until(enough)
        return found

    def until_archived(self) -> None:
        """Wait until the archive has all that the topics have."""
        url = self.settings.archive.url
        for topic in PIPELINE:
            until(
                partial(
                    lambda *now: archive.positions(url, now[0]) == now[1], topic, self.ends(topic)
                )
            )

    def until_items_are_applied(self) -> None:
        """Wait until item states stand where the item updates end."""
        self._until_stored(ITEM_STATE, "item-updates")

    def until_attributes_are_kept(self) -> None:
        """Wait until attributes stand where items and users end.

        The catalog's lag may not tell: it is of the last fetch, before which more was sent.
        """
        self._until_stored(ITEM_KIND, "items")
        self._until_stored(USER_KIND, "users")

    def _until_stored(self, kind: bytes, topic: str) -> None:
        ends = self.ends(topic)
        until(
            lambda: all(
                int(self.store.header(kind, partition) or 0) == end
                for partition, end in ends.items()
            )
        )

    def until_users_are_written(self) -> None:
        """Wait until user states stand where the journal ends; they are written after a commit."""
        ends = self.ends("journal")
        until(
            lambda: all(
                int(decode_header(self.store.header(USER_STATE, partition))["journal"]) == end
                for partition, end in ends.items()
            )
        )


def until(done: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def make_shop(kafka: str, store: str, folder: Path, **changes: dict[str, Any]) -> Shop:
    """A new shop with its topics; `changes` are settings by section."""
    prefix = f"{uuid4().hex[:8]}."
    settings = Settings.model_validate(
        {
            "kafka": {
                "bootstrap_servers": kafka,
                "topic_prefix": prefix,
                "group_id": prefix.rstrip("."),
                "partitions": PARTITIONS,
                "session_timeout_ms": 1_500,
                **changes.get("kafka", {}),
            },
            "redis": {"url": SecretStr(store), "key_prefix": prefix.rstrip(".")},
            "archive": {"url": str(folder / "archive"), "flush_seconds": 0.5},
            "models": {"url": str(folder / "models"), "encoder": "none", "device": "cpu"},
            "scorer": {"batch_events": 200},
            "states": changes.get("states", {}),
        }
    )
    apply_topics(settings.kafka)
    return Shop(settings)


def check_each_once(
    predictions: Sequence[PredictedRating], sent: Sequence[tuple[str, Any]]
) -> None:
    """Each event is predicted once; in a partition numbers are dense and sources in order."""
    expected = Counter(
        record.event_id for topic, record in sent if topic in ("reviews", "behavior")
    )
    assert Counter(each.event_id for each in predictions) == expected
    places = [
        (each.source.topic, each.source.partition, each.source.offset) for each in predictions
    ]
    assert len(set(places)) == len(places)
    last: dict[tuple[str, int], int] = {}
    numbers: dict[int, list[int | None]] = {}
    for each in predictions:
        numbers.setdefault(each.source.partition, []).append(each.seq)
        place = (each.source.topic, each.source.partition)
        assert each.source.offset > last.get(place, -1)
        last[place] = each.source.offset
    for seqs in numbers.values():
        assert seqs == list(range(len(seqs)))


def check_states(shop: Shop, sent: Sequence[tuple[str, Any]]) -> None:
    """User and item states are what a plain recount of the events gives.

    For events without repetitions, in which nobody reviews an item twice.
    """
    events = [record for topic, record in sent if topic in ("reviews", "behavior")]
    for name, rows in (
        ("user_id", shop.users),
        ("item_id", shop.items),
    ):
        names = sorted({getattr(each, name) for each in events})
        found = rows(names)
        counts = np.zeros((len(names), COUNTED), np.int64)
        ratings: list[list[float]] = [[] for _ in names]
        for each in events:
            at = names.index(getattr(each, name))
            action = each.action if isinstance(each, Behavior) else "review"
            counts[at, CODES[action]] += 1
            if isinstance(each, Review) and each.rating is not None:
                ratings[at].append(each.rating)
        np.testing.assert_array_equal(found["actions"], counts)
        assert found["rating_count"].tolist() == [len(each) for each in ratings]
        assert found["rating_sum"].tolist() == [sum(each) for each in ratings]
        assert found["rating_square_sum"].tolist() == [sum(r * r for r in each) for each in ratings]


def partition_of(user: str) -> int:
    """The partition of a user's events."""
    return int(partitions_of(hash_ids([user]), PARTITIONS)[0])
