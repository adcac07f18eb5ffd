import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from hypothesis import given
from hypothesis import strategies as st

from schemas import archive
from schemas.archive import Row
from schemas.codec import decode
from schemas.columns import decode_cells
from schemas.examples import EXAMPLES
from schemas.exceptions import ContractError, UnreachableError
from schemas.journal import encode
from schemas.topics import BY_NAME, TOPICS, Topic
from tests.faults.spoiling import WRONG
from tests.unit.schemas.test_columns import ODD
from tests.unit.schemas.test_journal import assert_same, make

REVIEW: dict[str, Any] = dict(EXAMPLES["reviews"])
NOON = 1_795_521_600_000  # 2026-11-24T12:00:00Z


def row(offset: int, value: Any, partition: int = 0) -> Row:
    encoded = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
    return Row(partition, offset, NOON + offset, b"k", encoded, [("trace", b"1"), ("trace", None)])


def write(url: Path, topic: str, rows: list[Row]) -> None:
    write_deltalake(archive.table_url(str(url), topic), archive.table(topic, rows), mode="append")


def test_rows_are_kept_raw_beside_their_columns(tmp_path: Path) -> None:
    bad = b'{"rating": 9}'
    write(tmp_path, "reviews", [row(2, None), row(1, bad), row(0, {**REVIEW, "title": None})])
    found = archive.read(str(tmp_path), "reviews").collect()
    assert found["kafka_offset"].to_list() == [0, 1, 2]
    assert found["kafka_value"].to_list()[1:] == [bad, None]
    assert found["kafka_timestamp"][0] == datetime(2026, 11, 24, 12, tzinfo=UTC)
    headers = [{"key": "trace", "value": b"1"}, {"key": "trace", "value": None}]
    assert found["kafka_headers"].to_list() == [headers] * 3
    assert found["rating"].to_list() == [4.0, None, None]
    assert found["title"].to_list() == [None] * 3
    assert found["event_time"][0] == datetime(2026, 11, 24, 10, 15, 0, 123_000, tzinfo=UTC)


@pytest.mark.parametrize("name", ["shop [old]", "a%20b", "a|b", "a^b", "a\\b"])
def test_a_path_that_delta_takes_for_another_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="its path; set STARCAST_ARCHIVE__URL"):
        archive.open_table(str(tmp_path / name), "reviews")
    assert archive.open_table(str(tmp_path / "100% (new)"), "reviews") is None


@pytest.mark.parametrize("topic", [topic.name for topic in TOPICS if topic.record])
def test_a_path_may_have_spaces(tmp_path: Path, topic: str) -> None:
    plain, odd = tmp_path / "plain", tmp_path / "my shop's ümläut+1"
    for folder in (plain, odd):
        write(folder, topic, [row(1, b"{"), row(0, EXAMPLES[topic]), row(2, EXAMPLES[topic], 1)])
    expected = archive.read(str(plain), topic).collect()
    assert expected.equals(archive.read(str(odd), topic).collect())
    since = datetime.fromtimestamp((NOON + 1) / 1000, UTC)
    part = archive.read(str(odd), topic, partitions=[0], since=since, columns=["kafka_offset"])
    assert part.collect()["kafka_offset"].to_list() == [1]
    assert archive.positions(str(odd), topic) == {0: 2, 1: 3}


@pytest.mark.parametrize("topic", [topic.name for topic in TOPICS if topic.record])
def test_every_record_has_its_columns(tmp_path: Path, topic: str) -> None:
    value = EXAMPLES[topic]
    write(tmp_path, topic, [row(0, value), row(1, b"{"), row(2, value, partition=1)])
    found = archive.read(str(tmp_path), topic).collect()
    assert found.height == 3
    record = decode(BY_NAME[topic], [json.dumps(value).encode()], [(0, 0)]).records[0]
    for name, cell in vars(record).items():
        column = found[name]
        assert column[1] is None
        if isinstance(cell, str | int | float | datetime | None):
            assert column[0] == column[2] == cell, name
        else:
            assert column[0] is not None, name


def test_nested_fields_are_structs_and_maps() -> None:
    updates = archive.table("item-updates", [row(0, EXAMPLES["item-updates"])])
    assert updates["source"].to_pylist() == [EXAMPLES["item-updates"]["source"]]
    assert updates["counts"].to_pylist() == [[("review", 1), ("view", 3)]]
    digests = archive.table("score-digests", [row(0, EXAMPLES["score-digests"])])
    ((tier, errors),) = digests["errors_by_tier"].to_pylist()[0]
    assert (tier, errors["count"]) == ("full", 120)


def by_pydantic(topic: str, rows: list[Row]) -> pa.Table:
    with patch("schemas.archive.decode_cells", return_value=None):
        return archive.table(topic, rows)


