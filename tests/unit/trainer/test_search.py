"""The search for settings, on a shop and an encoder that are tiny."""

import math
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import polars as pl
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.progress import Progress

from starcast.settings import load
from trainer import search as module
from trainer.config import FitConfig, SizesConfig, TextConfig, TrainerConfig
from trainer.data import from_file
from trainer.exceptions import DivergedError, TrainerError
from trainer.search import (
    SPACES,
    Searched,
    What,
    plot_importance,
    search,
    space,
    with_settings,
    write_settings,
)

SMALL = TrainerConfig(fit=FitConfig(epochs=2, sizes=SizesConfig(members=1, width=16)))


@pytest.mark.parametrize("what", ["rating", "text"])
def test_every_range_is_of_a_setting_and_holds_its_default(what: What) -> None:
    sizes = SMALL.fit.sizes.model_copy(update={"identity": 8})
    config = SMALL.model_copy(update={"fit": SMALL.fit.model_copy(update={"sizes": sizes})})
    for each in space(what, config):
        value: Any = config
        for part in each.name.split("."):
            value = getattr(value, part)
        assert each.low <= value <= each.high or each.name == "fit.sizes.width"
        with_settings(config, {each.name: each.low})
        with_settings(config, {each.name: each.high})
    assert space(what, config) == list(SPACES[what])


def test_other_values_by_path() -> None:
    found = with_settings(SMALL, {"fit.sizes.width": 32, "seed": 1})
    assert (found.fit.sizes.width, found.seed, found.fit.epochs) == (32, 1, 2)
    assert SMALL.fit.sizes.width == 16


def test_a_search_goes_on_where_it_was_left_and_is_no_worse_than_the_defaults(
    shop_file: Path, tmp_path: Path
) -> None:
    log, study = from_file(shop_file), tmp_path / "study"
    first = search(log, "rating", SMALL, study, 2, encoder="none")
    assert first.trials == 2
    again = search(log, "rating", SMALL, study, 4, encoder="none")
    assert again.trials == 4
    assert again.default_rmse == first.default_rmse
    assert again.rmse <= first.rmse <= first.default_rmse
    assert search(log, "rating", SMALL, study, 4, encoder="none") == again


