"""What is told of differences."""

import numpy as np
import orjson

from streams.verification import EXAMPLES, Verification


def test_differences_are_counted_and_some_told_in_full() -> None:
    report = Verification()
    assert not report.clean  # nothing was compared
    report.check("state", np.ones(5, bool), str)
    assert report.clean
    report.check("state", np.array([True, False, True, False]), lambda at: f"user {at}")
    report.check("feature row", np.zeros(100, bool), lambda at: f"row {at}")
    assert not report.clean
    assert report.compared == {"state": 9, "feature row": 100}
    assert report.differences == {"state": 2, "feature row": 100}
    assert report.examples[:3] == ["state: user 1", "state: user 3", "feature row: row 0"]
    assert len(report.examples) == EXAMPLES
    figures = orjson.loads(orjson.dumps(report.figures()))
    assert figures["compared"] == {"state": 9, "feature row": 100}
    assert figures["differences"] == {"state": 2, "feature row": 100}
    assert len(figures["examples"]) == EXAMPLES
