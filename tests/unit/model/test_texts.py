"""Texts as they are read."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.texts import plain, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ""),
        ("<p>Good&nbsp;&amp; <b>loud</b></p><!-- ad --><script>x()</script>", "Good & loud"),
        ("a\x00b\u200b  c\n\nd", "a b c d"),
        ("Donau&shy;dampf\u00adschiff", "Donaudampfschiff"),
        ("\u0dc1\u0dca\u200d\u0dbb\u0dd3", "\u0dc1\u0dca\u0dbb\u0dd3"),  # one syllable, Sri
        ("\u200fgood\u200e\ufeff stuff\u2060", "good stuff"),
        ("5 < 6 and 7 > 3", "5 < 6 and 7 > 3"),
        ("<br/>", ""),
        ("e\u0301", "é"),
        ("I&#39;d buy it &lt;again&gt;", "I'd buy it <again>"),
        ("\ufffd?", "?"),
        ("one &#" + "9" * 5_000 + "; two", "one two"),
        ("a" + "\u0323" * 30 + "\u0301" * 40, "\u1ea1" + "\u0323" * 29),
        ("\N{FIRE}" * 40, "\N{FIRE}" * 40),
    ],
)
def test_what_is_left(text: str | None, expected: str) -> None:
    assert plain(text) == expected


@given(st.text())
def test_nothing_unseen_and_no_runs_of_space_are_left(text: str) -> None:
    found = plain(text)
    assert found.isprintable()
    assert "  " not in found
    assert found == found.strip()


TAGS = ["<script", "<STYLE", "<!--", "-->", "</script ", "</style", ">", "-", "s", " ", "\n"]


@given(st.lists(st.sampled_from(TAGS), max_size=30).map("".join))
def test_what_is_hidden_is_found_as_by_one_pattern(text: str) -> None:
    pattern = r"<(script|style)\b.*?</\1\s*>|<!--.*?-->"
    expected = re.sub(pattern, " ", text, flags=re.IGNORECASE | re.DOTALL)
    assert shown(text) == expected


@pytest.mark.parametrize(
    "part", ["<!--", "<script ", "<style>", "\u0301\u0323", "\u0f81", "&#" + "9" * 90]
)
def test_one_part_after_another_takes_no_time(part: str) -> None:
    began = time.process_time()
    plain("a" + part * (65_535 // len(part)))
    assert time.process_time() - began < 0.5
