"""What is said of a replay that differs."""

from collections import Counter

import pytest
from typer.testing import CliRunner

from starcast.main import app
from streams.verification import Verification


def test_a_replay_that_differs_says_what_to_do_where_workers_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = Verification(Counter({"user state": 3}), Counter({"user state": 1}))
    monkeypatch.setattr("streams.verify.verify_replay", lambda *_: report)
    monkeypatch.setattr("starcast.log.configure", lambda _: None)
    told = CliRunner().invoke(app, ["verify-replay"])
    assert told.exit_code == 1
    assert "user state: 1 of 3 differ" in told.stdout
    assert "stop the scorers" in told.stderr
