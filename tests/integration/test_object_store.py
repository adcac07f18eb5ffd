"""The archive on an object store: moto's S3 server, from an environment of its own."""

import urllib.request
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake.fs import DeltaStorageHandler
from pyarrow import fs

from model.events import EVENT
from schemas import archive, journal
from schemas.archive import Row
from schemas.codec import encode
from schemas.exceptions import UnreachableError
from streams.archiver import Archive
from streams.compaction import claimed, compact
from streams.embedded import HOST, free_port
from streams.erasure import Erased, erase_journal, erase_rows
from tests.unit.streams.journals import USERS, Partition, events
from tests.unit.streams.test_erasure import HISTORY, erase_beside_an_archiver, erased, review

TIME = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def place(object_store: str) -> tuple[str, dict[str, str]]:
    """An archive's URL in a bucket of its own, and the options that reach it."""
    bucket = f"shop-{uuid4().hex}"
    put(f"{object_store}/{bucket}", b"")
    options = {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "who",
        "AWS_SECRET_ACCESS_KEY": "cares",
    }
    return f"s3://{bucket}/an archive", options


def put(address: str, content: bytes) -> None:
    """Make a bucket, or an object in it."""
    kind = {"Content-Type": "application/octet-stream"}  # a form would be read by moto itself
    with urllib.request.urlopen(urllib.request.Request(address, content, kind, method="PUT")):
        pass


def files(url: str, options: dict[str, str], topic: str) -> dict[str, pl.DataFrame]:
    """All objects of a table with rows, whatever version names them."""
    found = fs.PyFileSystem(DeltaStorageHandler(archive.table_url(url, topic), options))
    names = [each.base_name for each in found.get_file_info(fs.FileSelector(""))]
    return {
        name: pl.DataFrame(
            pl.from_arrow(pq.read_table(BytesIO(found.open_input_file(name).read())))
        )
        for name in names
        if name.endswith(".parquet")
    }


def test_rows_are_emptied_and_their_objects_deleted(place: tuple[str, dict[str, str]]) -> None:
    url, options = place
    written = Archive(url, options)
    for offset, user in enumerate(("ann", "bob", "ann", "bob")):
        written.append("reviews", [Row(0, offset, 0, user.encode(), encode(review(user, offset)))])
        written.commit()
    # Of a compaction that was killed, and one that an archiver is writing.
    for name, offset in (("part-of-a-killed-one", 0), ("part-being-written", 4)):
        content = BytesIO()
        row = Row(0, offset, 0, b"ann", encode(review("ann", offset)))
        pq.write_table(archive.table("reviews", [row]), content)
        where = archive.table_url(url, "reviews").removeprefix("s3://")
        put(f"{options['AWS_ENDPOINT_URL']}/{quote(where)}/{name}.parquet", content.getvalue())
    assert len(files(url, options, "reviews")) == 6
    assert erase_rows(url, options, "reviews", [erased("ann", reviews=3)]) == 2
    left = files(url, options, "reviews")
    assert left.pop("part-being-written.parquet")["user_id"].to_list() == ["ann"]
    whose = [user for rows in left.values() for user in rows["user_id"].to_list()]
    assert sorted(whose, key=str) == [None, None, "bob", "bob"]
    rows = archive.read(url, "reviews", options).collect()
    assert rows["user_id"].to_list() == [None, "bob", None, "bob"]
    assert archive.positions(url, "reviews", options) == {0: 4}
    assert erase_rows(url, options, "reviews", [erased("ann", reviews=3)]) == 0
    compact(url, "reviews", options)
    assert archive.read(url, "reviews", options).collect().equals(rows)
    assert written.append("reviews", [Row(0, 3, 0, b"k", None), Row(0, 4, 0, b"k", None)]) == 1
    assert written.commit() == 1


def test_rows_of_the_journal_become_rows_of_nobody(place: tuple[str, dict[str, str]]) -> None:
    url, options = place
    partition, written = Partition(), Archive(url, options)
    for rows in HISTORY:
        transaction = partition.apply(events(rows)).transaction
        (value,) = journal.encode(transaction.journal)
        written.append("journal", [Row(1, transaction.first_offset, 0, b"1", value)])
    written.commit()
    user = Erased("u", int(USERS[0]), 1, {"users": 3})
    ((found,), count) = erase_journal(url, options, [user])
    assert count == 5
    assert found.before == {"users": 3, "reviews": 4, "behavior": 2, "text-features": 1}
    journals = [each.journal for each in archive.journal(url, 1, options)]
    whose = np.concatenate([each.events for each in journals]).view(EVENT)["user"]
    assert (whose == USERS[0]).nonzero()[0].tolist() == [8, 10]
    assert len(files(url, options, "journal")) == 1
    assert erase_journal(url, options, [user]) == ([], 0)


def test_one_claims_a_table_at_a_time(place: tuple[str, dict[str, str]]) -> None:
    url, options = place
    written = Archive(url, options)
    written.append("users", [Row(0, 0, 0, b"ann", None)])
    written.commit()
    with claimed(url, "users", options) as one:
        assert one is not None
        with claimed(url, "users", options) as other:
            assert other is None
    with claimed(url, "users", options) as again:
        assert again is not None


def test_an_archiver_that_writes_meanwhile_loses_and_doubles_nothing(
    place: tuple[str, dict[str, str]],
) -> None:
    """Commits of both are conditional puts of the log's next object."""
    url, options = place
    erase_beside_an_archiver(url, options, ["ann", "bob"], count=10, compact_every=4)
    named = [user for each in files(url, options, "reviews").values() for user in each["user_id"]]
    assert "ann" not in named


def test_a_store_that_is_gone_is_told(place: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    url, options = place
    gone = options | {"AWS_ENDPOINT_URL": f"http://{HOST}:{free_port()}", "max_retries": "0"}
    with pytest.raises(UnreachableError, match="cannot be used"):
        erase_rows(url, gone, "reviews", [erased("ann", reviews=3)])
