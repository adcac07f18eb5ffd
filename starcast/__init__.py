"""The `starcast` command, its settings and its logs."""

__version__ = "0.1.0"

INTERRUPTED = 130  # exit code after Ctrl-C, as shells expect it
