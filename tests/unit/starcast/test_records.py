"""How a prediction is told."""

import pytest

from schemas.examples import EXAMPLES
from schemas.records import PredictedRating
from starcast.commands.records import _line


def test_a_prediction_from_a_review_s_text_has_no_tier() -> None:
    told = {**EXAMPLES["predicted-ratings"], "kind": "review", "tier": None}
    line = _line(PredictedRating.model_validate(told)).plain
    assert line.endswith(f"]  {told['model_version']}")


@pytest.mark.parametrize("field", ["user_id", "item_id", "model_version"])
def test_what_steers_a_terminal_is_written_out(field: str) -> None:
    record = PredictedRating.model_validate({**EXAMPLES["predicted-ratings"], field: "Ö\x1b[2J"})
    assert r"Ö\x1b[2J" in _line(record).plain
    assert "\x1b" not in _line(record).plain
