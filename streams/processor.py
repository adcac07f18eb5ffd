"""What the loop asks of a processor, and what a processor gives it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from confluent_kafka import Message

CLAIM_SECONDS = 5.0  # after which a claim takes up nothing more: who does not poll leaves the group

Position = tuple[str, int]  # topic (with the prefix taken off), partition
Offsets = dict[int, dict[str, int]]  # by partition and topic


@dataclass(frozen=True, slots=True)
class Output:
    """One record to send. Without `partition` the key decides, as Java's partitioner does."""

    topic: str
    key: bytes | None
    value: bytes | None
    partition: int = -1
    headers: list[tuple[str, str | bytes | None]] | None = None


@dataclass(frozen=True, slots=True)
class OutputBatch:
    """Many records for one topic: dicts of `key`, `value` and perhaps `partition`."""

    topic: str
    messages: list[dict[str, Any]]


@dataclass
class Outcome:
    """What a processor makes of one batch."""

    batches: list[OutputBatch] = field(default_factory=list[OutputBatch])
    outputs: list[Output] = field(default_factory=list[Output])
    # More of them, made when nothing is under way any more: they tell what the batch before left.
    late: Callable[[], list[Output]] | None = None
    tracked: frozenset[str] = frozenset()  # topics of outputs whose offsets `write` needs
    # Straight after the commit. With it, the next batch may be processed before it is called, in
    # another thread: the processor goes on from what it holds in memory.
    write: Callable[[dict[Position, int]], None] | None = None
    finish: Callable[[dict[Position, int]], None] | None = None  # after both, in the loop's thread


class Processor(Protocol):
    """What the loop asks of a processor. All calls come from the loop's own thread.

    Of what an outcome holds, only `write` may be called from another.
    """

    @property
    def name(self) -> str:
        """Its name in groups, metrics and on the command line."""
        ...

    @property
    def topics(self) -> Sequence[str]:
        """The topics it reads; all of a partition number are worked on together."""
        ...

    @property
    def together(self) -> bool:
        """Whether a partition number is worked on only when all its topics are owned."""
        ...

    @property
    def transactional(self) -> bool:
        """Whether its outputs and offsets belong in one transaction."""
        ...

    @property
    def batch_size(self) -> int:
        """Most records in one turn."""
        ...

    lag: int  # the loop sets it: records waiting in all its partitions

    @property
    def linger_seconds(self) -> float:
        """Longest wait for a fuller batch once there is a record and nothing is under way."""
        ...

    def claim(self, committed: Offsets) -> Offsets:
        """Take partitions over and recover their states; where each topic is to be read from.

        `committed` has the group's committed offset of each topic, -1 where there is none: of all
        topics, or of those owned when the processor does not want them together. What is not
        through after `CLAIM_SECONDS` may be left out of the answer: it is claimed again, after a
        poll.
        """
        ...

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget all that is held in memory of these partitions."""
        ...

    def process(self, messages: list[Message]) -> Outcome:
        """A batch of one message at least. Nothing outside may change before the commit."""
        ...

    def idle(self) -> Outcome | None:
        """For timed work: called with nothing under way, after a batch or `TIMED_SECONDS`."""
        ...

    def close(self) -> None:
        """Called when all is well and the worker is to stop: write what still waits."""
        ...
