"""What a rating hangs on, of states in a real store."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from model import registry
from model.events import blank
from model.ids import hash_ids
from model.network import blocks
from model.state import ITEM, LAYOUT_HASH, USER
from model.state_bytes import to_bytes
from schemas.records import PredictedRating, ScoreRequest
from streams.admin import TopicError, apply_topics
from streams.answers import Answers
from streams.config import KafkaConfig, ModelsConfig, RedisConfig, ScorerConfig
from streams.embedded import HOST, free_port
from streams.metrics import make_metrics
from streams.models import Models
from streams.reader import ITEM_STATE, USER_STATE, Reader, store_keys
from streams.store import Store
from tests.commands import run
from tests.unit.model.bundles import network, write
from tests.unit.streams.messages import PREFIX, message

PARTITIONS = 4


@pytest.fixture
def kept(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one user, who rates half a star above all others, and one item."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("streams.clients.REACH_SECONDS", 0.1)
    for name, value in {
        "REDIS__URL": store,
        "KAFKA__BOOTSTRAP_SERVERS": f"{HOST}:{free_port()}",
        "KAFKA__PARTITIONS": str(PARTITIONS),
        "MODELS__URL": str(tmp_path),
        "MODELS__ENCODER": "none",
    }.items():
        monkeypatch.setenv(f"STARCAST_{name}", value)
    made = Store(RedisConfig(url=SecretStr(store)), LAYOUT_HASH, PARTITIONS)
    user, item = blank(USER, 1), blank(ITEM, 1)
    user["rating_count"], user["rating_sum"], user["residual_sum"] = 10, 40, 5
    user["actions"][0][0], user["step"] = 10, 10
    item["rating_count"], item["rating_sum"], item["offset"] = 15, 60, 1
    item["histogram"], item["actions"][0][0] = [0, 0, 0, 15, 0], 15
    made.put(store_keys(made, USER_STATE, hash_ids(["ann"])), to_bytes(user))
    made.put(store_keys(made, ITEM_STATE, hash_ids(["lamp"])), to_bytes(item))
    return made


def explained(*arguments: str) -> dict[str, object]:
    result = run("explain", "--user", "ann", "--item", "lamp", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def answered(kept: Store, models: Path) -> PredictedRating:
    """What shops are told of the same."""
    metrics = make_metrics(CollectorRegistry())
    served = Models(ModelsConfig(url=str(models), encoder="none"), metrics)
    answers = Answers(ScorerConfig(), PREFIX, kept, Reader(kept), served, metrics, "answers-0")
    served.refresh()
    request = ScoreRequest(
        request_id="q", user_id="ann", item_ids=["lamp"], event_time=datetime.now(UTC)
    )
    (batch,) = answers.process([message("score-requests", request)]).batches
    return PredictedRating.model_validate_json(batch.messages[0]["value"])


def test_without_a_model_it_is_the_running_bias(kept: Store) -> None:
    found = explained("--model", "ladder")
    # All ratings' mean is 4 and the item's too; the user's ten are half a star higher, damped by 6.
    assert found["rating"] == pytest.approx(4 + 0.5 * 10 / 16, abs=1e-3)
    assert [each["name"] for each in found["inputs"]] == ["running bias"]  # pyright: ignore
    assert found["rest"] == pytest.approx(0, abs=1e-5)
    assert (found["tier"], found["model_version"]) == ("full", "ladder")


def test_it_is_the_rating_that_answers_give(kept: Store, tmp_path: Path) -> None:
    written = write(str(tmp_path))
    registry.promote(str(tmp_path), written.version, written.sha256, "a test", "to see")
    told, found = answered(kept, tmp_path), explained()
    assert found["rating"] == pytest.approx(told.rating, abs=1e-3)
    assert found["interval"] == pytest.approx(told.interval, abs=1e-3)
    assert (found["tier"], found["model_version"]) == (told.tier, written.version)


def test_inputs_come_by_size_and_sum_to_the_rating(kept: Store, tmp_path: Path) -> None:
    version = write(str(tmp_path)).version
    found = explained("--model", version, "--top", "4")
    inputs: list[dict[str, object]] = found["inputs"]  # pyright: ignore
    stars = [float(str(each["stars"])) for each in inputs]
    assert stars[1:] == sorted(stars[1:], key=abs, reverse=True)
    assert len(stars) == 5
    assert all(each["meaning"] for each in inputs)
    rest = float(str(found["rest"]))
    assert sum(stars) + rest == pytest.approx(found["rating"], abs=1e-5)
    shown = run("explain", "--user", "ann", "--item", "lamp", "--model", version, "--top", "4")
    first, *lines = shown.stdout.splitlines()
    assert first.startswith(f"ann would give lamp {found['rating']:.2f} stars, in 8 of 10 cases")
    assert [line.split()[0] for line in lines] == [f"{each:+.3f}" for each in (*stars, rest)]


def test_what_no_input_adds_is_the_baseline_and_calibration(kept: Store, tmp_path: Path) -> None:
    found = explained("--model", write(str(tmp_path)).version, "--top", "500")
    model = network().eval()
    nothing = torch.zeros(1, sum(blocks(model.config).values()))
    with torch.no_grad():
        base = float(torch.stack([each.head(nothing)[0, 0] for each in model.networks]).mean())
    rating = float(str(found["rating"]))
    before = (rating - 0.4) / 0.9  # as `write` calibrates
    assert found["rest"] == pytest.approx(rating - before + base, abs=0.01)


def test_a_shop_without_a_model_is_told_so(kept: Store) -> None:
    result = run("explain", "--user", "ann", "--item", "lamp")
    assert result.exit_code == 1
    assert "is promoted yet" in result.stderr


def test_other_partitions_than_settings_say_are_told(
    kept: Store, embedded_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = KafkaConfig(
        bootstrap_servers=embedded_broker, topic_prefix="explain.", partitions=PARTITIONS + 1
    )
    monkeypatch.setattr("streams.clients.REACH_SECONDS", 10.0)
    apply_topics(kafka)
    monkeypatch.setenv("STARCAST_KAFKA__BOOTSTRAP_SERVERS", embedded_broker)
    monkeypatch.setenv("STARCAST_KAFKA__TOPIC_PREFIX", kafka.topic_prefix)
    with pytest.raises(TopicError, match="STARCAST_KAFKA__PARTITIONS"):
        run("explain", "--user", "ann", "--item", "lamp", "--model", "ladder")
