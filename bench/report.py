"""Where and with what a benchmark ran, and its figures as JSON."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import psutil
from rich.table import Column, Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What this machine is, and how busy it was."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[1], 1),
    }


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of installed packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write(name: str, figures: Mapping[str, Any], *packages: str) -> Path:
    """Write `bench/results/NAME.json`, all of it or nothing."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(*packages),
    }
    part = path.with_suffix(".part")
    part.write_bytes(orjson.dumps({**figures, **about}, option=orjson.OPT_INDENT_2) + b"\n")
    return part.replace(path)


def table(first: str, *numbers: str, **look: Any) -> Table:
    """A table whose columns but the first hold numbers."""
    return Table(first, *(Column(name, justify="right") for name in numbers), **look)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
