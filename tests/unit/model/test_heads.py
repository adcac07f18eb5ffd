"""Heads that are cut out say what silent ones say."""

from pathlib import Path

import numpy as np
import pytest

from model import encoder as encoders
from model import heads
from model.exceptions import EncoderError
from tests.unit.trainer.shop import write_encoder

WORDS = ["good thing", "awful thing", "fair"]


def test_without_heads_an_encoder_says_what_it_says_with_them_silent(tmp_path: Path) -> None:
    whole = encoders.load(write_encoder(tmp_path / "whole"), "cpu")
    kept = [[each.count - 1] for each in heads.attentions(whole.model)]
    heads.silence(whole.model, kept)
    silent = whole.encode(WORDS)
    whole.save(tmp_path / "fewer")
    heads.write(tmp_path / "fewer", kept)
    fewer = encoders.load(tmp_path / "fewer", "cpu")
    assert [each.count for each in heads.attentions(fewer.model)] == [1] * len(kept)
    assert fewer.extended
    np.testing.assert_allclose(fewer.encode(WORDS), silent, atol=1e-5)


def test_heads_that_an_encoder_does_not_have_are_an_error(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "whole")
    heads.write(folder, [[99], [0]])
    with pytest.raises(EncoderError, match=r"heads\.json does not fit"):
        encoders.load(folder, "cpu")
