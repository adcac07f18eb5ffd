"""Drift, on columns and predictions small enough to do by hand."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from model.events import EVENT, REVIEW, VIEW, blank
from model.features import NAMES
from trainer import drift
from trainer.clean import REVIEW_COLUMNS
from trainer.config import DriftConfig
from trainer.data import Journalled, Log
from trainer.drift import Spread, join, measure, reference, since, spread, stability

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
CONFIG = DriftConfig(least_rows=50)


def test_spread_by_hand() -> None:
    found = spread(np.array([*range(1, 11), np.nan, np.nan], np.float64))
    assert len(found.edges) == 9
    assert found.shares == pytest.approx([1 / 12] * 10 + [2 / 12])
    above = float(np.nextafter(2, 3))
    assert spread(np.array([2.0, 2.0])) == Spread(edges=(2.0, above), shares=(0.0, 1.0, 0.0, 0.0))
    assert spread(np.array([np.nan])) == Spread(edges=(), shares=(0.0, 1.0))


def test_stability_by_hand() -> None:
    expected = Spread(edges=(0.0,), shares=(0.5, 0.5, 0.0))
    column = np.repeat([-1.0, 1.0], (25, 75))
    index = (0.25 - 0.5) * np.log(0.25 / 0.5) + (0.75 - 0.5) * np.log(0.75 / 0.5)
    assert stability(expected, column) == pytest.approx(index - 1 / 100)
    assert stability(expected, column, 20) == pytest.approx(index - 1 / 100 - 1 / 20)
    assert stability(expected, np.array([-1.0, 1.0])) == 0
    assert stability(expected, np.array([np.nan])) > 5


def test_what_happened_seldom_and_now_happens_is_a_change() -> None:
    """Most features of behaviour are 0 in most rows."""
    seldom, often = (np.repeat([0.0, 1.0], counts) for counts in ((95, 5), (5, 95)))
    for before, after in ((seldom, often), (often, seldom), (np.zeros(9), np.ones(9))):
        assert stability(spread(before), before) == 0
        assert stability(spread(before), after) > 1


def rows(shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (400, len(NAMES))).astype(np.float32)


def joined(error: float, seed: int = 1) -> pl.DataFrame:
    rating = np.random.default_rng(seed).integers(1, 6, 400).astype(np.float64)
    return pl.DataFrame({"predicted": np.clip(rating + error, 1, 5), "rating": rating})


def test_what_is_as_it_was_is_no_reason() -> None:
    known = joined(0.5)
    kept = reference(rows(), known["predicted"].to_numpy(), known["rating"].to_numpy())
    found = measure(kept, rows(seed=2), joined(0.5, 3), CONFIG)
    assert found.reasons == ()
    assert found.rmse == pytest.approx(kept.rmse, rel=0.1)
    assert kept == type(kept).model_validate_json(kept.model_dump_json())


def test_each_change_is_a_reason() -> None:
    known = joined(0.5)
    kept = reference(rows(), known["predicted"].to_numpy(), known["rating"].to_numpy())
    moved = measure(kept, rows(1.0, 2), joined(0.5, 3), CONFIG)
    assert len(moved.reasons) == 1
    assert f"of {len(NAMES)} features" in moved.reasons[0]
    assert list(moved.features.values()) == sorted(moved.features.values(), reverse=True)
    assert f"({', '.join(list(moved.features)[:3])})" in moved.reasons[0]
    worse = measure(kept, rows(seed=2), joined(-1.0, 3), CONFIG)
    assert any("RMSE is" in reason for reason in worse.reasons)
    assert any("predictions are spread" in reason for reason in worse.reasons)


def test_a_model_that_was_judged_by_few_rows_is_not_fitted_again_by_chance() -> None:
    """As in a shop of 500 ratings: the newest tenth says little of how all are spread."""
    changed = 0
    for seed in range(40):
        known = joined(0.5, seed).with_columns(
            pl.lit(np.random.default_rng(seed).normal(3, 0.5, 400)).alias("predicted")
        )
        told, rating = (known[name].to_numpy() for name in ("predicted", "rating"))
        kept = reference(rows(seed=seed)[:50], told[:50], rating[:50])
        changed += bool(measure(kept, rows(seed=seed + 100), known[50:], CONFIG).reasons)
    assert changed <= 2


def test_so_many_features_may_change_and_no_more() -> None:
    kept = reference(rows(), np.full(400, 4.0), np.full(400, 4.0))
    most = int(len(NAMES) * CONFIG.largest_share)
    for moved in (most, most + 1):
        after = rows(seed=2)
        after[:, :moved] += 5
        found = measure(kept, after, joined(0.0)[:0], CONFIG)
        assert set(found.features) == {*NAMES[:moved]}
        assert len(found.reasons) == (moved > most)


def test_a_feature_that_a_model_did_not_know_is_not_compared() -> None:
    known = joined(0.5)
    kept = reference(rows(), known["predicted"].to_numpy(), known["rating"].to_numpy())
    others = {name: kept.features[name] for name in NAMES[1:]}
    found = measure(kept.model_copy(update={"features": others}), rows(5.0), known, CONFIG)
    assert set(found.features) == {*NAMES[1:]}
    assert f"of {len(NAMES) - 1} features" in found.reasons[0]


def test_few_rows_tell_nothing() -> None:
    known = joined(0.5)
    kept = reference(rows(), known["predicted"].to_numpy(), known["rating"].to_numpy())
    found = measure(kept, rows(9.0)[:49], joined(-1.0)[:49], CONFIG)
    assert found.reasons == ()
    assert found.rmse is None
    found = measure(kept, rows(9.0)[:50], joined(-1.0)[:50], CONFIG)
    assert len(found.reasons) == 3


def test_few_predictions_of_a_new_model_tell_nothing() -> None:
    """The ratings since its window came mostly under the model before."""
    known = joined(0.5)
    kept = reference(rows(), known["predicted"].to_numpy(), known["rating"].to_numpy())
    found = measure(kept, rows(seed=2), joined(0.5, 3)[:3], CONFIG)
    assert found.reasons == ()
    assert (found.rows, found.rated, found.predictions) == (400, 3, None)


def test_predictions_of_what_was_not_rated_are_not_what_a_model_was_judged_by() -> None:
    known = joined(0.5)
    kept = reference(rows(), known["predicted"].to_numpy(), known["rating"].to_numpy())
    views = pl.DataFrame(
        {"predicted": [1.0] * 900, "rating": pl.Series([None] * 900, dtype=pl.Float64)}
    )
    found = measure(kept, rows(seed=2), pl.concat([joined(0.5, 3), views]), CONFIG)
    assert found.reasons == ()
    assert found.rated == 400


def test_features_are_those_of_reviews_with_stars(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shop of views and reviews, of which the newest half came after the model's window."""
    told = pl.LazyFrame(
        schema={
            "event_id": pl.String,
            "user_id": pl.String,
            "item_id": pl.String,
            "kind": pl.String,
            "model_version": pl.String,
            "event_time": pl.Datetime("ms", "UTC"),
            "rating": pl.Float32,
        }
    )
    monkeypatch.setattr(drift.archive, "read", lambda *place: told)
    events = blank(EVENT, 8)
    events["time"] = int(NOON.timestamp() * 1_000) + np.arange(-3, 5)
    events["event_id"] = np.arange(1, 9)
    events["action"] = [REVIEW, VIEW, REVIEW, VIEW, REVIEW, VIEW, REVIEW, REVIEW]
    events["rating"] = [5, np.nan, 4, np.nan, 3, np.nan, np.nan, 2]  # one is a text without stars
    seen = np.array([0, 2, 4, 7], np.float32)[:, None].repeat(len(NAMES), 1)
    journalled = Journalled(seen, np.ones(4, bool), np.full(4, ""))
    log = Log(events, pl.DataFrame(schema=REVIEW_COLUMNS), [], [], journalled)
    features, known = since(log, "", None, "v1", NOON)
    assert features[:, 0].tolist() == [4, 7]
    assert known.is_empty()


