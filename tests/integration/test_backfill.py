"""A history that is brought in is in the states and in the archive, whole and once."""

import json
import socket
import threading
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from pydantic import SecretStr

from schemas import archive
from schemas.codec import encode
from schemas.exceptions import UnreachableError
from schemas.files import write_records
from schemas.history import history
from starcast.backfill import ARCHIVER, STAGES, BackfillError, _has_work, backfill
from starcast.settings import Settings
from starcast.shop import shop
from streams.admin import apply_topics
from streams.producer import Outgoing, play

END = datetime(2026, 1, 31, tzinfo=UTC)


@pytest.fixture(params=["embedded_broker", "kafka"])
def settings(request: pytest.FixtureRequest, store: str, tmp_path: Path) -> Settings:
    made = Settings()
    made.kafka.bootstrap_servers = request.getfixturevalue(request.param)
    made.kafka.exactly_once = request.param == "kafka"
    made.kafka.topic_prefix = f"{uuid.uuid4().hex[:8]}."
    made.kafka.group_id = uuid.uuid4().hex[:8]
    made.kafka.partitions = 3
    made.redis.url = SecretStr(store)
    made.archive.url = str(tmp_path / "archive")
    made.archive.flush_seconds = 0.5
    made.models.url = str(tmp_path / "models")
    made.models.encoder = "none"
    made.web.metrics_port = 0
    return made


def test_all_of_a_history_is_in(settings: Settings, tmp_path: Path) -> None:
    records = list(shop(5, users=20, items=15, events=300, end=END))
    files = [tmp_path / "first.jsonl", tmp_path / "second.parquet"]
    write_records(files[0], records[:100])
    write_records(files[1], records[100:])
    stages: list[str] = []
    sent = backfill(settings, files, threading.Event(), on_stage=stages.append)
    assert stages == [*STAGES, "archiver"]
    assert sent.delivered == Counter(topic for topic, _ in records)

    def archived(topic: str) -> pl.DataFrame:
        return archive.read(settings.archive.url, topic).collect()

    for topic, count in sent.delivered.items():
        assert len(archived(topic)) == count
    predictions = archived("predicted-ratings")
    assert len(predictions) == 300
    assert predictions["event_id"].n_unique() == 300
    assert archived("journal")["rows"].sum() == 300
    assert len(archived("item-updates")) > 0
    exported = [(topic, json.loads(value)) for topic, value in history(settings.archive.url)]
    played = [(topic, json.loads(encode(record))) for topic, record in records]
    assert sorted(map(str, exported)) == sorted(map(str, played))


def test_digests_of_workers_that_run_are_not_waited_for(settings: Settings) -> None:
    apply_topics(settings.kafka)
    assert not _has_work(settings, ARCHIVER)
    play([Outgoing("score-digests", b"w", b"{}")], settings.kafka)
    assert not _has_work(settings, ARCHIVER)
    play([Outgoing("alerts", b"a", b"{}")], settings.kafka)
    assert _has_work(settings, ARCHIVER)


def test_a_port_that_a_worker_has_is_not_wanted(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "shop.jsonl"
    write_records(file, shop(5, users=2, items=2, events=2, end=END))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings.web.metrics_port = taken.getsockname()[1]
        assert backfill(settings, [file], threading.Event()).failed.total() == 0


def test_a_stop_ends_it(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "shop.jsonl"
    write_records(file, shop(5, users=20, items=15, events=300, end=END))
    stop = threading.Event()
    stop.set()
    assert backfill(settings, [file], stop).sent.total() == 0


@pytest.mark.parametrize("settings", ["kafka"], indirect=True)  # the other takes any size
def test_a_refused_record_is_an_error(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    file.write_text('{"topic": "reviews", "value": {"text": "' + "x" * 2_000_000 + '"}}\n')
    with pytest.raises(BackfillError, match=r"refused 1 records.* add --skip 1 to the command"):
        backfill(settings, [file], threading.Event())


def test_no_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.clients.REACH_SECONDS", 0.5)
    nowhere = Settings()
    nowhere.kafka.bootstrap_servers = "127.0.0.1:1"
    with pytest.raises(UnreachableError):
        backfill(nowhere, [], threading.Event())
