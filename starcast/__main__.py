"""The `starcast` command, and `python -m starcast`.

What the command imports takes a second or more, so Ctrl-C is heeded before that begins.
"""

import sys

from starcast import INTERRUPTED


def main() -> None:
    """Runs the command line; Ctrl-C before it has begun ends it without a trace too."""
    try:
        from starcast.main import main as command
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    command()


if __name__ == "__main__":
    main()
