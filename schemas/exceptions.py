"""Every error that Starcast raises on purpose has `StarcastError` as its base.

A message says what happened, where, and what to do. The command line prints the message alone,
and that of an OSError; any other exception is a bug and keeps its stack trace.
"""


class StarcastError(Exception):
    """What happened, where, and what to do."""


class ContractError(StarcastError):
    """A record, file or table does not keep the contract of `schemas`."""


class UnreachableError(StarcastError):
    """A broker, store, archive or model folder does not answer."""
