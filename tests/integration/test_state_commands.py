"""Rebuilding and checking states on a real Kafka and a real store, beside running workers."""

import shutil
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from confluent_kafka.admin import (
    AlterConfigOpType,  # pyright: ignore[reportPrivateImportUsage]
    ConfigEntry,  # pyright: ignore[reportPrivateImportUsage]
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
    ResourceType,  # pyright: ignore[reportPrivateImportUsage]
)
from typer.testing import CliRunner, Result

from model.ids import hash_ids
from schemas import archive
from schemas.records import Item
from starcast.main import app
from starcast.shop import shop as generated_shop
from streams import rebuild
from streams.clients import reach
from streams.exceptions import FencedError, JournalGapError
from streams.reader import ITEM_KIND, ITEM_STATE, USER_KIND, USER_STATE, store_keys
from streams.recount import check_states
from streams.store import Store
from tests.shops import PARTITIONS, Shop, make_shop, partition_of, until
from tests.shops import check_states as recount_plainly

EVENTS = 2_000
END = datetime(2026, 1, 1, tzinfo=UTC)
Sent = list[tuple[str, Any]]


def place(shop: Shop) -> rebuild.Shop:
    settings = shop.settings
    return rebuild.Shop(shop.store, settings.kafka, settings.archive, settings.states)


def everything(shop: Shop) -> dict[bytes, bytes]:
    """All that the store holds, attributes, prices and headers too."""
    store = shop.store
    found = shop.states()
    for kind in (ITEM_KIND, USER_KIND, b"c"):
        for partition in range(PARTITIONS):
            keys = list(store.scan(kind, partition))
            found |= {k: v or b"" for k, v in zip(keys, store.read(keys), strict=True)}
            found[store.header_key(kind, partition)] = store.header(kind, partition) or b""
    return found


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's log would go on writing to what captured its output."""
    monkeypatch.setattr("starcast.log.configure", lambda _: None)


def generated() -> Sent:
    return list(generated_shop(seed=7, events=EVENTS, end=END))


def play(shop: Shop) -> Sent:
    """All events go all the way; then nobody works any more."""
    sent = generated()
    with shop.workers("archiver"):
        with shop.workers("scorer", "items", "catalog") as workers:
            shop.play(sent)
            shop.until_predicted(EVENTS)
            shop.until_items_are_applied()
            shop.until_attributes_are_kept()
            until(lambda: all(each.lag == 0 for each in workers.processors.values()))
        shop.until_archived()
    return sent


@pytest.fixture(scope="module")
def whole(
    kafka: str, store_server: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Shop, Sent]:
    """A shop for tests that leave it as it was."""
    shop = make_shop(kafka, store_server, tmp_path_factory.mktemp("whole"))
    return shop, play(shop)


@pytest.fixture
def played(kafka: str, store_server: str, tmp_path: Path) -> tuple[Shop, Sent]:
    """A shop that a test may do with as it likes."""
    shop = make_shop(kafka, store_server, tmp_path)
    return shop, play(shop)


def run(shop: Shop, *arguments: str) -> Result:
    """A command with the shop's settings."""
    return CliRunner().invoke(app, ["state", *arguments], env=shop.environment)


def uncompacted(shop: Shop, topic: str) -> None:
    """Kafka deletes no records of a topic that it compacts."""
    admin = reach(shop.settings.kafka)
    entry = ConfigEntry("cleanup.policy", "delete", incremental_operation=AlterConfigOpType.SET)
    name = shop.settings.kafka.topic_prefix + topic
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(30)


def test_a_check_finds_no_difference(whole: tuple[Shop, Sent]) -> None:
    shop, sent = whole
    result = run(shop, "check", "--json")
    assert result.exit_code == 0, result.output
    report = orjson.loads(result.stdout)
    assert report["differences"] == {}
    assert report["notes"] == []
    users = {r.user_id for topic, r in sent if topic in ("reviews", "behavior")}
    items = {r.item_id for topic, r in sent if topic in ("reviews", "behavior")}
    assert report["compared"] == {
        "user state": len(users),
        "user header": PARTITIONS,
        "item state": len(items),
        "item attributes": sum(topic == "items" for topic, _ in sent),
        "user attributes": sum(topic == "users" for topic, _ in sent),
        "running prices": PARTITIONS,
    }


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (USER_STATE, "user state"),
        (ITEM_STATE, "item state"),
        (ITEM_KIND, "item attributes"),
        (USER_KIND, "user attributes"),
    ],
)
def test_a_check_finds_a_planted_change_and_a_rebuild_mends_it(
    whole: tuple[Shop, Sent], kind: bytes, what: str
) -> None:
    shop, sent = whole
    before = everything(shop)
    record = next(r for topic, r in reversed(sent) if topic == "behavior")
    whose = record.user_id if kind in (USER_STATE, USER_KIND) else record.item_id
    (key,) = store_keys(shop.store, kind, hash_ids([whose]))
    (value,) = shop.store.read([key])
    assert value is not None
    changed = bytearray(value)
    changed[9] ^= 1
    shop.store.put([key], [bytes(changed)])
    result = run(shop, "check")
    assert result.exit_code == 1
    assert f"✗ {what}: 1 of" in result.stdout
    assert f"hash {int(hash_ids([whose])[0]):#x}" in result.stderr
    partition = str(partition_of(whose))
    other = str((partition_of(whose) + 1) % PARTITIONS)
    assert run(shop, "check", "--partition", other).exit_code == 0
    assert run(shop, "check", "--partition", partition).exit_code == 1
    rebuilt = run(shop, "rebuild", "--partition", partition)
    assert rebuilt.exit_code == 0, rebuilt.output
    assert everything(shop) == before
    assert run(shop, "check").exit_code == 0


