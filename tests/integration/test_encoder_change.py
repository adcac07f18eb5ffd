"""A version with another encoder on a real Kafka and a real store: no item loses its words."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

from model import registry
from model.bundle import encoder_of
from schemas.records import Behavior, Item, PredictedRating
from streams.coverage import reached
from streams.verify import verify_replay
from tests.shops import Shop, Workers, make_shop, until
from tests.unit.model.bundles import write
from tests.unit.model.encoders import HIDDEN, bert

TIME = datetime(2026, 1, 1, tzinfo=UTC)
VIEWS = 40  # each of another item, by another user: nothing but its words is known
PROCESSORS = ("scorer", "items", "catalog", "archiver")


def view(number: int) -> tuple[str, Behavior]:
    behavior = Behavior(
        event_id=f"e{number}",
        user_id=f"u{number}",
        item_id=f"i{number}",
        event_time=TIME + timedelta(seconds=number),
        action="view",
    )
    return "behavior", behavior


def promoted(shop: Shop, encoder: Path, seed: int) -> str:
    url = shop.settings.models.url
    made = write(url, seed, HIDDEN, encoder=encoder)
    registry.promote(url, made.version, made.sha256, "a test", "to see")
    return made.version


def in_service(workers: Workers, version: str) -> bool:
    return workers.value("model_info", version=version) == 1


def by_version(predictions: list[PredictedRating]) -> Counter[str]:
    return Counter(str(each.model_version) for each in predictions)


def all_read(shop: Shop, version: str) -> bool:
    """Whether a version's encoder has read all items."""
    used = encoder_of(shop.settings.models.url, version)
    ends = shop.ends("items")
    return reached(shop.store, used or "", sorted(ends)) == [ends[at] for at in sorted(ends)]


def test_another_encoder_serves_once_it_has_read_all_items(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    shop = make_shop(kafka, store_server, tmp_path)
    for name in ("one", "other"):
        bert(tmp_path / name)
    first = promoted(shop, tmp_path / "one", 0)
    shop.play(
        ("items", Item(item_id=f"i{number}", event_time=TIME, title=f"a good guitar {number}"))
        for number in range(3 * VIEWS)
    )
    with shop.workers(*PROCESSORS, "texts") as workers:
        shop.until_attributes_are_kept()
        until(lambda: all_read(shop, first))
        shop.play(view(number) for number in range(VIEWS))
        shop.until_predicted(VIEWS)
    with shop.workers(*PROCESSORS) as workers:  # nobody reads texts
        second = promoted(shop, tmp_path / "other", 1)
        until(lambda: workers.value("encoder_covered") == 0)
        shop.play(view(number) for number in range(VIEWS, 2 * VIEWS))
        found = shop.until_predicted(2 * VIEWS)
        assert by_version(found) == {first: 2 * VIEWS}
    with shop.workers(*PROCESSORS, "texts") as workers:
        until(lambda: in_service(workers, second))
        shop.play(view(number) for number in range(2 * VIEWS, 3 * VIEWS))
        found = shop.until_predicted(3 * VIEWS)
        shop.until_archived()
    assert by_version(found) == {first: 2 * VIEWS, second: VIEWS}
    assert {each.tier for each in found} == {"item_text"}
    assert verify_replay(shop.settings.archive, shop.settings.models, shop.store).clean
