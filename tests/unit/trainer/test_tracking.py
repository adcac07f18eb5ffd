"""Figures come to where they are configured to."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config import TrackingConfig
from trainer.exceptions import TrainerError
from trainer.tracking import prune, tracking


def test_tensorboard_reads_what_was_noted(tmp_path: Path) -> None:
    config = TrackingConfig(folder=str(tmp_path))
    with tracking(config, "run", {"seed": 7}) as note:
        note("loss", 2.0, 1)
        note("loss", 1.5, 2)
    events: Any = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]


def test_old_trainings_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    runs = [f"2026010{day}T000000" for day in range(1, 5)]
    for name in (*runs, "wandb", "20260101"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events").write_text("figures")
    config = TrackingConfig(folder=str(tmp_path))
    prune(config, 2)
    assert {each.name for each in tmp_path.iterdir()} == {*runs[2:], "wandb", "20260101"}
    prune(config, 4)
    assert len(list(tmp_path.iterdir())) == 4
    prune(TrackingConfig(folder=str(tmp_path / "none")), 1)


@pytest.mark.parametrize(
    ("setting", "library"), [("wandb_project", "wandb"), ("mlflow_uri", "mlflow")]
)
def test_what_is_configured_must_be_installed(
    setting: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    config = TrackingConfig.model_validate({"folder": str(tmp_path), setting: "here"})
    with (
        pytest.raises(TrainerError, match=f"{library} is not installed"),
        tracking(config, "run", {}),
    ):
        pytest.fail("it opened")


def test_weights_and_biases_is_told_the_same_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    run = SimpleNamespace(log=told.append, finish=lambda: told.append("finished"))

    def init(**settings: Any) -> Any:
        told.append(settings["mode"])
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = TrackingConfig(folder=str(tmp_path), wandb_project="shop")
    with tracking(config, "run", {}) as note:
        note("loss", 2.0, 1)
    assert told == ["offline", {"loss": 2.0, "loss step": 1}, "finished"]


def test_a_place_that_fails_while_a_fit_goes_on_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that goes away after two figures, and does not answer at the end."""
    told: list[float] = []

    def log(figures: dict[str, float]) -> None:
        if len(told) == 2:
            raise ConnectionError("no route")
        told.append(figures["loss"])

    def finish() -> None:
        raise ConnectionError("no route")

    run = SimpleNamespace(log=log, finish=finish)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    config = TrackingConfig(folder=str(tmp_path), wandb_project="shop")
    with tracking(config, "run", {}) as note:
        for step in range(5):
            note("loss", float(step), step)
    assert told == [0, 1]
    assert [each.getMessage() for each in caplog.records] == [
        "Weights & Biases takes no more figures, the fit goes on: no route"
    ]
    events: Any = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert len(events.Scalars("loss")) == 5


def test_a_place_is_told_of_a_fit_that_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    run = SimpleNamespace(log=lambda figures: None, finish=lambda: told.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    config = TrackingConfig(folder=str(tmp_path), wandb_project="shop")
    with pytest.raises(ZeroDivisionError), tracking(config, "run", {}):
        raise ZeroDivisionError
    assert told == ["finished"]


def test_a_place_that_cannot_be_opened_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = TrackingConfig(folder=str(tmp_path), wandb_project="shop")
    with (
        pytest.raises(TrainerError, match="Weights & Biases takes no figures: not logged in"),
        tracking(config, "run", {}),
    ):
        pytest.fail("it opened")
