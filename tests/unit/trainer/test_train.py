"""From a small generated shop to a promoted bundle."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from model import bundle as bundles
from model import registry
from model.predict import predictor
from schemas.exceptions import UnreachableError
from schemas.files import write_records
from schemas.records import Review
from tests.unit.trainer.shop import shop
from tests.unit.trainer.test_archived import write_archive
from trainer import checkpoints, text
from trainer import fine_tune as tuning
from trainer import train as module
from trainer.assess import summary
from trainer.clean import Step
from trainer.config import TextConfig, TrackingConfig, TrainerConfig
from trainer.data import from_file
from trainer.evaluate import measure
from trainer.evaluate_texts import PARTS
from trainer.exceptions import TrainerError
from trainer.figures import summary as evaluated
from trainer.fine_tune import Labelled
from trainer.retrain import retrain_once
from trainer.train import TrainResult, train

CONFIG = TrainerConfig.model_validate(
    {
        "threads": 1,
        "device": "cpu",
        "fit": {
            "epochs": 4,
            "batch_rows": 128,
            "learning_rate": 3e-3,
            "sizes": {"members": 1, "width": 16, "token": 8},
        },
        "gate": {"resamples": 200},
        "text": {"method": "frozen"},
    }
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def result(models: str, shop_file: Path, encoder_folder: Path) -> TrainResult:
    log = from_file(shop_file)
    return train(log, models, CONFIG, encoder=str(encoder_folder), source="a generated shop")


def test_it_beats_the_baselines_that_cannot_know_tastes(result: TrainResult) -> None:
    errors = {name: found.all.rmse for name, found in result.evaluations.items()}
    assert set(errors) == {"model", "global", "global_running", "bias", "bias_running", "lightgbm"}
    assert errors["model"] < 0.85 * errors["bias_running"]
    assert len({found.all.rows for found in result.evaluations.values()}) == 1
    assert "bias_running" in result.claims
    assert result.verdict.passed, result.verdict.reason
    assert result.rows["test"] == 70
    assert result.text is not None
    assert result.text.accuracy == 1


def test_the_bundle_loads_and_says_what_it_was_made_from(result: TrainResult, models: str) -> None:
    bundle = bundles.load(models, result.version, result.sha256)
    assert predictor(bundle, "cpu").version == result.version
    assert bundle.star_head is not None
    assert bundle.metrics["rating"]["model"]["all"]["rmse"] == result.evaluations["model"].all.rmse
    assert bundle.metrics["gate"]["passed"] is True
    card = (bundle.folder / "MODEL_CARD.md").read_text()
    assert "a generated shop" in card
    assert "2024-01-01" in card


def test_the_report_needs_no_network_and_shows_every_plot(result: TrainResult) -> None:
    page = Path(result.report).read_text()
    for title in ("Error by model", "Reliability", "Error over time", "Cleaning", "Gate: "):
        assert title in page
    assert page.count("<svg") == 5
    outside = page.replace("http://www.w3.org/", "")  # names of SVG's own vocabulary
    assert "http://" not in outside
    assert "https://" not in outside
    assert "<script" not in page


def test_the_same_settings_give_the_same_model(
    result: TrainResult, shop_file: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    again = train(from_file(shop_file), str(tmp_path), CONFIG, encoder=str(encoder_folder))
    assert again.evaluations == result.evaluations
    assert again.calibration == result.calibration


def test_what_is_judged_was_fitted_without_the_newest_rows(
    result: TrainResult, shop_file: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    once = CONFIG.model_copy(update={"fit": CONFIG.fit.model_copy(update={"refit": False})})
    found = train(from_file(shop_file), str(tmp_path), once, encoder=str(encoder_folder))
    assert CONFIG.fit.refit
    assert found.evaluations == result.evaluations
    assert found.verdict == result.verdict
    assert found.sha256 != result.sha256


@pytest.mark.parametrize(("worded", "method"), [(range(700), "top_layers"), (range(590, 700), "")])
def test_an_encoder_learns_nothing_from_the_rows_that_judge(
    worded: range,
    method: str,
    encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The newest 70 of 700 ratings. Where hardly a text is older, the head is fitted alone."""
    entries = [
        (topic, record.model_copy(update={"text": None, "title": None}))
        if isinstance(record, Review) and int(record.event_id[1:]) not in worded
        else (topic, record)
        for topic, record in shop()
    ]
    write_records(tmp_path / "shop.jsonl", entries)
    fit, asked = tuning.fine_tune, list[str]()

    def watched(train: Labelled, validation: Labelled, *rest: Any) -> Any:
        asked.extend((*train.texts, *validation.texts))
        return fit(train, validation, *rest)

    monkeypatch.setattr(text, "fine_tune", watched)
    settings = TextConfig(method="top_layers", text_limit=110)
    config = CONFIG.model_copy(update={"text": settings})
    result = train(
        from_file(tmp_path / "shop.jsonl"), str(tmp_path), config, encoder=str(encoder_folder)
    )
    learnt = {int(each.split()[-1]) for each in asked}
    assert learnt == (set(range(531, 630)) if method else set())
    assert result.text is not None
    assert result.text.rows == 11  # a tenth
    card = bundles.load(str(tmp_path), result.version, result.sha256).folder / "MODEL_CARD.md"
    assert f"{method or 'frozen'}, l2" in card.read_text()
    assert ("the star head is fitted, the encoder is not" in caplog.text) == (not method)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("at", ["_take", "fit_network"])
