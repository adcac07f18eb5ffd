import resource
from itertools import count, islice
from pathlib import Path

import pytest

from starcast.importers import import_movielens, import_rees46, writing
from tests.unit.starcast.importers.sets import MOVIELENS, REES46, Importer, movielens_files, packed


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


def test_a_set_of_more_runs_than_files_may_be_open_is_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"1\t{at}\t3\t{881250000 - at * 7 % 401}" for at in range(400)]
    source = packed(tmp_path / "u.data", "\n".join(rows))
    import_movielens([source], tmp_path / "whole.jsonl")
    monkeypatch.setattr(writing, "RUN", 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Far below the number of runs: of the numbers below the limit so many are free by now.
    taken = {int(each.name) for each in Path("/dev/fd").iterdir()}
    free = (number for number in count() if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, 200, None)), limits[1]))
    try:
        import_movielens([source], tmp_path / "runs.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (tmp_path / "runs.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


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
