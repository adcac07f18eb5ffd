"""Parts of several runs lie in one file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench import report, scale


def test_each_part_says_which_machine_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [{"size": size, "cpu_us_per_event": 10.0 * size, "worker_us": 1.0} for size in (1, 2)]
    beside = [each | {"bare_us": 8.0} for each in points]
    there = {"date": "2026-01-01", "machine": {"processor": "another"}, "points": beside}
    (tmp_path / "scale.json").write_bytes(orjson.dumps({"parts": {"partitions": there}}))

    def measured(*_: Any) -> Iterator[tuple[str, Any]]:
        ratios = [{"ratio": 1.5 * each["size"], **each} for each in points]
        yield "items", {"points": ratios}

    for module in (report, scale):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(scale, "measure", measured)
    assert scale.main(["--parts", "items"]) == 0

    found = orjson.loads((tmp_path / "scale.json").read_bytes())
    assert found["parts"]["partitions"] == there
    assert found["parts"]["items"]["machine"]["processor"] == found["machine"]["processor"]
    assert (found["ratio_items_2"], found["ratio_partitions_2"]) == (3.0, 2.0)
    to_bare = [found[f"ratio_to_bare_partitions_{size}"] for size in (1, 2)]
    assert to_bare == [1.25, 2.5]
