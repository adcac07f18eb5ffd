import logging
import time

import pytest

from starcast.commands import context


def test_where_no_bar_can_be_shown_the_log_tells_how_far_a_command_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(context, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(context, "TOLD_SECONDS", 0.02)
    caplog.set_level(logging.INFO)

    def wait_for(words: str) -> None:
        deadline = time.monotonic() + 30
        while words not in caplog.text:
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.01)

    with context.progress_bar() as bars:
        first = bars.add_task("reading texts", total=None)
        wait_for("reading texts in 0:00:00")
        for done in (100, 200, 300):
            bars.update(first, completed=done, total=2_000)
            time.sleep(0.01)
        wait_for("reading texts: 300 of 2,000 in 0:00:0")
        wait_for(" left")
        bars.update(first, completed=2_000)
        bars.add_task("what there is nothing of", total=None)
        last = bars.add_task("fitting", total=None)
        wait_for("fitting in 0:00:00")
        bars.update(last, completed=1, total=1)
        caplog.clear()
        time.sleep(0.1)
        assert "nothing" not in caplog.text
    told = len(caplog.records)
    time.sleep(0.1)
    assert len(caplog.records) == told


def test_what_is_printed_has_no_other_characters_than_it_was_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`:id:` and `:100:` are names of emoji to the library that prints."""
    context.print_json({"item_id": "urn:shop:id:5"})
    context.fail("no item a:100:b")
    printed = capsys.readouterr()
    assert printed.out == '{"item_id":"urn:shop:id:5"}\n'
    assert printed.err == "no item a:100:b\n"
