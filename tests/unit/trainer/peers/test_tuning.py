"""The search finds what a flat look would."""

import optuna
import pytest

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
