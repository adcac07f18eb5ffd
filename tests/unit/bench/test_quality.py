"""A part that is measured again takes the place of what was there, and no more."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from bench import quality, report
from bench.quality_page import page


def part(rate: int, **more: Any) -> dict[str, Any]:
    figures = {"events": 10, "users": 2, "items": 3, "events_per_second": rate, "peak_mb": 4}
    return {"figures": figures, "minutes": 0.1, **more}


def test_a_part_alone_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for module in (quality, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    ablated = {"Toys": {"figures": {"nothing": {"rmse": 0.5, "cost": None}}}}
    results = tmp_path / "quality.json"
    results.write_bytes(orjson.dumps({"ablations": ablated, "replay": part(1), "date": "old"}))
    made = tmp_path / "made" / "replay.json"
    made.parent.mkdir()
    made.write_bytes(orjson.dumps(part(7_000, date="2026-11-29")))

    assert quality.main(["--parts", "replay", "--folder", str(made.parent)]) == 0
    found = orjson.loads(results.read_bytes())
    assert found["ablations"] == ablated
    assert found["replay"] == part(7_000, date="2026-11-29")
    assert found["date"] != "old"
    told = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    assert "7,000 events/s" in told
    assert "What each part of the network is worth on Toys" in told


def figures(model: float, bias: float) -> dict[str, Any]:
    gap = {"mean": -0.1, "low": -0.2, "high": 0.1, "by_users": {"low": -0.3, "high": 0.4}}
    block = {"model": {"rmse": model}, "bias": {"rmse": bias, "model_minus_this": {"all": gap}}}
    gain = {"best_peer": "bias", "gain": 1 - model / bias}
    return {"rows": {"test": 20}, "rating": {"prequential": block}, "gain": gain}


def test_other_sets_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for module in (quality, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    (tmp_path / "Appliances_5.json.gz").touch()
    (tmp_path / "AMAZON_FASHION_5.json").touch()
    for name, found in (("appliances", figures(0.9, 1.0)), ("amazon-fashion", figures(1.08, 1.0))):
        part = {"figures": found, "minutes": 1}
        (tmp_path / f"others-{name}.json").write_bytes(orjson.dumps(part))

    places = ["--folder", str(tmp_path), "--others", str(tmp_path)]
    assert quality.main(["--parts", "others", *places]) == 0
    told = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    assert (
        "| Appliances | 20 | 0.9000 | bias 1.0000 | +10.00% | -0.1000 [-0.2000, +0.1000] "
        "| [-0.3000, +0.4000] |" in told
    )
    assert "Mean gain over the best peer: +1.00%." in told
    said = capsys.readouterr().err
    assert "All Beauty: left out" in said.replace("\n", " ")
    assert "Appliances: left out" not in said


def test_a_set_without_a_best_peer_has_no_gain() -> None:
    # No peer ran, or the best one made no error at all.
    alone = {"figures": figures(0.9, 1.0) | {"gain": None}}
    told = page({"others": {"Toys": alone}})
    assert "| Toys | 20 | 0.9000 |  |  |  |  |\n" in told
    assert "Mean gain" not in told
    told = page({"others": {"Toys": alone, "Games": {"figures": figures(0.9, 1.0)}}})
    assert "Mean gain over the best peer: +10.00%. " in told


def test_the_page_is_that_of_the_results() -> None:
    written = (Path(__file__).parents[3] / "docs" / "quality.md").read_text(encoding="utf-8")
    assert page(orjson.loads((report.RESULTS / "quality.json").read_bytes())) == written
