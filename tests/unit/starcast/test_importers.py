"""Tiny made-up files in each public format; no row of a real data set stands here."""

import gzip
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from schemas.exceptions import ContractError
from schemas.files import read_records
from starcast.importers import (
    ImportReport,
    import_amazon,
    import_movielens,
    import_rees46,
    movielens,
    writing,
)

Importer = Callable[[Sequence[Path], Path], ImportReport]

AMAZON_HEADER = (
    "reviewerID,asin,reviewerName,helpful,reviewText,overall,summary,unixReviewTime,reviewTime"
)
AMAZON_2014 = f"""{AMAZON_HEADER}
U1,A1,Ann,"[0, 0]","Two
lines, one ""quote"" here",5.0,Fine,1000000200,"09 9, 2001"
U2,A2,,"[0, 0]",,3.0,,1000000100,"09 9, 2001"
U3,A1,Cy,"[0, 0]",Late,2.0,So so,1000000300,"09 9, 2001"
"""
AMAZON_2018 = [
    {"overall": 4.0, "reviewerID": "U1", "asin": "A1", "reviewText": "Good", "summary": "Yes",
     "unixReviewTime": 1500000200, "verified": True},
    {"overall": 1.0, "reviewerID": "U2", "asin": "A2", "unixReviewTime": 1500000100},
]  # fmt: skip
AMAZON_ITEMS = [
    {"asin": "A1", "title": "Salt &amp; <b>pepper</b>", "brand": "Ox", "price": "$1,025.00",
     "category": ["Home", "Kitchen", "x" * 300], "description": ["One.", "Two.<br>"]},
    {"asin": "A2", "title": "var x = getTime();", "brand": "", "price": ".a{color:red}",
     "category": [], "description": []},
    {"asin": "A1", "title": "Again"},
    {"asin": "A9", "title": "Never reviewed", "price": "$5.00 - $15.00"},
]  # fmt: skip
AMAZON_2023 = [
    {"rating": 5.0, "title": "Five Stars", "text": "Plays <br> well", "images": [], "asin": "V7",
     "parent_asin": "A1", "user_id": "U1", "timestamp": 1588687728923, "helpful_vote": 0,
     "verified_purchase": True},
    {"rating": 2.0, "title": "", "text": "", "images": [], "asin": "A2", "parent_asin": "A2",
     "user_id": "U2", "timestamp": 1588687700000, "helpful_vote": 0, "verified_purchase": True},
]  # fmt: skip
AMAZON_ITEMS_2023 = [
    {"main_category": "Home", "title": "Salt", "average_rating": 4.4, "rating_number": 9,
     "features": ["White"], "description": ["Fine."], "price": 19.99, "images": [], "store": "Ox",
     "categories": ["Home", "Kitchen"], "details": {"Brand": "Ox"}, "parent_asin": "A1"},
    {"main_category": "Home", "title": "Pepper", "price": "None", "store": None,
     "categories": [], "description": [], "parent_asin": "A2"},
]  # fmt: skip
REES46_HEADER = (
    "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session"
)
REES46 = f"""{REES46_HEADER}
2019-10-01 00:00:00 UTC,view,11,1,home.kitchen,ox,10.00,501,s-1
2019-10-01 00:00:05 UTC,cart,11,1,home.kitchen,ox,10.00,501,s-1
2019-10-01 00:00:07 UTC,view,12,2,,,0.00,502,
2019-10-01 00:00:07 UTC,purchase,11,1,home.kitchen,ox,9.50,501,s-1
2019-10-01 00:00:06 UTC,remove_from_cart,11,1,home.kitchen,ox,10.00,501,s-1
"""


