import zipfile
from pathlib import Path

import pytest

from schemas.exceptions import ContractError
from starcast.importers import import_movielens
from tests.unit.starcast.importers.sets import (
    MOVIELENS,
    U_DATA,
    movielens_files,
    packed,
    read,
    values,
)


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


def test_half_stars_are_kept(tmp_path: Path) -> None:
    """As those of latest and 10M; the least, which the contract does not have, is its least."""
    stars = ("4.5", "0.5", "0.5", "0")
    rows = "".join(f"1,{movie},{each},88125090{movie}\n" for movie, each in enumerate(stars))
    source = packed(tmp_path / "ratings.csv", f"userId,movieId,rating,timestamp\n{rows}")
    report = import_movielens([source], out := tmp_path / "out.jsonl")
    assert [value["rating"] for value in values(read(out), "reviews")] == [4.5, 1.0, 1.0]
    assert report.changed == {"1, which were half a star": (2, f"{source} line 3")}
    (left_out,) = report.skipped
    assert left_out.startswith("reviews rating: Input should be greater than or equal to 1")


def test_stars_of_another_scale_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"1,{stars},{stars},88125090{stars}\n" for stars in range(3, 10))
    source = packed(tmp_path / "ratings.csv", f"userId,movieId,rating,timestamp\n{rows}")
    with pytest.raises(ContractError, match=r"4 of 7 records .*line 5: reviews rating: .*to 5"):
        import_movielens([source], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_may_be_given_whole(tmp_path: Path) -> None:
    files = movielens_files(tmp_path, MOVIELENS["latest"])
    files.append(packed(tmp_path / "tags.csv", "userId,movieId,tag,timestamp\n1,10,odd,88125090\n"))
    assert import_movielens(files, tmp_path / "out.jsonl").skipped == {}


def test_titles_of_10m_are_utf8(tmp_path: Path) -> None:
    """Those of 1M are Latin-1, in a file of the same name."""
    texts = MOVIELENS["1m"]
    files = [packed(tmp_path / name, text) for name, text in texts.items()]
    import_movielens(files, out := tmp_path / "out.jsonl")
    assert "Caf\u00e9 (1995)" in [value["title"] for value in values(read(out), "items")]


def test_stars_that_are_no_number_are_told(tmp_path: Path) -> None:
    source = packed(
        tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,9e8\n1,3,x,9e8\n"
    )
    report = import_movielens([source], tmp_path / "out.jsonl")
    assert report.counts["reviews"] == 1
    assert report.skipped == {"stars that are no number, such as 4.5": (1, f"{source} line 3")}


def test_lines_of_a_wrong_width_and_without_time_are_counted(tmp_path: Path) -> None:
    source = packed(tmp_path / "u.data", U_DATA + "1\t2\n1\t10\t3\tnever\n")
    report = import_movielens([source], tmp_path / "out.jsonl")
    assert report.skipped == {
        "expected 4 fields separated by '\\t'": (1, f"{source} line 4"),
        "no time": (1, f"{source} line 5"),
    }