def test_a_training_that_was_killed_takes_no_step_twice(
    at: str,
    shop_file: Path,
    encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, fine_tune = from_file(shop_file), {"epochs": 1, "batch_texts": 64}
    text = TextConfig.model_validate({"method": "full", "fine_tune": fine_tune})
    config = CONFIG.model_copy(update={"text": text, "checkpoints": str(tmp_path / "checkpoints")})
    steps: list[int] = []
    take = tuning._Fit._take

    def counted(self: Any, *arguments: Any) -> float:
        steps.append(self.step)
        return take(self, *arguments)

    def killed(*arguments: Any) -> float:
        if at == "_take" and len(steps) < 2:
            return counted(*arguments)
        raise _KilledError

    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1.0)  # after each step
    monkeypatch.setattr(tuning._Fit, "_take", counted)
    with monkeypatch.context() as patched:
        patched.setattr(tuning._Fit if at == "_take" else module, at, killed)
        with pytest.raises(_KilledError):
            train(log, str(tmp_path / "models"), config, encoder=str(encoder_folder))
    done = len(steps)
    again = train(log, str(tmp_path / "models"), config, encoder=str(encoder_folder))
    assert steps == list(range(len(steps)))
    assert (len(steps) > done == 2) if at == "_take" else (len(steps) == done)
    assert not [*(tmp_path / "checkpoints").iterdir()]
    whole = train(log, str(tmp_path / "models"), config, encoder=str(encoder_folder))
    assert again.text == whole.text
    assert again.evaluations == whole.evaluations


@pytest.mark.parametrize(("ended", "started"), [(2, True), (3, False), (9, False)])
def test_a_fit_starts_from_stable_where_it_has_not_seen_what_chooses(
    ended: int, started: bool
) -> None:
    """Validation rows begin at second 3."""
    time = np.arange(10) * 1_000
    data: Any = SimpleNamespace(
        examples=SimpleNamespace(events={"time": time}),
        split=SimpleNamespace(validation=np.array([3, 4])),
    )
    window = [datetime.fromtimestamp(each, UTC).isoformat() for each in (0, ended)]
    stable: Any = SimpleNamespace(metrics={"window": window}, network="of stable")
    assert (module._start(stable, None, data) is not None) is started


