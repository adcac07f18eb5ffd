"""Each protection switched off: the harness finds the damage that it prevents.

Minutes long, so `make protections` runs it, not `make test`.
"""

from pathlib import Path

import pytest

from streams.sender import TRANSACTION_SECONDS
from tests.faults.kinds import workers
from tests.faults.run import Load, run
from tests.faults.schedule import make_schedule
from tests.faults.servers import Servers
from tests.faults.world import OVERRUN_SECONDS

DAMAGE = {
    "guard": ("overrun with a batch in hand", {"duplicated"}),
    "fence": ("zombie inside state write", {"user states recounted"}),
    "count": ("store went back", {"user states recounted"}),
    "order": ("killed before commit", {"settled"}),
    "recovery": ("killed after commit", {"user states recounted"}),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("protection", DAMAGE)
def test_without_a_protection_there_is_damage(
    protection: str, faulty_servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, expected = DAMAGE[protection]
    # A zombie that wakes at once writes what the new owner has just recovered: the same.
    monkeypatch.setattr(workers, "ZOMBIE_SECONDS", (15.0, 18.0))
    # Another owner has to commit before the overrun ends, and can once Kafka has ended the open
    # transaction. A static member keeps its partitions meanwhile: then nobody doubles them.
    monkeypatch.setattr(workers, "OVERRUN", OVERRUN_SECONDS + TRANSACTION_SECONDS + 5)
    # Kills are over in a second: of six, some meet a worker that has long settled in.
    shop = f"{'b' if protection == 'guard' else 'a'}-{protection}"
    result = run(
        faulty_servers,
        make_schedule(1, [shop], 6 if kind.startswith("killed") else 2, [kind], alone=False),
        Load((shop,), 24_000, 500, 300),  # so many that events still come when a zombie wakes
        tmp_path,
        say=print,
        switched_off=(protection,),
        settled_seconds=30,
    )
    print(result.verdicts[shop])
    assert result.injected[kind]
    assert not result.clean
    assert expected <= set(result.verdicts[shop].wrong)
