"""The star head, alone and with the encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model import encoder as encoders
from model.encoder import TextEncoder
from tests.unit.trainer.shop import WORDS
from trainer import text
from trainer.config import AdaptConfig, FineTuneConfig, Method, TextConfig
from trainer.metrics import Floats
from trainer.text import (
    TEST,
    TRAIN,
    VALIDATION,
    ReviewTexts,
    TextModel,
    fit,
    fit_star_head,
    settled,
    soft_labels,
)


def texts(count: int = 240) -> ReviewTexts:
    """Texts whose only telling word says the stars."""
    random = np.random.default_rng(0)
    rating = random.integers(1, 6, count)
    span = np.repeat([TRAIN, VALIDATION, TEST], [count - 80, 40, 40]).astype(np.int8)
    words = [f"{WORDS[star - 1]} thing" for star in rating]
    return ReviewTexts(words, rating.astype(np.float64), span)


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> TextEncoder:
    return encoders.load(encoder_folder, "cpu")


def test_soft_labels_by_hand() -> None:
    found = soft_labels(np.array([1.0, 3.5, 5.0, 4.25]))
    assert found.tolist() == [
        [1, 0, 0, 0, 0],
        [0, 0, 0.5, 0.5, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0.75, 0.25],
    ]


def test_without_information_the_head_says_the_shares_of_the_labels() -> None:
    labels = soft_labels(np.array([1.0, 5.0, 5.0, 5.0]))
    head = fit_star_head(np.zeros((4, 3), np.float32), labels, l2=0.1)
    assert head.stars(np.zeros((1, 3), np.float32))[0] == pytest.approx(
        [0.25, 0, 0, 0, 0.75], abs=1e-3
    )


def test_a_stronger_penalty_gives_smaller_weights() -> None:
    random = np.random.default_rng(1)
    vectors = random.normal(size=(100, 4)).astype(np.float32)
    labels = soft_labels(np.where(vectors[:, 0] > 0, 5.0, 1.0))
    weak, strong = (fit_star_head(vectors, labels, l2) for l2 in (1e-3, 1.0))
    assert np.abs(strong.weight).sum() < 0.3 * np.abs(weak.weight).sum()


def test_the_frozen_head_reads_the_word_that_tells(encoder: TextEncoder, tmp_path: Path) -> None:
    done: list[int] = []
    found = fit(
        texts(),
        encoder,
        TextConfig(method="frozen"),
        tmp_path,
        0,
        lambda count, total: done.append(count),
    )
    assert found.encoder is encoder
    assert found.scores.rows == 40
    assert found.scores.accuracy == 1
    assert found.scores.rmse < 0.3
    assert done[-1] == 240


def test_all_is_fitted_at_first_and_the_head_alone_once_an_encoder_serves() -> None:
    assert settled(TextConfig(), in_service=False).method == "full"
    assert settled(TextConfig(), in_service=True).method == "frozen"
    assert settled(TextConfig(method="lora"), in_service=True).method == "lora"


def test_fine_tuning_gives_a_new_encoder_and_leaves_the_old_one(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    config = TextConfig(method="full", fine_tune=FineTuneConfig(epochs=1, learning_rate=1e-3))
    before = encoder.encode(["good thing"])
    found = fit(texts(), encoder, config, tmp_path / "new", 0, lambda done, total: None)
    assert (encoder.encode(["good thing"]) == before).all()
    assert found.encoder.hash != encoder.hash
    assert found.scores.accuracy == 1
    assert found.cost.steps == 13  # 200 texts, 16 a step


def test_among_very_many_texts_the_newest_are_all_of_validation(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PROBED", 30)
    config = TextConfig(method="full", fine_tune=FineTuneConfig(epochs=1))
    with np.errstate(all="raise"):  # no head is fitted to nothing
        found = fit(texts(), encoder, config, tmp_path / "new", 0, lambda done, total: None)
    assert found.l2 == 3e-4
    assert found.scores.accuracy == 1


def test_texts_without_stars_are_learnt_from_where_the_head_is_sure(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    tuning = FineTuneConfig(epochs=1, learning_rate=1e-3)
    config = TextConfig(method="full", pseudo_labels=0.5, fine_tune=tuning)
    unrated = [f"{word} thing" for word in WORDS] * 20 + ["thing"] * 20  # which says nothing
    reviews = replace(texts(), unrated=unrated)
    found = fit(reviews, encoder, config, tmp_path / "new", 0, lambda done, total: None)
    assert found.cost.steps == 20  # 216 and 100 texts, 16 a step
    assert found.scores.accuracy == 1


@pytest.mark.parametrize("method", ["frozen", "full"])
def test_stars_of_the_newest_texts_are_not_learnt_before_they_are_judged(
    method: Method, encoder: TextEncoder, tmp_path: Path
) -> None:
    tuning = FineTuneConfig(epochs=1, batch_texts=16)
    config = TextConfig(method=method, l2=1e-4, fine_tune=tuning)
    known = texts()
    turned = np.where(known.span == TEST, 6 - known.rating, known.rating)

    def fitted(rating: Floats, name: str) -> TextModel:
        reviews = replace(known, rating=rating)
        return fit(reviews, encoder, config, tmp_path / name, 0, lambda done, total: None)

    first, second = fitted(known.rating, "first"), fitted(turned, "second")
    assert first.encoder.hash == second.encoder.hash
    assert (first.judged.weight == second.judged.weight).all()
    assert (first.judged.bias == second.judged.bias).all()
    assert first.scores.accuracy > second.scores.accuracy


def test_an_encoder_in_service_stays_as_it_is() -> None:
    config = TextConfig(adapt=AdaptConfig(epochs=1))
    assert settled(config, in_service=True).method == "frozen"
    assert settled(config, in_service=True).adapt.epochs == 0
    assert settled(config, in_service=False).adapt.epochs == 1


def test_an_encoder_is_adapted_first(masking_folder: Path, tmp_path: Path) -> None:
    base = encoders.load(masking_folder, "cpu")
    config = TextConfig(method="frozen", adapt=AdaptConfig(epochs=1))
    found = fit(texts(), base, config, tmp_path, 0, lambda done, total: None)
    assert found.encoder.hash != base.hash
    assert found.scores.accuracy == 1
