"""What is told of dead letters that lack a part of their record."""

import base64
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from schemas.examples import EXAMPLES
from schemas.records import DeadLetter, Header
from starcast.commands import dead_letters
from starcast.main import app
from streams.dead_letters import LEFT_OUT_HEADER, Letter

WHOLE = DeadLetter.model_validate(EXAMPLES["dead-letters"])
LACKING = DeadLetter.model_validate(
    {
        **EXAMPLES["dead-letters"],
        "value": None,
        "headers": [{"key": LEFT_OUT_HEADER, "value": "dmFsdWU="}],
    }
)


STEERING = WHOLE.model_copy(
    update={
        "value": base64.b64encode("Ö\x1b[2J\x9b2J".encode()).decode(),
        "headers": [Header(key="\x1b[2J")],
    }
)


@pytest.fixture(autouse=True)
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> Iterator[Letter]:
        yield Letter(0, 5, LACKING)
        yield Letter(0, 6, WHOLE)

    monkeypatch.setattr(dead_letters, "read_letters", read)


def test_what_was_left_out_is_no_null_value() -> None:
    for command in ("list",), ("show", "0/5"):
        shown = CliRunner().invoke(app, ["dead-letters", *command]).stdout
        assert "(left out)" in shown
        assert "(null)" not in shown


@pytest.mark.parametrize("command", [("list",), ("show", "0/7")])
def test_what_steers_a_terminal_is_written_out(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        dead_letters, "read_letters", lambda *_, **__: iter([Letter(0, 7, STEERING)])
    )
    shown = CliRunner().invoke(app, ["dead-letters", *command]).stdout
    assert r"Ö\x1b[2J\x9b2J" in shown
    assert not {"\x1b", "\x9b"} & set(shown)


def test_a_dry_run_counts_what_can_be_sent() -> None:
    told = CliRunner().invoke(app, ["dead-letters", "redrive", "--dry-run"])
    assert told.stdout == "Would send 1 records (1 to reviews).\n"
    assert "1 letters lack a part of their record" in told.stderr
