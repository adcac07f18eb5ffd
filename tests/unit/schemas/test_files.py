import gzip
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.examples import EXAMPLES
from schemas.exceptions import ContractError
from schemas.files import LineError, read_records, read_values, write_records
from schemas.records import Behavior, Review

REVIEW: dict[str, Any] = dict(EXAMPLES["reviews"])
EVENT: dict[str, Any] = dict(EXAMPLES["behavior"])


def line(topic: str, value: Any) -> str:
    return json.dumps({"topic": topic, "value": value})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_each_format_gives_back_what_was_written(tmp_path: Path, name: str) -> None:
    many = [("reviews", {**REVIEW, "event_id": f"e{i}"}) for i in range(2_500)]
    rows = [("items", EXAMPLES["items"]), *many, ("behavior", EVENT)]
    counts = write_records(tmp_path / name, rows)
    assert counts == {"items": 1, "reviews": 2_500, "behavior": 1}
    found = list(read_records(tmp_path / name))
    assert [record.topic for record in found] == [topic for topic, _ in rows]
    assert [record.line for record in found] == list(range(1, len(rows) + 1))
    assert isinstance(found[1].record, Review)
    assert isinstance(found[-1].record, Behavior)
    write_records(tmp_path / f"again-{name}", ((each.topic, each.record) for each in found))
    again = read_records(tmp_path / f"again-{name}")
    assert [each.record for each in again] == [each.record for each in found]


def test_the_content_tells_the_format(tmp_path: Path) -> None:
    write_records(tmp_path / "a.gz", [("reviews", REVIEW)])
    (tmp_path / "a.gz").rename(tmp_path / "a.json")
    assert len(list(read_values(tmp_path / "a.json"))) == 1


def test_zstandard_is_read_in_one_frame_or_several(tmp_path: Path) -> None:
    """As `zstd` packs a file, and as two packed files make one."""
    rows = [f"{line('reviews', {**REVIEW, 'event_id': f'e{at}'})}\n".encode() for at in range(9)]
    packed = [pa.compress(b"".join(some), "zstd", asbytes=True) for some in (rows[:5], rows[5:])]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(packed))
    assert [found.line for found in read_records(path)] == [*range(1, 10)]
    path.write_bytes(packed[0][:-9])
    with pytest.raises(ContractError, match="cannot be read"):
        list(read_records(path))


