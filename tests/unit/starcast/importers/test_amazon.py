from pathlib import Path

import pytest

from starcast.importers import import_amazon
from tests.unit.starcast.importers.sets import (
    AMAZON_HEADER,
    AMAZON_ITEMS,
    json_lines,
    packed,
    read,
    values,
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


@pytest.mark.parametrize(
    "row",
    [
        "A3W4D8XOGLWUN5,B00000000{0},{0}.0,150000020{0}",
        "B00000000{0},A3W4D8XOGLWUN5,{0}.0,150000020{0}",
    ],
)
def test_files_of_ratings_alone_have_no_header(tmp_path: Path, row: str) -> None:
    """Of 2014 the user comes first, of 2018 the item."""
    source = packed(tmp_path / "ratings.csv", "".join(f"{row.format(stars)}\n" for stars in (1, 2)))
    assert import_amazon([source], tmp_path / "out.jsonl").counts == {"reviews": 2}
    low, high = values(read(tmp_path / "out.jsonl"), "reviews")
    assert (low["user_id"], low["item_id"], low["rating"]) == ("A3W4D8XOGLWUN5", "B000000001", 1.0)
    assert high["event_time"] == "2017-07-14T02:43:22.000Z"


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


def test_an_entity_of_more_digits_than_python_takes_is_no_letter(tmp_path: Path) -> None:
    item = {"asin": "A1", "title": f"Salt &#{'9' * 5_000}; &amp; pepper"}
    files = [
        packed(tmp_path / "meta.json", json_lines([item])),
        packed(tmp_path / "reviews.csv", AMAZON_2014),
    ]
    import_amazon(files, tmp_path / "out.jsonl")
    (found,) = values(read(tmp_path / "out.jsonl"), "items")
    assert found["title"] == "Salt \ufffd & pepper"


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


def test_an_event_of_a_time_that_cannot_be_takes_no_item_with_it(tmp_path: Path) -> None:
    """Items stand at their first event, those without one at the first of all."""
    never = {**AMAZON_2018[0], "unixReviewTime": 0}
    files = [
        packed(tmp_path / "meta.json", json_lines(AMAZON_ITEMS)),
        packed(tmp_path / "reviews.json", json_lines([never, *AMAZON_2018])),
    ]
    report = import_amazon(files, tmp_path / "out.jsonl")
    assert report.counts == {"items": 3, "reviews": 2}
    assert report.skipped["no time (unixReviewTime)"] == (1, f"{files[1]} line 1")


def test_stars_that_are_no_number_are_told(tmp_path: Path) -> None:
    rows = [{**AMAZON_2018[0], "overall": stars} for stars in ("4,5", "4.5", None, "")]
    source = packed(tmp_path / "reviews.json", json_lines(rows))
    report = import_amazon([source], tmp_path / "out.jsonl")
    assert report.skipped == {"stars that are no number, such as 4.5": (1, f"{source} line 1")}
    told = [each.get("rating") for each in values(read(tmp_path / "out.jsonl"), "reviews")]
    assert told == [4.5, None, None]


def test_a_half_of_a_character_is_a_line_that_is_left_out(tmp_path: Path) -> None:
    items = "{'asin': 'A2', 'title': 'Pepper'}\n{'asin': 'A1', 'title': 'Sal\\ud83dt'}\n"
    files = [
        packed(tmp_path / "meta.json", items),
        packed(tmp_path / "reviews.csv", AMAZON_2014),
    ]
    report = import_amazon(files, tmp_path / "out.jsonl")
    assert report.counts == {"items": 1, "reviews": 3}
    assert report.skipped == {"expected one JSON object a line": (1, f"{files[0]} line 2")}
