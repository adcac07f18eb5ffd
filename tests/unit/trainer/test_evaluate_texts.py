"""What readers of review texts are measured by."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from model import encoder as encoders
from trainer.config import TrainerConfig
from trainer.evaluate_texts import Worded, blocks, peers, texts_of
from trainer.kept import Kept
from trainer.split import Split
from trainer.text import TEST, TRAIN, VALIDATION, ReviewTexts

TEXTS = ["good", "bad", "fine"]
RATINGS = np.array([5.0, 1.0, 4.0])


def worded(titles: list[str]) -> Worded:
    """Three reviews, of which the last two are test texts."""
    span = np.array([TRAIN, TEST, TEST], np.int8)
    return Worded(ReviewTexts(TEXTS, RATINGS, span), titles, TEXTS)


ANSWERS = {part: np.array([2.0, 4.0]) for part in ("text", "text_title", "text_body")} | {
    f"{part} stars": np.array([2, 4]) for part in ("text", "text_title", "text_body")
}


def test_a_part_is_measured_where_it_is_there() -> None:
    found = blocks(worded(["", "", "Fine"]), {"model": ANSWERS})
    assert found["text"]["model"]["rows"] == 2
    assert found["text"]["model"]["mae"] == pytest.approx(0.5)
    assert found["text_title"]["model"]["rows"] == 1
    assert found["text_title"]["model"]["mae"] == 0


def test_a_part_that_no_review_has_is_not_measured() -> None:
    found = blocks(worded(["", "", ""]), {"model": ANSWERS})
    assert found["text_title"] == {}
    assert found["text"] == found["text_body"] != {}


def test_peers_that_cannot_be_fitted_tell_the_mean(
    encoder_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All stars are alike: a ridge says so, a classifier knows of no second class."""
    base = encoders.load(encoder_folder, "cpu")
    span = np.repeat([TRAIN, VALIDATION, TEST], [30, 8, 8]).astype(np.int8)
    texts = ["good thing"] * 46
    known = Worded(ReviewTexts(texts, np.full(46, 5.0), span), texts, texts)
    wanted = ("tfidf_ridge", "tfidf_logistic", "frozen_logistic")
    found = peers(wanted, known, base, TrainerConfig(), Kept(tmp_path), None)
    assert found.keys() == {*wanted}
    for name in wanted[1:]:
        assert found[name]["text_title"].tolist() == found[name]["text stars"].tolist() == [5] * 8
    assert "tfidf_logistic takes no such texts" in caplog.text


@pytest.mark.parametrize("missing", [TRAIN, VALIDATION, TEST])
def test_where_a_span_has_no_texts_they_are_not_asked_for(missing: int) -> None:
    """As in a shop that began to take texts, or ended, within its history."""
    spans = np.repeat([TRAIN, VALIDATION, TEST], 60)
    reviews = pl.DataFrame(
        {
            "event_id": [f"r{row}" for row in range(180)],
            "time": range(180),
            "rating": [4.0] * 180,
            "title": [None] * 180,
            "text": [None if span == missing else f"good {row}" for row, span in enumerate(spans)],
        },
        schema_overrides={"title": pl.String},
    )
    split = Split(*(np.flatnonzero(spans == span) for span in (TRAIN, VALIDATION, TEST)))
    assert texts_of(reviews, split, TrainerConfig())[0] is None
    whole = reviews.with_columns(pl.Series("text", [f"good {row}" for row in range(180)]))
    assert texts_of(whole, split, TrainerConfig())[0] is not None
