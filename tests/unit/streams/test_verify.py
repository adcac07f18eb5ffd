from pathlib import Path

import pytest
from deltalake import write_deltalake
from pydantic import SecretStr

from model.ids import hash_ids, partitions_of
from schemas import archive
from schemas.archive import Row
from schemas.codec import encode
from schemas.examples import EXAMPLES as RECORDS
from schemas.exceptions import StarcastError, UnreachableError
from schemas.records import ItemUpdate
from streams.config import ArchiveConfig, ModelsConfig, RedisConfig
from streams.erasure import Erased, erase_journal
from streams.store import Store
from streams.verify import verify_replay
from tests.unit.streams.journals import USERS
from tests.unit.streams.test_erasure import archived


def test_archived_rows_that_cannot_be_read_are_told(store: str, tmp_path: Path) -> None:
    where = tmp_path / "items"
    write_deltalake(str(where), archive.table("items", [Row(0, 0, 0, b"k", b"{}")]))
    for each in where.glob("*.parquet"):
        each.unlink()
    kept = Store(RedisConfig(url=SecretStr(store)), "abcd", 2)
    with pytest.raises(UnreachableError, match="items cannot be used"):
        verify_replay(ArchiveConfig(url=str(tmp_path)), ModelsConfig(encoder="none"), kept)


def test_inputs_that_were_emptied_are_told_as_missing_beside_rows_of_nobody(
    store: str, tmp_path: Path
) -> None:
    """As of a record whose key is another user's, who was erased."""
    archived(tmp_path)
    erase_journal(str(tmp_path), {}, [Erased("u", int(USERS[0]), 1, {})])
    emptied = [Row(1, offset, 0, None, None) for offset in range(5)]
    for topic in ("reviews", "behavior"):
        write_deltalake(str(tmp_path / topic), archive.table(topic, emptied))
    kept = Store(RedisConfig(url=SecretStr(store)), "abcd", 2)
    found = verify_replay(ArchiveConfig(url=str(tmp_path)), ModelsConfig(encoder="none"), kept)
    assert found.differences["archived input"] == 7  # all rows that are of somebody
    assert found.passed_over == 5
    # One line, however many there are.
    assert [note for note in found.notes if "skipped" in note] == [
        "partition 1: rows were skipped in 5 places: their inputs are missing"
    ]


def test_without_a_journal_there_is_nothing_to_verify(store: str, tmp_path: Path) -> None:
    kept = Store(RedisConfig(url=SecretStr(store)), "abcd", 2)
    with pytest.raises(StarcastError, match=r"holds no journal.*STARCAST_ARCHIVE__URL"):
        verify_replay(ArchiveConfig(url=str(tmp_path)), ModelsConfig(encoder="none"), kept)


def test_an_archive_of_more_partitions_than_settings_say_is_told(
    store: str, tmp_path: Path
) -> None:
    archived(tmp_path)  # a journal of partition 1
    kept = Store(RedisConfig(url=SecretStr(store)), "abcd", 1)
    with pytest.raises(StarcastError, match=r"journal of partition 1.*STARCAST_KAFKA__PARTITIONS"):
        verify_replay(ArchiveConfig(url=str(tmp_path)), ModelsConfig(encoder="none"), kept)


def test_an_archive_of_fewer_partitions_than_settings_say_is_told(
    store: str, tmp_path: Path
) -> None:
    archived(tmp_path)
    update = ItemUpdate.model_validate(RECORDS["item-updates"])
    partition = int(partitions_of(hash_ids([update.item_id]), 2)[0])
    row = Row(partition, 0, 0, update.item_id.encode(), encode(update))
    write_deltalake(str(tmp_path / "item-updates"), archive.table("item-updates", [row]))
    kept = Store(RedisConfig(url=SecretStr(store)), "abcd", 2)
    verify_replay(ArchiveConfig(url=str(tmp_path)), ModelsConfig(encoder="none"), kept)
    kept = Store(RedisConfig(url=SecretStr(store)), "abcd", 3)
    with pytest.raises(StarcastError, match=r"item-updates.*STARCAST_KAFKA__PARTITIONS"):
        verify_replay(ArchiveConfig(url=str(tmp_path)), ModelsConfig(encoder="none"), kept)
