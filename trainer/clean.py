"""Which rated reviews are learnt from, and what their texts look like before they are encoded.

Cleaning chooses labels; it never hides an event from the states, because the scorer's states saw
it too. Each rule reports how many rows it dropped and names a few of them.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import polars as pl

from model.texts import plain
from schemas.records import EARLIEST_TIME
from trainer.config import CleanConfig
from trainer.copies import repeats

EXAMPLES = 3  # event ids named in a report, a rule

REVIEW_COLUMNS: dict[str, pl.DataType] = {
    "row": pl.Int64(),  # position among all events, in the order they were applied
    "event_id": pl.String(),
    "user_id": pl.String(),
    "item_id": pl.String(),
    "time": pl.Datetime("ms", "UTC"),
    "rating": pl.Float64(),
    "title": pl.String(),
    "text": pl.String(),
}
"""The reviews that `clean` takes, one a row; rating, title and text may be null."""


@dataclass(frozen=True)
class Step:
    """What one rule did: to how many rows, and to which, for example (event ids)."""

    rule: str
    dropped: bool  # else the rows were kept and mended
    rows: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Cleaned:
    """Reviews fit to learn from (the columns of `REVIEW_COLUMNS`, same order), and the report."""

    reviews: pl.DataFrame
    steps: tuple[Step, ...]


def clean_text(column: str) -> pl.Expr:
    """A text column as `model.texts.plain` makes it; null when nothing is left."""
    text = pl.col(column).map_elements(plain, return_dtype=pl.String)
    return pl.when(text != "").then(text).alias(column)


def clean(reviews: pl.DataFrame, config: CleanConfig, now: datetime | None = None) -> Cleaned:
    """Drop what cannot teach and mend texts, rule by rule in a fixed order.

    Args:
        reviews: the columns of `REVIEW_COLUMNS`, in the order the events were applied.
        config: the rules' bounds.
        now: times later than this (and a margin) are impossible; the clock's when absent.
    """
    now = now or datetime.now(UTC)
    latest = now + timedelta(seconds=config.longest_future_seconds)
    mended = reviews.with_columns(clean_text("title"), clean_text("text"))
    steps = [
        _step(
            f"{name}: HTML, control characters or space taken out",
            False,
            reviews.filter((pl.col(name) != "") & pl.col(name).ne_missing(mended[name])),
        )
        for name in ("title", "text")
    ]
    burst = (
        "user_id",
        "text",
        pl.col("time").dt.epoch("ms") // int(config.burst_seconds * 1e3),
    )
    # Without words the time tells a rating given anew from a row that came twice.
    wordless = pl.col("title").is_null() & pl.col("text").is_null()
    when = pl.when(wordless).then("time").alias("when")
    told = pl.struct("user_id", "item_id", "rating", "title", "text", when)
    long = pl.col("text").str.len_chars() >= config.repeated_text_characters
    near = "a long text that nearly repeats an earlier one of its item"
    rules: tuple[tuple[str, pl.Expr], ...] = (
        ("no rating", pl.col("rating").is_null() | pl.col("rating").is_nan()),
        ("rating outside 1 to 5", ~pl.col("rating").is_between(1, 5)),
        (
            "impossible time",
            ~pl.col("time").is_between(pl.lit(EARLIEST_TIME), pl.lit(latest)),
        ),
        ("event_id seen before", ~pl.col("event_id").is_first_distinct()),
        (
            "same user, item, stars and text (without any: time) as an earlier row",
            ~told.is_first_distinct(),
        ),
        (
            f"text copied by {config.repeated_text_users} users or more",
            (
                long
                & (pl.col("user_id").n_unique().over("text") >= config.repeated_text_users)
                & ~pl.col("text").is_first_distinct()
            ).fill_null(False),
        ),
        (near, pl.struct("text", "item_id").map_batches(_repeats, return_dtype=pl.Boolean)),
        (
            f"spam: one text more than {config.burst_rows} times in {config.burst_seconds:g} s",
            pl.col("text").is_not_null() & (pl.col("row").count().over(*burst) > config.burst_rows),
        ),
    )
    for name, matches in rules:
        flagged = mended.with_columns(matches.fill_null(True).alias("flagged"))
        steps.append(_step(name, True, flagged.filter("flagged")))
        mended = flagged.filter(~pl.col("flagged")).drop("flagged")
    return Cleaned(mended, tuple(steps))


def _repeats(rows: pl.Series) -> pl.Series:
    """Whether texts repeat an earlier one of their item; rows of `text` and `item_id`."""
    fields = rows.struct
    texts = [text or "" for text in fields.field("text").to_list()]
    return pl.Series(repeats(texts, fields.field("item_id").to_list()))


def _step(rule: str, dropped: bool, rows: pl.DataFrame) -> Step:
    return Step(rule, dropped, rows.height, tuple(rows["event_id"].head(EXAMPLES).to_list()))
