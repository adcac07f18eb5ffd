"""What cleaning drops, what it mends, and that it says so."""

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from trainer.clean import REVIEW_COLUMNS, Cleaned, clean, clean_text
from trainer.config import CleanConfig

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LONG = (
    "This guitar string broke on the very first evening, and the second one did so the day after."
)


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Reviews with defaults that no rule objects to."""
    filled = [
        {
            "row": number,
            "event_id": f"e{number}",
            "user_id": f"u{number}",
            "item_id": "i",
            "time": NOW - timedelta(days=1),
            "rating": 4.0,
            "title": None,
            "text": f"text {number}",
            **row,
        }
        for number, row in enumerate(rows)
    ]
    return pl.DataFrame(filled, schema=REVIEW_COLUMNS)


def run(rows: list[dict[str, Any]], **config: Any) -> tuple[list[str], dict[str, int]]:
    cleaned: Cleaned = clean(frame(rows), CleanConfig(**config), NOW)
    return cleaned.reviews["event_id"].to_list(), {
        step.rule: step.rows for step in cleaned.steps if step.rows
    }


def test_sound_rows_are_kept_in_order_and_nothing_is_reported() -> None:
    assert run([{}, {}, {"text": None}]) == (["e0", "e1", "e2"], {})


def test_rows_without_or_with_impossible_ratings_are_dropped() -> None:
    ratings = (None, float("nan"), 0.5, 5.5, 1.0, 5.0)
    kept, dropped = run([{"rating": rating} for rating in ratings])
    assert kept == ["e4", "e5"]
    assert dropped == {"no rating": 2, "rating outside 1 to 5": 2}


def test_impossible_times_are_dropped() -> None:
    kept, dropped = run(
        [
            {"time": datetime(1971, 1, 1, tzinfo=UTC)},
            {"time": NOW + timedelta(days=2)},
            {"time": NOW + timedelta(hours=1)},
        ]
    )
    assert kept == ["e2"]
    assert dropped == {"impossible time": 2}


def test_the_first_of_equal_event_ids_is_kept() -> None:
    kept, dropped = run([{"event_id": "same"}, {"event_id": "same"}, {}])
    assert kept == ["same", "e2"]
    assert dropped == {"event_id seen before": 1}


def test_a_user_repeating_a_review_counts_once_but_another_item_counts() -> None:
    same = {"user_id": "u", "text": "Great"}
    kept, dropped = run([same, same, {**same, "item_id": "other"}])
    assert kept == ["e0", "e2"]
    assert sum(dropped.values()) == 1


def test_a_rating_without_words_that_is_given_again_later_is_kept() -> None:
    """To drop it for its stars would leave the test rows those that have changed."""
    same = {"user_id": "u", "text": None}
    later = {**same, "time": NOW - timedelta(hours=1)}
    kept, dropped = run([same, same, later, {**later, "rating": 2.0}, {**later, "title": "Great"}])
    assert kept == ["e0", "e2", "e3", "e4"]
    assert sum(dropped.values()) == 1


def test_a_long_text_of_many_users_is_copied_and_a_short_one_is_not() -> None:
    kept, dropped = run([{"text": LONG}] * 5 + [{"text": "Works great"}] * 5)
    assert kept == ["e0", "e5", "e6", "e7", "e8", "e9"]
    assert dropped == {"text copied by 5 users or more": 4}
    assert len(run([{"text": None}] * 9)[0]) == 9  # nothing is no text that they share


def test_a_long_text_that_nearly_repeats_one_of_its_item_is_dropped() -> None:
    nearly = LONG.replace("after", "later")
    other = {"text": nearly, "item_id": "other"}
    kept, dropped = run([{"text": LONG}, {"text": nearly}, other, {"text": "Works great"}])
    assert kept == ["e0", "e2", "e3"]
    assert dropped == {"a long text that nearly repeats an earlier one of its item": 1}


def test_a_burst_of_one_text_by_one_user_is_spam_and_a_burst_without_texts_is_not() -> None:
    spam = [{"user_id": "bot", "text": "Buy at my shop", "item_id": f"i{n}"} for n in range(6)]
    kept, dropped = run(spam, burst_rows=5)
    assert kept == []
    assert dropped == {"spam: one text more than 5 times in 60 s": 6}
    assert len(run(spam, burst_rows=6)[0]) == 6
    slow = [{**row, "time": NOW - timedelta(minutes=n)} for n, row in enumerate(spam, 1)]
    assert len(run(slow, burst_rows=2)[0]) == 6
    assert len(run(slow, burst_rows=2, burst_seconds=3_600)[0]) == 0
    silent = [{**row, "text": None} for row in spam]
    assert len(run(silent, burst_rows=5)[0]) == 6


def test_texts_lose_markup_control_characters_and_runs_of_space() -> None:
    raw = [
        "<p>Good&nbsp;&amp; <b>loud</b></p><!-- ad --><script>x()</script>",
        "a\x00b\u200b  c\n\nd",
        "5 < 6 and 7 > 3",
        "<br/>",
        "e\u0301",
        None,
    ]
    mended = pl.DataFrame({"text": raw}).select(clean_text("text"))["text"].to_list()
    assert mended == ["Good & loud", "a b c d", "5 < 6 and 7 > 3", None, "é", None]


def test_mended_rows_are_kept_and_counted_with_examples() -> None:
    rows = [{"text": "<i>fine</i>"}, {}, {"title": "", "text": ""}]  # nothing to take out of none
    cleaned = clean(frame(rows), CleanConfig(), NOW)
    assert cleaned.reviews["text"].to_list() == ["fine", "text 1", None]
    mended = [step for step in cleaned.steps if step.rows]
    assert [(step.dropped, step.rows, step.examples) for step in mended] == [(False, 1, ("e0",))]
