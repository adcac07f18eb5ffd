"""Errors of the stream processors."""

from schemas.exceptions import StarcastError


class BrokerError(StarcastError):
    """Kafka refused something in a way that retrying does not mend."""


class LeftOutError(BrokerError):
    """A consumer group goes on without a worker, whose client does not come back to it."""


class LetterError(StarcastError):
    """A dead letter that cannot be sent again: it lacks a part of its record."""


class StoreError(StarcastError):
    """The store does not answer, or answers with an error; the loop pauses and tries again."""


class FencedError(StoreError):
    """A newer owner has claimed the partition; the write changed nothing."""


class StoreAheadError(StarcastError):
    """The store has applied more of a partition than Kafka holds."""


class JournalGapError(StarcastError):
    """The journal, or item updates, do not reach back to where states are computed from."""
