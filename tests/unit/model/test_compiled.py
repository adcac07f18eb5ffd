"""Machine code that is kept is that of the sources as they are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from model import compiled

LOOP = """
from model.compiled import compiled
from model.numbers import STEP, twice

@compiled
def loop(number):
    return twice(number) + STEP
"""
NUMBERS = """
from model.compiled import compiled
STEP = {}

@compiled
def twice(number):
    return {} * number
"""


def test_loops_follow_what_they_call_and_read_in_other_files(tmp_path: Path) -> None:
    package = tmp_path / "model"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(compiled.__file__, package)
    (package / "loops.py").write_text(LOOP, "utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run() -> tuple[str, set[str]]:
        command = [sys.executable, "-c", "from model.loops import loop; print(loop(10))"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout, {each.name for each in package.rglob("*.nbc")}

    (package / "numbers.py").write_text(NUMBERS.format(1, 2), "utf-8")
    first, kept = run()
    assert (first, len(kept)) == ("21\n", 2)
    assert run() == (first, kept)
    (package / "numbers.py").write_text(NUMBERS.format(5, 3), "utf-8")
    assert run()[0] == "35\n"
