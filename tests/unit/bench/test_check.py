"""`make bench-check` on figures written by hand."""

from pathlib import Path

import orjson
import pytest

from bench import check
from bench.check import Ratio, fallen


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


def test_the_baseline_names_ratios_that_the_benchmarks_wrote() -> None:
    baseline = orjson.loads(check.BASELINE.read_bytes())
    for name, benchmark in baseline.items():
        figures = orjson.loads((check.RESULTS / f"{name}.json").read_bytes())
        assert benchmark["ratios"].keys() <= figures.keys()
        assert all(each.startswith(("ratio", "share")) for each in benchmark["ratios"])
