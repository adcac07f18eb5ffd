"""Adaptation to a shop's words."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model

from model import encoder as encoders
from model.encoder import TextEncoder
from tests.unit.trainer.shop import WORDS, write_encoder
from trainer import checkpoints
from trainer.adapt import adapt
from trainer.config import AdaptConfig
from trainer.exceptions import TrainerError

TEXTS = [f"{word} thing" for word in WORDS] * 8


@pytest.fixture(scope="module")
def encoder(masking_folder: Path) -> TextEncoder:
    return encoders.load(masking_folder, "cpu")


def test_an_adapted_encoder_reads_otherwise_and_the_same_each_time(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    config = AdaptConfig(epochs=2, batch_texts=16, learning_rate=1e-3)

    def run(name: str) -> TextEncoder:
        return adapt(encoder, TEXTS, config, tmp_path / name, 3, lambda *at: steps.append(at))

    first, second = run("first"), run("second")
    assert steps[:6] == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    assert first.hash == second.hash != encoder.hash
    assert not np.allclose(first.encode(TEXTS[:5]), encoder.encode(TEXTS[:5]), atol=1e-4)


@pytest.mark.parametrize("at", [4, 6])  # in the second epoch, and after the last step
def test_one_that_was_killed_goes_on_to_the_same_weights(
    at: int, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdaptConfig(epochs=2, batch_texts=16, learning_rate=1e-3)
    whole = adapt(encoder, TEXTS, config, tmp_path / "whole", 3, lambda done, total: None)
    steps: list[int] = []

    def killed(done: int, total: int) -> None:
        steps.append(done)
        if done == at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1.0)  # after each step
    checkpoint = tmp_path / "checkpoint"
    run = partial(adapt, encoder, TEXTS, config, checkpoint=checkpoint, seed=3)
    with pytest.raises(KeyboardInterrupt) if at < 6 else nullcontext():
        run(folder=tmp_path / "killed", on_progress=killed)
    steps = steps[:at]
    found = run(folder=tmp_path / "again", on_progress=lambda done, total: steps.append(done))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert found.hash == whole.hash


def test_without_a_mask_token_there_is_nothing_to_fill_in(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    blind = replace(encoder, tokenizer=SimpleNamespace(mask_token=None))
    with pytest.raises(TrainerError, match="no mask token"):
        adapt(blind, TEXTS, AdaptConfig(epochs=1), tmp_path, 0, lambda done, total: None)


def test_a_decoder_fills_in_nothing_though_it_knows_a_mask(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=20, n_embd=24, n_layer=1, n_head=2, n_positions=40)
    GPT2Model(config).save_pretrained(write_encoder(tmp_path, mask="[MASK]"))
    decoder = encoders.load(tmp_path, "cpu")
    with pytest.raises(TrainerError, match="no model that fills in masks"):
        adapt(decoder, TEXTS, AdaptConfig(epochs=1), tmp_path, 0, lambda done, total: None)


def test_weights_kept_in_half_are_adapted_in_full_precision(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    half = replace(encoder, model=deepcopy(encoder.model).to(torch.bfloat16))
    half.save(tmp_path / "half")
    loaded = encoders.load(tmp_path / "half", "cpu")
    config = AdaptConfig(epochs=1)
    found = adapt(loaded, TEXTS, config, tmp_path / "new", 0, lambda done, total: None)
    assert {each.dtype for each in found.model.parameters()} == {torch.float32}
    assert np.isfinite(found.encode(TEXTS[:5])).all()


def test_an_encoder_in_eight_bits_is_not_adapted(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "small")
    encoders.write_quantization(tmp_path / "small")
    small = encoders.load(tmp_path / "small", "cpu")
    with pytest.raises(TrainerError, match="not fitted again"):
        adapt(small, TEXTS, AdaptConfig(epochs=1), tmp_path / "new", 0, lambda done, total: None)
