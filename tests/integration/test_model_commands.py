"""The way of a model by hand: trained, measured, promoted, rolled back, and told to the workers."""

import json
import re
import uuid
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from model import registry
from model.exceptions import RegistryError
from schemas.records import ModelUpdate, Role
from starcast.main import app
from streams.admin import apply_topics
from streams.config import InsightsConfig, KafkaConfig, RedisConfig
from streams.steps import add, close, make_steps
from streams.store import connect
from streams.tail import read_topic
from streams.windows import WINDOW_FIELD, WINDOWS_KEY
from tests.commands import run
from tests.digests import at, digest, ms
from tests.unit.model.bundles import write
from tests.unit.model.encoders import bert


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
    rating = document["rating"]["prequential"]
    assert rating["model"]["rows"] == rating["bias_running"]["rows"] > 50
    run("evaluate", "--events", "shop.jsonl", "--model", "ladder", "--json", "e.json")
    ladder = json.loads((tmp_path / "e.json").read_text())["rating"]["prequential"]
    # One is served, rounded and clipped as a distribution needs it, the other is the bare feature.
    assert ladder["model"]["rmse"] == pytest.approx(ladder["bias_running"]["rmse"], abs=0.01)

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


def test_a_version_is_tried_compared_and_promoted(
    kafka_config: KafkaConfig, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARCAST_REDIS__URL", store)
    url = str(tmp_path / "models")
    first, second = (write(url, seed) for seed in (0, 1))
    bert(tmp_path / "encoder")
    foreign = write(url, encoder=tmp_path / "encoder")
    assert run("models", "promote", first.version).exit_code == 0

    assert run("models", "compare").exit_code == 1
    with pytest.raises(RegistryError, match="no canary"):
        run("models", "end-canary")
    refused = run("models", "canary", foreign.version, "--share", "0.1")
    assert refused.exit_code == 1
    assert "another encoder" in " ".join(refused.stderr.split())
    assert run("models", "canary", second.version, "--share", "1.1").exit_code == 2
    assert run("models", "canary", second.version).exit_code == 2  # a share is said
    assert registry.read(url).canary is None

    shadow = run("models", "canary", second.version, "--share", "0", "--reason", "let us see")
    assert shadow.stdout == f"{second.version} is a shadow: it predicts, and answers nobody.\n"
    told = run("models", "list").stdout
    assert re.search(rf"{second.version} +shadow .*let us see", told)
    early = run("models", "compare")
    assert early.exit_code == 1
    assert "Nothing is counted" in early.stderr

    steps = make_steps(InsightsConfig(step_seconds=10))
    sides: tuple[tuple[Role, str, float], ...] = (
        ("stable", first.version, 0.5),
        ("shadow", second.version, 1.0),
    )
    for role, version, error in sides:
        errors = [(3.0 + sign * error, 3.0) for sign in (1, 0)] * 200
        add(steps, digest(at(5), errors, version=version, role=role), ms(9))
    window = close(steps, ms(10), InsightsConfig(step_seconds=10))
    assert window is not None
    client = connect(RedisConfig(url=SecretStr(store)))
    client.xadd(f"starcast:{WINDOWS_KEY}", {WINDOW_FIELD: window.model_dump_json().encode()})
    client.close()
    compared = " ".join(run("models", "compare").stdout.split())
    assert "stable 400 400 0.354 0.250 +0.250" in compared
    assert f"shadow {second.version} 400 400 0.707 0.500 +0.500" in compared
    # Means 0.5 and 0.25; variances 0.25 and 0.0625 of one, a 400th of it of the means.
    assert "Since 2026-01-01 00:00 UTC; the canary's MAE is +8.9 standard errors" in compared
    assert json.loads(run("models", "compare", "--json").stdout)["canary"]["sums"]["rated"] == 400

    more = run("models", "canary", second.version, "--share", "0.25")
    assert more.stdout == f"{second.version} answers 25% of users.\n"
    assert "canary 25%" in run("models", "list").stdout
    with pytest.raises(RegistryError, match="stable already"):
        run("models", "canary", first.version, "--share", "0.1")
    ended = run("models", "end-canary")
    assert ended.stdout == f"{second.version} is not tried any more.\n"
    assert (stable(), registry.read(url).canary) == (first.version, None)
    run("models", "canary", second.version, "--share", "0.5")
    assert run("models", "promote", second.version).exit_code == 0
    assert (stable(), registry.read(url).canary) == (second.version, None)
    assert updates(kafka_config) == [
        (first.version, "stable"),
        (second.version, "shadow"),
        (second.version, "canary"),
        (second.version, "retired"),
        (second.version, "canary"),
        (second.version, "stable"),
        (first.version, "retired"),
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