def test_a_check_finds_what_is_missing_and_what_should_not_be(played: tuple[Shop, Sent]) -> None:
    shop, sent = played
    record = next(r for topic, r in reversed(sent) if topic == "behavior")
    store = shop.store
    (known,) = store_keys(store, USER_STATE, hash_ids([record.user_id]))
    (unknown,) = store_keys(store, USER_STATE, hash_ids(["nobody"]))
    (value,) = store.read([known])
    store.put([unknown], [value or b""])
    store.client.delete(known)
    report = check_states(place(shop), list(range(PARTITIONS)))
    assert report.differences == {"user state": 2}
    shop.empty_store()
    report = check_states(place(shop), list(range(PARTITIONS)))
    assert report.differences["user header"] == PARTITIONS
    assert report.differences["item header"] == PARTITIONS


def test_a_rebuild_takes_from_the_archive_what_retention_has_taken(
    played: tuple[Shop, Sent],
) -> None:
    shop, sent = played
    before = everything(shop)
    shop.cut("journal", "item-updates")
    shop.empty_store()
    result = run(shop, "rebuild")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("✓") == PARTITIONS * rebuild.KINDS_OF_STATES
    assert everything(shop) == before
    recount_plainly(shop, sent)
    assert run(shop, "check").exit_code == 0


def test_workers_take_from_the_archive_what_retention_has_taken(
    played: tuple[Shop, Sent],
) -> None:
    shop, sent = played
    before = everything(shop)
    shop.cut("journal", "item-updates")
    shop.empty_store()
    with shop.workers("scorer", "items", "catalog") as workers:
        until(lambda: everything(shop).keys() == before.keys())
        last = next(each for each in reversed(sent) if each[0] == "behavior")
        shop.play([("behavior", last[1].model_copy(update={"event_id": "new"}))])
        shop.until_predicted(EVENTS + 1)
        shop.until_items_are_applied()
        lost = workers.metrics.registry.collect()
        assert not any(
            sample.value
            for family in lost
            for sample in family.samples
            if sample.name == "starcast_lost_records_total"
        )
    recount_plainly(shop, [*sent, last])


def test_states_without_their_beginning_are_not_touched(
    played: tuple[Shop, Sent], tmp_path: Path
) -> None:
    shop, _ = played
    before = everything(shop)
    shop.cut("journal", "item-updates")
    shutil.move(tmp_path / "archive" / "item-updates", tmp_path / "kept")
    with pytest.raises(JournalGapError, match="does not have all before"):
        list(rebuild.rebuild(place(shop), 0))
    report = check_states(place(shop), [0])
    assert report.differences == {"item states not compared": 1}
    shutil.move(tmp_path / "kept", tmp_path / "archive" / "item-updates")
    shutil.rmtree(tmp_path / "archive" / "journal")
    with pytest.raises(JournalGapError, match="has nothing between"):
        list(rebuild.rebuild(place(shop), 0))
    assert check_states(place(shop), [0]).differences == {"user states not compared": 1}
    assert everything(shop) == before


