"""Whether what comes in now is what the model in service was fitted to.

A bundle keeps how its features and its predictions were spread over its newest rows, and its error
there. Rows that came after its window are set beside them:

- the population stability index of each feature and of the predictions of what was rated,
  Σ (a − e) ln(a / e) over tenths of the expected rows and the missing (Siddiqi 2006, "Credit Risk
  Scorecards", chapter 9), less what it is by chance where nothing has changed, of n rows beside m:
  (bins − 1)(1/n + 1/m) (Yurdakul 2018, "Statistical Properties of Population Stability Index");
- the RMSE of ratings that came after their predictions. A rating comes late: of an event's own
  prediction and those that its user's earlier events with the item got, the newest before it
  counts.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from model.features import NAMES
from schemas import archive
from trainer.config import DriftConfig
from trainer.data import Log
from trainer.metrics import Floats, rmse

_TENTHS = np.linspace(0.1, 0.9, 9)
_LEAST_SHARE = 1e-3  # an empty bin would make the index infinite
_ERRORS = 2.0  # standard errors that lie between an error that has grown and that of before


class Spread(BaseModel):
    """How a column is spread: shares of the bins between its tenths, and of missing values."""

    model_config = ConfigDict(frozen=True)

    edges: tuple[float, ...]  # equal tenths are one edge, with another just above it
    shares: tuple[float, ...]  # of edges + 1 bins, then missing


class Reference(BaseModel):
    """What a bundle keeps of its newest rows."""

    model_config = ConfigDict(frozen=True)

    features: dict[str, Spread]
    predictions: Spread
    rmse: float
    rows: int | None = None  # newest rows; bundles of before do not tell
    deviation: float = 0.0  # standard deviation of their squared errors


class Drift(BaseModel):
    """What has changed since a model was fitted."""

    model_config = ConfigDict(frozen=True)

    rows: int  # reviews with stars since its window
    rated: int  # predictions among them whose rating is known
    features: dict[str, float]  # stability index of those beyond the bound, largest first
    predictions: float | None  # stability index; of too few predictions None, as is the next
    rmse: float | None
    reasons: tuple[str, ...]  # to retrain early; empty: there is none


def spread(column: NDArray[np.floating[Any]]) -> Spread:
    """Of a column (n)."""
    known = column[~np.isnan(column)].astype(np.float64)
    tenths = np.quantile(known, _TENTHS) if len(known) else np.empty(0)
    # What a tenth or more of the rows have, as 0 where little happens, has a bin of its own.
    above = np.nextafter(tenths[1:][np.diff(tenths) == 0], np.inf)
    edges = np.unique(np.concatenate([tenths, above]))
    return Spread(edges=tuple(edges.tolist()), shares=tuple(_shares(column, edges).tolist()))


def stability(
    expected: Spread, column: NDArray[np.floating[Any]], rows: int | None = None
) -> float:
    """The population stability index of a column (n) beside what was expected by so many `rows`.

    What chance makes of it is taken off; 0: spread as expected.
    """
    wanted = np.array(expected.shares)
    found = _shares(column, np.array(expected.edges))
    bins = np.count_nonzero(wanted + found)
    chance = (bins - 1) * ((1 / rows if rows else 0.0) + 1 / max(len(column), 1))
    wanted, found = np.maximum(wanted, _LEAST_SHARE), np.maximum(found, _LEAST_SHARE)
    return max(float(((found - wanted) * np.log(found / wanted)).sum()) - chance, 0.0)


def _shares(column: NDArray[np.floating[Any]], edges: NDArray[np.floating[Any]]) -> Floats:
    missing = np.isnan(column)
    bins = np.searchsorted(edges, column[~missing], "right")
    counts = np.append(np.bincount(bins, minlength=len(edges) + 1), missing.sum())
    return counts / max(len(column), 1)


def reference(features: NDArray[np.float32], predicted: Floats, rating: Floats) -> Reference:
    """Of feature rows (n, F), predictions (n) and ratings (n) that a model was judged by."""
    return Reference(
        features={name: spread(features[:, at]) for at, name in enumerate(NAMES)},
        predictions=spread(predicted),
        rmse=rmse(rating, predicted),
        rows=len(rating),
        deviation=float(_squares(rating, predicted).std()),
    )


def _squares(rating: Floats, predicted: Floats) -> Floats:
    """Squared errors (n), as `rmse` has them."""
    return (np.clip(predicted, 1, 5) - rating) ** 2


def measure(
    kept: Reference, features: NDArray[np.float32], joined: pl.DataFrame, config: DriftConfig
) -> Drift:
    """Rows that came since (n, F), and `joined` predictions, beside what a model knew."""
    indices = {
        name: stability(kept.features[name], features[:, at], kept.rows)
        for at, name in enumerate(NAMES)
        if name in kept.features
    }
    moved = {name: index for name, index in indices.items() if index > config.largest_index}
    moved = dict(sorted(moved.items(), key=lambda each: -each[1]))
    rated = joined.drop_nulls("rating")
    told = rated["predicted"].to_numpy()
    predictions = error = None
    worse = False
    if rated.height >= config.least_rows:  # a model that is new has predicted few of the rows
        predictions = stability(kept.predictions, told, kept.rows)
        truth = rated["rating"].to_numpy()
        error = rmse(truth, told)
        chance = _squares(truth, told).var() / len(told) + kept.deviation**2 / (kept.rows or 1)
        grown = error**2 - kept.rmse**2 > _ERRORS * chance**0.5
        worse = grown and error > kept.rmse * config.largest_error
    reasons: list[str] = []
    if len(features) >= config.least_rows:
        share = len(moved) / max(len(indices), 1)
        if share > config.largest_share:
            first = ", ".join(list(moved)[:3])
            reasons.append(
                f"{len(moved)} of {len(indices)} features are spread otherwise ({first})"
            )
        if predictions is not None and predictions > config.largest_index:
            reasons.append(f"predictions are spread otherwise (index {predictions:.2f})")
        if worse:
            reasons.append(f"RMSE is {error:.4f}, {kept.rmse:.4f} when it was fitted")
    return Drift(
        rows=len(features),
        rated=rated.height,
        features=moved,
        predictions=predictions,
        rmse=error,
        reasons=tuple(reasons),
    )


def join(predictions: pl.DataFrame, ratings: pl.DataFrame) -> pl.DataFrame:
    """Predictions with the rating that came later, null where none has.

    Args:
        predictions: columns event_id, user_id, item_id, time, predicted.
        ratings: columns event_id, user_id, item_id, time, rating; one a review.

    Returns:
        The columns predicted and rating. A review's own prediction was made before its stars were
        read, so it counts; of several before one rating the newest does, and only once.
    """
    own = ratings.join(predictions.select("event_id", "predicted"), on="event_id", how="left")
    earlier = own.filter(pl.col("predicted").is_null()).drop("predicted").sort("time")
    asked = predictions.sort("time").with_columns(pl.col("event_id").alias("asked"))
    late = earlier.join_asof(
        asked.select("user_id", "item_id", "time", "asked", "predicted"),
        on="time",
        by=["user_id", "item_id"],
        strategy="backward",
        check_sortedness=False,  # it cannot see that, and warns
    ).drop_nulls("predicted")
    known = pl.concat(
        [
            own.drop_nulls("predicted").select(pl.col("event_id").alias("asked"), "rating"),
            late.select("asked", "rating"),
        ]
    ).unique("asked", keep="last")
    return predictions.join(known, left_on="event_id", right_on="asked", how="left").select(
        "predicted", "rating"
    )


def since(
    log: Log,
    url: str,
    options: Mapping[str, str] | None,
    version: str,
    window_end: datetime,
) -> tuple[NDArray[np.float32], pl.DataFrame]:
    """Feature rows (n, F) of reviews with stars after a window; a model's joined predictions."""
    begin = int(window_end.timestamp() * 1_000)
    features = np.empty((0, len(NAMES)), np.float32)
    if log.journalled is not None:
        # What a bundle keeps is of reviews with stars, by which it was judged; views are otherwise.
        rated = log.events[log.labelled]
        newer = (rated["time"] > begin) & _first(rated["event_id"]) & log.journalled.usable
        features = log.journalled.features[newer]
    # An event that came again is predicted with its own rating known, so its first prediction
    # counts, and none where that was another version's.
    predictions = archive.collect(
        archive.read(url, "predicted-ratings", options)
        .filter((pl.col("kind") == "interaction") & (pl.col("event_time") > window_end))
        .select(
            "model_version",
            "event_id",
            "user_id",
            "item_id",
            pl.col("event_time").alias("time"),
            pl.col("rating").cast(pl.Float64).alias("predicted"),
        )
        .unique("event_id", keep="first", maintain_order=True)
        .filter(pl.col("model_version") == version)
        .drop("model_version"),
        archive.table_url(url, "predicted-ratings"),
    )
    ratings = log.reviews.filter(
        pl.col("rating").is_not_null() & (pl.col("time") > window_end),
        pl.col("event_id").is_first_distinct(),
    )
    chosen = ratings.select(
        "event_id", "user_id", "item_id", pl.col("time").cast(predictions["time"].dtype), "rating"
    )
    return features, join(predictions, chosen)


def _first(ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Where ids (n) are there for the first time."""
    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    return first
