from pathlib import Path

from starcast.importers import import_rees46
from tests.unit.starcast.importers.sets import REES46, packed, read, values


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
