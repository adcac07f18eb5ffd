"""The micro-batching engine."""

import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine import Engine
from model.exceptions import DeadlineError, EngineClosedError

# Prevents that a test hangs when a future is never done; far above what any of them takes.
PATIENCE = 20.0


class Gated:
    """Work that doubles numbers, remembers its batches, and can be held back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.begun = threading.Event()
        self.open.set()

    def __call__(self, numbers: list[int]) -> Sequence[int]:
        self.batches.append(numbers)
        self.begun.set()
        assert self.open.wait(PATIENCE)
        if any(number < 0 for number in numbers):
            raise ValueError(f"poison among {numbers}")
        return [2 * number for number in numbers]


@contextmanager
def held(budget: int) -> Generator[tuple[Engine[int, int], Gated]]:
    """An engine that is busy with a first item, 0, until `open` is set."""
    work = Gated()
    work.open.clear()
    with Engine(work, budget) as engine:
        engine.submit(0)
        assert work.begun.wait(PATIENCE)
        try:
            yield engine, work
        finally:
            work.open.set()


def done(futures: list[Future[int]]) -> None:
    assert not wait(futures, PATIENCE).not_done


jobs = st.lists(
    st.tuples(
        st.integers(-2, 50),  # below 0: poison
        st.integers(1, 12),  # cost
        st.integers(0, 5),  # deadline, from an hour ahead
    ),
    max_size=30,
)


@given(jobs, st.integers(1, 10))
def test_whatever_comes(jobs: list[tuple[int, int, int]], budget: int) -> None:
    start = time.monotonic() + 3600
    with held(budget) as (engine, work):
        futures = [engine.submit(n, cost, start + due) for n, cost, due in jobs]
        assert engine.pending == len(jobs) + 1
        work.open.set()
        done(futures)
    # Everybody gets the answer to his own question, and only the poisoned fail.
    for (number, _, _), future in zip(jobs, futures, strict=True):
        if number < 0:
            assert isinstance(future.exception(), ValueError)
        else:
            assert future.result() == 2 * number
    assert engine.pending == 0


@given(jobs, st.integers(1, 10))
def test_batches_keep_the_budget_and_the_deadlines(
    jobs: list[tuple[int, int, int]], budget: int
) -> None:
    start = time.monotonic() + 3600
    with held(budget) as (engine, work):
        # Payloads are positions, so that batches tell which items they held.
        futures = [
            engine.submit(number, cost, start + due) for number, (_, cost, due) in enumerate(jobs)
        ]
        work.open.set()
        done(futures)
    batches = work.batches[1:]
    order = [number for batch in batches for number in batch]
    assert order == sorted(range(len(jobs)), key=lambda number: (jobs[number][2], number))
    costs = [sum(jobs[number][1] for number in batch) for batch in batches]
    for batch, cost in zip(batches, costs, strict=True):
        assert cost <= budget or len(batch) == 1
    for cost, after in zip(costs, batches[1:], strict=False):
        assert cost + jobs[after[0]][1] > budget  # no batch ends early


def test_an_idle_engine_answers_at_once() -> None:
    with Engine(Gated(), 1_000_000) as engine:
        for number in range(50):
            begin = time.monotonic()
            assert engine.submit(number).result(PATIENCE) == 2 * number
            if time.monotonic() - begin < 0.005:
                return
    pytest.fail("fifty single items each waited 5 ms or more")


def test_poison_is_found_and_the_engine_goes_on() -> None:
    with held(100) as (engine, work):
        futures = [engine.submit(number) for number in (1, -1, 2)]
        work.open.set()
        done(futures)
        assert [future.exception() is None for future in futures] == [True, False, True]
        assert "poison among [-1]" in str(futures[1].exception())
        assert engine.submit(21).result(PATIENCE) == 42
    assert work.batches[1:5] == [[1, -1, 2], [1], [-1], [2]]


def test_many_threads() -> None:
    work = Gated()
    with Engine(work, 64) as engine, ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda n: engine.submit(n).result(PATIENCE), range(2000))
        assert list(results) == [2 * number for number in range(2000)]


def test_work_that_expires_is_not_begun() -> None:
    with held(100) as (engine, work):
        past = time.monotonic() - 1
        late = engine.submit(1, deadline=past, expires=True)
        patient = engine.submit(2, deadline=past)
        early = engine.submit(3, deadline=time.monotonic() + 3600, expires=True)
        work.open.set()
        done([late, patient, early])
    assert isinstance(late.exception(), DeadlineError)
    assert (patient.result(), early.result()) == (4, 6)
    assert work.batches[1:] == [[2, 3]]


def test_cancelled_work_is_passed_over() -> None:
    with held(100) as (engine, work):
        first, second = engine.submit(1), engine.submit(2)
        assert first.cancel()
        assert engine.pending == 2
        work.open.set()
        done([second])
    assert work.batches[1:] == [[2]]
    assert engine.pending == 0


def test_close_finishes_what_is_queued() -> None:
    with held(1) as (engine, work):
        futures = [engine.submit(number) for number in range(5)]
        work.open.set()
        assert engine.close()
        assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]
        with pytest.raises(EngineClosedError, match="takes no more"):
            engine.submit(1)
        assert engine.close()


def test_close_fails_what_is_queued() -> None:
    with held(1) as (engine, work):
        futures = [engine.submit(number) for number in range(5)]
        futures[0].cancel()
        threading.Timer(0.05, work.open.set).start()
        assert engine.close(finish=False)
        for future in futures[1:]:
            assert isinstance(future.exception(0), EngineClosedError)
    assert len(work.batches) == 1


def test_close_does_not_wait_for_ever() -> None:
    with held(1) as (engine, work):
        future = engine.submit(1)
        assert not engine.close(timeout=0.01)
        work.open.set()
        assert isinstance(future.exception(PATIENCE), EngineClosedError)


def test_an_error_in_the_block_fails_what_is_queued() -> None:
    work = Gated()
    work.open.clear()
    futures: list[Future[int]] = []

    def use(engine: Engine[int, int]) -> None:
        with engine:
            engine.submit(0)
            assert work.begun.wait(PATIENCE)
            futures.extend([engine.submit(1), engine.submit(2)])
            threading.Timer(0.05, work.open.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        use(Engine(work, 1))
    assert len(futures) == 2
    assert all(isinstance(future.exception(0), EngineClosedError) for future in futures)


@settings(max_examples=30)
@given(st.integers(0, 20), st.booleans())
def test_close_among_submissions_leaves_nobody_waiting(number: int, finish: bool) -> None:
    engine = Engine(Gated(), 3)
    futures: list[Future[int]] = []

    def submit() -> None:
        try:
            while True:
                futures.append(engine.submit(len(futures)))
        except EngineClosedError:
            pass

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(submit) for _ in range(2)]
        while len(futures) < number:
            time.sleep(0)
        assert engine.close(finish)
        wait(tasks)
    for future in futures:
        assert future.done()
        assert finish is False or future.exception() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_takes_nobody_with_it() -> None:
    gate = threading.Event()

    def work(_: list[int]) -> Sequence[int]:
        assert gate.wait(PATIENCE)
        raise SystemExit

    engine = Engine(work, 1)
    futures = [engine.submit(number) for number in range(3)]
    gate.set()
    done(futures)
    assert all(isinstance(future.exception(), EngineClosedError) for future in futures)
    with pytest.raises(EngineClosedError):
        engine.submit(1)
    assert engine.close()


def test_a_wrong_number_of_results_is_told_to_all() -> None:
    with Engine[int, int](lambda _: [], 10) as engine:
        assert "0 results for 1" in str(engine.submit(1).exception(PATIENCE))


def test_user_errors_are_raised_at_once() -> None:
    with pytest.raises(ValueError, match="budget"):
        Engine(Gated(), 0)
    with Engine(Gated(), 1) as engine:
        with pytest.raises(ValueError, match="cost"):
            engine.submit(1, cost=0)
        with pytest.raises(ValueError, match="nan"):
            engine.submit(1, deadline=float("nan"))
        assert engine.pending == 0