def test_what_came_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was played again: the second time each rating was known to who predicted it."""
    later = NOON + timedelta(minutes=1)
    told = pl.LazyFrame(
        {
            "event_id": ["a", "b", "a", "b"],
            "user_id": "u",
            "item_id": ["i", "j", "i", "j"],
            "kind": "interaction",
            "model_version": "v1",
            "event_time": later,
            "rating": [3.0, 4.0, 4.9, 2.1],
        },
        schema_overrides={"event_time": pl.Datetime("ms", "UTC")},
    )
    monkeypatch.setattr(drift.archive, "read", lambda *place: told)
    reviews = pl.DataFrame(
        {
            "row": range(4),
            "event_id": ["a", "b", "a", "b"],
            "user_id": "u",
            "item_id": ["i", "j", "i", "j"],
            "time": later,
            "rating": [5.0, 2.0, 5.0, 2.0],
            "title": None,
            "text": None,
        },
        schema=REVIEW_COLUMNS,
    )
    events = blank(EVENT, 4)
    events["time"] = int(later.timestamp() * 1_000)
    events["action"], events["rating"], events["event_id"] = REVIEW, 5, [7, 8, 7, 8]
    seen = np.arange(4, dtype=np.float32)[:, None].repeat(len(NAMES), 1)
    log = Log(events, reviews, [], [], Journalled(seen, np.ones(4, bool), np.full(4, "")))
    features, known = since(log, "", None, "v1", NOON)
    assert features[:, 0].tolist() == [0, 1]
    assert known.rows() == [(3.0, 5.0), (4.0, 2.0)]


def test_what_came_again_under_a_version_rolled_back_to_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It predicts an event that another version met first with that event's rating known."""
    later = NOON + timedelta(minutes=1)
    told = pl.LazyFrame(
        {
            "event_id": ["a", "b", "c", "a", "b", "c"],
            "user_id": "u",
            "item_id": ["i", "j", "k", "i", "j", "k"],
            "kind": "interaction",
            "model_version": ["v1", "v2", "v1", "v1", "v1", "v1"],
            "event_time": later,
            "rating": [3.0, 3.0, 4.0, 4.9, 2.1, 5.0],
        },
        schema_overrides={"event_time": pl.Datetime("ms", "UTC")},
    )
    monkeypatch.setattr(drift.archive, "read", lambda *place: told)
    reviews = pl.DataFrame(
        {
            "row": range(3),
            "event_id": ["a", "b", "c"],
            "user_id": "u",
            "item_id": ["i", "j", "k"],
            "time": later,
            "rating": [5.0, 2.0, 5.0],
            "title": None,
            "text": None,
        },
        schema=REVIEW_COLUMNS,
    )
    log = Log(blank(EVENT, 0), reviews, [], [])
    _, known = since(log, "", None, "v1", NOON)
    assert known.rows() == [(3.0, 5.0), (4.0, 5.0)]
    _, known = since(log, "", None, "v2", NOON)
    assert known.rows() == [(3.0, 2.0)]


