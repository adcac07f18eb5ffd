"""Which checkpoint is whose."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import encoder as encoders
from model.encoder import TextEncoder
from trainer.checkpoints import STALE_SECONDS, drop, load, save
from trainer.config import TextConfig
from trainer.text import TEST, TRAIN, ReviewTexts, checkpoint_of

REVIEWS = ReviewTexts(["good", "bad"], np.array([5.0, 1.0]), np.array([TRAIN, TEST], np.int8))


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> TextEncoder:
    return encoders.load(encoder_folder, "cpu")


def test_each_fit_has_its_own(encoder: TextEncoder, tmp_path: Path) -> None:
    config = TextConfig(method="full")
    mine = checkpoint_of(tmp_path, REVIEWS, encoder, config, 7)
    assert checkpoint_of(tmp_path, REVIEWS, encoder, config, 7) == mine
    reviews = [
        replace(REVIEWS, texts=["good", "bat"]),
        replace(REVIEWS, rating=np.array([5.0, 2.0])),
        replace(REVIEWS, span=REVIEWS.span[::-1].copy()),
        replace(REVIEWS, unrated=["new"]),
    ]
    others = [checkpoint_of(tmp_path, each, encoder, config, 7) for each in reviews]
    others += [
        checkpoint_of(tmp_path, REVIEWS, encoder, TextConfig(method="lora"), 7),
        checkpoint_of(tmp_path, REVIEWS, encoder, config, 8),
    ]
    assert len({mine, *others}) == 7


def test_what_nobody_took_up_again_goes_after_a_day(encoder: TextEncoder, tmp_path: Path) -> None:
    config = TextConfig(method="full")
    mine = checkpoint_of(tmp_path, REVIEWS, encoder, config, 7)
    old, new = tmp_path / "old.checkpoint", tmp_path / "new.part"
    for path in (mine, old, new):
        path.touch()
    for path in (mine, old):
        past = path.stat().st_mtime - STALE_SECONDS - 60
        os.utime(path, (past, past))
    checkpoint_of(tmp_path, REVIEWS, encoder, config, 7)
    assert {*tmp_path.iterdir()} == {mine, new}
    mine.with_suffix(".adapted").touch()
    drop(mine)
    assert {*tmp_path.iterdir()} == {new}


def test_where_nothing_can_be_written_the_fit_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    save(tmp_path / "file" / "1.checkpoint", {"step": 1})
    assert "no checkpoint was written" in caplog.text
    save(tmp_path / "new" / "1.checkpoint", {"step": 1})
    assert load(tmp_path / "new" / "1.checkpoint", torch.device("cpu")) == {"step": 1}
