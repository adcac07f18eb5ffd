"""The command line against a broker and a store: what it prints, and its exit codes."""

import base64
import gzip
import json
import os
import re
import signal
import threading
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner, Result

from schemas.codec import encode
from schemas.files import write_records
from schemas.records import DeadLetter, PredictedRating, Review, Source
from schemas.topics import TOPICS
from starcast.main import app
from streams.config import KafkaConfig
from streams.producer import Outgoing, play
from streams.tail import read_topic
from tests.commands import run

TIME = datetime(2026, 1, 1, 12, 30, tzinfo=UTC)


@pytest.fixture
def kafka_config(
    embedded_broker: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> KafkaConfig:
    """The broker under a prefix of its own, as the environment's settings name it."""
    prefix = f"{uuid.uuid4().hex[:8]}."
    for name, value in {
        "KAFKA__BOOTSTRAP_SERVERS": embedded_broker,
        "KAFKA__TOPIC_PREFIX": prefix,
        "KAFKA__PARTITIONS": "3",
        "REDIS__URL": store,
        "ARCHIVE__URL": str(tmp_path / "archive"),
        "MODELS__URL": str(tmp_path / "models"),
        "MODELS__ENCODER": "none",
    }.items():
        monkeypatch.setenv(f"STARCAST_{name}", value)
    monkeypatch.chdir(tmp_path)
    return KafkaConfig(bootstrap_servers=embedded_broker, topic_prefix=prefix, partitions=3)


@pytest.fixture
def topics(kafka_config: KafkaConfig) -> KafkaConfig:
    assert run("topics", "apply").exit_code == 0
    return kafka_config


def prediction(number: int, **changes: object) -> PredictedRating:
    values: dict[str, object] = {
        "event_id": f"e{number}",
        "user_id": f"u{number % 2}",
        "item_id": "i",
        "event_time": TIME,
        "predicted_at": TIME,
        "kind": "interaction",
        "rating": 4.25,
        "interval": [3.5, 5.0],
        "tier": "full",
        "model_version": "ladder",
        "source": Source(topic="reviews", partition=0, offset=number),
    }
    return PredictedRating.model_validate(values | changes)


def send(kafka: KafkaConfig, topic: str, *values: bytes) -> None:
    assert not play([Outgoing(topic, b"k", value) for value in values], kafka).failed


def test_topics_apply_and_show(kafka_config: KafkaConfig) -> None:
    missing = run("topics", "show")
    assert missing.exit_code == 1
    assert "missing" in missing.output
    applied = run("topics", "apply")
    assert applied.exit_code == 0
    assert applied.stdout.count("created") == len(TOPICS)
    shown = run("topics", "show", "--json")
    assert shown.exit_code == 0
    assert {line["problem"] for line in json.loads(shown.stdout)} == {""}
    assert run("topics", "apply").stdout == ""


def test_produce_prints_counts(topics: KafkaConfig, tmp_path: Path) -> None:
    review = Review(event_id="e", user_id="u", item_id="i", event_time=TIME, rating=4.0)
    write_records(tmp_path / "f.jsonl.gz", [("reviews", review)] * 20)
    done = run("produce", "f.jsonl.gz")
    assert done.exit_code == 0
    assert done.stdout.split() == ["20", "reviews"]
    assert "20 records" in done.stderr


def test_produce_tells_of_lines_that_are_no_records(topics: KafkaConfig, tmp_path: Path) -> None:
    good = json.dumps({"topic": "reviews", "value": {"user_id": "u"}})
    (tmp_path / "f.jsonl").write_text(f"{good}\nnot json\n{good}\n")
    done = run("produce", "f.jsonl")
    assert done.exit_code == 1
    assert done.stdout.split() == ["2", "reviews"]
    assert "1 lines are no records" in done.stderr
    assert "line 2" in done.stderr


def test_produce_tells_what_it_sent_of_a_file_that_is_cut_off(
    topics: KafkaConfig, tmp_path: Path
) -> None:
    line = json.dumps({"topic": "reviews", "value": {"user_id": "u"}}).encode() + b"\n"
    whole = gzip.compress(line, mtime=0)
    (tmp_path / "f.jsonl.gz").write_bytes(whole + whole[:-4])
    done = run("produce", "f.jsonl.gz")
    assert done.exit_code == 1
    assert "f.jsonl.gz cannot be read" in done.stderr
    assert "records before that were sent" in done.stderr


def test_produce_goes_on_where_it_was_stopped(topics: KafkaConfig, tmp_path: Path) -> None:
    lines = [json.dumps({"topic": "reviews", "value": {"user_id": f"u{at}"}}) for at in range(40)]
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    ctrl_c = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    stopped = run("produce", "f.jsonl", "--rate", "10")
    ctrl_c.join()
    assert stopped.exit_code == 130
    found = re.search(r"--skip (\d+)", stopped.stderr)
    assert found is not None
    assert 0 < int(found[1]) < 40
    assert run("produce", "f.jsonl", "--skip", found[1]).exit_code == 0
    keys = Counter(each.key() for batch in read_topic(topics, "reviews") for each in batch)
    assert keys == Counter(f"u{at}".encode() for at in range(40))


def test_consume_for_people_and_for_machines(topics: KafkaConfig) -> None:
    records = [prediction(number) for number in range(4)]
    expired = prediction(
        4, event_id=None, request_id="r", kind="request", rating=None, of=2,
        status="expired", interval=None, tier=None, model_version=None,
    )  # fmt: skip
    send(topics, "predicted-ratings", *map(encode, [*records, expired]))
    read = ("consume", "--from", "beginning", "--no-follow")
    lines = run(*read, "--json").stdout.splitlines()
    assert [PredictedRating.model_validate_json(line) for line in lines] == [*records, expired]
    assert len(run(*read, "--json", "--user", "u1").stdout.splitlines()) == 2
    assert len(run(*read, "--json", "--kind", "request").stdout.splitlines()) == 1
    assert len(run(*read, "--limit", "3").stdout.splitlines()) == 3
    shown = run(*read).stdout
    assert "12:30:00 interaction u1" in shown
    assert "★★★★☆ 4.25 [3.5, 5.0]  full, ladder" in shown
    assert shown.splitlines()[-1].endswith("☆☆☆☆☆ expired")


def test_consume_from_a_time_that_is_none(topics: KafkaConfig) -> None:
    assert run("consume", "--from", "yesterday").exit_code == 2


def test_dead_letters(topics: KafkaConfig) -> None:
    letters = [
        DeadLetter(
            key=base64.b64encode(b"u").decode(),
            value=base64.b64encode(b'{"rating": [red]9[/red]}').decode(),
            source=Source(topic="reviews", partition=1, offset=offset),
            processor="scorer",
            reason=reason,
            field="rating",
            first_failed_at=TIME,
        )
        for offset, reason in enumerate(["too large", "missing"])
    ]
    assert "0 dead letters" in run("dead-letters", "list").stderr
    send(topics, "dead-letters", *map(encode, letters))
    listed = run("dead-letters", "list")
    assert "reviews 1/0" in listed.stdout
    assert "2 dead letters" in listed.stderr
    assert "1 of them not shown" in run("dead-letters", "list", "--limit", "1").stderr
    (line,) = run("dead-letters", "list", "--reason", "LARGE", "--json").stdout.splitlines()
    position = json.loads(line)["position"]
    shown = run("dead-letters", "show", position).stdout
    assert "rating" in shown
    assert "[red]9[/red]" in shown
    assert run("dead-letters", "show", "7/7").exit_code == 1
    dry = run("dead-letters", "redrive", "--dry-run")
    assert dry.stdout == "Would send 2 records (2 to reviews).\n"
    assert run("dead-letters", "redrive", position).stdout == "Sent 1 records (1 to reviews).\n"
    assert run("dead-letters", "redrive", "--until", "2025-12-31").stdout == "Sent 0 records.\n"
    assert run("dead-letters", "redrive", position).stdout == "Sent 0 records.\n"
    missing = run("dead-letters", "redrive", position, "7/7")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "There is no dead letter at 7/7" in missing.stderr
    assert "1 dead letters" in run("dead-letters", "list").stderr
    everything = run("dead-letters", "list", "--all", "--json").stdout.splitlines()
    assert [json.loads(line)["redriven"] for line in everything] == [True, False]
    assert "sent again" in run("dead-letters", "list", "--all").stdout
    assert "yes" in run("dead-letters", "show", position).stdout
    again = run("dead-letters", "redrive", position, "--again")
    assert again.stdout == "Sent 1 records (1 to reviews).\n"


def findings(result: Result) -> dict[str, str]:
    return {line["name"]: line["state"] for line in map(json.loads, result.stdout.splitlines())}


def test_doctor_when_all_is_well(topics: KafkaConfig, store: str) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    found = findings(result)
    assert found["broker"] == found["topics"] == found["store"] == "fine"
    assert found["archive"] == found["models"] == found["device"] == "fine"
    assert found["model"] == found["encoder"] == "note"
    assert "✓ broker" in run("doctor").stdout


def test_doctor_tells_a_store_that_takes_no_writes(topics: KafkaConfig, store: str) -> None:
    with redis.Redis.from_url(store) as client:
        client.config_set("maxmemory", "1mb")
        client.replicaof("127.0.0.1", 1)
        try:
            result = run("doctor", "--json")
        finally:
            client.replicaof("no", "one")
            client.config_set("maxmemory", "0")
    assert result.exit_code == 1
    assert findings(result)["store memory"] == findings(result)["store role"] == "wrong"


def test_doctor_tells_what_is_wrong_and_what_to_do(
    kafka_config: KafkaConfig, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STARCAST_ARCHIVE__URL", str(tmp_path / "file" / "archive"))
    monkeypatch.setenv("STARCAST_MODELS__ENCODER", str(tmp_path / "no-encoder"))
    with redis.Redis.from_url(store) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            result = run("doctor", "--json")
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert result.exit_code == 1
    found = findings(result)
    assert found["topics"] == found["store eviction"] == found["archive"] == "wrong"
    assert found["encoder"] == "wrong"
    assert "starcast topics apply" in result.stdout
    assert "noeviction" in result.stdout


def test_doctor_without_servers(kafka_config: KafkaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.clients.REACH_SECONDS", 0.5)
    monkeypatch.setenv("STARCAST_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("STARCAST_REDIS__URL", "redis://:hunter2@127.0.0.1:1/0")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    found = findings(result)
    assert found["broker"] == found["store"] == "wrong"
    assert found["archive"] == "fine"
    assert "hunter2" not in result.output


def test_run_gives_up_without_a_broker(
    kafka_config: KafkaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.clients.REACH_SECONDS", 0.2)
    monkeypatch.setenv("STARCAST_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    result = CliRunner().invoke(app, ["run", "scorer", "--wait", "2"])
    assert result.exit_code == 1
    assert "127.0.0.1:1" in str(result.exception)
