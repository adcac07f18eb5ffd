"""From a log to what is fitted and tested: cleaned, split by time, replayed."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import polars as pl
from numpy.typing import NDArray

from model.encoder import TextEncoder, review_text
from model.lookups import Vectors, vectors_of
from model.network import Inputs
from trainer import text
from trainer.clean import Cleaned, clean
from trainer.config import SplitConfig, TextConfig, TrainerConfig
from trainer.data import Examples, Log, item_texts, replay
from trainer.exceptions import TrainerError
from trainer.progress import OnProgress
from trainer.split import Split, by_time, sample
from trainer.text import ReviewTexts


def cleaned(log: Log, config: TrainerConfig) -> Cleaned:
    """The reviews of a log that can be learnt from.

    Raises:
        TrainerError: too few are left.
    """
    found = clean(log.reviews, config.clean)
    if found.reviews.height < config.least_rated:
        dropped = ", ".join(f"{s.rows} {s.rule}" for s in found.steps if s.dropped and s.rows)
        raise TrainerError(
            f"only {found.reviews.height} rated reviews of {log.reviews.height} are left to learn "
            f"from, {config.least_rated} are needed (dropped: {dropped or 'none'}); wait for more "
            "ratings, or lower STARCAST_TRAINER__LEAST_RATED"
        )
    return found


def review_texts(
    reviews: pl.DataFrame,
    config: TextConfig,
    split: SplitConfig,
    held: NDArray[np.int64] | None = None,
) -> ReviewTexts | None:
    """The newest texts of cleaned reviews, split by time among themselves; None when too few.

    Of the `held` reviews none is learnt from: those before them are, as far as there are some.
    """
    only_asked = np.zeros(reviews.height, np.bool_)
    only_asked[[] if held is None else held] = True
    worded = with_words(reviews.with_columns(pl.Series("held", only_asked)))
    count = min(worded.height, config.limit)
    spans = by_time(np.arange(count), split)
    asked = len(spans.test)
    known = worded.head(worded.height - asked).filter(~pl.col("held")).tail(count - asked)
    if count < config.least_texts or known.height < config.least_texts // 2:
        return None
    worded = pl.concat([known, worded.tail(asked)])
    span = np.full(worded.height, text.TRAIN, np.int8)
    span[max(known.height - len(spans.validation), 0) :] = text.VALIDATION
    span[known.height :] = text.TEST
    return ReviewTexts(joined_texts(worded), worded["rating"].to_numpy(), span)


def with_words(reviews: pl.DataFrame) -> pl.DataFrame:
    """The reviews that have a title or a text, oldest first."""
    words = pl.col("title").is_not_null() | pl.col("text").is_not_null()
    return reviews.filter(words).sort("time", maintain_order=True)


def joined_texts(reviews: pl.DataFrame) -> list[str]:
    """What is read of reviews (n): title and text of each, joined."""
    return [review_text(*pair) for pair in zip(reviews["title"], reviews["text"], strict=True)]


def unrated_texts(log: Log, config: TextConfig, before: int | None = None) -> list[str]:
    """Texts of a log's reviews without stars, at most `limit`; of its first events, or all."""
    table = log.reviews.filter(pl.col("rating").is_null())
    if before is not None:
        table = table.filter(pl.col("row") < before)
    found = [each for each in joined_texts(table) if each]
    return found[-config.limit :]


def item_vectors(log: Log, encoder: TextEncoder | None, on_progress: OnProgress) -> Vectors | None:
    """Projected vectors of a log's item texts by text hash; None without texts or encoder."""
    texts = item_texts(log)
    if encoder is None or not texts:
        return None
    vectors = encoder.project(text.encode(encoder, list(texts.values()), on_progress))
    return vectors_of(np.array(list(texts), np.uint64), vectors)


@dataclass(frozen=True)
class Prepared:
    """The rows that count, oldest first in `split`, with what a network reads of them."""

    examples: Examples
    split: Split

    def window(self) -> tuple[datetime, datetime]:
        """Times of the oldest and the newest row."""
        times = self.examples.events["time"] / 1e3
        return (datetime.fromtimestamp(times.min(), UTC), datetime.fromtimestamp(times.max(), UTC))


def prepared(
    log: Log,
    reviews: pl.DataFrame,
    vectors: Vectors | None,
    encoder: str,
    config: TrainerConfig,
    on_progress: OnProgress,
) -> Prepared:
    """Replay a log and keep the rows of cleaned `reviews`, split by time."""
    width = 0 if vectors is None else vectors.rows.shape[1]
    rows = reviews["row"].to_numpy()
    examples = replay(log, vectors, encoder, width, on_progress, rows=rows)
    return sampled(Prepared(examples, by_time(examples.events["time"], config.split)), config)


def sampled(data: Prepared, config: TrainerConfig) -> Prepared:
    """The same with no more train rows than `config.sample` allows."""
    train = data.split.train
    users, rating = data.examples.events["user"][train], data.examples.rating[train]
    kept = train[sample(users, rating, config.sample, config.seed)]
    return replace(data, split=replace(data.split, train=kept))


def of_width(inputs: Inputs, width: int) -> Inputs:
    """The same inputs for a network that reads vectors of another width: without vectors."""
    return inputs if inputs.vectors.shape[1] == width else inputs.without_vectors(width)