def test_values_are_keyed_and_not_validated(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = {**REVIEW, "rating": 9}
    path.write_text(
        f"{line('reviews', bad)}\n\n{line('items', EXAMPLES['items'])}\n{line('reviews', 7)}\n"
    )
    first, second, third = read_values(path)
    assert (first.key, json.loads(first.value), first.line) == (b"u-204", bad, 1)
    assert (second.key, second.line) == (b"i-31", 3)
    assert (third.key, third.value) == (None, b"7")


def test_parquet_may_hold_structs(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [
        {"topic": "reviews", "value": REVIEW},
        {"topic": "items", "value": EXAMPLES["items"]},
    ]
    pl.DataFrame(values, strict=False).write_parquet(tmp_path / "a.parquet")
    review, item = read_values(tmp_path / "a.parquet")
    assert json.loads(review.value) == REVIEW
    assert json.loads(item.value) == EXAMPLES["items"]


def parquet(path: Path, *values: Any) -> Path:
    table = pa.table({"topic": ["behavior"] * len(values), "value": pa.array(values)})
    pq.write_table(table, path)
    return path


def test_structs_may_hold_decimals_and_binary_text(tmp_path: Path) -> None:
    odd = {**EVENT, "user_id": EVENT["user_id"].encode(), "price": Decimal("19.90")}
    (found,) = read_records(parquet(tmp_path / "a.parquet", odd))
    assert found.record == Behavior.model_validate({**EVENT, "price": 19.9})
    (value,) = read_values(tmp_path / "a.parquet")
    assert value.key == EVENT["user_id"].encode()
    lists = parquet(tmp_path / "b.parquet", {"user_id": "u", "path": [b"a", b"b"]})
    assert json.loads(next(read_values(lists)).value)["path"] == ["a", "b"]


@pytest.mark.parametrize("depth", [300, 600, 1_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_value_too_deep_to_be_written_again_is_a_bad_line(
    tmp_path: Path, name: str, depth: int
) -> None:
    deep = json.dumps(EVENT)[:-1] + ', "odd": ' + "[" * depth + "]" * depth + "}"
    write_records(tmp_path / name, [("behavior", deep.encode()), ("behavior", EVENT)])
    errors: list[LineError] = []
    assert [found.line for found in read_values(tmp_path / name, errors.append)] == [2]
    assert [str(error) for error in errors] == [
        f"{tmp_path / name} line 1: no JSON can be made of its value: Recursion limit reached"
    ]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_structs_may_hold_times(tmp_path: Path, unit: str) -> None:
    time = pa.array([datetime(2026, 11, 24, 10, 15, tzinfo=UTC)], pa.timestamp(unit, "UTC"))
    fields = {name: pa.array([cell]) for name, cell in EVENT.items()} | {"event_time": time}
    value = pa.StructArray.from_arrays([*fields.values()], [*fields])
    pq.write_table(pa.table({"topic": ["behavior"], "value": value}), tmp_path / "a.parquet")
    (found,) = read_records(tmp_path / "a.parquet")
    assert found.record == Behavior.model_validate({**EVENT, "event_time": time[0].as_py()})


@pytest.mark.parametrize(
    "odd",
    [
        pa.array([10**12], pa.timestamp("s")),  # of a year that no calendar of Python has
        pa.array([0], pa.timestamp("us", "Nowhere/Else")),
        pa.array([b"\xff"]).view(pa.string()),
    ],
)
def test_a_cell_that_cannot_be_read_is_told_with_its_file(tmp_path: Path, odd: pa.Array) -> None:
    pq.write_table(pa.table({"topic": ["behavior"], "value": odd}), tmp_path / "a.parquet")
    with pytest.raises(ContractError, match=r"a\.parquet holds what Python has no value for: "):
        list(read_values(tmp_path / "a.parquet", lambda _: None))


@pytest.mark.parametrize("odd", [timedelta(seconds=1), b"\xff"])
def test_a_struct_that_has_no_json_is_a_bad_line(tmp_path: Path, odd: Any) -> None:
    path = parquet(tmp_path / "a.parquet", {"user_id": "u"}, {"user_id": "u", "price": odd})
    with pytest.raises(ContractError, match=r"a\.parquet line 2: .*no JSON"):
        list(read_values(path))
    errors: list[LineError] = []
    assert [each.line for each in read_values(path, errors.append)] == [1]
    assert [error.line for error in errors] == [2]


BAD = {
    "{": "not JSON",
    "[]": "expected a line such as",
    '{"topic": "reviews"}': "expected a line such as",
    line("rewiews", REVIEW): "unknown topic 'rewiews'; one of reviews, behavior",
    line("journal", "x"): "unknown topic 'journal'",
    '{"topic": 7, "value": {}}': "unknown topic '7'",
    line("reviews", {**REVIEW, "rating": 9}): "not a good record of reviews: rating: ",
    line("reviews", None): "not a good record of reviews: Input should be a JSON object",
    line("items", None): "not a good record of items: ",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_line_is_named_and_may_be_passed_over(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line('reviews', REVIEW)}\n{text}\n{line('behavior', EVENT)}\n")
    with pytest.raises(ContractError, match=r"a\.jsonl line 2: ") as caught:
        list(read_records(path))
    assert BAD[text] in str(caught.value)
    errors: list[LineError] = []
    found = list(read_records(path, errors.append))
    assert [error.line for error in errors] == [2]
    assert [each.line for each in found] == [1, 3]


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_may_be_written_as_windows_does(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "a.jsonl"
    written = f"\ufeff{line('reviews', REVIEW)}\r\n{line('behavior', EVENT)}\r\n".encode()
    path.write_bytes(gzip.compress(written) if packed else written)
    assert [each.line for each in read_records(path)] == [1, 2]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"nowhere\.jsonl cannot be read"):
        list(read_values(tmp_path / "nowhere.jsonl"))
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b"x" * 10_000)[:-20])
    with pytest.raises(ContractError, match=r"cut\.gz cannot be read"):
        list(read_values(cut))
    flipped = tmp_path / "flipped.gz"
    packed = bytearray(gzip.compress(line("reviews", REVIEW).encode()))
    packed[10] |= 0b110  # no block is of such a type
    flipped.write_bytes(packed)
    with pytest.raises(ContractError, match=r"flipped\.gz cannot be read"):
        list(read_values(flipped))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and nothing of Parquet")
    with pytest.raises(ContractError, match=r"broken\.parquet cannot be read"):
        list(read_values(broken))
    foreign = tmp_path / "foreign.parquet"
    pl.DataFrame({"user": [1]}).write_parquet(foreign)
    with pytest.raises(ContractError, match="has the columns user; a record file"):
        list(read_values(foreign))


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, [("reviews", REVIEW)])

    def broken() -> Any:
        yield "reviews", REVIEW
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert len(list(read_records(path))) == 1
    assert list(tmp_path.iterdir()) == [path]
