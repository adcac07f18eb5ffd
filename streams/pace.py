"""How many events a transaction takes, so that it ends in time, and how long they are gathered."""

from math import inf

LEAST = 100  # events: a transaction costs as much with fewer
# Kafka's client asks the broker once for each partition that it writes to. A worker of more
# partitions than these takes larger transactions in proportion, up to so many times as large, and
# none larger for that than what is known to end in time.
SPREAD, WIDEST, LARGEST = 16, 4, 8_000
SHRINK, GROW = 0.5, 1.25  # a turn changes the size by these factors at most
NEWEST = 0.2  # what the last turn counts in a running mean
LONG_SECONDS = 2.0  # to process a batch, where a transaction may stay open for ten
GATHER_SECONDS = 0.1  # a commit that is slow for once keeps no batch waiting for longer


class Pace:
    """The size of transactions under a latency target.

    An event that comes while a transaction is under way waits for it and then for its own, so each
    may take half of the target. One that took t seconds makes the next one target / (2 t) times as
    large, within bounds; a short one that was not full says nothing of larger ones. Who is behind
    by more than the largest transaction has missed the target, and catches up fastest with those.
    """

    def __init__(self, most: int, target_seconds: float) -> None:
        """At most `most` events while partitions are few; a target of 0 is none."""
        self._usual = self._most = most
        self._target = target_seconds
        self._size = float(most)

    def spread(self, partitions: int) -> None:
        """Events lie in so many partitions from now on."""
        wider = round(self._usual * min(max(partitions / SPREAD, 1), WIDEST))
        self._most = max(min(wider, LARGEST), self._usual)
        self._size = min(self._size, self._most)

    def size(self, lag: int) -> int:
        """Most events of the next transaction; `lag`: events that wait."""
        if not self._target or lag > self._most:
            return self._most
        return round(self._size)

    def took(self, events: int, seconds: float) -> None:
        """A transaction of so many events took so long, from reading them to the commit."""
        if not self._target:
            return
        change = min(max(self._target / 2 / max(seconds, 1e-6), SHRINK), GROW)
        if change < 1 or events >= round(self._size):
            least = min(LEAST, self._most)
            self._size = min(max(self._size * change, least), self._most)


class Bound:
    """The most records of a transaction, once Kafka has ended one that was open for too long.

    The same batch would be as slow again: the next takes half of it. Full ones that end within half
    of the limit make it larger again, step by step.
    """

    def __init__(self, limit_seconds: float) -> None:
        """Kafka ends a transaction that is open for longer than the limit."""
        self._limit = limit_seconds
        self._most = inf

    def most(self, wanted: int) -> int:
        """Most records of the next transaction, of so many that are wanted."""
        return int(min(wanted, self._most))

    def ended(self, records: int, seconds: float) -> None:
        """One of so many records was committed after so long."""
        if records + 1 > self._most and seconds < self._limit / 2:
            self._most *= GROW

    def failed(self, records: int, seconds: float) -> bool:
        """One came to nothing after so long; whether the next one is smaller for that."""
        slow = records > 1 and seconds > self._limit
        if slow:
            self._most = records / 2
        return slow


class Overlap:
    """How long a batch is gathered while the transaction before it is under way.

    Its own transaction can be opened no sooner than that one ends. So it is taken as late as lets
    it be processed by then: what comes until then need not wait for the next.
    """

    def __init__(self) -> None:
        self._processing = 0.0
        self._opening = 0.0
        self._ending = 0.0

    def processed(self, seconds: float) -> None:
        """A batch was processed."""
        # A long one counts in whole: its transaction may have been opened so long before its end
        # that Kafka aborted it, as it would again.
        weight = NEWEST if seconds < LONG_SECONDS else 1.0
        self._processing += weight * (seconds - self._processing)

    def opened(self, seconds: float) -> None:
        """A transaction took so long to begin and to note its offsets."""
        self._opening += NEWEST * (seconds - self._opening)

    def ended(self, seconds: float) -> None:
        """A transaction took so long to end, from its outputs to the write after its commit."""
        self._ending += NEWEST * (seconds - self._ending)

    def spare(self, elapsed: float) -> float:
        """Seconds until a batch's transaction is to be opened, so long after it was polled.

        So that it is open when the batch is processed.
        """
        return max(self._processing - self._opening - elapsed, 0.0)

    def left(self, elapsed: float) -> float:
        """Seconds to gather for, so long after the outputs of the one under way."""
        ready = self._ending + self._opening
        return min(max(ready - self._processing - elapsed, 0.0), GATHER_SECONDS)