def test_a_bundle_and_the_ladder_are_measured_as_what_is_fitted_is(
    result: TrainResult, models: str, shop_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = from_file(shop_file)
    bundle = bundles.load(models, result.version)
    found = measure(log, bundle, CONFIG, ties="arrival").document
    assert found["model"] == result.version
    assert found["rating"].keys() == {"prequential", "static"}
    rating = found["rating"]["prequential"]
    for measured in ("rmse", "mse", "mae"):
        told = getattr(result.evaluations["bias_running"].all, measured)
        assert rating["bias_running"][measured] == pytest.approx(told)
    assert rating["model"]["rmse"] < rating["bias_running"]["rmse"]
    assert rating["model"]["buckets"].keys() == {"0", "1-2", "3-9", "10+"}
    for part in PARTS:
        assert found[part].keys() == {"model"}
    assert found["text"]["model"]["rmse"] < 1
    assert found["rows"]["not_newer_than_its_own"] == found["rows"]["test"]
    assert "was fitted to rows as new as" in caplog.text
    caplog.clear()
    ladder = measure(log, None, CONFIG)
    assert not caplog.text
    found = ladder.document
    assert found["rating"].keys() == {"prequential", "static", "arrival"}
    rating = found["rating"]["prequential"]
    # One is served, rounded and clipped as a distribution needs it, the other is the bare feature.
    assert rating["model"]["rmse"] == pytest.approx(rating["bias_running"]["rmse"], abs=0.01)
    assert (found["model"], found["text"]) == ("ladder", {})
    console = Console(width=160)
    with console.capture() as shown:
        console.print(evaluated(ladder))
    assert "bias_running" in shown.get()


def test_ids_from_outside_do_not_steer_the_console(result: TrainResult) -> None:
    console = Console(width=160)
    odd = Step("seen before", True, 2, ("order[/5]", "[red]x", "u\x1b[31m", "Ä"))
    with console.capture() as shown:
        console.print(summary(replace(result, steps=(odd,))))
    assert "order[/5], [red]x, u\\x1b[31m, Ä" in shown.get()


def test_stable_is_compared_on_newer_rows_and_left_out_where_it_predicts_no_numbers(
    result: TrainResult, models: str, shop_file: Path, tmp_path: Path
) -> None:
    stable = bundles.load(models, result.version)
    end = datetime.fromisoformat(stable.metrics["window"][1])
    window = [stable.metrics["window"][0], (end - timedelta(hours=20)).isoformat()]
    earlier = replace(stable, metrics={**stable.metrics, "window": window})
    gate = CONFIG.gate.model_copy(update={"least_unseen": 20})
    config, log = CONFIG.model_copy(update={"gate": gate}), from_file(shop_file)
    told = train(log, str(tmp_path), config, stable=earlier).verdict.checks
    assert any("stable model, 20 rows" in check.reason for check in told)
    broken = replace(stable, calibration=stable.calibration.model_copy(update={"slope": np.nan}))
    told = train(log, str(tmp_path), config, stable=broken).verdict.checks
    assert all("stable model" not in check.name for check in told)


def test_another_shops_bundle_is_started_from_and_the_card_says_what_was_carried(
    result: TrainResult, models: str, shop_file: Path, tmp_path: Path
) -> None:
    other = bundles.load(models, result.version)
    found = train(from_file(shop_file), str(tmp_path), CONFIG, other=other)
    bundle = bundles.load(str(tmp_path), found.version)
    assert bundle.encoder_hash == other.encoder_hash
    card = (bundle.folder / "MODEL_CARD.md").read_text()
    assert "of hidden" in card


def test_too_few_ratings_are_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    write_records(path, shop()[:300])
    with pytest.raises(TrainerError, match=r"only \d+ rated reviews of \d+ are left"):
        train(from_file(path), str(tmp_path), CONFIG, encoder="none")


@pytest.mark.parametrize("rating", [{"model": {}}, {"prequential": {}}, 3])
def test_an_evaluation_of_one_model_alone_is_refused_before_anything_is_fitted(
    rating: object, tmp_path: Path
) -> None:
    path = tmp_path / "few.jsonl"
    write_records(path, shop()[:300])  # too few to learn from, which would be said next
    alone = {"model": "v1", "rating": rating}
    with pytest.raises(TrainerError, match="without --model"):
        train(from_file(path), str(tmp_path), CONFIG, encoder="none", evaluated=alone)


def test_a_models_folder_that_cannot_be_written_is_told_before_anything_is_fitted(
    tmp_path: Path, shop_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.train.fit_network", pytest.fail)
    models = tmp_path / "models"
    models.touch()
    with pytest.raises(UnreachableError, match=r"models.*check models\.url"):
        train(from_file(shop_file), str(models), CONFIG, encoder="none")


_ERRORS = {"rmse": 1.0, "mse": 1.0, "mae": 0.8}


@pytest.mark.parametrize(
    "document",
    [
        {"rating": {"prequential": ["bias"]}},
        {"rating": {"prequential": {"bias": 1.0}}},
        {"rating": {"prequential": {"bias": {"rmse": 1.0}}}},
        {"rating": {"prequential": {"bias": {**_ERRORS, "mae": "low"}}}},
        {"rating": {"prequential": {"bias": _ERRORS}}, "ablations": {"taste": {"rmse": 1.0}}},
    ],
)
def test_an_evaluation_without_its_figures_is_refused_before_anything_is_fitted(
    document: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "few.jsonl"
    write_records(path, shop()[:300])
    with pytest.raises(TrainerError, match="lacks figures"):
        train(from_file(path), str(tmp_path), CONFIG, encoder="none", evaluated=document)


def test_retraining_promotes_what_passes_and_judges_it_against_stable(
    tmp_path: Path, encoder_folder: Path
) -> None:
    archive, models = str(tmp_path / "archive"), str(tmp_path / "models")
    (tmp_path / "archive").mkdir()
    write_archive(archive, shop())
    told: list[str] = []

    def tell(new: registry.Registry) -> None:
        assert new.stable is not None
        told.append(new.stable.version)

    first = retrain_once(
        archive, models, CONFIG, encoder=str(encoder_folder), on_promoted=tell, by="test"
    )
    assert first.promoted, first.reason
    assert first.result is not None
    assert first.previous == ""
    stable = registry.read(models).stable
    assert stable is not None
    assert (stable.version, stable.by) == (first.result.version, "test")
    assert told == [first.result.version]
    second = retrain_once(archive, models, CONFIG, on_promoted=tell)
    assert second.result is not None
    assert second.previous == first.result.version
    names = [check.name for check in second.result.verdict.checks]
    assert "not worse than the stable model" in names
    kept = bundles.load(models, second.result.version)
    assert kept.encoder_hash == bundles.load(models, first.result.version).encoder_hash
    third = retrain_once(archive, models, CONFIG, on_drift=True)
    assert (third.result, third.promoted) == (None, False)
    assert third.reason == "nothing has changed in the 0 ratings since it was fitted"


def test_retraining_leaves_stable_in_service_when_the_gate_says_no(tmp_path: Path) -> None:
    archive, models = str(tmp_path / "archive"), str(tmp_path / "models")
    (tmp_path / "archive").mkdir()
    write_archive(archive, shop())
    strict = CONFIG.model_copy(
        update={"gate": CONFIG.gate.model_copy(update={"least_rows": 100_000})}
    )
    done = retrain_once(
        archive, models, strict, encoder="none", on_promoted=lambda new: pytest.fail("promoted")
    )
    assert not done.promoted
    assert done.result is not None
    assert "100000 are needed to judge" in done.reason
    assert registry.read(models).stable is None
    metrics = json.loads((Path(models) / done.result.version / "metrics.json").read_text())
    assert metrics["gate"]["passed"] is False


@pytest.mark.parametrize(("rank", "tells"), [("0", True), ("1", False)])
def test_of_processes_that_fit_together_one_tells_figures(
    rank: str, tells: bool, shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(module, "base_encoder", stop)
    folder = tmp_path / "runs"
    tracked = CONFIG.model_copy(update={"tracking": TrackingConfig(folder=str(folder))})
    with pytest.raises(KeyboardInterrupt):
        train(from_file(shop_file), str(tmp_path), tracked)
    assert folder.exists() == tells


def test_where_figures_go_is_not_told_there(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's address may have a password."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    told: dict[str, Any] = {}
    library = SimpleNamespace(
        set_tracking_uri=lambda _: None,
        start_run=lambda run_name: nullcontext(),
        log_params=told.update,
    )
    monkeypatch.setitem(sys.modules, "mlflow", library)
    monkeypatch.setattr(module, "base_encoder", stop)
    config = TrackingConfig(folder=str(tmp_path / "runs"), mlflow_uri="http://bob:hunter2@mlflow")
    with pytest.raises(KeyboardInterrupt):
        train(from_file(shop_file), str(tmp_path), CONFIG.model_copy(update={"tracking": config}))
    assert told["seed"] == CONFIG.seed
    assert "hunter2" not in str(told)
