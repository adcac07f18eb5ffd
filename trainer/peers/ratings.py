"""Question (a): what will this user rate this item.

A peer is fitted on known rows and asked for others. Those that only know what they were fitted on
give the same answer whenever they are asked; `biasedmf_folded` takes the user's earlier ratings in
at each question, and those on features see what the replay saw.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import lightgbm
import numpy as np
import pandas as pd
from lenskit.als import BiasedMFScorer
from lenskit.basic import BiasScorer
from lenskit.data import ItemList, RecQuery, from_interactions_df
from lenskit.training import TrainingOptions
from numpy.typing import NDArray
from optuna.trial import Trial
from sklearn.ensemble import RandomForestRegressor
from surprise import SVD, SVDpp
from surprise import Dataset as SurpriseDataset
from surprise import Reader as SurpriseReader

from trainer.baselines import fit_damped_bias, predict_damped_bias, running_bias
from trainer.metrics import Floats, rmse
from trainer.peers.tuning import Remember, Settings, Suggest, tune, unremembered

MOST_FOREST_TREES = 200


@dataclass(frozen=True)
class Rated:
    """n rated rows in the order of time.

    Their turns are their times, or where rows of one time know of each other their places.
    """

    user: NDArray[np.uint64]  # (n)
    item: NDArray[np.uint64]  # (n)
    turn: NDArray[np.int64]  # (n): what is known of a row's past has a lower one
    rating: Floats  # (n)
    features: NDArray[np.float32]  # (n, F): as replayed before each row

    def __len__(self) -> int:
        return len(self.rating)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """These rows."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))


Predict = Callable[[Rated, Rated], Floats]
"""Ratings of the asked rows; the other rows are the past, of which those before each row count."""


@dataclass(frozen=True)
class Peer:
    """How a peer is tuned and fitted."""

    fit: Callable[[Rated, Settings, int], Predict]  # known rows, settings, seed
    suggest: Suggest | None = None  # None: there is nothing to tune


def settle(
    peer: Peer,
    train: Rated,
    validation: Rated,
    seed: int,
    remember: Remember = unremembered,
) -> tuple[dict[str, Any], Predict]:
    """Tune a peer on validation, then fit it to both; its settings and what it predicts."""

    def error(settings: Settings) -> float:
        predicted = peer.fit(train, settings, seed)(validation, joined(train, validation))
        return rmse(validation.rating, predicted)

    settings = tune(peer.suggest, error, seed, remember) if peer.suggest else {}
    return settings, peer.fit(joined(train, validation), settings, seed)


def joined(first: Rated, second: Rated) -> Rated:
    """The rows of both, one after the other."""
    pairs = ((getattr(first, each.name), getattr(second, each.name)) for each in fields(Rated))
    return Rated(*(np.concatenate(pair) for pair in pairs))


def _global(known: Rated, settings: Settings, seed: int) -> Predict:
    mean = float(known.rating.mean())
    return lambda asked, past: np.full(len(asked), mean)


def _bias(known: Rated, settings: Settings, seed: int) -> Predict:
    bias = fit_damped_bias(known.user, known.item, known.rating, **settings)
    return lambda asked, past: predict_damped_bias(bias, asked.user, asked.item)


def _suggest_bias(trial: Trial) -> dict[str, Any]:
    return {
        "user_damping": trial.suggest_float("user_damping", 0.5, 100, log=True),
        "item_damping": trial.suggest_float("item_damping", 0.5, 100, log=True),
    }


def _bias_running(known: Rated, settings: Settings, seed: int) -> Predict:
    return lambda asked, past: running_bias(asked.features)


def _biasedmf(folded: bool) -> Callable[[Rated, Settings, int], Predict]:
    """LensKit's biased matrix factorisation by alternating least squares; its bias as fallback."""

    def fit(known: Rated, settings: Settings, seed: int) -> Predict:
        frame = pd.DataFrame(
            {"user_id": known.user, "item_id": known.item, "rating": known.rating}
        ).drop_duplicates(["user_id", "item_id"], keep="last")
        dataset = from_interactions_df(frame)
        options = TrainingOptions(rng=seed)
        damping = settings["damping"]
        model = BiasedMFScorer(
            embedding_size=settings["embedding_size"],
            regularization=settings["regularization"],
            epochs=settings["epochs"],
            damping=damping,
        )
        fallback = BiasScorer(damping=damping)
        model.train(dataset, options)
        fallback.train(dataset, options)

        def predict(asked: Rated, past: Rated) -> Floats:
            histories = _histories(asked, past) if folded else [None] * len(asked)
            predicted = np.empty(len(asked))
            for row, history in enumerate(histories):
                items = ItemList(item_ids=[asked.item[row]])
                query = RecQuery(user_id=asked.user[row], history_items=history)
                found = model(query, items).scores()
                if found is None or not np.isfinite(found[0]):
                    found = fallback(query, items).scores()
                predicted[row] = found[0] if found is not None else known.rating.mean()
            return predicted

        return predict

    return fit


