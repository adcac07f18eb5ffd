"""Newcomers' level, on ratings few enough to work out by hand, and in storms."""

import numpy as np
import pytest

from model import newcomers
from model.events import EVENT, REVIEW, VIEW, Rows, blank
from model.newcomers import (
    BELIEF,
    DOUBT,
    FORGETTING,
    HALF,
    TURN,
    USER_DAMPING,
    WITNESS,
    follow,
    level,
)
from model.state import PARTITION

FADE = 0.5 ** (1 / HALF)


def ratings(*stars: float) -> Rows:
    events = blank(EVENT, len(stars))
    events["action"], events["rating"] = REVIEW, stars
    return events


def followed(
    events: Rows,
    usual: float = 4,
    count: int = 0,
    duplicate: list[bool] | None = None,
    begin: Rows | None = None,
) -> tuple[Rows, Rows]:
    """The partition's rows that ratings meet, and the one that they leave."""
    size = len(events)
    after = blank(PARTITION, 1) if begin is None else begin.reshape(1).copy()
    met = blank(PARTITION, size)
    follow(
        met,
        after,
        np.array([size], np.intp),
        events,
        np.array([False] * size if duplicate is None else duplicate),
        np.full(size, usual),
        np.full(size, np.log1p(count), np.float32),
    )
    return met, after[0]


def storm(size: int, stars: float = 1) -> Rows:
    """A partition after so many ratings of newcomers, who usually give 4."""
    return followed(ratings(*[stars] * size))[1]


def test_two_ratings() -> None:
    """The first is three stars below; the second, two, tells how right the first was."""
    met, after = followed(ratings(1, 2))
    assert met[0].tobytes() == blank(PARTITION, ()).tobytes()
    first = met[1]
    assert (first["late_sum"], first["late_weight"]) == (-3, 1)
    assert first["storm"] == 0  # nothing was said of it by either, so neither was the better one
    assert (first["error_sum"], first["error_count"]) == (9, 1)
    said = -3 / (1 + DOUBT)
    assert level(first) == pytest.approx(BELIEF * said)
    odds = np.exp(WITNESS * (4 - (-2 - said) ** 2) / (2 * (1 + 9) / 2))
    belief = BELIEF * odds / (BELIEF * odds + 1 - BELIEF)
    assert after["storm"] == pytest.approx((1 - TURN) * (belief - BELIEF))
    assert after["late_sum"] == pytest.approx(-3 * FADE - 2)
    assert after["late_weight"] == pytest.approx(FADE + 1)
    assert after["error_sum"] == pytest.approx(9 * FORGETTING + 4)


def test_who_has_rated_tells_less_and_is_told_less() -> None:
    """Who has rated as often as the damping is taken on trust by a half."""
    count = int(USER_DAMPING)
    _, after = followed(ratings(1), count=count)
    assert after["late_sum"] == pytest.approx(-1.5)
    assert after["late_weight"] == pytest.approx(0.25)
    assert newcomers.trust(np.array([0, count])).tolist() == [1, 0.5]


def test_a_storm_is_believed_and_passes() -> None:
    in_it = storm(40)
    assert -3 < level(in_it) < -1.5
    _, after = followed(ratings(*[4.0] * 150), begin=in_it)
    assert abs(level(after)) < 0.1
    _, other_way = followed(ratings(*[5.0] * 120), begin=storm(0))
    assert 0.5 < level(other_way) < 1


def test_noise_is_not_believed() -> None:
    stars = np.random.default_rng(2).choice([1, 2, 3, 4, 5], 2_000, p=[0.1, 0.05, 0.1, 0.25, 0.5])
    met, _ = followed(ratings(*stars), usual=float(stars.mean()))
    assert np.abs(level(met)).max() < 0.1


@pytest.mark.parametrize("stars", [1e-9, 1.0, 5.0])
def test_nothing_overflows(stars: float) -> None:
    """However long a storm lasts, and in whatever direction."""
    found = storm(20_000, stars)
    assert np.isfinite(level(found))
    assert 0 <= found["storm"] + BELIEF <= 1
    _, back = followed(ratings(*[5.0 if stars < 4 else 1.0] * 200), begin=found)
    assert np.sign(level(back)) == (1 if stars < 4 else -1)


def test_only_ratings_are_learnt_from_and_each_once() -> None:
    events = ratings(1, 1, np.nan, 1)
    events["action"][3] = VIEW
    _, found = followed(events, duplicate=[False, True, False, False])
    assert found.tobytes() == followed(ratings(1))[1].tobytes()


def test_partitions_know_nothing_of_each_other() -> None:
    events = ratings(1, 2, 5)
    met, after = blank(PARTITION, 3), blank(PARTITION, 3)
    after[2] = storm(9)
    usual, count = np.full(3, 4.0), np.zeros(3, np.float32)
    ends = np.array([2, 2, 3], np.intp)
    follow(met, after, ends, events, np.zeros(3, np.bool_), usual, count)
    assert after[0].tobytes() == followed(events[:2])[1].tobytes()
    assert after[1].tobytes() == blank(PARTITION, ()).tobytes()
    alone = followed(events[2:], begin=storm(9))
    assert (met[2].tobytes(), after[2].tobytes()) == (alone[0][0].tobytes(), alone[1].tobytes())
