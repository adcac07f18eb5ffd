"""The way of a model by hand: trained, measured, promoted, rolled back, and told to the workers."""

import json
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schemas.records import ModelUpdate
from starcast.main import app
from streams.admin import apply_topics
from streams.config import KafkaConfig
from streams.tail import read_topic
from tests.commands import run


@pytest.fixture
def kafka_config(
    embedded_broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> KafkaConfig:
    prefix = f"{uuid.uuid4().hex[:8]}."
    for name, value in {
        "KAFKA__BOOTSTRAP_SERVERS": embedded_broker,
        "KAFKA__TOPIC_PREFIX": prefix,
        "KAFKA__PARTITIONS": "2",
        "ARCHIVE__URL": str(tmp_path / "archive"),
        "MODELS__URL": str(tmp_path / "models"),
        "MODELS__ENCODER": "none",
        "TRAINER__FIT__EPOCHS": "2",
        "TRAINER__THREADS": "1",
        "TRAINER__GATE__LARGEST_ECE": "1",
        "TRAINER__GATE__LEAST_COVERAGE": "0",
    }.items():
        monkeypatch.setenv(f"STARCAST_{name}", value)
    monkeypatch.chdir(tmp_path)
    config = KafkaConfig(bootstrap_servers=embedded_broker, topic_prefix=prefix, partitions=2)
    apply_topics(config)
    return config


def updates(kafka: KafkaConfig) -> list[tuple[str, str]]:
    """Version and stage of each record of model-updates, in order."""
    values = [message.value() for batch in read_topic(kafka, "model-updates") for message in batch]
    read = [ModelUpdate.model_validate_json(value or b"") for value in values]
    return [(update.version, update.stage) for update in read]


def stable() -> str | None:
    entry = json.loads(run("models", "list", "--json").stdout)["registry"]["stable"]
    return entry and entry["version"]


def test_a_model_from_training_to_rollback(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    arguments = ("--events", "3000", "--users", "60", "--items", "60")
    assert run("sample", "--out", "shop.jsonl", *arguments).exit_code == 0

    trained = run("train", "shop.jsonl", "--promote")
    assert trained.exit_code == 0, trained.stderr
    assert "bias_running" in trained.stdout
    first = stable()
    assert first
    assert (tmp_path / "models" / "reports" / f"{first}.html").exists()
    assert updates(kafka_config) == [(first, "stable")]

    assert run("train", "shop.jsonl").exit_code == 0
    assert stable() == first
    second = json.loads(run("models", "list", "--json").stdout)["versions"][-1]
    assert second != first

    measured = run("evaluate", "--events", "shop.jsonl", "--model", "stable", "--json", "e.json")
    assert measured.exit_code == 0
    document = json.loads((tmp_path / "e.json").read_text())
    assert document["model"] == first
    rating = document["rating"]
    assert rating["model"]["all"]["rows"] == rating["bias_running"]["all"]["rows"] > 50
    run("evaluate", "--events", "shop.jsonl", "--model", "ladder", "--json", "e.json")
    ladder = json.loads((tmp_path / "e.json").read_text())["rating"]
    # One is served, rounded and clipped as a distribution needs it, the other is the bare feature.
    assert ladder["model"]["all"]["rmse"] == pytest.approx(
        ladder["bias_running"]["all"]["rmse"], abs=0.01
    )

    assert run("models", "promote", second, "--reason", "by hand").exit_code == 0
    assert stable() == second
    assert "by hand" in run("models", "list").stdout
    assert run("models", "rollback").stdout == f"{first} is stable.\n"
    assert stable() == first
    assert updates(kafka_config)[1:] == [
        (second, "stable"),
        (first, "retired"),
        (first, "stable"),
        (second, "retired"),
    ]


def test_nothing_is_archived_yet(kafka_config: KafkaConfig) -> None:
    result = CliRunner().invoke(app, ["retrain"])
    assert result.exit_code == 1
    assert "archive" in str(result.exception)


@pytest.mark.parametrize("arguments", [["--once", "--every", "6h"]])
def test_retrain_takes_one_schedule(kafka_config: KafkaConfig, arguments: list[str]) -> None:
    assert run("retrain", *arguments).exit_code == 2


def test_a_span_that_is_none(kafka_config: KafkaConfig) -> None:
    result = CliRunner().invoke(app, ["retrain", "--every", "often"])
    assert result.exit_code == 1
    assert "often" in str(result.exception)
