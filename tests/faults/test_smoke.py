"""A short run of the harness: some of every kind of harm, and nothing lost, doubled or wrong."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.faults import report
from tests.faults.run import Load, run
from tests.faults.schedule import load, make_schedule, save
from tests.faults.servers import Servers

SEED = 20_261_124
KINDS = (
    "killed while scoring",
    "killed inside commit",
    "killed with offsets noted",
    "killed after commit",
    "killed inside state write",
    "zombie before state write",
    "overrun with a batch in hand",
    "store failover, writes lost",
    "store emptied",
    "store link cut",
    "broker killed",
    "archiver killed",
    "bundle damaged",
    "users forgotten",
)


@pytest.mark.alone
@pytest.mark.timeout(600)
def test_a_short_run_is_clean(faulty_servers: Servers, tmp_path: Path) -> None:
    schedule = make_schedule(SEED, ["a", "b"], 1, KINDS, alone=False)
    save(schedule, tmp_path / "schedule.json")
    assert load(tmp_path / "schedule.json") == schedule
    result = run(faulty_servers, schedule, Load(("a", "b"), 12_000, 500, 90), tmp_path, say=print)
    report.show(result, Console())
    assert result.clean
    assert result.events >= 24_000
    assert len(result.injected) == len(KINDS)
    assert faulty_servers.kafka.end_hanging() == 0
