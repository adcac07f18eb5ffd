"""Question (b): how many stars does a review's text mean.

Every peer is fitted on whole reviews, title and text joined, as ours is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from optuna.trial import Trial
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from model.distribution import softmax
from trainer.metrics import Floats, rmse
from trainer.peers.tuning import Remember, Settings, Suggest, tune, unremembered

PLAIN = "finetune_plain"  # the name of what has nothing to tune
_MOST_STEPS = 300  # of a logistic regression's solver
_CHECKPOINT_STEPS = 50  # of a fine-tune: minutes on a core

Vectors = NDArray[np.float32]
Told = tuple[Floats, NDArray[np.int64]]
"""Expected ratings (n) and likeliest stars (n)."""


@dataclass(frozen=True)
class RatedTexts:
    """n rated review texts in the order of time."""

    texts: Sequence[str]
    rating: Floats  # (n)
    vectors: Vectors  # (n, hidden): of the encoder as it came

    @property
    def stars(self) -> NDArray[np.int64]:
        """Rounded ratings (n)."""
        return np.clip(np.rint(self.rating), 1, 5).astype(np.int64)


Read = Callable[[Sequence[str], Vectors], Told]
"""What texts (n), with their vectors (n, hidden), mean."""


@dataclass(frozen=True)
class TextPeer:
    """How a peer is tuned and fitted."""

    fit: Callable[[RatedTexts, Settings], Read]
    suggest: Suggest


def settle(
    peer: TextPeer,
    train: RatedTexts,
    validation: RatedTexts,
    seed: int,
    remember: Remember = unremembered,
) -> tuple[dict[str, Any], Read]:
    """Tune a peer on validation, then fit it to both; its settings and how it reads.

    Raises ValueError when it takes no such texts, whatever its settings.
    """

    def error(settings: Settings) -> float:
        try:
            read = peer.fit(train, settings)
        except ValueError:  # of these settings: no word is in as many texts
            return math.inf
        expected, _ = read(validation.texts, validation.vectors)
        return rmse(validation.rating, expected)

    settings = tune(peer.suggest, error, seed, remember)
    both = RatedTexts(
        [*train.texts, *validation.texts],
        np.concatenate([train.rating, validation.rating]),
        np.concatenate([train.vectors, validation.vectors]),
    )
    return settings, peer.fit(both, settings)


def _words(settings: Settings) -> TfidfVectorizer:
    return TfidfVectorizer(
        ngram_range=(1, settings["ngrams"]),
        min_df=settings["min_df"],
        sublinear_tf=True,
    )


def _suggest_words(trial: Trial) -> dict[str, Any]:
    return {
        "ngrams": trial.suggest_int("ngrams", 1, 2),
        "min_df": trial.suggest_int("min_df", 1, 5),
    }


def _tfidf_ridge(known: RatedTexts, settings: Settings) -> Read:
    model = make_pipeline(_words(settings), Ridge(settings["alpha"]))
    model.fit(known.texts, known.rating)

    def read(texts: Sequence[str], vectors: Vectors) -> Told:
        expected = np.asarray(model.predict(texts), np.float64)
        return expected, np.clip(np.rint(expected), 1, 5).astype(np.int64)

    return read


def _suggest_ridge(trial: Trial) -> dict[str, Any]:
    return {**_suggest_words(trial), "alpha": trial.suggest_float("alpha", 0.1, 100, log=True)}


def _tfidf_logistic(known: RatedTexts, settings: Settings) -> Read:
    """Told by the expected value of the stars' probabilities."""
    logistic = LogisticRegression(C=settings["C"], max_iter=_MOST_STEPS)
    model = make_pipeline(_words(settings), logistic)
    model.fit(known.texts, known.stars)
    return lambda texts, vectors: _expected(model.predict_proba(texts), logistic.classes_)


def _frozen_logistic(known: RatedTexts, settings: Settings) -> Read:
    """On the vectors of the encoder as it came."""
    model = LogisticRegression(C=settings["C"], max_iter=_MOST_STEPS)
    model.fit(known.vectors, known.stars)
    return lambda texts, vectors: _expected(model.predict_proba(vectors), model.classes_)


def _expected(shares: Any, classes: Any) -> Told:
    shares, classes = np.asarray(shares, np.float64), np.asarray(classes, np.int64)
    return shares @ classes, classes[shares.argmax(1)]


def _suggest_logistic(trial: Trial) -> dict[str, Any]:
    return {**_suggest_words(trial), **_suggest_strength(trial)}


def _suggest_strength(trial: Trial) -> dict[str, Any]:
    return {"C": trial.suggest_float("C", 0.05, 200, log=True)}


TEXT_PEERS: Mapping[str, TextPeer] = {
    "tfidf_ridge": TextPeer(_tfidf_ridge, _suggest_ridge),
    "tfidf_logistic": TextPeer(_tfidf_logistic, _suggest_logistic),
    "frozen_logistic": TextPeer(_frozen_logistic, _suggest_strength),
}


def finetune_plain(
    folder: Path,
    texts: Sequence[str],
    rating: Floats,
    asked: Sequence[Sequence[str]],
    longest_tokens: int,
    seed: int,
    scratch: Path,
) -> list[Told]:
    """A full fine-tune as transformers' own documentation has it: two epochs, defaults else.

    Args:
        folder: of the encoder.
        texts: (n) to fit to.
        rating: (n) their ratings, rounded to classes.
        asked: several lists of texts to read.
        longest_tokens: a text is cut there.
        seed: of the head and the order.
        scratch: a folder for checkpoints, from which a fit that was cut short goes on.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=5, local_files_only=True, dtype=torch.float32
    )
    if tokenizer.pad_token is None:  # many decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    def rows(words: Sequence[str], stars: NDArray[np.int64] | None = None) -> list[dict[str, Any]]:
        tokens = tokenizer(list(words), truncation=True, max_length=longest_tokens)
        found = [{"input_ids": each or [0]} for each in tokens["input_ids"]]  # some blank texts
        for row, star in zip(found, stars if stars is not None else [], strict=False):
            row["labels"] = int(star) - 1
        return found

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(scratch),
            num_train_epochs=2,
            seed=seed,
            save_steps=_CHECKPOINT_STEPS,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),  # else it warns
        ),
        train_dataset=cast(Any, rows(texts, np.clip(np.rint(rating), 1, 5).astype(np.int64))),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)  # what the command prints are its own figures
    # A checkpoint's state is written last: a kill before that leaves one that is not whole.
    whole = [each.parent for each in scratch.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda each: int(each.name.rpartition("-")[2]), default=None)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    told: list[Told] = []
    for words in asked:
        logits = np.asarray(trainer.predict(cast(Any, rows(words))).predictions)
        told.append(_expected(softmax(logits), np.arange(1, 6)))
    return told
