"""The search finds what a flat look would."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import Trial

from trainer.kept import Kept
from trainer.peers.tuning import TRIALS, Settings, tune


def test_the_least_error_of_all_trials_is_taken_and_repeats() -> None:
    tried: list[float] = []

    def error(settings: object) -> float:
        assert isinstance(settings, dict)
        tried.append((settings["x"] - 3) ** 2)
        return tried[-1]

    found = tune(lambda trial: {"x": trial.suggest_float("x", 0, 10)}, error, seed=1)
    assert len(tried) == TRIALS
    assert (found["x"] - 3) ** 2 == min(tried)
    assert found == tune(lambda trial: {"x": trial.suggest_float("x", 0, 10)}, error, seed=1)


def test_trials_of_a_search_that_was_cut_short_are_not_made_again(tmp_path: Path) -> None:
    made: list[float] = []

    def error(settings: Settings) -> float:
        if len(made) == 12:  # past those drawn by chance
            raise KeyboardInterrupt
        made.append(settings["x"])
        return (settings["x"] - 3) ** 2

    def suggest(trial: Trial) -> dict[str, Any]:
        return {"x": trial.suggest_float("x", 0, 10)}

    with pytest.raises(KeyboardInterrupt):
        tune(suggest, error, 1, Kept(tmp_path).trials("peer"))
    before, made = made, []
    whole = tune(suggest, lambda settings: (settings["x"] - 3) ** 2, 1)
    assert tune(suggest, error, 1, Kept(tmp_path).trials("peer")) == whole
    assert len(made) == TRIALS - 12
    assert not set(before) & set(made)


def test_what_a_peer_raises_is_told_by_who_catches_it(caplog: pytest.LogCaptureFixture) -> None:
    def error(settings: Settings) -> float:
        raise ValueError("one class only")

    optuna.logging.enable_propagation()
    try:
        with pytest.raises(ValueError, match="one class"):
            tune(lambda trial: {}, error, seed=0)
    finally:
        optuna.logging.disable_propagation()
    assert caplog.text == ""
