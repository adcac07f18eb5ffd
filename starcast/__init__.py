"""The `starcast` command, its settings and its logs."""

__version__ = "0.1.0"