def _histories(asked: Rated, past: Rated) -> list[ItemList | None]:
    """Of each asked row (n), what its user had rated at earlier turns."""
    order = np.lexsort((past.turn, past.user))
    users, turns = past.user[order], past.turn[order]
    found: list[ItemList | None] = []
    for user, turn in zip(asked.user, asked.turn, strict=True):
        begin, end = np.searchsorted(users, user), np.searchsorted(users, user, "right")
        rows = order[begin : begin + np.searchsorted(turns[begin:end], turn)]
        newest = dict(zip(past.item[rows].tolist(), past.rating[rows].tolist(), strict=True))
        found.append(
            ItemList(item_ids=np.array([*newest], np.uint64), rating=np.array([*newest.values()]))
            if newest
            else None
        )
    return found


def _suggest_biasedmf(trial: Trial) -> dict[str, Any]:
    return {
        "embedding_size": trial.suggest_int("embedding_size", 2, 64, log=True),
        "regularization": trial.suggest_float("regularization", 0.01, 30, log=True),
        "epochs": trial.suggest_int("epochs", 3, 20),
        "damping": trial.suggest_float("damping", 0.5, 100, log=True),
    }


def _surprise(kind: type[SVD] | type[SVDpp]) -> Callable[[Rated, Settings, int], Predict]:
    def fit(known: Rated, settings: Settings, seed: int) -> Predict:
        frame = pd.DataFrame({"user": known.user, "item": known.item, "rating": known.rating})
        dataset = SurpriseDataset.load_from_df(frame, SurpriseReader(rating_scale=(1, 5)))
        model = kind(random_state=seed, **settings)
        model.fit(dataset.build_full_trainset())

        def predict(asked: Rated, past: Rated) -> Floats:
            pairs = zip(asked.user, asked.item, strict=True)
            return np.array([model.predict(user, item).est for user, item in pairs])

        return predict

    return fit


def _suggest_surprise(trial: Trial) -> dict[str, Any]:
    return {
        "n_factors": trial.suggest_int("n_factors", 2, 100, log=True),
        "n_epochs": trial.suggest_int("n_epochs", 5, 40),
        "lr_all": trial.suggest_float("lr_all", 0.001, 0.02, log=True),
        "reg_all": trial.suggest_float("reg_all", 0.005, 0.5, log=True),
    }


def _lightgbm(known: Rated, settings: Settings, seed: int) -> Predict:
    rounds = settings["rounds"]
    fixed = {"objective": "l2", "verbosity": -1, "deterministic": True, "bagging_freq": 1}
    chosen = {name: value for name, value in settings.items() if name != "rounds"}
    data = lightgbm.Dataset(known.features, known.rating)
    model = lightgbm.train({**fixed, **chosen, "seed": seed}, data, num_boost_round=rounds)
    return lambda asked, past: np.asarray(model.predict(asked.features), np.float64)


def _suggest_lightgbm(trial: Trial) -> dict[str, Any]:
    return {
        "rounds": trial.suggest_int("rounds", 50, 800, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.15, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 4, 63, log=True),
        "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 5, 200, log=True),
        "bagging_fraction": trial.suggest_float("bagging_fraction", 0.4, 1.0),
        "feature_fraction": trial.suggest_float("feature_fraction", 0.2, 1.0),
        "lambda_l2": trial.suggest_float("lambda_l2", 0.01, 100, log=True),
    }


def _forest(known: Rated, settings: Settings, seed: int) -> Predict:
    model = RandomForestRegressor(MOST_FOREST_TREES, n_jobs=-1, random_state=seed, **settings)
    model.fit(known.features, known.rating)
    model.set_params(n_jobs=1)  # else trees are added up in the order in which threads end
    return lambda asked, past: np.asarray(model.predict(asked.features), np.float64)


def _suggest_forest(trial: Trial) -> dict[str, Any]:
    return {
        "max_features": trial.suggest_float("max_features", 0.05, 0.7, log=True),
        "min_samples_leaf": trial.suggest_int("min_samples_leaf", 2, 60, log=True),
        "max_samples": trial.suggest_float("max_samples", 0.2, 1.0),
    }


PEERS: Mapping[str, Peer] = {
    "global": Peer(_global),
    "bias": Peer(_bias, _suggest_bias),
    "bias_running": Peer(_bias_running),
    "biasedmf": Peer(_biasedmf(False), _suggest_biasedmf),
    "biasedmf_folded": Peer(_biasedmf(True), _suggest_biasedmf),
    "svd": Peer(_surprise(SVD), _suggest_surprise),
    "svdpp": Peer(_surprise(SVDpp), _suggest_surprise),
    "lightgbm": Peer(_lightgbm, _suggest_lightgbm),
    "forest": Peer(_forest, _suggest_forest),
}
