"""Attributes of items and users from their records."""

from datetime import UTC, datetime, timedelta
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.catalog import (
    EVERYTHING,
    LEAST_PRICES,
    describe_items,
    describe_users,
    forget_items,
    item_text,
)
from model.events import Rows, blank
from model.ids import hash_ids, hash_names
from model.lookups import Table, empty
from model.state import CATEGORY, ITEM_ATTRIBUTES
from schemas.records import Item, User

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def item(name: str = "i", **fields: Any) -> Item:
    return Item(item_id=name, event_time=fields.pop("event_time", NOON), **fields)


def describe(items: list[Item], categories: Table | None = None) -> tuple[Rows, Table]:
    return describe_items(
        items,
        range(1, len(items) + 1),
        blank(ITEM_ATTRIBUTES, len(items)),
        empty(CATEGORY) if categories is None else categories,
    )


def test_text_of_an_item() -> None:
    full = item(title="Lute", brand="Orpheus", category=["Music", "Strings"], description="Old.")
    assert item_text(full) == "Lute\nOrpheus\nMusic > Strings\nOld."
    assert item_text(item()) == ""
    rows, _ = describe([full, item()])
    assert rows["text"].tolist() == [int(hash_ids([item_text(full)])[0]), 0]


def test_attributes_of_items() -> None:
    rows, _ = describe(
        [
            item(brand="Orpheus", category=["a", "b"], price=5),
            item(category=["a", "c", "d", "e", "f"]),
        ]
    )
    assert rows["version"].tolist() == [1, 2]
    assert rows["brand"].tolist() == [int(hash_names(["Orpheus"])[0]), 0]
    category = rows["category"]
    assert category[0, 0] == category[1, 0] != 0
    assert category[0, 1] != category[1, 1]
    assert category[0, 2:].tolist() == [0, 0]
    assert (category[1] > 0).all()
    assert rows["price"][0] == 5
    assert np.isnan(rows["price"][1])
    assert rows["first_time"].tolist() == [int(NOON.timestamp() * 1000)] * 2


def test_the_same_name_in_two_categories_is_two() -> None:
    rows, _ = describe([item(category=["a", "x"]), item(category=["b", "x"])])
    assert rows["category"][0, 1] != rows["category"][1, 1]


def test_rank_of_a_price_in_its_category() -> None:
    prices = [1, 2, 4, 8, 16]
    logs = np.rint(np.log1p(prices) * 256) / 256
    dear = [item(f"d{n}", category=["dear"], price=1000 + n) for n in range(LEAST_PRICES)]
    cheap = [item(f"c{p}", category=["cheap"], price=p) for p in prices]
    before, categories = describe([*cheap, *dear])
    assert np.isnan(before["price_rank"][: LEAST_PRICES - 1]).all()  # too few prices so far
    rows, categories = describe_items(cheap, range(11, 16), before[:5], categories)
    ranks = rows["price_rank"]
    assert ranks[2] == pytest.approx(NormalDist(logs.mean(), logs.std()).cdf(logs[2]), abs=1e-6)
    assert (np.diff(ranks) > 0).all()
    assert (ranks[0] < 0.2) & (ranks[4] > 0.8)
    assert categories.take(np.array([EVERYTHING], np.uint64))["count"][0] == 10
    few, _ = describe([item(category=["new"], price=16)], categories)
    assert few["price_rank"][0] < 0.7  # among all items, since its category has one price
    alone, _ = describe([item(price=5)])
    assert np.isnan(alone["price_rank"][0])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.none() | st.floats(0, 1e6)), min_size=1, max_size=8)
)
def test_a_new_price_takes_the_place_of_the_old(changes: list[tuple[int, float | None]]) -> None:
    categories, rows = empty(CATEGORY), blank(ITEM_ATTRIBUTES, 4)
    latest = dict[int, Item]()
    for number, (which, price) in enumerate(changes):
        latest[which] = item(
            str(which),
            price=price,
            category=["ab"[number % 2]],
            event_time=NOON - timedelta(number),
        )
        rows[[which]], categories = describe_items(
            [latest[which]], [number + 1], rows[[which]], categories
        )
    _, expected = describe(list(latest.values()))
    assert categories.hashes.tolist() == expected.hashes.tolist()
    assert categories.rows.tobytes() == expected.rows.tobytes()
    which, number = changes[-1][0], len(changes) - 1
    assert rows["first_time"][which] == int((NOON - timedelta(number)).timestamp() * 1000)
    assert len(forget_items(rows[list(latest)], categories).hashes) == 0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.none() | st.floats(0, 1e4))), st.data())
def test_a_log_may_be_cut_anywhere(
    items: list[tuple[str, float | None]], data: st.DataObject
) -> None:
    log = [item(str(n), category=[name], price=price) for n, (name, price) in enumerate(items)]
    whole, categories = describe(log)
    cut = data.draw(st.integers(0, len(log)))
    first, known = describe(log[:cut])
    rest, after = describe(log[cut:], known)
    assert [*first["price_rank"], *rest["price_rank"]] == pytest.approx(
        whole["price_rank"], abs=0, nan_ok=True
    )
    assert after.rows.tobytes() == categories.rows.tobytes()


def test_attributes_of_users() -> None:
    rows = describe_users(
        [
            User(user_id="u", event_time=NOON, gender="f", age=33, region="Kent"),
            User(user_id="v", event_time=NOON),
        ],
        [3, 4],
    )
    assert rows["version"].tolist() == [3, 4]
    assert rows["gender"].tolist() == [int(hash_names(["f"])[0]), 0]
    assert rows["region"].tolist() == [int(hash_names(["Kent"])[0]), 0]
    assert rows["age"][0] == 33
    assert np.isnan(rows["age"][1])
