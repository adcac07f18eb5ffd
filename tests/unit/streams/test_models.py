import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from model import registry
from model.bundle import Written
from model.encoder import StarHead
from model.predict import Predictor
from schemas.exceptions import UnreachableError
from streams import models as following
from streams.config import ModelsConfig
from streams.exceptions import StoreError
from streams.metrics import make_metrics
from streams.models import Models
from tests.unit.model.bundles import write
from tests.unit.model.encoders import HIDDEN, bert


def make(url: Path, **config: Any) -> Models:
    settings = {"url": str(url), "encoder": "none", "device": "cpu", **config}
    return Models(ModelsConfig.model_validate(settings), make_metrics(CollectorRegistry()))


def promote(url: Path, written: Written) -> str:
    registry.promote(str(url), written.version, written.sha256, "a test", "to see")
    return written.version


def try_out(url: Path, written: Written, share: float) -> str:
    registry.set_canary(str(url), written.version, written.sha256, share, "a test", "to see")
    return written.version


def on_trial(models: Models) -> dict[str, float]:
    (family,) = (
        each for each in models._metrics.registry.collect() if each.name == "starcast_canary_share"
    )
    return {sample.labels["version"]: sample.value for sample in family.samples}


def in_service(models: Models) -> dict[str, float]:
    (family,) = (
        each for each in models._metrics.registry.collect() if each.name == "starcast_model_info"
    )
    return {sample.labels["version"]: sample.value for sample in family.samples}


def promoted_at(models: Models) -> float | None:
    return models._metrics.registry.get_sample_value("starcast_model_promoted_timestamp_seconds")


def test_before_any_bundle_the_ladder_serves(tmp_path: Path) -> None:
    models = make(tmp_path)
    assert models.serving.predictor.version == "ladder"
    assert (models.serving.bundle, models.serving.encoder_hash) == (None, "")
    models.refresh()
    assert models.serving.predictor.version == "ladder"
    assert in_service(models) == {"ladder": 1}
    assert promoted_at(models) == 0


def test_a_promoted_bundle_is_taken_up_between_two_looks(tmp_path: Path) -> None:
    models = make(tmp_path)
    before = models.serving
    first = promote(tmp_path, write(str(tmp_path)))
    assert models.serving is before  # whoever took it for a batch keeps it
    models.refresh()
    assert models.serving.predictor.version == first
    assert before.predictor.version == "ladder"
    assert in_service(models) == {first: 1}
    stable = registry.read(str(tmp_path)).stable
    assert stable is not None
    assert promoted_at(models) == stable.at.timestamp()
    taken = models.serving
    models.refresh()
    assert models.serving is taken  # not loaded again
    second = promote(tmp_path, write(str(tmp_path), seed=1))
    models.refresh()
    assert models.serving.predictor.version == second
    registry.rollback(str(tmp_path), "a test", "to see")
    models.refresh()
    assert models.serving.predictor.version == first
    assert in_service(models) == {first: 1}


def test_metrics_tell_of_the_newest_versions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "COUNTED_VERSIONS", 2)
    models = make(tmp_path)

    def counted() -> list[str]:
        version = models.serving.predictor.version
        models._metrics.predictions.labels("interaction", "full", version).inc()
        models._metrics.predictions.labels("request", "global", version).inc()
        (family,) = models._metrics.predictions.collect()
        return sorted({sample.labels["model_version"] for sample in family.samples})

    assert counted() == ["ladder"]
    first = promote(tmp_path, write(str(tmp_path)))
    models.refresh()
    assert counted() == sorted(["ladder", first])
    second = promote(tmp_path, write(str(tmp_path), seed=1))
    models.refresh()
    assert counted() == sorted([first, second])
    registry.rollback(str(tmp_path), "a test", "to see")
    models.refresh()
    third = promote(tmp_path, write(str(tmp_path), seed=2))
    models.refresh()
    assert counted() == sorted([first, third])  # which served later than the second


def cut(folder: Path) -> None:
    file = folder / "network.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def change(folder: Path) -> None:
    file = folder / "calibration.json"
    file.write_text(file.read_text().replace("0.9", "0.8"))


def forget(folder: Path) -> None:
    (folder / "features.json").unlink()


def pickle(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(b"cos\nsystem\n")


def swap(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"feature_hash": "0" * 8}))