def test_what_counts_came_after_the_window_and_of_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each row but the first is of another kind, another version, or too old."""
    later = NOON + timedelta(hours=1)
    told = pl.LazyFrame(
        {
            "event_id": ["r0", "r1", "r2", "r3"],
            "user_id": ["u"] * 4,
            "item_id": ["i"] * 4,
            "kind": ["interaction", "review", "interaction", "interaction"],
            "model_version": ["v1", "v1", "v0", "v1"],
            "event_time": pl.Series([later] * 3 + [NOON], dtype=pl.Datetime("ms", "UTC")),
            "rating": pl.Series([4.5, 3.5, 2.5, 1.5], dtype=pl.Float32),
        }
    )
    monkeypatch.setattr(drift.archive, "read", lambda *place: told)
    reviews = pl.DataFrame(
        {
            "row": [0, 1],
            "event_id": ["r0", "r4"],
            "user_id": ["u"] * 2,
            "item_id": ["i"] * 2,
            "time": [later, NOON],
            "rating": [5.0, 1.0],
            "title": [None] * 2,
            "text": [None] * 2,
        },
        schema=REVIEW_COLUMNS,
    )
    features, known = since(Log(blank(EVENT, 0), reviews, [], []), "", None, "v1", NOON)
    assert len(features) == 0  # nothing of the journal is at hand
    assert known.rows() == [(4.5, 5.0)]


def test_of_several_ratings_after_one_prediction_the_newest_counts() -> None:
    predictions = pl.DataFrame(
        {"event_id": ["view"], "user_id": "u", "item_id": "i", "time": NOON, "predicted": 3.0}
    )
    for stars in ([5.0, 2.0], [2.0, 5.0]):
        ratings = pl.DataFrame(
            {
                "event_id": ["review", "edit"],
                "user_id": "u",
                "item_id": "i",
                "time": [NOON + timedelta(hours=1), NOON + timedelta(hours=2)],
                "rating": stars,
            }
        )
        for order in (ratings, ratings[::-1]):
            assert join(predictions, order).rows() == [(3.0, stars[1])]


def test_a_rating_finds_the_newest_prediction_before_it() -> None:
    def at(*minutes: int) -> list[datetime]:
        return [NOON + timedelta(minutes=each) for each in minutes]

    predictions = pl.DataFrame(
        {
            "event_id": ["view-1", "view-2", "view-late", "other", "review-own"],
            "user_id": ["u", "u", "u", "v", "w"],
            "item_id": ["i"] * 5,
            "time": at(0, 1, 9, 0, 5),
            "predicted": [3.0, 3.5, 4.0, 2.0, 1.5],
        }
    )
    ratings = pl.DataFrame(
        {
            "event_id": ["review-1", "review-own"],
            "user_id": ["u", "w"],
            "item_id": ["i", "i"],
            "time": at(5, 5),
            "rating": [5.0, 1.0],
        }
    )
    found = join(predictions, ratings).sort("predicted")
    assert found.rows() == [(1.5, 1.0), (2.0, None), (3.0, None), (3.5, 5.0), (4.0, None)]
