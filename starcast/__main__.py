"""The `starcast` command, and `python -m starcast`.

What the command imports takes a second or more, so Ctrl-C is heeded before that begins.
"""

import os
import signal
import sys
from types import FrameType

from starcast import INTERRUPTED


def _end(number: int, _: FrameType | None) -> None:
    """As the signal itself would; an exception could come up where none is heeded."""
    os._exit(128 + number)


def main() -> None:
    """Runs the command line; Ctrl-C before it has begun ends it without a trace too."""
    # The first process of a container is ended by no signal that it has no handler for.
    signal.signal(signal.SIGTERM, _end)
    try:
        from starcast.main import main as command
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    command()


if __name__ == "__main__":
    main()
