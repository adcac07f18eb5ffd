"""Every text peer reads stars off words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast, Trainer

from tests.unit.trainer.shop import WORDS
from trainer.metrics import class_scores
from trainer.peers import tuning
from trainer.peers.texts import TEXT_PEERS, RatedTexts, finetune_plain, settle


def worded(count: int, seed: int) -> RatedTexts:
    stars = np.random.default_rng(seed).integers(0, len(WORDS), count)
    texts = [f"{WORDS[star]} thing number {at}" for at, star in enumerate(stars.tolist())]
    vectors = np.eye(len(WORDS), 8, dtype=np.float32)[stars]
    return RatedTexts(texts, (stars + 1).astype(np.float64), vectors)


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


@pytest.mark.parametrize("name", ["tfidf_ridge", "tfidf_logistic"])
def test_settings_that_leave_no_word_are_passed_over(name: str) -> None:
    """No word is in more than two of the texts."""
    known = RatedTexts(
        ["aa again", "bb again", "aa", "bb", "cc", "dd"],
        np.array([1.0, 5, 1, 5, 3, 3]),
        np.zeros((6, 8), np.float32),
    )
    settings, read = settle(TEXT_PEERS[name], known, known, seed=1)
    assert settings["min_df"] <= 2
    assert len(read(["aa", "bb"], known.vectors[:2])[0]) == 2


def test_a_plain_fine_tune_reads_lists_of_texts(
    encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = worded(64, 1)
    asked = [known.texts[:5], [""]]
    told = finetune_plain(encoder_folder, known.texts, known.rating, asked, 16, 1, tmp_path)
    assert capsys.readouterr().out == ""  # where the command prints its figures
    (expected, stars), (nothing, _) = told
    assert expected.shape == stars.shape == (5,)
    assert ((expected >= 1) & (expected <= 5)).all()
    assert nothing.shape == (1,)


def test_a_plain_fine_tune_that_was_cut_short_comes_to_the_same(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = worded(64, 1)

    def fitted(folder: str) -> np.ndarray:
        told = finetune_plain(
            encoder_folder, known.texts, known.rating, [known.texts], 16, 1, tmp_path / folder
        )
        return told[0][0]

    whole = fitted("whole")
    monkeypatch.setattr("trainer.peers.texts._CHECKPOINT_STEPS", 6)  # of 16
    steps = 0
    step = Trainer.training_step

    def cut(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", cut)
    with pytest.raises(KeyboardInterrupt):
        fitted("cut")
    (tmp_path / "cut" / "checkpoint-8").mkdir()  # as a kill while one is written leaves it
    assert np.array_equal(fitted("cut"), whole)
    assert steps == 9 + 10  # from the sixth on


def test_a_decoder_without_a_padding_token_is_fitted_plainly(tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    vocabulary = {word: k for k, word in enumerate(["<end>", *WORDS, "thing"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<end>", eos_token="<end>"
    ).save_pretrained(folder)
    config = GPT2Config(vocab_size=len(vocabulary), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    decoder: Any = GPT2Model(config)
    decoder.to(torch.bfloat16).save_pretrained(folder)
    known = worded(32, 1)
    ((expected, _),) = finetune_plain(
        folder, known.texts, known.rating, [known.texts[:5]], 16, 1, tmp_path / "scratch"
    )
    assert ((expected >= 1) & (expected <= 5)).all()
