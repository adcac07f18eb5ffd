"""A server as a process that can be ended in any way and started again where it was."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.embedded import Child, start_child
from tests.servers import ServerError

SHUTDOWN_SECONDS = 30.0  # a broker hands its partitions over before it ends


@dataclass
class Server:
    """A process that can be ended in any way and started again where it was."""

    name: str
    command: Sequence[str]
    address: str
    folder: Path
    ready: Callable[[], bool]
    seconds: float
    child: Child | None = None

    @property
    def pid(self) -> int:
        assert self.child is not None
        return self.child.process.pid

    @property
    def dead(self) -> bool:
        """Whether it was started, and runs no more."""
        return self.child is not None and not self.child.alive()

    def start(self, wait: bool = True) -> None:
        """Start it, and wait until it answers."""
        self.child = start_child(
            self.name,
            self.command,
            self.address,
            self.folder,
            self.ready if wait else lambda: True,
            self.seconds,
            SHUTDOWN_SECONDS,
        )

    def kill(self) -> None:
        """As a power cut does."""
        assert self.child is not None
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.child.process.wait()

    def stop(self) -> None:
        """As an operator does."""
        if self.child is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self.child.stop()


def until(done: Callable[[], Any], seconds: float, pause: float = 0.1) -> None:
    """Wait until something is so; raises ServerError when it does not come."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise ServerError(f"waited {seconds:.0f} s in vain ({done.__qualname__})")
        time.sleep(pause)
