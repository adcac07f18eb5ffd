"""Events, and what is known beside them, to see that the Java peer computes what we do."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from numpy.typing import NDArray

from bench.peers.launch import PEERS, python
from bench.peers.work import INPUTS
from model.bundle import Bundle
from model.calibration import Calibration
from model.events import ACTIONS, Rows, blank, joined
from model.ids import hash_ids, hash_names
from model.lookups import Lookups, table, vectors_of
from model.network import gather, tensors
from model.predict import Predictions, predictor
from model.replay import History, Share, run_batch
from model.state import ITEM_ATTRIBUTES, LEVELS, USER_ATTRIBUTES
from schemas.columns import columns_of
from streams.reader import VECTOR_DTYPE
from tests.unit.model.test_serving import trained

WIDTH = 20  # of vectors; no multiple of what is added side by side
USERS, ITEMS = 12, 140
BATCH = 250

Sent = tuple[str, dict[str, Any]]  # topic and record


@dataclass(frozen=True)
class Expected:
    """What we say of events, in their order."""

    columns: NDArray[np.float32]  # features, then what the taste says
    predictions: Sequence[Predictions]
    seq: Sequence[int]

    def column(self, name: str) -> NDArray[np.float32]:
        if name == "interval":
            parts = [np.stack([each.low, each.high], 1) for each in self.predictions]
        else:
            parts = [getattr(each, name) for each in self.predictions]
        return np.concatenate(parts)


def installed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The class path of the program; the peer's packages can be imported after it."""
    executable = python(PEERS["kafka_streams"])
    [packages] = executable.parents[1].glob("lib/python*/site-packages")
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    from bench.peers.kafka_streams import build

    return build()


def bundle() -> Bundle:
    """A network that looks at all that it is given."""
    network = trained(vector=WIDTH, members=2, factors=3, trees=9, heads=0, identity=0)
    calibration = Calibration(intercept=0.1, slope=0.95, temperature=0.9, interval=1.2)
    return Bundle("a", "", Path(), network, calibration, {}, "e", None, None)


def expect(bundle: Bundle, history: History, lookups: Lookups, events: Rows) -> Expected:
    """What we say of one partition's events that go on where a history ends."""
    made, network = predictor(bundle, "cpu"), bundle.network
    columns: list[NDArray[np.float32]] = []
    predictions: list[Predictions] = []
    seq: list[int] = []
    partition = history.partition
    for begin in range(0, len(events), BATCH):
        batch = events[begin : begin + BATCH]
        users, index = history.users.distinct(batch["user"])
        share = Share(history.users.rows.take(users), index, partition, batch)
        [result], observation = run_batch([share], lookups)
        history.users.rows[users] = result.states
        partition = result.partition
        inputs = gather(batch, observation, lookups, network.config.vector)
        with torch.inference_mode():
            columns.append(network.columns(tensors(network.config, inputs)).numpy())
        predictions.append(made.predict(batch, observation, lookups))
        seq += result.seq.tolist()
    return Expected(np.concatenate(columns), predictions, seq)


def compare(said: Sequence[dict[str, Any]], expected: Expected) -> None:
    """Predictions as they were published: rounded to four decimals."""
    for name in ("rating", "distribution", "interval"):
        np.testing.assert_allclose(
            [each[name] for each in said], expected.column(name), atol=2e-4, err_msg=name
        )
    assert [each["seq"] for each in said] == expected.seq


def lookups_of(history: History) -> Lookups:
    """What stands still from now on."""
    return Lookups(
        table(history.items.hashes.copy(), history.items.rows.copy()),
        history.item_attributes,
        history.user_attributes,
        history.vectors,
    )


# Ids of one to hundreds of bytes are hashed in different ways.
_ENDINGS = {7: "ü", 11: "-" * 20, 13: "long " * 30, 17: "é" * 240}


def begin(random: np.random.Generator) -> History:
    """What is known of most items and users."""
    items, users = _names("item", ITEMS - 9), _names("user", USERS - 2)
    attributes = blank(ITEM_ATTRIBUTES, len(items))
    attributes["version"] = 1 + np.arange(len(items))
    attributes["first_time"] = 1_700_000_000_000
    attributes["text"] = np.where(random.random(len(items)) < 0.9, hash_ids(items), 0)
    attributes["brand"] = hash_names([f"brand {at % 5}" for at in range(len(items))])
    for level in range(LEVELS):
        names = [f"{at % 2} {at % 7 % (level + 1)} {level}" for at in range(len(items))]
        known = np.arange(len(items)) % 5 >= level
        attributes["category"][:, level] = np.where(known, hash_names(names), 0)
    priced = random.random(len(items)) < 0.9
    attributes["price"] = np.where(priced, 40 * random.random(len(items)), np.nan)
    attributes["price_rank"] = random.random(len(items))
    people = blank(USER_ATTRIBUTES, len(users))
    people["version"] = 1
    people["gender"] = hash_names(["f", "m", None, "x", "f"] * (len(users) // 5))
    people["region"] = hash_names([f"region {at % 3}" for at in range(len(users) - 1)] + [None])
    people["age"] = [None if at % 3 else 20 + at for at in range(len(users))]
    texts = np.unique(attributes["text"])[1:-3]  # a few have no vector yet
    vectors = random.normal(size=(len(texts), WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return History(
        table(hash_ids(items), attributes),
        table(hash_ids(users), people),
        vectors_of(texts, vectors.astype(VECTOR_DTYPE).astype(np.float32)),
    )


def records_of(random: np.random.Generator, count: int) -> list[Sent]:
    """Reviews (some of them edits) and actions, a few twice, in nearly the order of time."""
    records: list[Sent] = []
    time = np.datetime64("2026-03-01T08:00:00.000")
    for number in range(count):
        if number % 37 == 5:
            records.append(records[-int(random.integers(1, 5))])
            continue
        time += np.timedelta64(int(random.exponential(200_000)), "ms")
        late = np.timedelta64(int(random.integers(600_000)) if number % 50 == 0 else 0, "ms")
        record: dict[str, Any] = {
            "event_id": f"event {number}",
            "user_id": f"user {int(USERS * random.random() ** 2)}",
            "item_id": f"item {int(random.integers(ITEMS))}{_ENDINGS.get(number % 60, '')}",
            "event_time": f"{time - late}Z",
        }
        if random.random() < 0.6:
            stars = [1, 2, 3, 3.5, 4, 4.7, 5, None]
            topic, rating = "reviews", stars[int(random.integers(len(stars)))]
            record |= {"rating": rating, "text": "words"}
        else:
            topic = "behavior"
            action = ACTIONS[1 + int(random.integers(7))]
            record |= {"action": action, "session_id": None, "unknown": {"a": [1]}}
            if number % 3:
                record["session_id"] = f"session {number // 40}"
            if number % 4:
                record["price"] = round(60 * random.random(), 2)
            if number % 5 == 0:
                record["quantity"] = int(random.integers(1, 9))
        records.append((topic, record))
    return records


def events_of(records: Sequence[Sent]) -> Rows:
    """EVENT rows (n)."""
    parts: list[Rows] = []
    for topic, record in records:
        kind, rows_of = INPUTS[topic]
        parts.append(rows_of(columns_of(kind, [kind.model_validate_json(orjson.dumps(record))])))
    return joined(parts)


def _names(what: str, count: int) -> list[str]:
    return [f"{what} {at}" for at in range(count)]
