"""Two versions over one batch."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.canary import Canary, Part, in_order, is_chosen, predict
from model.exceptions import BundleError, TrialError
from model.ids import hash_ids, partitions_of
from model.predict import Predictor, warm
from tests.unit.model.shop import Observed
from tests.unit.model.test_predict import MODELS, SHOP, trained

USERS = hash_ids([f"user {number}" for number in range(20_000)])
STABLE = replace(trained(2), version="stable")
OTHER = replace(trained(), version="other")
COLUMNS = ("rating", "distribution", "low", "high", "tier")

shares = st.floats(0, 1)
versions = st.text(min_size=1, max_size=20)


def both(shop: Observed, canary: Canary | None, stable: Predictor = STABLE) -> list[Part]:
    return predict(stable, canary, shop.events, shop.observation, shop.lookups)


@given(versions, shares, shares)
def test_a_greater_share_keeps_the_users_of_a_smaller_one(
    version: str, one: float, other: float
) -> None:
    few, many = (is_chosen(USERS, version, share) for share in sorted((one, other)))
    assert not (few & ~many).any()


@given(versions, shares)
def test_a_user_is_chosen_whoever_else_is_asked_for(version: str, share: float) -> None:
    whole = is_chosen(USERS, version, share)
    np.testing.assert_array_equal(is_chosen(USERS[::-7], version, share), whole[::-7])


@given(versions)
def test_none_and_all(version: str) -> None:
    assert not is_chosen(USERS, version, 0.0).any()
    assert is_chosen(USERS, version, 1.0).all()


@given(versions, st.floats(0.01, 0.99))
def test_a_share_is_that_share_of_the_users_of_each_partition(version: str, share: float) -> None:
    chosen = is_chosen(USERS, version, share)
    partitions = partitions_of(USERS, 8)
    for partition in range(8):
        mine = chosen[partitions == partition]
        # Six standard deviations of a coin thrown for each.
        assert abs(mine.mean() - share) < 6 * (share * (1 - share) / len(mine)) ** 0.5


def test_another_version_has_other_users() -> None:
    one, other = (is_chosen(USERS, version, 0.2) for version in ("a", "b"))
    assert (one & other).mean() == pytest.approx(0.04, abs=0.01)  # as if drawn anew


def test_which_users_these_are_never_changes() -> None:
    """Workers of two releases at once must agree."""
    # splitmix64's finalizer of hash(id) ^ hash("v1"), over 2⁶⁴.
    places = {"ann": 0.014, "bob": 0.092, "eve": 0.392, "joe": 0.505, "kim": 0.987, "lea": 0.003}
    for share in (0.01, 0.05, 0.1, 0.39, 0.4, 0.5, 0.51, 0.98, 0.99):
        chosen = is_chosen(hash_ids(list(places)), "v1", share)
        assert chosen.tolist() == [place < share for place in places.values()]


@given(st.floats(0.05, 0.95))
def test_each_row_is_what_its_version_says_alone_and_in_order(share: float) -> None:
    parts = both(SHOP, Canary(OTHER, share))
    its = is_chosen(SHOP.events["user"], "other", share)
    for version, rows in ((STABLE, ~its), (OTHER, its)):
        said = version.predict(SHOP.events, SHOP.observation, SHOP.lookups)
        for column in COLUMNS:
            found = in_order(parts, lambda each, name=column: getattr(each, name))
            np.testing.assert_array_equal(found[rows], getattr(said, column)[rows])
    assert [part.role for part in parts] == ["stable", "canary"]
    taken = [row for part in parts for row in part.take(list(range(len(its))))]
    assert sorted(taken) == list(range(len(its)))
    assert parts[1].take(its.tolist()) == [True] * int(its.sum())


@pytest.mark.parametrize("canary", [None, Canary(OTHER, 0.0)])
def test_without_a_canary_or_with_a_shadow_stable_answers_in_one_pass(
    canary: Canary | None,
) -> None:
    (part,) = both(SHOP, canary)
    assert (part.role, part.rows, part.predictions.version) == ("stable", slice(None), "stable")
    ratings = in_order([part], lambda each: each.rating)
    assert ratings is part.predictions.rating  # nothing is copied
    assert part.take(["a", "b"]) == ["a", "b"]


def test_a_whole_batch_of_the_canarys() -> None:
    (part,) = both(SHOP, Canary(OTHER, 1.0))
    assert (part.role, len(part.predictions.rating)) == ("canary", len(SHOP.events))
    assert part.predictions.version == "other"


def overflowing(predictor: Predictor) -> Predictor:
    """One whose weights are numbers, and whose predictions are not."""
    network = deepcopy(predictor.network)
    assert network is not None
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1e38
    return replace(predictor, network=network)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_canary_that_says_no_numbers_fails(share: float) -> None:
    with pytest.raises(TrialError, match="no number"):
        both(SHOP, Canary(overflowing(OTHER), share))


def test_a_version_that_says_no_numbers_does_not_get_warm() -> None:
    warm(OTHER)
    with pytest.raises(BundleError, match="other predicts what is no number"):
        warm(overflowing(OTHER))


def test_an_empty_batch() -> None:
    rows: NDArray[np.intp] = np.zeros(0, np.intp)
    (part,) = both(SHOP.take(rows), Canary(OTHER, 0.5), MODELS["ladder"])
    assert (part.role, len(part.predictions.rating)) == ("stable", 0)
