"""Micro-batching: work from many threads, done in batches by one.

As in Hugging Face's text-embeddings-inference, one thread owns the queue and everything else
reaches it by messages. It never waits for a fuller batch: what arrives while one batch is at work
makes the next, so batches grow with the load and an idle engine answers at once.
"""

import contextlib
import heapq
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

from model.exceptions import DeadlineError, EngineClosedError

# Prevents that a process hangs at its end because a batch does: the thread is left behind.
CLOSE_SECONDS = 30.0

P = TypeVar("P")  # payload
R = TypeVar("R")  # result


@dataclass(order=True)
class _Item(Generic[P, R]):
    deadline: float
    number: int  # order of arrival, among equal deadlines
    cost: int = field(compare=False)
    expires: bool = field(compare=False)
    payload: P = field(compare=False)
    future: Future[R] = field(compare=False)


@dataclass(frozen=True)
class _Close:
    finish: bool


class Engine(Generic[P, R]):
    """Runs `work` over batches whose costs sum to at most `budget`, earliest deadline first.

    `work` takes payloads and returns as many results, in order; it runs in the engine's own thread.
    When it raises, the batch is tried again item by item, so that only the items at fault fail.
    """

    def __init__(
        self, work: Callable[[list[P]], Sequence[R]], budget: int, name: str = "engine"
    ) -> None:
        if budget < 1:
            raise ValueError(f"an engine's budget must be at least 1, not {budget}")
        self._work = work
        self._budget = budget
        self._commands: queue.SimpleQueue[_Item[P, R] | _Close] = queue.SimpleQueue()
        self._gate = threading.Lock()  # orders submissions before the close that ends them
        self._closed = False
        self._number = 0
        self._pending = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Items handed in and not yet done: what callers bound to keep memory in bounds."""
        return self._pending

    def submit(
        self, payload: P, cost: int = 1, deadline: float = math.inf, expires: bool = False
    ) -> Future[R]:
        """Queue one payload; its future gets the result, or the error that `work` raised for it.

        `deadline` (seconds of `time.monotonic`) orders the queue. With `expires`, work not begun
        by then is not begun at all: the future gets DeadlineError. An item that costs more than
        the budget has a batch of its own. A cancelled future is passed over. Raises
        EngineClosedError after `close`.
        """
        if cost < 1:
            raise ValueError(f"cost must be at least 1, not {cost}")
        if math.isnan(deadline):
            raise ValueError("deadline must be a time, not nan")
        future: Future[R] = Future()
        with self._gate:
            if self._closed:
                raise EngineClosedError(f"{self._thread.name} is closed and takes no more work")
            self._number += 1
            self._pending += 1
            future.add_done_callback(self._done)
            self._commands.put(_Item(deadline, self._number, cost, expires, payload, future))
        return future

    def close(self, finish: bool = True, timeout: float = CLOSE_SECONDS) -> bool:
        """Take no more work; finish what is queued, or fail it with EngineClosedError.

        Returns whether the thread has ended within `timeout` seconds; if not, it fails what is
        queued as soon as the batch at work returns. May be called again, and from any thread.
        """
        with self._gate:
            self._closed = True
            self._commands.put(_Close(finish))
        if threading.current_thread() is self._thread:
            return False
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._commands.put(_Close(finish=False))
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(finish=error is None)

    def _done(self, _: Future[R]) -> None:
        with self._gate:
            self._pending -= 1

    def _run(self) -> None:
        heap: list[_Item[P, R]] = []
        closing = False
        try:
            while heap or not closing:
                for command in self._arrivals(wait=not heap):
                    if isinstance(command, _Item):
                        heapq.heappush(heap, command)
                    elif command.finish:
                        closing = True
                    else:
                        return
                self._process(self._take(heap))
        finally:
            self._abandon(heap)

    def _arrivals(self, wait: bool) -> list[_Item[P, R] | _Close]:
        """Commands that have come; with `wait`, at least one."""
        commands = [self._commands.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._commands.get_nowait())
        return commands

    def _take(self, heap: list[_Item[P, R]]) -> list[_Item[P, R]]:
        """The next batch: due first, until the next would pass the budget."""
        batch: list[_Item[P, R]] = []
        room = self._budget
        now = time.monotonic()
        while heap and (heap[0].cost <= room or not batch):
            item = heapq.heappop(heap)
            if not item.future.set_running_or_notify_cancel():
                continue
            if item.expires and item.deadline < now:
                item.future.set_exception(
                    DeadlineError(f"not begun within its deadline, {now - item.deadline:.3f} s ago")
                )
                continue
            batch.append(item)
            room -= item.cost
        return batch

    def _process(self, batch: list[_Item[P, R]]) -> None:
        try:
            self._attempt(batch)
        finally:
            self._fail([item.future for item in batch if not item.future.done()])

    def _attempt(self, batch: list[_Item[P, R]]) -> None:
        if not batch:
            return
        try:
            results = self._work([item.payload for item in batch])
            if len(results) != len(batch):  # a bug of `work`
                raise RuntimeError(f"{len(results)} results for {len(batch)} payloads")
        except Exception as error:  # noqa: BLE001 - whatever work raises is its futures' matter
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:
                for item in batch:
                    self._attempt([item])
            return
        for item, result in zip(batch, results, strict=True):
            item.future.set_result(result)

    def _abandon(self, heap: list[_Item[P, R]]) -> None:
        """Fail all that is left, so that nobody waits for a thread that has ended."""
        with self._gate:
            self._closed = True
        left = heap + [item for item in self._arrivals(wait=False) if isinstance(item, _Item)]
        self._fail([i.future for i in left if i.future.set_running_or_notify_cancel()])

    def _fail(self, futures: Sequence[Future[R]]) -> None:
        for future in futures:
            future.set_exception(
                EngineClosedError(f"{self._thread.name} ended before this work was done")
            )
