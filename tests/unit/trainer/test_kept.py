"""A result that is there is not made again."""

from pathlib import Path

import numpy as np
import pytest

from trainer.kept import Kept


def test_parts_are_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        return {"a": np.arange(3), "b": np.array("text")}

    kept = Kept(tmp_path / "folder")
    first, second = kept.get("part", make), Kept(tmp_path / "folder").get("part", make)
    assert made == [1]
    assert first["a"].tolist() == second["a"].tolist()
    assert str(second["b"]) == "text"


@pytest.mark.parametrize("left", [0, 1, 100, -30])
def test_a_damaged_part_is_made_anew(
    left: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(tmp_path)
    kept.get("part", lambda: {"a": np.arange(300)})
    path = tmp_path / "part.npz"
    path.write_bytes(path.read_bytes()[:left])
    for _ in range(2):
        assert kept.get("part", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
    assert caplog.text.count("is damaged") == 1


def test_two_processes_may_make_a_part_at_once(tmp_path: Path) -> None:
    def make() -> dict[str, np.ndarray]:
        Kept(tmp_path).get("part", lambda: {"a": np.arange(3)})
        return {"a": np.arange(3)}

    assert Kept(tmp_path).get("part", make)["a"].tolist() == [0, 1, 2]
    assert [each.name for each in tmp_path.iterdir()] == ["part.npz"]
