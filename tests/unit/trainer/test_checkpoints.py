"""Which checkpoint is whose."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model import encoder as encoders
from model.encoder import TextEncoder
from trainer.checkpoints import STALE_SECONDS, of_fit
from trainer.config import TextConfig
from trainer.text import TEST, TRAIN, ReviewTexts

REVIEWS = ReviewTexts(["good", "bad"], np.array([5.0, 1.0]), np.array([TRAIN, TEST], np.int8))


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> TextEncoder:
    return encoders.load(encoder_folder, "cpu")


def test_each_fit_has_its_own(encoder: TextEncoder, tmp_path: Path) -> None:
    config = TextConfig(method="full")
    mine = of_fit(tmp_path, REVIEWS, encoder, config, 7)
    assert of_fit(tmp_path, REVIEWS, encoder, config, 7) == mine
    others = [
        of_fit(tmp_path, replace(REVIEWS, texts=["good", "bat"]), encoder, config, 7),
        of_fit(tmp_path, replace(REVIEWS, rating=np.array([5.0, 2.0])), encoder, config, 7),
        of_fit(tmp_path, replace(REVIEWS, span=REVIEWS.span[::-1].copy()), encoder, config, 7),
        of_fit(tmp_path, replace(REVIEWS, unrated=["new"]), encoder, config, 7),
        of_fit(tmp_path, REVIEWS, encoder, config.model_copy(update={"method": "lora"}), 7),
        of_fit(tmp_path, REVIEWS, encoder, config, 8),
    ]
    assert len({mine, *others}) == 7


def test_what_nobody_took_up_again_goes_after_a_day(encoder: TextEncoder, tmp_path: Path) -> None:
    config = TextConfig(method="full")
    mine = of_fit(tmp_path, REVIEWS, encoder, config, 7)
    old, new = tmp_path / "old.checkpoint", tmp_path / "new.part"
    for path in (mine, old, new):
        path.touch()
    for path in (mine, old):
        past = path.stat().st_mtime - STALE_SECONDS - 60
        os.utime(path, (past, past))
    of_fit(tmp_path, REVIEWS, encoder, config, 7)
    assert {*tmp_path.iterdir()} == {mine, new}