def test_a_rebuild_and_a_check_beside_workers(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    shop, sent = make_shop(kafka, store_server, tmp_path), generated()
    names = ("scorer", "items", "catalog")
    with shop.workers("archiver"), shop.workers(*names) as workers:
        shop.play(sent[: EVENTS // 2])
        shop.until_predicted(100)
        playing = threading.Thread(
            target=shop.play, args=(sent[EVENTS // 2 :],), kwargs={"rate": 200}
        )
        playing.start()
        for partition in range(PARTITIONS):
            done = list(rebuild.rebuild(place(shop), partition))
            assert [each.partition for each in done] == [partition] * rebuild.KINDS_OF_STATES
            report = check_states(place(shop), [partition])
            assert report.differences == {}, report.examples
        playing.join()
        shop.until_predicted(EVENTS)
        shop.until_items_are_applied()
        until(lambda: all(each.lag == 0 for each in workers.processors.values()))
        report = check_states(place(shop), list(range(PARTITIONS)))
        assert report.differences == {}, report.examples
        assert report.notes == []
    assert len(shop.predictions()) == EVENTS
    recount_plainly(shop, sent)


def test_a_command_that_is_fenced_waits_for_the_worker(
    whole: tuple[Shop, Sent], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, _ = whole
    before = everything(shop)
    write, claimed = Store.write, list[bytes]()

    def overtaken(self: Store, claim: Any, keys: Any, values: Any, data: bytes) -> None:
        """A worker claims as soon as states are written, not while they are cleared."""
        if any(values) and claim.kind not in claimed:
            claimed.append(claim.kind)
            shop.store.claim(claim.kind, claim.partition)
        write(self, claim, keys, values, data)

    with shop.workers("scorer", "items", "catalog") as workers:
        until(lambda: not any(loop.waiting for loop in workers.loops.values()))
        monkeypatch.setattr(Store, "write", overtaken)
        done = list(rebuild.rebuild(place(shop), 1))
    assert any(each.taken_over for each in done)
    assert everything(shop) == before


def test_a_worker_that_takes_over_while_states_are_cleared(
    whole: tuple[Shop, Sent], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, _ = whole
    before = everything(shop)
    write, fenced = Store.write, list[bytes]()

    def overtaken(self: Store, claim: Any, keys: Any, values: Any, data: bytes) -> None:
        if keys and not any(values) and claim.kind not in fenced:
            fenced.append(claim.kind)
            write(self, claim, keys[:10], values[:10], b"")
            raise FencedError("as a worker that claims")
        write(self, claim, keys, values, data)

    monkeypatch.setattr(Store, "write", overtaken)
    assert len(list(rebuild.rebuild(place(shop), 1))) == rebuild.KINDS_OF_STATES
    assert len(fenced) == 4
    assert everything(shop) == before


def test_an_item_that_comes_while_attributes_are_listed(
    played: tuple[Shop, Sent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleared prices with an item left that they had counted would rank all others otherwise."""
    shop, sent = played
    described = next(each for topic, each in sent if topic == "items")
    new: Item = described.model_copy(update={"item_id": "new", "price": 9_999.0})
    scan, came = Store.scan, list[bytes]()
    with shop.workers("catalog"):

        def late(self: Store, kind: bytes, partition: int) -> list[bytes]:
            keys = list(scan(self, kind, partition))
            if kind == ITEM_KIND and not came:
                came.append(kind)
                key = store_keys(shop.store, ITEM_KIND, hash_ids(["new"]))
                shop.play([("items", new)])
                until(lambda: shop.store.read(key) != [None])
            return keys

        monkeypatch.setattr(Store, "scan", late)
        list(rebuild.rebuild(place(shop), partition_of("new")))
        monkeypatch.undo()
    report = check_states(place(shop), [partition_of("new")])
    assert report.differences == {}, report.examples


def test_a_compacted_catalogue_is_taken_from_the_archive(played: tuple[Shop, Sent]) -> None:
    """A price that was is gone from the topic, but ranks of other prices hang on it."""
    shop, sent = played
    items = [record for topic, record in sent if topic == "items"]
    dearer: list[Item] = [each.model_copy(update={"price": 7.5}) for each in items[:20]]
    with shop.workers("archiver"), shop.workers("catalog") as workers:
        shop.play(("items", each) for each in dearer)
        until(
            lambda: (
                sum(int(shop.store.header(ITEM_KIND, p) or 0) for p in range(PARTITIONS))
                == len(items) + len(dearer)
            )
        )
        until(lambda: workers.processors["catalog"].lag == 0)
        until(
            lambda: (
                sum(archive.positions(shop.settings.archive.url, "items").values())
                == len(items) + len(dearer)
            )
        )
    before = everything(shop)
    uncompacted(shop, "items")
    shop.cut("items")
    checked = run(shop, "check")
    assert checked.exit_code == 0, checked.output
    rebuilt = run(shop, "rebuild")
    assert rebuilt.exit_code == 0, rebuilt.output
    assert everything(shop) == before
    nowhere = place(shop).archive.model_copy(update={"url": "nowhere"})
    shop.play(("items", each) for each in dearer[:1])
    report = check_states(replace(place(shop), archive=nowhere), [0, 1, 2])
    assert report.differences["item attributes"] > 0  # deleted records, as if they had never been
    assert any("neither in the topic" in note for note in report.notes)
    assert np.all([each.startswith("item") for each in report.examples])
