import sys
from pathlib import Path

import psutil
import pytest

from bench.processes import Worker
from schemas.exceptions import StarcastError
from streams.embedded import HOST, free_port, start_child


def test_a_worker_that_has_ended_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    program = "import sys, time; print('out of memory', flush=True); time.sleep(1); sys.exit(3)"
    address = f"{HOST}:{free_port()}"
    log = tmp_path / "scorer.log"
    command = [sys.executable, "-c", program]
    child = start_child("scorer", command, address, tmp_path, lambda: "memory" in log.read_text())
    worker = Worker(child, psutil.Process(child.process.pid))
    worker.check()
    child.process.wait(30)
    for ask in (worker.check, worker.metrics):
        with pytest.raises(StarcastError, match=r"scorer has ended \(exit code 3\)") as told:
            ask()
        assert "out of memory" in str(told.value)
        assert str(log) in str(told.value)
