"""The Java peer computes what we do: the same features, states and predictions."""

import subprocess
from pathlib import Path

import numpy as np
import orjson
import pytest

from model.features import NAMES
from model.lookups import Table, table
from model.taste import COLUMNS
from tests.unit.bench import streamed

EVENTS = 4_000
FIRST = 1_000  # events that leave the states which the program begins with


@pytest.mark.peer
@pytest.mark.timeout(900)  # packages and jars come by network at first use
def test_it_computes_what_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = streamed.installed(monkeypatch)
    from bench.peers import export
    from bench.peers.kafka_streams import STREAMS

    random, bundle = np.random.default_rng(11), streamed.bundle()
    records = streamed.records_of(random, EVENTS)
    events, later = streamed.events_of(records), records[FIRST:]
    history = streamed.begin(random)
    for _ in history.run(events[:FIRST]):
        pass
    lookups = streamed.lookups_of(history)
    assert history.vectors is not None
    known = export.Rows(
        lookups.items,
        lookups.item_attributes,
        lookups.user_attributes,
        Table(history.vectors.places.hashes, history.vectors.rows[history.vectors.places.rows]),
        table(history.users.hashes.copy(), history.users.rows.copy()),
        table(np.zeros(1, np.uint64), history.partition.reshape(1).copy()),
    )
    nowhere = {"bootstrap": "", "prefix": "", "inputs": [], "output": "", "application": ""}
    sizes = {"events": len(later), "warm_up": 0, "batch": streamed.BATCH}
    export.write_settings(
        tmp_path,
        nowhere
        | sizes
        | {"partitions": 1, "gather_ms": 0, "streams": STREAMS}
        | export.write(tmp_path, bundle, known),
    )
    lines = [
        b"%b\t%d\t%b\n" % (topic.encode(), at, orjson.dumps(record))
        for at, (topic, record) in enumerate(later)
    ]
    (tmp_path / "events").write_bytes(b"".join(lines))

    command = ["java", "-cp", path, "starcast.peer.Replay", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)

    expected = streamed.expect(bundle, history, lookups, events[FIRST:])
    columns = np.fromfile(tmp_path / "columns", "<f4").reshape(len(later), -1)
    for at, name in enumerate((*NAMES, *COLUMNS)):
        np.testing.assert_allclose(
            columns[:, at], expected.columns[:, at], rtol=1e-6, atol=1e-6, err_msg=name
        )
    said = [orjson.loads(line) for line in (tmp_path / "predictions").read_bytes().splitlines()]
    streamed.compare(said, expected)
    for each, (topic, record) in zip(said, later, strict=True):
        same = ("event_id", "user_id", "item_id", "event_time")
        assert [each[name] for name in same] == [record[name] for name in same]
        assert each["source"]["topic"] == topic
