"""Splits by time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import SplitConfig
from trainer.split import by_time


def test_spans_follow_each_other_in_time() -> None:
    split = by_time(np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 0]), SplitConfig())
    assert split.train.tolist() == [9, 1, 5, 3, 7, 0, 8, 4]
    assert (split.validation.tolist(), split.test.tolist()) == ([6], [2])


@given(
    st.lists(st.integers(0, 5), max_size=60),
    st.floats(0.01, 0.4),
    st.floats(0.01, 0.4),
)
def test_every_row_is_in_one_span_and_none_is_older_than_the_span_before(
    times: list[int], validation: float, test: float
) -> None:
    time = np.array(times, np.int64)
    split = by_time(time, SplitConfig(validation_share=validation, test_share=test))
    order = np.concatenate([split.train, split.validation, split.test])
    assert sorted(order.tolist()) == list(range(len(times)))
    assert (np.diff(time[order]) >= 0).all()
