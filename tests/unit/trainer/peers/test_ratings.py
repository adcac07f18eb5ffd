"""Every rating peer learns what is there to learn, and uses no later row."""

import numpy as np
import pytest

from model.features import FEATURES, INDEX
from trainer.metrics import scores
from trainer.peers import ratings, tuning
from trainer.peers.ratings import PEERS, Rated, joined, settle

USERS, ITEMS, ROWS = 30, 12, 900


def rated(seed: int = 0) -> Rated:
    """Stars of a user's and an item's leaning; one feature tells both, the bias half of it."""
    random = np.random.default_rng(seed)
    user, item = random.integers(0, USERS, ROWS), random.integers(0, ITEMS, ROWS)
    leaning = np.random.default_rng(5)
    users, items = leaning.normal(0, 0.8, USERS), leaning.normal(0, 0.8, ITEMS)
    told = 3 + users[user] + items[item]
    features = np.zeros((ROWS, len(FEATURES)), np.float32)
    features[:, INDEX["user_rating_mean"]] = told
    features[:, INDEX["global_mean"]] = 3
    features[:, INDEX["user_bias"]] = features[:, INDEX["item_bias"]] = (told - 3) / 4
    features[:, INDEX["bias"]] = 1  # whatever else we may put into it is not in theirs
    return Rated(
        user.astype(np.uint64) + 1,
        item.astype(np.uint64) + 1,
        np.arange(ROWS, dtype=np.int64),
        np.clip(told + random.normal(0, 0.2, ROWS), 1, 5),
        features,
    )


@pytest.mark.parametrize("name", [name for name in PEERS if name != "global"])
def test_a_peer_beats_the_global_mean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRIALS", 2)
    monkeypatch.setattr(ratings, "MOST_FOREST_TREES", 20)
    data = rated()
    train, validation, test = (
        data.take(np.arange(*span)) for span in ((0, 600), (600, 750), (750, 900))
    )
    _, told = settle(PEERS[name], train, validation, seed=3)
    _, mean = settle(PEERS["global"], train, validation, seed=3)
    past = joined(train, validation)
    error = scores(test.rating, told(test, past)).rmse
    assert error < 0.8 * scores(test.rating, mean(test, past)).rmse


def test_the_past_that_is_folded_in_is_strictly_older() -> None:
    data = rated()
    asked = data.take(np.array([500]))
    found = ratings._histories(asked, data)[0]
    assert found is not None
    before = (data.user == asked.user[0]) & (data.turn < asked.turn[0])
    assert set(found.ids().tolist()) == set(data.item[before].tolist())
    first = data.take(np.array([int(np.flatnonzero(data.user == data.user[0])[0])]))
    assert ratings._histories(first, data) == [None]


def test_what_is_unknown_to_a_peer_is_predicted_all_the_same() -> None:
    data = rated()
    strange = Rated(
        np.array([999], np.uint64),
        np.array([999], np.uint64),
        np.array([ROWS]),
        np.array([3.0]),
        data.features[:1],
    )
    settings = {"embedding_size": 2, "regularization": 1.0, "epochs": 2, "damping": 5.0}
    for name in ("biasedmf", "biasedmf_folded"):
        told = PEERS[name].fit(data, settings, 1)(strange, data)
        assert told == pytest.approx([data.rating.mean()], abs=0.2)
