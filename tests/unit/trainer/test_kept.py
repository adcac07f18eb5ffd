"""A result that is there is not made again."""

from pathlib import Path

import numpy as np

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
