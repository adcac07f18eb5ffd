"""Every text peer reads stars off words."""

from pathlib import Path

import numpy as np
import pytest

from tests.unit.trainer.shop import WORDS
from trainer.metrics import class_scores
from trainer.peers import tuning
from trainer.peers.texts import TEXT_PEERS, Worded, finetune_plain, settle


def worded(count: int, seed: int) -> Worded:
    stars = np.random.default_rng(seed).integers(0, len(WORDS), count)
    texts = [f"{WORDS[star]} thing number {at}" for at, star in enumerate(stars.tolist())]
    vectors = np.eye(len(WORDS), 8, dtype=np.float32)[stars]
    return Worded(texts, (stars + 1).astype(np.float64), vectors)


@pytest.mark.parametrize("name", [*TEXT_PEERS])
def test_a_peer_reads_the_word_that_says_the_stars(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TRIALS", 3)
    _, read = settle(TEXT_PEERS[name], worded(200, 1), worded(60, 2), seed=1)
    test = worded(60, 3)
    expected, stars = read(test.texts, test.vectors)
    found = class_scores(test.rating, expected, stars)
    assert found.rmse < 0.6
    assert found.accuracy > 0.9


def test_a_plain_fine_tune_reads_lists_of_texts(encoder_folder: Path) -> None:
    known = worded(64, 1)
    told = finetune_plain(
        encoder_folder, known.texts, known.rating, [known.texts[:5], [""]], 16, seed=1
    )
    (expected, stars), (nothing, _) = told
    assert expected.shape == stars.shape == (5,)
    assert ((expected >= 1) & (expected <= 5)).all()
    assert nothing.shape == (1,)