def check(topic: str, values: list[bytes]) -> None:
    """A table holds what pydantic takes, whoever decoded it."""
    rows = [row(offset, value) for offset, value in enumerate(values)]
    table = archive.table(topic, rows)
    table.validate(full=True)
    assert table.equals(by_pydantic(topic, rows))


DECODED = [topic.name for topic in TOPICS if topic.record]


@pytest.mark.parametrize("topic", DECODED)
def test_what_is_decoded_in_bulk_is_what_pydantic_takes(topic: str) -> None:
    record = BY_NAME[topic].record
    assert record is not None
    needed = {
        name: EXAMPLES[topic][name]
        for name, field in record.model_fields.items()
        if field.is_required()
    }
    values = [json.dumps(each).encode() for each in (EXAMPLES[topic], needed)]
    rare = topic in ("score-digests", "dead-letters")  # of which pydantic has all
    assert (decode_cells(record, values) is None) == rare
    check(topic, values)
    check(topic, [*values, b"{"])
    check(topic, [])


@pytest.mark.parametrize(
    ("topic", "changes", "bulk"),
    [
        ("reviews", {"event_time": "2026-11-24T10:15:00.1234567+01:00"}, True),
        ("reviews", {"event_time": "2026-11-24T10:15:00.1234569Z"}, True),
        ("items", {"category": []}, True),
        ("items", {"category": ["a\0"]}, False),
        ("items", {"category": ["a"] * 17}, False),
        ("items", {"category": ["a", None]}, False),
        ("score-requests", {"deadline_ms": 200.0}, False),  # whole, as JSON Schema has it
        ("score-requests", {"deadline_ms": 0}, False),
        ("predicted-ratings", {"distribution": None, "interval": None, "seq": None}, True),
        ("predicted-ratings", {"seq": 2**63 - 1}, True),
        ("predicted-ratings", {"seq": 2**63}, False),
        ("predicted-ratings", {"seq": True}, False),
        ("predicted-ratings", {"source": None}, False),
        ("predicted-ratings", {"source": {"topic": "reviews", "partition": 0}}, False),
        ("item-updates", {"counts": {}}, True),
        ("item-updates", {"counts": {"view": -3, "": 1}}, True),
        ("item-updates", {"counts": {"view": 2**31}}, False),
        ("item-updates", {"counts": {"view": None}}, False),
        ("item-updates", {"rating_histogram": [0, 0, 0, 0]}, False),
        ("item-updates", {"rating_histogram": None}, False),
    ],
)
def test_what_a_field_may_hold(topic: str, changes: dict[str, Any], bulk: bool) -> None:
    record = BY_NAME[topic].record
    assert record is not None
    value = json.dumps({**EXAMPLES[topic], **changes}).encode()
    assert (decode_cells(record, [value]) is not None) == bulk
    check(topic, [json.dumps(EXAMPLES[topic]).encode(), value])


@given(st.data(), st.sampled_from(DECODED))
def test_values_that_were_spoiled(data: st.DataObject, topic: str) -> None:
    fields = dict(EXAMPLES[topic])
    for name in data.draw(st.lists(st.sampled_from([*fields, "unknown"]), max_size=2)):
        fields[name] = data.draw(st.sampled_from(WRONG))
    good = bytearray(json.dumps(fields, default=str).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(good)))
        good[at : at + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from(ODD))
    check(topic, [json.dumps(EXAMPLES[topic]).encode(), bytes(good)])


def test_reading_part_of_a_table(tmp_path: Path) -> None:
    write(tmp_path, "reviews", [row(5, REVIEW, 1), row(1, REVIEW, 0), row(0, REVIEW, 0)])
    url = str(tmp_path)
    assert archive.positions(url, "reviews") == {0: 2, 1: 6}
    assert archive.tables(url) == ["reviews"]
    one = archive.read(url, "reviews", partitions=[1], columns=["user_id"]).collect()
    assert one.to_dicts() == [{"user_id": "u-204"}]
    since = datetime.fromtimestamp((NOON + 1) / 1000, UTC)
    late = archive.read(url, "reviews", since=since).collect()
    assert late["kafka_offset"].to_list() == [1, 5]


def test_what_is_not_archived_yet_is_empty(tmp_path: Path) -> None:
    frame = archive.read(str(tmp_path / "none"), "reviews", columns=["rating"])
    assert frame.collect().schema == {"rating": pl.Float64}
    assert archive.tables(str(tmp_path / "none")) == []
    assert archive.positions(str(tmp_path / "none"), "journal") == {}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "overwritten": lambda file: file.write_bytes(
        file.read_bytes()[:4] + b"\xff" * 600 + file.read_bytes()[604:]
    ),
}
NOWHERE = {  # a store whose port nothing listens on, asked once
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_REGION": "x",
    "max_retries": "0",
}


def test_storage_that_does_not_answer_is_named() -> None:
    with pytest.raises(UnreachableError) as caught:
        archive.open_table("s3://bucket", "reviews", NOWHERE)
    message = str(caught.value)
    assert message.startswith("the archive at s3://bucket/reviews cannot be used: Generic S3 error")
    assert "STARCAST_ARCHIVE__URL" in message
    assert "\n" not in message
    assert "\x1b" not in message


