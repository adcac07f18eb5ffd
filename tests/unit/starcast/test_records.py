"""How a prediction is told, and what was sent of a file."""

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from schemas.examples import EXAMPLES
from schemas.exceptions import UnreachableError
from schemas.records import PredictedRating
from starcast.commands import records
from starcast.commands.records import _line
from starcast.main import app
from streams.producer import Outgoing, Sent


def test_a_prediction_from_a_review_s_text_has_no_tier() -> None:
    told = {**EXAMPLES["predicted-ratings"], "kind": "review", "tier": None}
    line = _line(PredictedRating.model_validate(told)).plain
    assert line.endswith(f"]  {told['model_version']}")


@pytest.mark.parametrize("field", ["user_id", "item_id", "model_version"])
def test_what_steers_a_terminal_is_written_out(field: str) -> None:
    record = PredictedRating.model_validate({**EXAMPLES["predicted-ratings"], field: "Ö\x1b[2J"})
    assert r"Ö\x1b[2J" in _line(record).plain
    assert "\x1b" not in _line(record).plain


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_file_with_a_bad_line_goes_on_where_it_was_stopped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def play(given: Iterator[Outgoing], _: Any, *, stop: threading.Event, **__: Any) -> Sent:
        sent = sum(1 for _ in zip(range(4), given, strict=False))
        os.kill(os.getpid(), number)
        assert stop.wait(10)
        return Sent(Counter(reviews=sent), Counter(reviews=sent - 1), Counter({"refused": 1}))

    monkeypatch.setattr(records, "play", play)
    line = json.dumps({"topic": "reviews", "value": {"user_id": "u"}})
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join([line, "not json", *[line] * 5]))
    stopped = CliRunner().invoke(app, ["produce", str(file), "--skip", "1"])
    assert "1 failed: refused" in stopped.stderr
    assert "1 lines are no records" in stopped.stderr
    assert "add --skip 5 to the command" in stopped.stderr
    assert stopped.exit_code == 128 + number


def test_an_export_of_an_archive_that_is_not_there_writes_nothing(tmp_path: Path) -> None:
    """An empty file would be brought in as a shop's history."""
    out = tmp_path / "out.jsonl"
    nowhere = {"STARCAST_ARCHIVE__URL": str(tmp_path / "nowhere")}
    done = CliRunner().invoke(app, ["export", "--out", str(out)], env=nowhere)
    assert isinstance(done.exception, UnreachableError)
    assert "nowhere has no table yet" in str(done.exception)
    assert not out.exists()


def test_an_export_between_bounds_that_are_swapped_writes_nothing(tmp_path: Path) -> None:
    """A file of items and users alone would be brought in as what came meanwhile."""
    out = tmp_path / "out.jsonl"
    bounds = ["--since", "2026-12-05", "--before", "2026-12-01"]
    done = CliRunner().invoke(app, ["export", "--out", str(out), *bounds])
    assert done.exit_code == 2
    assert "nothing is between them" in done.stderr
    assert not out.exists()
