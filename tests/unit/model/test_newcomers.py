"""Newcomers' level, on ratings few enough to work out by hand, and in storms."""

import numpy as np
import pytest

from model.events import EVENT, REVIEW, VIEW, Rows, blank
from model.newcomers import (
    BELIEF,
    DOUBT,
    FORGETTING,
    HALF,
    TURN,
    follow,
    level,
)
from model.state import PARTITION

FADE = 0.5 ** (1 / HALF)
USUAL = np.float32(3.75)
ITEM = np.float32(0.25)


def ratings(*stars: float) -> Rows:
    events = blank(EVENT, len(stars))
    events["action"], events["rating"] = REVIEW, stars
    return events


def followed(
    events: Rows, begin: Rows | None = None, first: list[bool] | None = None
) -> tuple[Rows, Rows]:
    """The partition's rows that first ratings meet, and the one that they leave; usual are 4."""
    size = len(events)
    met = blank(PARTITION, size)
    after = blank(PARTITION, 1) if begin is None else begin.reshape(1).copy()
    told = np.array([True] * size if first is None else first)
    follow(
        met,
        after,
        np.array([size], np.intp),
        events,
        told,
        np.full(size, USUAL),
        np.full(size, ITEM),
    )
    return met, after[0]


def settled(size: int = 200) -> Rows:
    """A partition that has seen as many fives as threes."""
    return followed(ratings(*[5.0, 3.0] * (size // 2)))[1]


def storm(size: int, stars: float = 1) -> Rows:
    """Then so many first ratings, all the same."""
    return followed(ratings(*[stars] * size), settled())[1]


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
    odds = np.exp((4 - (-2 - said) ** 2) / (2 * (1 + 9) / 2))
    belief = BELIEF * odds / (BELIEF * odds + 1 - BELIEF)
    assert after["storm"] == pytest.approx((1 - TURN) * (belief - BELIEF))
    assert after["late_sum"] == pytest.approx(-3 * FADE - 2)
    assert after["late_weight"] == pytest.approx(FADE + 1)
    assert after["error_sum"] == pytest.approx(9 * FORGETTING + 4)


def test_each_rating_meets_what_those_before_it_left() -> None:
    events, begin = ratings(1, 2, 1, 1, 5), settled()
    met, _ = followed(events, begin)
    for place in range(len(events)):
        assert met[place].tobytes() == followed(events[:place], begin)[1].tobytes()


def test_a_storm_is_believed_and_passes() -> None:
    in_it = storm(20)
    assert -3 < level(in_it) < -1
    _, after = followed(ratings(*[4.0] * 100), in_it)
    assert abs(level(after)) < 0.1
    assert 0.2 < level(storm(60, 5)) < 1


def test_noise_is_not_believed() -> None:
    stars = np.random.default_rng(2).choice([1, 2, 3, 4, 5], 2_000, p=[0.1, 0.05, 0.15, 0.2, 0.5])
    met, _ = followed(ratings(*stars))
    assert abs(stars.mean() - 4) < 0.1
    assert np.abs(level(met)).max() < 0.2


@pytest.mark.parametrize("stars", [1.0, 5.0])
def test_nothing_overflows(stars: float) -> None:
    """However long a storm lasts, and in whatever direction."""
    found = storm(20_000, stars)
    assert np.isfinite(level(found))
    assert 0 <= found["storm"] + BELIEF <= 1
    _, back = followed(ratings(*[6 - stars] * 300), found)
    assert np.sign(level(back)) == np.sign(3 - stars)


def test_only_first_ratings_are_learnt_from() -> None:
    events = ratings(1, 1, np.nan, 1)
    events["action"][3] = VIEW
    _, found = followed(events, first=[True, False, True, True])
    assert found.tobytes() == followed(ratings(1))[1].tobytes()


def test_partitions_know_nothing_of_each_other() -> None:
    events = ratings(1, 2, 5)
    met, after = blank(PARTITION, 3), blank(PARTITION, 3)
    after[2] = storm(9)
    ends = np.array([2, 2, 3], np.intp)
    follow(met, after, ends, events, np.ones(3, np.bool_), np.full(3, USUAL), np.full(3, ITEM))
    assert after[0].tobytes() == followed(events[:2])[1].tobytes()
    assert after[1].tobytes() == blank(PARTITION, ()).tobytes()
    alone = followed(events[2:], storm(9))
    assert (met[2].tobytes(), after[2].tobytes()) == (alone[0][0].tobytes(), alone[1].tobytes())
