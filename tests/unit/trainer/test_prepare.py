"""Which texts are taken to learn from."""

import polars as pl
import pytest

from trainer.config import Method, SplitConfig, TextConfig
from trainer.prepare import review_texts


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


def test_no_limit_takes_all() -> None:
    reviews = pl.DataFrame(
        {"title": ["good"] * 30, "text": [None] * 30, "rating": [5.0] * 30, "time": range(30)}
    )
    found = review_texts(reviews, TextConfig(least_texts=20, text_limit=0), SplitConfig())
    assert found is not None
    assert len(found.texts) == 30
