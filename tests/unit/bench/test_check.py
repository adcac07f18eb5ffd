"""`make bench-check` on figures written by hand."""

import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench import check
from bench.check import Ratio, fallen
from schemas.exceptions import StarcastError


def test_a_ratio_may_fall_by_its_noise_and_no_more() -> None:
    baseline = {"ratio_a": Ratio.model_validate({"is": 2.0, "noise": 0.1})}
    assert fallen(baseline, {"ratio_a": 1.8}) == []
    assert fallen(baseline, {"ratio_a": 5.0}) == []
    assert fallen(baseline, {"ratio_a": 1.79}) == ["ratio_a"]
    assert fallen(baseline, {}) == ["ratio_a"]
    assert fallen(baseline, {"ratio_a": float("nan")}) == ["ratio_a"]


@pytest.mark.parametrize(("found", "code"), [(0.36, 0), (0.2, 1)])
def test_the_command_fails_when_a_ratio_has_fallen(
    found: float,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    baseline = {"loop": {"arguments": [], "ratios": {"ratio_b": {"is": 0.4, "noise": 0.2}}}}
    (tmp_path / "baseline.json").write_bytes(orjson.dumps(baseline))
    (tmp_path / "loop.json").write_bytes(orjson.dumps({"ratio_b": found}))
    monkeypatch.setattr(check, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    assert check.main(["--as-is"]) == code
    assert ("fallen" if code else "holds") in capsys.readouterr().out


@pytest.mark.parametrize("other", ["text-gpu", "text"])
def test_figures_that_a_run_did_not_write_are_not_compared(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a machine with a GPU the encoder's figures go into another file.
    (tmp_path / "text.json").write_bytes(b'{"ratio_a": 2.0}')
    ran: list[list[str]] = []

    def write(command: list[str], **_: Any) -> None:
        ran.append(command[1:])
        (tmp_path / "text.json.part").write_bytes(b'{"ratio_a": 0.1}')
        (tmp_path / "text.json.part").replace(tmp_path / f"{other}.json")

    monkeypatch.setattr(check, "RESULTS", tmp_path)
    monkeypatch.setattr(subprocess, "run", write)
    if other == "text":
        assert check.run("text", ["--rounds", "1"]) == {"ratio_a": 0.1}
    else:
        with pytest.raises(StarcastError, match="did not write"):
            check.run("text", ["--rounds", "1"])
    assert ran == [["-m", "bench.text", "--rounds", "1"]]
    # Those of the last run are there as before.
    assert orjson.loads((tmp_path / "text.json").read_bytes()) == {"ratio_a": 2.0}
    assert not (tmp_path / "text.kept").exists()


def test_the_baseline_names_ratios_that_the_benchmarks_wrote() -> None:
    baseline = orjson.loads(check.BASELINE.read_bytes())
    for name, benchmark in baseline.items():
        figures = orjson.loads((check.RESULTS / f"{name}.json").read_bytes())
        assert benchmark["ratios"].keys() <= figures.keys()
        assert all(each.startswith(("ratio", "share")) for each in benchmark["ratios"])
