"""`make setup` finds a Python that serves, and says what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("python3.11", "python3.12", "python3")


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout in which no Python runs, as with shims of pyenv for versions not in force."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "requirements.txt").write_text("uv==1\n")
    (tmp_path / "pyproject.toml").touch()
    for name in NAMES:
        program(tmp_path / "bin" / name, "exit 127")
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{folder / 'bin'}:{os.defpath}"}
    return subprocess.run(
        ["make", "-C", str(folder), *arguments], capture_output=True, text=True, env=environment
    )


def test_a_python_that_does_not_run_is_passed_over(folder: Path) -> None:
    program(folder / "bin" / "python3", f'exec "{sys.executable}" "$@"')
    told = make(folder, "--silent", "--eval=told: ; @echo $(PYTHON)", "told")
    assert told.stdout.split() == ["python3"]


def test_a_python_of_another_version_is_told_before_anything_is_made(folder: Path) -> None:
    program(folder / "bin" / "python3.13", "exit 1")
    for named in ((), ("PYTHON=python3.13",)):
        done = make(folder, "setup", *named)
        assert done.returncode != 0
        assert "needs Python 3.11 or 3.12 with venv" in done.stderr
        assert not (folder / ".venv").exists()


def test_an_environment_without_pip_is_made_anew(folder: Path) -> None:
    # As Debian leaves one behind where python3-venv is missing.
    program(folder / ".venv" / "bin" / "python", "exit 1")
    program(folder / "bin" / "python3", f'echo "$@" >> "{folder / "asked"}"')
    make(folder, "setup")
    assert "-m venv --clear .venv" in (folder / "asked").read_text()
