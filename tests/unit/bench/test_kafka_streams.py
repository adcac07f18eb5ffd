"""The Java peer computes what we do: the same features, states and predictions."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from numpy.typing import NDArray

from bench.peers.launch import PEERS, PeerError, python
from model.bundle import Bundle
from model.calibration import Calibration
from model.events import ACTIONS, Rows, joined
from model.features import NAMES
from model.ids import hash_ids, hash_names
from model.lookups import Lookups, Table, table, vectors_of
from model.network import FusedNetwork, gather, tensors
from model.predict import Predictions, predictor
from model.replay import History, Share, run_batch
from model.state import ITEM_ATTRIBUTES, LEVELS, USER_ATTRIBUTES, blank
from model.taste import COLUMNS
from schemas.codec import decode
from schemas.topics import BY_NAME
from tests.unit.model.test_serving import trained

WIDTH = 20  # of vectors; no multiple of what is added side by side
USERS, ITEMS, EVENTS = 12, 140, 4_000
BATCH = 250
FIRST = EVENTS // 4  # events that leave the states which the program begins with


@dataclass(frozen=True)
class Expected:
    """What we say of events."""

    events: Sequence[tuple[str, dict[str, Any]]]  # topic and record
    columns: NDArray[np.float32]
    predictions: Sequence[Predictions]
    seq: NDArray[np.uint64]


@pytest.mark.slow
@pytest.mark.timeout(900)  # packages and jars come by network at first use
def test_it_computes_what_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _installed(monkeypatch)
    expected = _prepare(tmp_path, _bundle(trained(vector=WIDTH, members=2, factors=3, trees=9)))

    command = ["java", "-cp", path, "starcast.peer.Replay", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)

    columns = np.fromfile(tmp_path / "columns", "<f4").reshape(len(expected.columns), -1)
    for at, name in enumerate((*NAMES, *COLUMNS)):
        np.testing.assert_allclose(
            columns[:, at], expected.columns[:, at], rtol=2e-6, atol=2e-6, err_msg=name
        )
    said = [orjson.loads(line) for line in (tmp_path / "predictions").read_bytes().splitlines()]
    for name, tolerance in (("rating", 2e-4), ("distribution", 2e-4), ("interval", 5e-4)):
        np.testing.assert_allclose(
            [each[name] for each in said], _column(expected, name), atol=tolerance, err_msg=name
        )
    assert [each["seq"] for each in said] == expected.seq.tolist()
    for each, (topic, record) in zip(said, expected.events, strict=True):
        known = ("event_id", "user_id", "item_id", "event_time")
        assert [each[name] for name in known] == [record[name] for name in known]
        assert each["source"]["topic"] == topic


def _installed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The class path of the program, its peer's packages after our own."""
    try:
        executable = python(PEERS["kafka_streams"])
        [packages] = executable.parents[1].glob("lib/python*/site-packages")
        monkeypatch.setattr("sys.path", [*__import__("sys").path, str(packages)])
        from bench.peers.kafka_streams import build

        return build()
    except PeerError as error:
        pytest.skip(str(error))


def _prepare(folder: Path, bundle: Bundle) -> Expected:
    """Fill a folder as the peer does, with events beside; what we say of these."""
    from bench.peers import export
    from bench.peers.kafka_streams import STREAMS

    random = np.random.default_rng(11)
    records = _records(random)
    events = _rows(records)
    history = _history(random, bundle.network.config.vector)
    for _ in history.run(events[:FIRST]):
        pass
    frozen = Lookups(
        Table(*_sorted(history.items.hashes, history.items.rows)),
        history.item_attributes,
        history.user_attributes,
        history.vectors,
    )
    assert history.vectors is not None
    vectors = history.vectors
    rows = export.Rows(
        frozen.items,
        frozen.item_attributes,
        frozen.user_attributes,
        Table(vectors.places.hashes, vectors.rows[vectors.places.rows]),
        table(history.users.hashes.copy(), history.users.rows.copy()),
        table(np.zeros(1, np.uint64), history.partition.reshape(1).copy()),
    )
    said = export.write(folder, bundle, rows)
    nowhere = {"bootstrap": "", "prefix": "", "inputs": [], "output": "", "application": ""}
    sizes = {"events": EVENTS - FIRST, "warm_up": 0, "batch": BATCH, "partitions": 1}
    export.write_settings(folder, nowhere | sizes | {"streams": STREAMS} | said)
    later = records[FIRST:]
    lines = [
        b"%b\t%d\t%b\n" % (topic.encode(), at, orjson.dumps(record))
        for at, (topic, record) in enumerate(later)
    ]
    (folder / "events").write_bytes(b"".join(lines))
    return _expected(bundle, history, frozen, later, events[FIRST:])


