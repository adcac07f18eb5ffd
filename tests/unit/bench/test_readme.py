"""Commands that `bench/README.md` prints are ones that the benchmarks take."""

import re
import shlex
from pathlib import Path

import pytest

from bench import latency, loop, quality, scale, soak, text, train

README = (Path(__file__).parents[3] / "bench" / "README.md").read_text(encoding="utf-8")
READERS = {
    module.__name__.removeprefix("bench."): module.read_options
    for module in (latency, loop, quality, scale, soak, text, train)
}
COMMANDS = [
    *re.findall(r"`(?:OMP_NUM_THREADS=1 )?python -m bench\.(\w+) ([^`]*)`", README),
    *re.findall(r"`make (?:bench-)?(\w+) ARGS=\"([^`]*)\"`", README),
]


@pytest.mark.parametrize(("name", "options"), COMMANDS)
def test_a_command_has_options_that_there_are(name: str, options: str) -> None:
    READERS[name](shlex.split(options))


def test_there_are_commands() -> None:
    assert {name for name, _ in COMMANDS} >= {"latency", "loop", "quality", "scale", "text"}


def test_a_run_of_the_loop_is_long_enough_to_be_measured() -> None:
    for refused in (["--rounds", "0"], ["--events", "7999", "--batch", "2000"]):
        with pytest.raises(SystemExit):
            loop.read_options(refused)
    assert loop.read_options(["--events", "8000", "--batch", "2000"])[0].events == 8_000
