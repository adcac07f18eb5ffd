"""A benchmark that is stopped, and one that lacks something."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.command import exit_code
from schemas.exceptions import StarcastError

BENCHMARK = """
import sys, tempfile, time
from bench.command import exit_code

def main():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as name:
        print(name, flush=True)
        time.sleep(600)

sys.exit(exit_code(main))
"""


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_stopped_leaves_no_folder(
    ending: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", BENCHMARK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip())
        assert folder.exists()
        process.send_signal(ending)
        assert process.wait(60) == 130
    assert not folder.exists()


def test_what_is_wrong_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise StarcastError("There is no Kafka.")

    assert exit_code(main) == 1
    assert capsys.readouterr().err == "There is no Kafka.\n"
    assert exit_code(lambda: 3) == 3