@pytest.mark.parametrize("folder", ["plain", "with space"])  # either way of reading
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_data_file_that_cannot_be_read_is_told_with_its_table(
    tmp_path: Path, folder: str, damage: str
) -> None:
    url = tmp_path / folder
    write(url, "journal", [row(0, encode(make(3))[0])])
    for each in (url / "journal").glob("*.parquet"):
        DAMAGES[damage](each)
    where = re.escape(f"the archive at {url}/journal cannot be used: ")
    with pytest.raises(UnreachableError, match=where):
        archive.positions(str(url), "journal")
    with pytest.raises(UnreachableError, match=where):
        archive.journal(str(url), 0)


def test_a_journal_that_is_lost_while_it_is_read_is_told(tmp_path: Path) -> None:
    write(tmp_path, "journal", [row(0, encode(make(3))[0])])
    transactions = archive.journal(str(tmp_path), 0)
    for each in (tmp_path / "journal").glob("*.parquet"):
        each.unlink()
    with pytest.raises(UnreachableError, match="journal cannot be used"):
        next(transactions)


def test_a_transaction_of_which_the_archiver_has_committed_some_is_left_out(tmp_path: Path) -> None:
    first, last = encode(make(2_500))
    write(tmp_path, "journal", [row(0, encode(make(3))[0]), row(2, first)])
    assert [len(each.journal) for each in archive.journal(str(tmp_path), 0)] == [3]
    write(tmp_path, "journal", [row(3, last)])
    assert [len(each.journal) for each in archive.journal(str(tmp_path), 0)] == [3, 2_500]
    write(tmp_path, "journal", [row(5, last)])
    with pytest.raises(ContractError, match="part of a transaction is missing"):
        list(archive.journal(str(tmp_path), 0))


def test_the_journal_is_read_back_as_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "JOURNAL_CHUNK", 3)
    journals = [make(rows, seed=rows) for rows in (2_500, 1, 7, 1_700)]
    values = [value for journal in journals for value in encode(journal)]
    write(tmp_path, "journal", [row(10 + 2 * at, value) for at, value in enumerate(values)])
    write(tmp_path, "journal", [row(0, encode(make(3))[0], partition=1)])
    found = list(archive.journal(str(tmp_path), 0))
    for transaction, journal in zip(found, journals, strict=True):
        assert_same(transaction.journal, journal)
    assert found[0].first_offset == 10
    assert found[-1].last_offset == 10 + 2 * (len(values) - 1)
    later = archive.journal(str(tmp_path), 0, start=found[0].last_offset + 1)
    assert [len(transaction.journal) for transaction in later] == [1, 7, 1_700]
    frame = archive.read(str(tmp_path), "journal", partitions=[1]).collect()
    assert frame.select("rows", "first_step", "last_step").row(0) == (3, 77, 79)


@pytest.mark.parametrize(
    "time", [None, -2, 253_402_300_800_000, 1_795_521_600_000_000_000, 2**63 - 1]
)
def test_a_timestamp_that_no_reader_takes_is_none(time: int | None) -> None:
    """Producers set those of items and users; one of them counts in nanoseconds."""
    rows = [Row(0, 0, time, b"k", None), Row(0, 1, 253_402_300_799_999, b"k", None)]
    found = archive.table("items", rows)["kafka_timestamp"].to_pylist()
    assert found == [None, datetime(9999, 12, 31, 23, 59, 59, 999_000, UTC)]


def whole_numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where whole numbers stand in a record, however deep."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in inside:
            yield from whole_numbers(each, (*path, key))
    elif type(value) is int:
        yield path


@pytest.mark.parametrize("number", [2**63, 2**64 - 1])
@pytest.mark.parametrize(
    "topic", [each for each in TOPICS if any(whole_numbers(EXAMPLES.get(each.name)))]
)
def test_a_number_that_no_column_holds_is_no_number_of_the_contract(
    topic: Topic, number: int
) -> None:
    for *path, last in whole_numbers(EXAMPLES[topic.name]):
        changed = json.loads(json.dumps(EXAMPLES[topic.name]))
        inner = changed
        for key in path:
            inner = inner[key]
        inner[last] = number
        assert archive.table(topic.name, [Row(0, 0, 0, b"k", json.dumps(changed).encode())])


def test_damaged_journal_values_are_archived_raw() -> None:
    table = archive.table("journal", [row(0, b"no Arrow"), row(1, encode(make(0))[0])])
    assert table.select(["rows", "first_step"]).to_pydict() == {
        "rows": [None, 0],
        "first_step": [None, None],
    }


def test_columns_do_not_hide_each_other() -> None:
    for topic in TOPICS:
        names = archive.schema(topic.name).names
        assert len(names) == len(set(names))
