from pathlib import Path

import orjson
import pytest

from bench import report


def test_a_full_disk_leaves_the_figures_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = report.write("loop", {"ratio": 1})

    def fill(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fill)
        with pytest.raises(OSError, match="No space"):
            report.write("loop", {"ratio": 2})

    assert path == tmp_path / "loop.json"
    assert orjson.loads(path.read_bytes())["ratio"] == 1
    report.write("loop", {"ratio": 3})
    assert orjson.loads(path.read_bytes())["ratio"] == 3
    assert [each.name for each in tmp_path.iterdir()] == ["loop.json"]
