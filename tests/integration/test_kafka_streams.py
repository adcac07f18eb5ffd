"""The Java peer on real servers: each event is answered once, as we answer it, whatever ends it."""

import subprocess
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition
from pydantic import SecretStr

from bench.peers.work import INPUTS, OUTPUT, Settings
from model.bundle import Bundle
from model.ids import partitions_of
from model.lookups import Table
from model.replay import History
from model.state import LAYOUT_HASH
from model.state_bytes import to_bytes
from streams.admin import apply_topics
from streams.clients import reader_config
from streams.config import KafkaConfig, RedisConfig
from streams.producer import Outgoing, play
from streams.reader import (
    ITEM_KIND,
    ITEM_STATE,
    USER_KIND,
    VECTOR_DTYPE,
    store_keys,
    vector_keys,
)
from streams.store import Store
from streams.tail import read_topic
from tests.shops import until
from tests.unit.bench import streamed

EVENTS = 3_000
FIRST = 1_000  # events that leave states of items
BEFORE = 1_237  # events that the program meets before it is killed
CALL = 32  # most events in a call of the network
PARTITIONS = 2


@pytest.mark.peer
@pytest.mark.timeout(900)  # packages and jars come by network at first use
def test_a_killed_program_goes_on_where_it_was(
    kafka: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = streamed.installed(monkeypatch)
    from bench.peers.kafka_streams import STREAMS, fill

    for name, milliseconds in (("session.timeout", 6_000), ("heartbeat.interval", 500)):
        monkeypatch.setitem(STREAMS, f"consumer.{name}.ms", milliseconds)
    random, bundle = np.random.default_rng(12), streamed.bundle()
    records = streamed.records_of(random, FIRST + EVENTS)
    history = streamed.begin(random)
    for _ in history.run(streamed.events_of(records[:FIRST])):
        pass
    records = records[FIRST:]
    _put(Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, PARTITIONS), history)
    config = KafkaConfig(
        bootstrap_servers=kafka, partitions=PARTITIONS, topic_prefix=f"{uuid4().hex[:8]}."
    )
    apply_topics(config)
    given = Settings(
        kafka, store, "", 2 * EVENTS, CALL * PARTITIONS, PARTITIONS, config.topic_prefix
    )

    monkeypatch.setattr("bench.peers.kafka_streams.GATHER_SECONDS", 600)
    fill(tmp_path, given, bundle)
    _play(records[:BEFORE], config)
    with _running(path, tmp_path):
        until(lambda: _committed(config) == BEFORE)
    users = partitions_of(streamed.events_of(records[:BEFORE])["user"], PARTITIONS)
    calls = np.bincount(users, minlength=PARTITIONS) // CALL
    assert len(_said(config)) == calls.sum() * CALL < BEFORE  # the others wait

    monkeypatch.setattr("bench.peers.kafka_streams.GATHER_SECONDS", 0.1)
    fill(tmp_path, given, bundle)
    _play(records[BEFORE:], config)
    with _running(path, tmp_path):
        until(lambda: len(_said(config)) >= EVENTS)
    _check(_said(config), records, history, bundle)


@contextmanager
def _running(path: str, folder: Path) -> Generator[None]:
    """The program, killed in the end."""
    from bench.peers.kafka_streams import LOG

    program = subprocess.Popen(["java", LOG, "-cp", path, "starcast.peer.Main", str(folder)])
    try:
        yield
        assert program.poll() is None
    finally:
        program.kill()
        program.wait()


def _play(records: Sequence[streamed.Sent], config: KafkaConfig) -> None:
    play(
        (
            Outgoing(topic, record["user_id"].encode(), orjson.dumps(record))
            for topic, record in records
        ),
        config,
    )


def _committed(config: KafkaConfig) -> int:
    """Events whose offsets the program has committed."""
    group = config.model_copy(update={"group_id": f"{config.topic_prefix}scoring"})
    consumer = Consumer(reader_config(group) | {"group.id": group.group_id})
    try:
        found = consumer.committed(
            [
                TopicPartition(config.topic_prefix + topic, partition)
                for topic in INPUTS
                for partition in range(PARTITIONS)
            ],
            timeout=10,
        )
        return sum(max(each.offset, 0) for each in found)
    except KafkaException:  # a new broker has no coordinator for the group yet
        return 0
    finally:
        consumer.close()


def _check(
    said: Sequence[dict[str, Any]],
    records: Sequence[streamed.Sent],
    history: History,
    bundle: Bundle,
) -> None:
    """Each event is answered once, in an order in which we would have answered it so."""
    sources = {tuple(each["source"].values()) for each in said}
    assert len(said) == len(sources) == EVENTS
    by_id = {record["event_id"]: (topic, record) for topic, record in records}
    by_partition = defaultdict[int, list[dict[str, Any]]](list)
    for each in said:
        by_partition[each["source"]["partition"]].append(each)
    assert len(by_partition) == PARTITIONS
    lookups = streamed.lookups_of(history)
    for mine in by_partition.values():
        mine.sort(key=lambda each: each["seq"])
        events = streamed.events_of([by_id[each["event_id"]] for each in mine])
        assert len({*partitions_of(events["user"], PARTITIONS).tolist()}) == 1
        fresh = streamed.begin(np.random.default_rng(0))
        streamed.compare(mine, streamed.expect(bundle, fresh, lookups, events))


def _put(store: Store, history: History) -> None:
    """Fill a store with what is known beside users' states."""

    def rows(kind: bytes, known: Table) -> None:
        store.put(store_keys(store, kind, known.hashes), to_bytes(known.rows[:-1]))

    lookups = streamed.lookups_of(history)
    rows(ITEM_STATE, lookups.items)
    rows(ITEM_KIND, lookups.item_attributes)
    rows(USER_KIND, lookups.user_attributes)
    assert history.vectors is not None
    places = history.vectors.places
    vectors = history.vectors.rows[places.rows[:-1]].astype(VECTOR_DTYPE)
    store.put(vector_keys(store, "e", places.hashes), [each.tobytes() for each in vectors])
    store.close()


def _said(config: KafkaConfig) -> list[dict[str, Any]]:
    messages = [each for batch in read_topic(config, OUTPUT) for each in batch]
    return [orjson.loads(each.value() or b"") for each in messages]