def packed(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """Writes a text as the suffix of its path says."""
    data = text.encode(encoding)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/._x", b"\0")
            archive.writestr(path.stem, data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Topic and present fields of each record; every record keeps the contract."""
    return [
        (found.topic, found.record.model_dump(mode="json", exclude_none=True))
        for found in read_records(path)
    ]


def values(records: list[tuple[str, dict[str, Any]]], topic: str) -> list[dict[str, Any]]:
    return [value for name, value in records if name == topic]


def test_amazon_2023_with_items(tmp_path: Path) -> None:
    """A review names a variant; the item, which metadata describe, is its parent."""
    out = tmp_path / "out.jsonl"
    files = [
        packed(tmp_path / "Home.jsonl.gz", json_lines(AMAZON_2023)),
        packed(tmp_path / "meta_Home.jsonl.gz", json_lines(AMAZON_ITEMS_2023)),
    ]
    report = import_amazon(files, out)
    assert (report.counts, report.skipped) == ({"items": 2, "reviews": 2}, {})
    records = read(out)
    low, high = values(records, "reviews")
    assert (low["user_id"], low["item_id"], low["rating"]) == ("U2", "A2", 2.0)
    assert high["event_time"] == "2020-05-05T14:08:48.000Z"
    assert (high["item_id"], high["title"], high["text"]) == ("A1", "Five Stars", "Plays <br> well")
    bare, full = values(records, "items")
    assert bare.keys() == {"item_id", "event_time", "title"}
    assert full == {
        "item_id": "A1",
        "event_time": "2020-05-05T14:08:48.000Z",
        "title": "Salt",
        "brand": "Ox",
        "category": ["Home", "Kitchen"],
        "price": 19.99,
        "description": "Fine.",
    }


def test_amazon_2023_by_ratings_alone(tmp_path: Path) -> None:
    table = "user_id,parent_asin,rating,timestamp\nU1,A1,4.0,1588687728923\nU2,A1,1.0,soon\n"
    report = import_amazon([packed(tmp_path / "Home.csv.gz", table)], tmp_path / "out.jsonl")
    assert report.counts == {"reviews": 1}
    assert [count for count, _ in report.skipped.values()] == [1]
    (found,) = values(read(tmp_path / "out.jsonl"), "reviews")
    assert (found["item_id"], found["rating"]) == ("A1", 4.0)


@pytest.mark.parametrize("name", ["reviews.csv", "reviews.csv.gz", "reviews.csv.zip"])
def test_amazon_2014(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.jsonl"
    report = import_amazon([packed(tmp_path / name, AMAZON_2014)], out)
    assert (report.counts, report.skipped) == ({"reviews": 3}, {})
    first, second, third = values(read(out), "reviews")
    assert [first["user_id"], second["user_id"], third["user_id"]] == ["U2", "U1", "U3"]
    assert first.keys() == {"event_id", "user_id", "item_id", "event_time", "rating"}
    assert second["text"] == 'Two\nlines, one "quote" here'
    assert (second["title"], second["rating"], second["item_id"]) == ("Fine", 5.0, "A1")
    assert second["event_time"] == "2001-09-09T01:50:00.000Z"


def test_amazon_2018_with_items(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl.gz"
    files = [
        packed(tmp_path / "meta.json.gz", json_lines(AMAZON_ITEMS)),
        packed(tmp_path / "reviews.json.gz", json_lines(AMAZON_2018) + "{broken\n"),
    ]
    report = import_amazon(files, out)
    assert report.counts == {"items": 3, "reviews": 2}
    assert report.skipped == {
        "expected one JSON object a line": (1, f"{files[1]} line 3"),
        "item described twice": (1, f"{files[0]} line 3"),
    }
    records = read(out)
    order = [(topic, value["item_id"]) for topic, value in records]
    assert order == [
        ("items", "A2"), ("items", "A9"), ("reviews", "A2"), ("items", "A1"), ("reviews", "A1"),
    ]  # fmt: skip
    bare, never, full = values(records, "items")
    assert full == {
        "item_id": "A1",
        "event_time": "2017-07-14T02:43:20.000Z",
        "title": "Salt & pepper",
        "brand": "Ox",
        "category": ["Home", "Kitchen"],
        "price": 1025.0,
        "description": "One.\nTwo.",
    }
    assert bare.keys() == {"item_id", "event_time"}
    assert never["price"] == 5.0


@pytest.mark.parametrize(
    ("told", "category"),
    [
        ("'categories': [['Home', 'Kitchen'], ['Sale']]", ["Home", "Kitchen"]),
        ("'categories': [None]", None),
        ("'categories': {'a': 1}", None),
        ("'category': 5", None),
    ],
)
def test_amazon_items_of_2014_are_written_as_python_has_them(
    told: str, category: list[str] | None, tmp_path: Path
) -> None:
    files = [
        packed(tmp_path / "meta.json", f"{{'asin': 'A1', 'title': \"Ox's salt\", {told}}}\n{{'a\n"),
        packed(tmp_path / "reviews.csv", AMAZON_2014),
    ]
    report = import_amazon(files, tmp_path / "out.jsonl")
    assert [count for count, _ in report.skipped.values()] == [1]
    (found,) = values(read(tmp_path / "out.jsonl"), "items")
    assert found["title"] == "Ox's salt"
    assert found.get("category") == category


def test_rees46_with_items_as_they_change(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    report = import_rees46([packed(tmp_path / "log.csv.gz", REES46)], out)
    assert report.counts == {"items": 3, "behavior": 5}
    records = read(out)
    assert [topic for topic, _ in records] == [
        "items", "behavior", "behavior", "behavior", "items", "behavior", "items", "behavior",
    ]  # fmt: skip
    actions = [value["action"] for value in values(records, "behavior")]
    assert actions == ["view", "cart", "remove_from_cart", "view", "purchase"]
    first, bare, dearer = values(records, "items")
    assert first == {
        "item_id": "11",
        "event_time": "2019-10-01T00:00:00.000Z",
        "brand": "ox",
        "category": ["home", "kitchen"],
        "price": 10.0,
    }
    assert bare == {"item_id": "12", "event_time": "2019-10-01T00:00:07.000Z", "price": 0.0}
    assert (dearer["item_id"], dearer["price"]) == ("11", 9.5)
    event = values(records, "behavior")[0]
    assert (event["user_id"], event["session_id"], event["price"]) == ("501", "s-1", 10.0)
    assert "session_id" not in values(records, "behavior")[3]


U_DATA = "1\t10\t3\t881250949\n2\t20\t5\t881250900\n1\t20\t4\t881250999\n"
FLAGS = "|".join("1" if name in ("Comedy", "Drama") else "0" for name in movielens.GENRES)
U_ITEM = f"10|Caf\u00e9 (1995)|01-Jan-1995||url|{FLAGS}\n20|Void (1996)|||url|{'0|' * 18}0\n"
U_USER = "1|24|M|technician|85711\n2|53|F|other|94043\n"
MOVIELENS: dict[str, dict[str, str]] = {
    "100k": {"u.data": U_DATA, "u.item": U_ITEM, "u.user": U_USER},
    "1m": {
        "ratings.dat": U_DATA.replace("\t", "::"),
        "movies.dat": "10::Caf\u00e9 (1995)::Comedy|Drama\n20::Void (1996)::\n",
        "users.dat": "1::M::24::10::48067\n2::F::53::16::70072\n",
    },
    "recbole": {
        "ml.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + U_DATA,
        "ml.item": (
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "10\tCaf\u00e9 (1995)\t1995\tComedy Drama\n20\tVoid (1996)\t1996\t\n"
        ),
        "ml.user": (
            "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
            + U_USER.replace("|", "\t")
        ),
    },
    "latest": {
        "ratings.csv": "userId,movieId,rating,timestamp\n" + U_DATA.replace("\t", ","),
        "movies.csv": (
            'movieId,title,genres\n10,"Caf\u00e9 (1995)",Comedy|Drama\n'
            "20,Void (1996),(no genres listed)\n"
        ),
    },
}
LATIN = ("u.item", "movies.dat")


def movielens_files(folder: Path, texts: dict[str, str]) -> list[Path]:
    return [
        packed(folder / name, text, "latin-1" if name in LATIN else "utf-8")
        for name, text in texts.items()
    ]


@pytest.mark.parametrize("kind", MOVIELENS)
@pytest.mark.parametrize("zipped", [False, True])
def test_movielens(tmp_path: Path, kind: str, zipped: bool) -> None:
    files = movielens_files(tmp_path, MOVIELENS[kind])
    if zipped:
        whole = tmp_path / f"ml-{kind}.zip"
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr(f"ml-{kind}/README", "About this set.")
            for file in files:
                archive.write(file, f"ml-{kind}/{file.name}")
        files = [whole]
    out = tmp_path / "out.jsonl"
    report = import_movielens(files, out)
    users = 0 if kind == "latest" else 2
    assert {"users": 0, **report.counts} == {"items": 2, "users": users, "reviews": 3}
    records = read(out)
    seen: set[str] = set()
    for topic, value in records:
        if topic == "reviews":
            assert value["item_id"] in seen
            assert users == 0 or value["user_id"] in seen
        seen.add(value["user_id" if topic == "users" else "item_id"])
    ratings = [(v["user_id"], v["item_id"], v["rating"]) for v in values(records, "reviews")]
    assert ratings == [("2", "20", 5.0), ("1", "10", 3.0), ("1", "20", 4.0)]
    items = {value["item_id"]: value for value in values(records, "items")}
    assert items["10"]["title"] == "Caf\u00e9 (1995)"
    assert items["10"]["category"] == ["Comedy", "Drama"]
    assert "category" not in items["20"]
    if users:
        people = {value["user_id"]: value for value in values(records, "users")}
        assert (people["1"]["gender"], people["1"]["age"]) == ("M", 24.0)


def test_a_second_import_gives_the_same_ids(tmp_path: Path) -> None:
    source = packed(tmp_path / "log.csv", REES46)
    for name in ("a.jsonl", "b.jsonl"):
        import_rees46([source], tmp_path / name)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    ids = [value["event_id"] for value in values(read(tmp_path / "a.jsonl"), "behavior")]
    assert len(set(ids)) == 5
    doubled = packed(tmp_path / "doubled.csv", REES46 + REES46.splitlines()[1] + "\n")
    import_rees46([doubled], tmp_path / "c.jsonl")
    ids = [value["event_id"] for value in values(read(tmp_path / "c.jsonl"), "behavior")]
    assert len(set(ids)) == 6  # the line number tells equal rows apart


@pytest.mark.parametrize("run", [1, 2, 3])
def test_long_sets_are_sorted_in_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int
) -> None:
    cases: list[tuple[Importer, list[Path]]] = [
        (import_rees46, [packed(tmp_path / "log.csv", REES46)]),
        (import_movielens, movielens_files(tmp_path, MOVIELENS["100k"])),
    ]
    for importer, files in cases:
        importer(files, tmp_path / "whole.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr(writing, "RUN", run)
            importer(files, tmp_path / "runs.jsonl")
        assert (tmp_path / "runs.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".import-*"))


def test_lines_that_break_the_contract_are_counted_with_their_place(tmp_path: Path) -> None:
    bad = (
        "2019-10-01 00:00:09 UTC,stare,11,1,,,1.00,501,s\n"
        "yesterday,view,11,1,,,1.00,501,s\n"
        "2019-10-01 00:00:09 UTC,stare,11,1,,,1.00,502,s\n"
        "2019-10-01 00:00:09 UTC,view,11\n"
    )
    source = packed(tmp_path / "log.csv", REES46 + bad)
    report = import_rees46([source], tmp_path / "out.jsonl")
    assert report.counts["behavior"] == 5
    found = {reason.split(":")[0]: value for reason, value in report.skipped.items()}
    assert found == {
        "behavior action": (2, f"{source} line 7"),
        "behavior event_time": (1, f"{source} line 8"),
        "behavior user_id": (1, f"{source} line 10"),
        "items event_time": (1, f"{source} line 8"),
    }


def test_lines_of_a_wrong_width_and_without_time_are_counted(tmp_path: Path) -> None:
    source = packed(tmp_path / "u.data", U_DATA + "1\t2\n1\t10\t3\tnever\n")
    report = import_movielens([source], tmp_path / "out.jsonl")
    assert report.skipped == {
        "expected 4 fields separated by '\\t'": (1, f"{source} line 4"),
        "no time": (1, f"{source} line 5"),
    }


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
        (import_movielens, "u.item", U_ITEM, "no file holds ratings; give u.data"),
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