def test_settings_without_error_are_the_best(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where all ratings are equal."""
    errors = iter([0.0, 0.5])
    monkeypatch.setattr(module, "_judge", lambda *given: lambda config, trial: next(errors))
    found = search(from_file(shop_file), "rating", SMALL, tmp_path / "study", 2, encoder="none")
    assert (found.settings, found.rmse, found.default_rmse) == ({}, 0, 0)


def test_a_search_of_other_data_or_settings_is_another(shop_file: Path, tmp_path: Path) -> None:
    log, study = from_file(shop_file), tmp_path / "study"
    first = search(log, "rating", SMALL, study, 1, encoder="none")
    other = SMALL.model_copy(update={"seed": 1})
    assert search(log, "rating", other, study, 1, encoder="none").rmse != first.rmse
    newer = replace(log, events=log.events.copy())
    newer.events["time"] += 1
    assert search(newer, "rating", SMALL, study, 2, encoder="none").trials == 2


def test_settings_in_force_that_come_to_no_number_are_the_worst(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([math.nan, 0.5])
    monkeypatch.setattr(module, "_judge", lambda *_: lambda *_: next(answers))
    found = search(from_file(shop_file), "rating", SMALL, tmp_path / "study", 2, encoder="none")
    assert (found.rmse, found.default_rmse) == (0.5, math.inf)
    assert found.settings


def test_a_search_of_other_words_or_attributes_is_another(shop_file: Path) -> None:
    log = from_file(shop_file)
    (known, item), *items = log.items
    cheaper = replace(log, items=[(known, item.model_copy(update={"price": 1.0})), *items])
    mended = replace(log, reviews=log.reviews.with_columns(text=pl.col("text") + "!"))
    digests = {module._digest(each, SMALL, "none") for each in (log, cheaper, mended)}
    assert len(digests) == 3
    assert module._digest(from_file(shop_file), SMALL, "none") in digests


def test_a_search_killed_in_its_first_trial_tries_the_settings_in_force(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, study = from_file(shop_file), tmp_path / "study"
    judge = module._Rating.__call__

    def killed(self: Any, config: TrainerConfig, trial: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Rating, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        search(log, "rating", SMALL, study, 2, encoder="none")
    monkeypatch.setattr(module._Rating, "__call__", judge)
    found = search(log, "rating", SMALL, study, 2, encoder="none")
    alone = search(log, "rating", SMALL, tmp_path / "alone", 1, encoder="none")
    assert found.default_rmse == alone.default_rmse


def test_a_search_that_goes_on_draws_other_trials(shop_file: Path, tmp_path: Path) -> None:
    log, study = from_file(shop_file), tmp_path / "study"
    for trials in (2, 3, 4):
        search(log, "rating", SMALL, study, trials, encoder="none")
    storage = JournalStorage(JournalFileBackend(str(study)))
    (opened,) = optuna.get_all_study_names(storage)
    done = optuna.load_study(study_name=opened, storage=storage).trials
    assert len({each.params["fit.learning_rate"] for each in done}) == 4


def test_what_is_switched_off_is_not_searched_for(shop_file: Path, tmp_path: Path) -> None:
    """By default there are no ids."""
    ids = {"fit.identity_decay", "fit.sizes.identity", "fit.sizes.unknown"}
    assert {each.name for each in SPACES["rating"]} - {
        each.name for each in space("rating", SMALL)
    } == ids
    found = search(from_file(shop_file), "rating", SMALL, tmp_path / "s", 2, encoder="none")
    assert found.trials == 2
    assert not ids & set(found.settings)


def test_processes_share_a_study(shop_file: Path, tmp_path: Path) -> None:
    log = from_file(shop_file)
    found = search(log, "rating", SMALL, tmp_path / "study", 3, encoder="none", workers=2)
    assert found.trials == 3


_SLOW = """
import os, sys, time
from pathlib import Path
from trainer import search as module
from trainer.config import TrainerConfig
from trainer.data import from_file

def slow(config, trial):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    module._judge = lambda *_: slow
    shop, study = map(Path, sys.argv[1:])
    module.search(from_file(shop), "rating", TrainerConfig(), study, 4, encoder="none", workers=2)
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (lambda search, worker: os.killpg(search, signal.SIGINT), "KeyboardInterrupt"),
        (lambda search, worker: os.kill(search, signal.SIGTERM), ""),
        (lambda search, worker: os.kill(worker, signal.SIGKILL), "fewer --workers"),
    ],
    ids=["Ctrl-C", "SIGTERM", "killed worker"],
)
def test_processes_end_with_their_search_and_without_traces_of_their_own(
    shop_file: Path, tmp_path: Path, how: Callable[[int, int], None], told: str
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(_SLOW)
    with (
        (tmp_path / "errors").open("w") as errors,
        subprocess.Popen(
            [sys.executable, script, shop_file, tmp_path / "study"],
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as search,
    ):
        try:
            assert search.stdout is not None
            workers = [int(search.stdout.readline()) for _ in range(2)]
            how(search.pid, workers[0])
            search.communicate(timeout=60)  # which comes when all have ended
            assert search.returncode
        finally:
            with suppress(ProcessLookupError):
                os.killpg(search.pid, signal.SIGKILL)
    said = (tmp_path / "errors").read_text()
    assert told in said
    assert said.count("KeyboardInterrupt\n") == (told == "KeyboardInterrupt")


def test_an_error_in_a_trial_is_told_once_and_without_a_trace(
    shop_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: Any) -> float:
        raise TrainerError("the encoder does not take it")

    monkeypatch.setattr(module, "_judge", lambda *_: refused)
    with pytest.raises(TrainerError, match="does not take it"):
        search(from_file(shop_file), "rating", SMALL, tmp_path / "study", 2, encoder="none")
    assert capfd.readouterr().err == ""


def test_the_text_model_is_searched_for(
    shop_file: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    config = SMALL.model_copy(update={"text": TextConfig(method="lora")})
    encoder = str(encoder_folder)
    found = search(from_file(shop_file), "text", config, tmp_path / "s", 2, encoder=encoder)
    assert 0 < found.rmse <= found.default_rmse


def test_a_frozen_encoder_has_nothing_to_search_for(
    shop_file: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    config = SMALL.model_copy(update={"text": TextConfig(method="frozen")})
    with pytest.raises(TrainerError, match="nothing to search for"):
        search(from_file(shop_file), "text", config, tmp_path / "s", 2, encoder=str(encoder_folder))


def test_what_is_found_is_a_settings_file_that_train_takes(tmp_path: Path) -> None:
    found = Searched(
        {"fit.learning_rate": 0.002, "fit.sizes.width": 96}, 0.9, 0.91, 20, {"fit.sizes.width": 1}
    )
    path = tmp_path / "found.toml"
    write_settings(found, path)
    assert tomllib.loads(path.read_text())["trainer"]["fit"]["sizes"] == {"width": 96}
    settings = load(path, tmp_path)
    assert settings.trainer.fit.learning_rate == 0.002
    assert settings.trainer.fit.sizes.width == 96
    plot_importance(found, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


def test_a_fit_that_diverges_does_not_end_the_search(
    shop_file: Path,
    encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    validate, tried = module.text.validate, list[float]()

    def second_diverges(*given: Any) -> Any:
        tried.append(0)
        if len(tried) == 2:
            raise DivergedError("the fit of the encoder came to no number")
        return validate(*given)

    monkeypatch.setattr(module.text, "validate", second_diverges)
    config = SMALL.model_copy(update={"text": TextConfig(method="lora")})
    log, encoder = from_file(shop_file), str(encoder_folder)
    with Progress(disable=True) as progress:
        found = search(log, "text", config, tmp_path / "s", 3, encoder=encoder, progress=progress)
        assert [(task.completed, task.total) for task in progress.tasks] == [(3, 3)]
    assert (len(tried), found.trials) == (3, 3)
    assert found.rmse < 5
    assert "trial 1 comes to no number" in caplog.text


def test_a_search_goes_on_after_a_full_disk_cut_its_last_line(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, study = from_file(shop_file), tmp_path / "study"
    monkeypatch.setattr(module, "_judge", lambda *_: lambda *_: 0.5)
    search(log, "rating", SMALL, study, 2, encoder="none")
    with study.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    for trials in (3, 4):
        assert search(log, "rating", SMALL, study, trials, encoder="none").trials == trials


def test_a_study_that_is_another_file_is_refused_and_left_alone(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_judge", lambda *_: lambda *_: 0.5)
    for content in (b"[trainer]", b'{"topic": "reviews"}\n'):
        study = tmp_path / "other"
        study.write_bytes(content)
        with pytest.raises(TrainerError, match="holds no trials of a search"):
            search(from_file(shop_file), "rating", SMALL, study, 2, encoder="none")
        assert study.read_bytes() == content
