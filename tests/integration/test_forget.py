"""Erasing a user on a real Kafka, a real store and a real archive."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from model.state import USER
from schemas.records import Review
from starcast.shop import shop as generated_shop
from streams import rebuild
from streams.producer import Outgoing
from streams.recount import check_states
from streams.verify import verify_replay
from tests.shops import PARTITIONS, Shop, make_shop, until

EVENTS = 1_000
END = datetime(2026, 1, 1, tzinfo=UTC)
WORKERS = ("scorer", "items", "catalog", "texts")


def place(shop: Shop) -> rebuild.Shop:
    settings = shop.settings
    return rebuild.Shop(shop.store, settings.kafka, settings.archive, settings.states)


def generated() -> list[tuple[str, Any]]:
    return list(generated_shop(seed=7, events=EVENTS, end=END))


def busiest(sent: Sequence[tuple[str, Any]]) -> str:
    """The user of most events."""
    users = [each.user_id for topic, each in sent if topic in ("reviews", "behavior")]
    return max(sorted(set(users)), key=users.count)


def is_blank(shop: Shop, user: str) -> bool:
    return shop.users([user]).tobytes() == np.zeros(1, USER).tobytes()


def test_a_null_value_erases_a_state_in_the_order_of_its_partition(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    shop = make_shop(kafka, store_server, tmp_path)
    sent = generated()
    user = busiest(sent)
    with shop.workers("archiver"):
        with shop.workers(*WORKERS) as workers:
            shop.play(sent)
            shop.until_predicted(EVENTS)
            shop.until_users_are_written()
            assert not is_blank(shop, user)
            shop.play([Outgoing(topic, user.encode(), None) for topic in ("reviews", "behavior")])
            until(lambda: is_blank(shop, user))
            # Once more by way of texts, which had not read all of what the user wrote.
            until(lambda: workers.value("events_total", processor="scorer", kind="forget") == 3)
            again = Review(
                event_id="again", user_id=user, item_id="cup", event_time=END, rating=4.0
            )
            shop.play([("reviews", again)])
            predicted = shop.until_predicted(EVENTS + 1)
            shop.until_users_are_written()
            shop.until_items_are_applied()
        shop.until_archived()
    (mine,) = [each for each in predicted if each.event_id == "again"]
    assert mine.tier in ("global", "item_text", "item_state")
    assert shop.users([user])["rating_count"].tolist() == [1]
    settings = shop.settings
    report = verify_replay(settings.archive, settings.models, shop.store)
    assert report.differences == {}, report.examples
    before = shop.states()
    shop.empty_store()
    for partition in range(PARTITIONS):
        list(rebuild.rebuild(place(shop), partition))
    assert shop.states() == before
    checked = check_states(place(shop), list(range(PARTITIONS)))
    assert checked.differences == {}, checked.examples
    assert not shop.letters()
