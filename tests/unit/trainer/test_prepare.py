"""Which texts are taken to learn from."""

import numpy as np
import polars as pl
import pytest

from trainer.config import Method, SplitConfig, TextConfig
from trainer.prepare import review_texts
from trainer.text import TEST, TRAIN, VALIDATION


@pytest.mark.parametrize(("method", "taken"), [("full", 24), ("auto", 24), ("frozen", 20)])
def test_the_newest_texts_are_taken_fewer_for_a_head_alone(method: Method, taken: int) -> None:
    names = [f"text {at}" for at in range(30)]
    reviews = pl.DataFrame(
        {"title": [None] * 30, "text": names, "rating": [5.0] * 30, "time": range(30, 0, -1)}
    )
    config = TextConfig(method=method, least_texts=20, text_limit=24, head_limit=20)
    found = review_texts(reviews, config, SplitConfig())
    assert found is not None
    assert found.texts == names[::-1][-taken:]


@pytest.mark.parametrize(("held", "learnt"), [(3, range(7, 27)), (8, range(2, 22))])
def test_what_is_held_is_not_learnt_from(held: int, learnt: range) -> None:
    """Of the newest 22 texts two are asked for; 20 are learnt from, the newest that may be."""
    config = TextConfig(least_texts=20, text_limit=22)
    found = review_texts(numbered(30), config, SplitConfig(), np.arange(30 - held, 30))
    assert found is not None
    assert found.texts == [str(at) for at in (*learnt, 28, 29)]
    assert found.span.tolist() == [TRAIN] * 18 + [VALIDATION] * 2 + [TEST] * 2


def test_texts_to_be_asked_for_alone_are_too_few() -> None:
    """Of 60 texts 24 are asked for, and five are older than those that are held."""
    config, split = TextConfig(least_texts=20), SplitConfig(test_share=0.4)
    assert review_texts(numbered(60), config, split, np.arange(5, 60)) is None
    assert review_texts(numbered(60), config, split, np.arange(10, 60)) is not None


def numbered(count: int) -> pl.DataFrame:
    texts = [str(at) for at in range(count)]
    columns = {"title": [None] * count, "text": texts, "rating": [5.0] * count}
    return pl.DataFrame(columns).with_columns(time=pl.int_range(count))


def test_no_limit_takes_all() -> None:
    reviews = pl.DataFrame(
        {"title": ["good"] * 30, "text": [None] * 30, "rating": [5.0] * 30, "time": range(30)}
    )
    found = review_texts(reviews, TextConfig(least_texts=20, text_limit=0), SplitConfig())
    assert found is not None
    assert len(found.texts) == 30