@pytest.mark.parametrize("damage", [cut, change, forget, pickle, swap])
def test_a_damaged_bundle_is_refused_and_the_running_model_stays(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    models = make(tmp_path)
    good = promote(tmp_path, write(str(tmp_path)))
    models.refresh()
    running = models.serving
    bad = promote(tmp_path, write(str(tmp_path), seed=1))
    damage(tmp_path / bad)
    with capture_logs() as logs:
        models.refresh()
        models.refresh()
    assert models.serving is running
    assert in_service(models) == {good: 1}
    refused = [line for line in logs if line["event"] == "bundle refused"]
    assert len(refused) == 1  # said once
    assert (refused[0]["log_level"], refused[0]["running"]) == ("error", good)
    assert bad in refused[0]["reason"]
    later = promote(tmp_path, write(str(tmp_path), seed=2))
    models.refresh()
    assert models.serving.predictor.version == later


def test_a_bundle_that_was_mended_serves_once_it_is_promoted_again(tmp_path: Path) -> None:
    models = make(tmp_path)
    written = write(str(tmp_path))
    file = tmp_path / written.version / "network.safetensors"
    whole = file.read_bytes()
    cut(file.parent)
    promote(tmp_path, written)
    models.refresh()
    file.write_bytes(whole)
    models.refresh()
    assert models.serving.predictor.version == "ladder"  # which is not looked at all the time
    promote(tmp_path, written)
    models.refresh()
    assert models.serving.predictor.version == written.version


def test_a_canary_comes_changes_its_share_and_goes(tmp_path: Path) -> None:
    models = make(tmp_path)
    stable = promote(tmp_path, write(str(tmp_path)))
    second = write(str(tmp_path), seed=1)
    models.refresh()
    before = models.serving
    assert (before.canary, before.shadow, on_trial(models)) == (None, None, {})
    other = try_out(tmp_path, second, 0.1)
    models.refresh()
    first = models.serving
    assert before.canary is None  # whoever took it for a batch keeps it
    assert first.canary is not None
    assert (first.canary.predictor.version, first.canary.share) == (other, 0.1)
    assert first.canary.since == registry.read(str(tmp_path)).tried_since
    assert (first.predictor, first.bundle, first.shadow) == (before.predictor, before.bundle, None)
    assert (in_service(models), on_trial(models)) == ({stable: 1}, {other: 0.1})
    models.refresh()
    assert models.serving is first
    try_out(tmp_path, second, 0)
    models.refresh()
    assert models.serving.canary is not None
    assert models.serving.canary.share == 0
    assert models.serving.shadow is first.canary.predictor  # not loaded again
    assert on_trial(models) == {other: 0}
    registry.clear_canary(str(tmp_path), "a test", "enough")
    models.refresh()
    assert (models.serving.canary, on_trial(models)) == (None, {})
    assert models.serving.predictor is before.predictor


def test_a_canary_becomes_stable_or_outlives_it(tmp_path: Path) -> None:
    models = make(tmp_path)
    promote(tmp_path, write(str(tmp_path)))
    second, third = (write(str(tmp_path), seed=seed) for seed in (1, 2))
    try_out(tmp_path, second, 0.5)
    models.refresh()
    kept = models.serving.canary
    promote(tmp_path, third)  # as a retraining does
    models.refresh()
    assert models.serving.predictor.version == third.version
    assert models.serving.canary is kept is not None
    promote(tmp_path, second)
    models.refresh()
    assert models.serving.predictor.version == second.version
    assert models.serving.canary is None
    # Named at once as that was promoted: the one before serves on until this one is loaded.
    try_out(tmp_path, third, 0.5)
    models.refresh()
    assert models.serving.canary is not None
    assert models.serving.canary.predictor.version == third.version


def test_a_canary_is_warm_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = make(tmp_path)
    promote(tmp_path, write(str(tmp_path)))
    models.refresh()
    other = try_out(tmp_path, write(str(tmp_path), seed=1), 0.5)
    warmed: list[str] = []

    def warm(predictor: Predictor) -> None:
        assert models.serving.canary is None
        warmed.append(predictor.version)

    monkeypatch.setattr(following, "warm", warm)
    models.refresh()
    assert warmed == [other]
    assert models.serving.canary is not None


def test_a_damaged_canary_is_refused_once_and_stable_answers_all(tmp_path: Path) -> None:
    models = make(tmp_path)
    promote(tmp_path, write(str(tmp_path)))
    good = try_out(tmp_path, write(str(tmp_path), seed=1), 0.5)
    models.refresh()
    assert on_trial(models) == {good: 0.5}
    bad = write(str(tmp_path), seed=2)
    cut(tmp_path / bad.version)
    try_out(tmp_path, bad, 0.5)
    with capture_logs() as logs:
        models.refresh()
        models.refresh()
    assert (models.serving.canary, on_trial(models)) == (None, {})
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["bundle refused"]


def fails(*_: Any) -> Any:
    raise RuntimeError("CUDA out of memory")


def test_a_version_that_cannot_be_made_ready_is_refused_and_what_runs_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when two networks do not fit on a device: the thread that follows has to go on."""
    models = make(tmp_path)
    good = promote(tmp_path, write(str(tmp_path)))
    models.refresh()
    promote(tmp_path, write(str(tmp_path), seed=1))
    tried = write(str(tmp_path), seed=2)
    try_out(tmp_path, tried, 0.5)
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(following, "predictor", fails)
        models.refresh()
        models.refresh()
    assert (models.serving.predictor.version, models.serving.canary) == (good, None)
    refused = [line for line in logs if line["event"] == "bundle refused"]
    assert len(refused) == 2
    assert "CUDA out of memory" in refused[0]["reason"]
    later = promote(tmp_path, tried)  # alone there may be room for it
    models.refresh()
    assert models.serving.predictor.version == later


def test_a_trial_ends_also_when_the_new_stable_version_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = make(tmp_path)
    good = promote(tmp_path, write(str(tmp_path)))
    try_out(tmp_path, write(str(tmp_path), seed=1), 0.5)
    models.refresh()
    promote(tmp_path, write(str(tmp_path), seed=2))
    registry.clear_canary(str(tmp_path), "a test", "enough")

    def gone(*_: str) -> None:
        raise UnreachableError("no answer")

    monkeypatch.setattr(following.bundle, "load", gone)
    with capture_logs() as logs:
        models.refresh()
    assert (models.serving.predictor.version, models.serving.canary) == (good, None)
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == [
        "registry not read"
    ]


def test_a_canary_of_another_encoder_is_refused_until_stable_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert(tmp_path / "encoder")
    url = tmp_path / "models"
    models = make(url)
    promote(url, write(str(url)))
    other = try_out(url, write(str(url), seed=1, encoder=tmp_path / "encoder"), 0.5)
    with capture_logs() as logs:
        models.refresh()
    assert models.serving.canary is None
    (refused,) = [line for line in logs if line["event"] == "bundle refused"]
    assert f"{other} has another encoder" in refused["reason"]
    with monkeypatch.context() as patched:
        patched.setattr(following.bundle, "load", None)  # not read again and again
        models.refresh()
    promote(url, write(str(url), seed=2, encoder=tmp_path / "encoder"))
    models.refresh()
    assert on_trial(models) == {other: 0.5}
    promote(url, write(str(url), seed=3))  # and without an encoder
    models.refresh()
    assert on_trial(models) == {}


def test_a_registry_that_cannot_be_read_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = make(tmp_path)
    good = promote(tmp_path, write(str(tmp_path)))
    models.refresh()
    (tmp_path / registry.FILE).write_text("{")
    with capture_logs() as logs:
        models.refresh()
    assert models.serving.predictor.version == good
    assert [line["event"] for line in logs] == ["registry not read"]

    def gone(url: str) -> None:
        raise UnreachableError(f"nothing at {url}")

    monkeypatch.setattr(following.registry, "read", gone)
    models.refresh()
    assert models.serving.predictor.version == good


def test_a_bundle_brings_its_encoder(tmp_path: Path) -> None:
    source = tmp_path / "encoder"
    bert(source)
    head = StarHead(np.ones((5, HIDDEN), np.float32), np.zeros(5, np.float32))
    models = make(tmp_path / "models", encoder=str(source))
    before = models.serving
    assert before.encoder_folder == source
    assert before.encoder_hash
    assert before.star_head is None
    version = promote(
        tmp_path / "models", write(str(tmp_path / "models"), encoder=source, star_head=head)
    )
    models.refresh()
    assert models.serving.encoder_folder == tmp_path / "models" / version / "encoder"
    assert models.serving.encoder_hash == before.encoder_hash  # whose vectors stay good
    assert models.serving.star_head is not None


def test_the_registry_is_followed_until_the_end(tmp_path: Path) -> None:
    models = make(tmp_path, poll_seconds=0.02).start()
    try:
        version = promote(tmp_path, write(str(tmp_path)))
        deadline = time.monotonic() + 20
        while models.serving.predictor.version != version:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        models.close()
    assert not models._thread.is_alive()
    make(tmp_path).close()  # which was never started


def test_a_bug_does_not_end_the_following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, read = make(tmp_path, poll_seconds=0.01), registry.read
    failures = [ValueError("a bug")]

    def fail_once(url: str) -> registry.Registry:
        if failures:
            raise failures.pop()
        return read(url)

    models.start()
    try:
        with capture_logs() as logs:
            monkeypatch.setattr(registry, "read", fail_once)
            version = promote(tmp_path, write(str(tmp_path)))
            until = time.monotonic() + 10
            while models.serving.predictor.version != version and time.monotonic() < until:
                time.sleep(0.01)
    finally:
        models.close()
    assert models.serving.predictor.version == version
    assert [each["event"] for each in logs if each["log_level"] == "error"] == [
        "registry not followed"
    ]


def test_what_is_stable_already_serves_from_the_start(tmp_path: Path) -> None:
    version = promote(tmp_path, write(str(tmp_path)))
    models = make(tmp_path).start()
    models.close()
    assert models.serving.predictor.version == version


# -- another encoder -------------------------------------------------------------------------------


@dataclass
class Vectors:
    """How far the vectors of encoders reach, as the store would say."""

    share: float = 0.0
    asked: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    broken: bool = False

    def __call__(self, before: str, after: str) -> float:
        self.asked.append((before, after))
        if self.broken:
            raise StoreError("gone")
        return self.share


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    bert(made[0])
    bert(made[1])
    return made


def waiting(url: Path, vectors: Vectors, **config: Any) -> Models:
    settings = {"url": str(url), "encoder": "none", "device": "cpu", **config}
    metrics = make_metrics(CollectorRegistry())
    return Models(ModelsConfig.model_validate(settings), metrics, vectors)


def covered(models: Models) -> float | None:
    return models._metrics.registry.get_sample_value("starcast_encoder_covered")


def versions(models: Models) -> tuple[str, str]:
    """Of what serves, and of what reads texts."""
    return models.serving.predictor.version, models.reading.predictor.version


def test_a_version_with_another_encoder_serves_once_that_has_read_all_items(
    tmp_path: Path, encoders: tuple[Path, Path]
) -> None:
    vectors = Vectors()
    models = waiting(tmp_path, vectors)
    first = promote(tmp_path, write(str(tmp_path), encoder=encoders[0]))
    models.refresh()
    assert versions(models) == (first, first)  # nothing served before that knew words
    assert vectors.asked == []
    second = promote(tmp_path, write(str(tmp_path), seed=1, encoder=encoders[1]))
    running = models.serving
    with capture_logs() as logs:
        models.refresh()
        vectors.share = 0.75
        models.refresh()
    assert models.serving is running
    assert versions(models) == (first, second)
    assert (in_service(models), covered(models)) == ({first: 1}, 0.75)
    assert [line["event"] for line in logs] == ["a version waits for the vectors of its encoder"]
    assert set(vectors.asked) == {(running.encoder_hash, models.reading.encoder_hash)}
    loaded = models.reading
    vectors.share = 1.0
    models.refresh()
    assert models.serving == loaded  # which was warm already
    assert versions(models) == (second, second)
    assert (in_service(models), covered(models)) == ({second: 1}, 1)


def test_the_same_encoder_is_waited_for_by_nobody(
    tmp_path: Path, encoders: tuple[Path, Path]
) -> None:
    vectors = Vectors()
    models = waiting(tmp_path, vectors)
    promote(tmp_path, write(str(tmp_path), encoder=encoders[0]))
    models.refresh()
    second = promote(tmp_path, write(str(tmp_path), seed=1, encoder=encoders[0]))
    models.refresh()
    third = promote(tmp_path, write(str(tmp_path), seed=2))  # reads no texts
    assert versions(models) == (second, second)
    models.refresh()
    assert versions(models) == (third, third)
    fourth = promote(tmp_path, write(str(tmp_path), seed=3, encoder=encoders[0]))
    models.refresh()
    assert versions(models) == (fourth, fourth)
    assert vectors.asked == []


def test_a_rollback_waits_for_nothing(tmp_path: Path, encoders: tuple[Path, Path]) -> None:
    vectors = Vectors()
    models = waiting(tmp_path, vectors)
    first = promote(tmp_path, write(str(tmp_path), encoder=encoders[0]))
    models.refresh()
    second = promote(tmp_path, write(str(tmp_path), seed=1, encoder=encoders[1]))
    models.refresh()
    assert versions(models) == (first, second)
    registry.rollback(str(tmp_path), "a test", "to see")
    models.refresh()  # while it waits
    assert versions(models) == (first, first)
    assert covered(models) == 1
    promote(tmp_path, write(str(tmp_path), seed=2, encoder=encoders[1]))
    vectors.share = 1.0
    models.refresh()
    vectors.share = 0.0
    registry.rollback(str(tmp_path), "a test", "to see")
    models.refresh()  # when it serves
    assert versions(models) == (first, first)


@pytest.mark.parametrize("wait", [0.0, 0.01])
def test_no_version_waits_for_ever(
    tmp_path: Path, encoders: tuple[Path, Path], wait: float
) -> None:
    models = waiting(tmp_path, Vectors(broken=True), encoder_wait_seconds=wait)
    promote(tmp_path, write(str(tmp_path), encoder=encoders[0]))
    models.refresh()
    second = promote(tmp_path, write(str(tmp_path), seed=1, encoder=encoders[1]))
    with capture_logs() as logs:
        models.refresh()
        time.sleep(wait)
        models.refresh()
    assert versions(models) == (second, second)
    told = [line["event"] for line in logs]
    assert "not all items' vectors are there, and no version waits longer" in told
    assert "vectors not looked for" in told


def test_a_worker_that_starts_meanwhile_serves_what_the_others_serve(
    tmp_path: Path, encoders: tuple[Path, Path]
) -> None:
    first = promote(tmp_path, write(str(tmp_path), encoder=encoders[0]))
    second = promote(tmp_path, write(str(tmp_path), seed=1, encoder=encoders[1]))
    vectors = Vectors(0.5)
    models = waiting(tmp_path, vectors)
    models.refresh()
    assert versions(models) == (first, second)
    vectors.share = 1.0
    models.refresh()
    assert versions(models) == (second, second)
    models = waiting(tmp_path, vectors)
    models.refresh()
    assert versions(models) == (second, second)
    shutil.rmtree(tmp_path / first)
    vectors.share = 0.5
    models = waiting(tmp_path, vectors)
    models.refresh()
    assert versions(models) == (second, second)  # better than none


def test_a_worker_that_starts_goes_back_behind_all_that_wait_for_one_encoder(
    tmp_path: Path, encoders: tuple[Path, Path]
) -> None:
    """Two versions with the new encoder were promoted, and neither serves yet."""
    first = promote(tmp_path, write(str(tmp_path), encoder=encoders[0]))
    promote(tmp_path, write(str(tmp_path), seed=1, encoder=encoders[1]))
    third = promote(tmp_path, write(str(tmp_path), seed=2, encoder=encoders[1]))
    vectors = Vectors(0.5)
    models = waiting(tmp_path, vectors)
    models.refresh()
    assert versions(models) == (first, third)
    vectors.share = 1.0
    models.refresh()
    assert versions(models) == (third, third)


def test_another_version_takes_the_place_of_one_that_waits(
    tmp_path: Path, encoders: tuple[Path, Path]
) -> None:
    vectors = Vectors()
    models = waiting(tmp_path, vectors)
    first = promote(tmp_path, write(str(tmp_path), encoder=encoders[0]))
    models.refresh()
    promote(tmp_path, write(str(tmp_path), seed=1, encoder=encoders[1]))
    models.refresh()
    third = promote(tmp_path, write(str(tmp_path), seed=2, encoder=encoders[1]))
    models.refresh()
    assert versions(models) == (first, third)
    fourth = promote(tmp_path, write(str(tmp_path), seed=3, encoder=encoders[0]))
    models.refresh()
    assert versions(models) == (fourth, fourth)
