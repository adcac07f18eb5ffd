"""What readers of review texts are measured by."""

import numpy as np
import pytest

from trainer.evaluate_texts import Worded, blocks
from trainer.text import TEST, TRAIN, ReviewTexts

TEXTS = ["good", "bad", "fine"]
RATINGS = np.array([5.0, 1.0, 4.0])


def worded(titles: list[str]) -> Worded:
    """Three reviews, of which the last two are test texts."""
    span = np.array([TRAIN, TEST, TEST], np.int8)
    return Worded(ReviewTexts(TEXTS, RATINGS, span), titles, TEXTS, ["a", "b", "c"])


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