def _expected(
    bundle: Bundle,
    history: History,
    lookups: Lookups,
    records: Sequence[tuple[str, dict[str, Any]]],
    events: Rows,
) -> Expected:
    made, network = predictor(bundle, "cpu"), bundle.network
    columns, predictions, seq = [], [], []
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
        seq.append(result.seq)
    return Expected(records, np.concatenate(columns), predictions, np.concatenate(seq))


def _column(expected: Expected, name: str) -> NDArray[np.float32]:
    if name == "interval":
        parts = [np.stack([each.low, each.high], 1) for each in expected.predictions]
    else:
        parts = [getattr(each, name) for each in expected.predictions]
    return np.concatenate(parts)


def _bundle(network: FusedNetwork) -> Bundle:
    calibration = Calibration(intercept=0.1, slope=0.95, temperature=0.9, interval=1.2)
    return Bundle("a", "", Path(), network, calibration, {}, None, None, None)


def _history(random: np.random.Generator, width: int) -> History:
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
    attributes["price"] = np.where(random.random(len(items)) < 0.9, 40 * random.random(), np.nan)
    attributes["price"] *= random.random(len(items)).astype(np.float32)
    attributes["price_rank"] = random.random(len(items))
    people = blank(USER_ATTRIBUTES, len(users))
    people["version"] = 1
    people["gender"] = hash_names(["f", "m", None, "x", "f"] * (len(users) // 5))
    people["region"] = hash_names([f"region {at % 3}" if at % 4 else None for at in range(len(users))])
    people["age"] = [None if at % 3 else 20 + at for at in range(len(users))]
    texts = np.unique(attributes["text"])[1:-3]  # a few have no vector yet
    vectors = random.normal(size=(len(texts), width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return History(
        table(hash_ids(items), attributes),
        table(hash_ids(users), people),
        vectors_of(texts, vectors.astype(np.float32)),
    )


def _records(random: np.random.Generator) -> list[tuple[str, dict[str, Any]]]:
    """Reviews (some of them edits) and actions, a few twice, in nearly the order of time."""
    records: list[tuple[str, dict[str, Any]]] = []
    time = np.datetime64("2026-03-01T08:00:00.000")
    for number in range(EVENTS):
        if number % 37 == 5:
            records.append(records[-int(random.integers(1, 5))])
            continue
        time += np.timedelta64(int(random.exponential(200_000)), "ms")
        late = np.timedelta64(int(random.integers(600_000)) if number % 50 == 0 else 0, "ms")
        record: dict[str, Any] = {
            "event_id": f"event {number}",
            "user_id": f"user {int(USERS * random.random() ** 2)}",
            "item_id": f"item {int(random.integers(ITEMS))}" + "ü" * (number % 3 == 0) + "-long" * (number % 60 == 1) * 12,
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


def _rows(records: Sequence[tuple[str, dict[str, Any]]]) -> Rows:
    from bench.peers.work import _FROM_RECORDS as FROM  # noqa: N811

    parts = []
    for topic, record in records:
        [decoded] = decode(BY_NAME[topic], [orjson.dumps(record)], [(0, 0)]).records
        parts.append(FROM[topic]([decoded]))
    return joined(parts)


def _sorted(hashes: NDArray[np.uint64], rows: Rows) -> tuple[NDArray[np.uint64], Rows]:
    made = table(hashes.copy(), rows.copy())
    return made.hashes, made.rows


def _names(what: str, count: int) -> list[str]:
    return [f"{what} {at}" for at in range(count)]
