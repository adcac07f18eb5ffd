import gzip
from pathlib import Path

import pytest

from schemas.exceptions import ContractError
from starcast.importers import import_amazon, import_movielens, import_rees46
from starcast.importers.reading import json_object
from tests.unit.starcast.importers.sets import (
    AMAZON_HEADER,
    AMAZON_ITEMS,
    REES46,
    U_ITEM,
    Importer,
    json_lines,
    packed,
)


@pytest.mark.parametrize(
    ("importer", "name", "text", "message"),
    [
        (import_amazon, "a.csv", "user,item\n1,2\n", r"a\.csv line 1: .*asin.*begins 'user,item'"),
        (import_amazon, "a.json", '{"id": 1}\n', r"a\.json line 1: not a file of this data set"),
        (import_amazon, "a.json", json_lines(AMAZON_ITEMS), "no file holds reviews"),
        (import_amazon, "a.csv", "", r"a\.csv line 1: "),
        (import_amazon, "a.csv", AMAZON_HEADER, "no line gave a record"),
        (import_amazon, "a.csv", f'{AMAZON_HEADER}\nU,"{"x" * 140_000}', "line 2: expected a CSV"),
        (import_rees46, "a.csv", "x,y\n", r"a\.csv line 1: .*columns event_time, event_type"),
        (import_movielens, "u.item", U_ITEM, "no file holds ratings .*; give u.data"),
        # As what another program has packed.
        (
            import_rees46,
            "a.csv.xz",
            "\xfd7zXZ\0a\rb",
            r"a\.csv\.xz line 1: not a file of this data set",
        ),
        (import_amazon, "a.csv", "x" * 140_000, r"a\.csv line 1: not a file of this data set"),
        (import_movielens, "notes.txt", "hello", r"notes\.txt line 1: .*expected u\.data"),
    ],
)
def test_what_is_not_of_the_set_is_named(
    tmp_path: Path, importer: Importer, name: str, text: str, message: str
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(ContractError, match=message):
        importer([packed(tmp_path / name, text)], out)
    assert not out.exists()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(ContractError, match=r"nowhere\.csv cannot be read"):
        import_amazon([tmp_path / "nowhere.csv"], out)
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(REES46.encode() * 200, mtime=0)[:-30])
    with pytest.raises(ContractError, match=r"cut\.csv\.gz cannot be read"):
        import_rees46([cut], out)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ContractError, match=r"broken\.zip cannot be read"):
        import_movielens([broken], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("places", "value", "reason"),
    [((8, 10), 9, "compression method"), ((6, 8), 1, "encrypted")],  # 9: as Windows packs 4 GB
)
def test_a_zip_that_python_cannot_unpack_is_named(
    tmp_path: Path, places: tuple[int, int], value: int, reason: str
) -> None:
    path = packed(tmp_path / "log.csv.zip", REES46)
    data = bytearray(path.read_bytes())
    for head, place in zip((b"PK\3\4", b"PK\1\2"), places, strict=True):
        data[data.rindex(head) + place] = value
    path.write_bytes(data)
    with pytest.raises(ContractError, match=rf"log\.csv cannot be read: .*{reason}"):
        import_rees46([path], tmp_path / "out.jsonl")


def test_a_line_that_is_nested_too_deep_is_no_object() -> None:
    """Its id could not be made, and nobody could write it again."""
    assert json_object(f'{{"a": {"[" * 200}{"]" * 200}}}') is not None
    for opens, closes in (("[", "]"), ('{"a":', "}")):
        assert json_object(f'{{"a": {opens * 253}1{closes * 253}}}') is None
    assert json_object(f'{{"text": "{"[" * 300}"}}') is not None
