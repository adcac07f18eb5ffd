"""Settings of a peer, searched for on validation rows."""

from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.trial import Trial

Settings = Mapping[str, Any]
Suggest = Callable[[Trial], dict[str, Any]]
Remember = Callable[[str, Callable[[], float]], float]
"""What a trial of this name found: made by the function, unless it was before."""

TRIALS = 20
_DRAWN = 8  # trials by chance, before the sampler learns from them


def unremembered(name: str, make: Callable[[], float]) -> float:
    """Each trial is made."""
    return make()


def tune(
    suggest: Suggest,
    error: Callable[[Settings], float],
    seed: int,
    remember: Remember = unremembered,
) -> dict[str, Any]:
    """The settings of `TRIALS` that give the least error.

    Tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for Hyper-Parameter
    Optimization", section 4). Of the same errors come the same trials, so a search that was cut
    short goes on with what it remembers.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # else a trace of what is raised here
    sampler = TPESampler(n_startup_trials=_DRAWN, seed=seed)
    study = optuna.create_study(sampler=sampler)
    found: dict[int, dict[str, Any]] = {}

    def objective(trial: Trial) -> float:
        found[trial.number] = suggest(trial)
        return remember(f"trial {trial.number}", lambda: error(found[trial.number]))

    study.optimize(objective, n_trials=TRIALS)
    return found[study.best_trial.number]
