"""Where a process spends its time: a flame graph that py-spy records from beside it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from schemas.exceptions import StarcastError

SAMPLES = 100  # a second; each stops the process for a moment
WAIT_SECONDS = 60.0  # a recorder that does not end would hang the benchmark
_TITLE = re.compile(r'(<text id="title"[^>]*>)[^<]*(</text>)')  # it names folders of this machine


@contextmanager
def recorded(path: Path | None, title: str) -> Generator[None]:
    """Record this process while the context is open; without a path do nothing.

    Only threads that have the processor are counted. Raises StarcastError when it recorded nothing.
    """
    if path is None:
        yield
        return
    spy = Path(sys.executable).with_name("py-spy")
    options = ["--rate", str(SAMPLES), "--format", "flamegraph"]
    recorder = subprocess.Popen(
        [spy, "record", *options, "--output", path, "--pid", str(os.getpid())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield
    finally:
        recorder.send_signal(signal.SIGINT)
        _, said = recorder.communicate(timeout=WAIT_SECONDS)
    if not path.exists():
        raise StarcastError(f"py-spy recorded nothing: {said.decode()[-500:]}")
    path.write_text(_TITLE.sub(rf"\g<1>{title}\g<2>", path.read_text()))
