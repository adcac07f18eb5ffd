"""Memory goes back to the system, and is seldom looked through."""

import ctypes
import gc
import subprocess
import sys
import weakref

import psutil
import pytest

from streams.memory import AT_ONCE, BETWEEN_COLLECTIONS, KEPT, give_back, settle

SMALL = 64 * 1024  # bytes, which the C library keeps when they are freed
MANY = 3_000

told = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc tells of heaps, from 2.33 on"
)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has malloc_trim")
def test_what_was_freed_is_given_back() -> None:
    process = psutil.Process()
    held = [bytearray(SMALL) for _ in range(MANY)]
    for each in held:
        each[::4_096] = b"x" * (SMALL // 4_096)
    kept = held[::50]  # so that the heap does not shrink by itself
    del held
    give_back()
    after = process.memory_info().rss
    again = [bytearray(b"x" * SMALL) for _ in range(MANY)]
    grown = process.memory_info().rss - after
    del again
    give_back()
    assert grown > 0.5 * MANY * SMALL
    assert process.memory_info().rss - after < 0.2 * MANY * SMALL
    assert kept


MAPPED = """
import ctypes
from streams.memory import AT_ONCE, HeapUse, settle

library = ctypes.CDLL(None)
library.mallinfo2.restype = HeapUse
settle()
larger = bytearray(3 * AT_ONCE)
del larger  # from then on the C library would keep what is smaller in its heap
before = library.mallinfo2().hblkhd
arrays = [bytearray(AT_ONCE) for _ in range(5)]
print(library.mallinfo2().hblkhd - before)
"""

FAULTS = """
import resource
from streams.memory import AT_ONCE, settle

def batch():
    for size in (AT_ONCE // 8, AT_ONCE // 4, AT_ONCE // 2):
        bytearray(b"x") * size

settle()
batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@told
def test_a_large_array_goes_back_as_it_is_freed() -> None:
    """In a process of its own, whose heap has no room from before."""
    done = subprocess.run(
        [sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) > 4 * AT_ONCE


@told
def test_the_next_batch_gets_the_pages_of_the_one_before() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=60
    )
    pages = 50 * AT_ONCE // 4_096
    assert int(done.stdout) < 0.05 * pages


KEEPING = """
import psutil
from streams.memory import KEPT, give_back, settle

SMALL = 64 * 1024
settle()

def grown_by(size):
    before = psutil.Process().memory_info().rss
    held = [bytearray(b"x" * SMALL) for _ in range(size // SMALL)]
    kept = held[::50]  # so that the heap does not shrink by itself
    del held
    give_back(keep=KEPT)
    return psutil.Process().memory_info().rss - before

print(grown_by(KEPT // 2), grown_by(KEPT * 2))
"""


@told
def test_what_batches_need_again_is_kept_and_more_goes_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True, timeout=60
    )
    batches, backlog = map(int, done.stdout.split())
    assert batches > 0.4 * KEPT
    assert backlog < 0


def test_what_only_a_cycle_holds_is_given_back_too() -> None:
    class Batch:
        """Knows itself, as a closure or an error with its traceback may."""

    batch = Batch()
    vars(batch)["itself"] = batch
    left = weakref.ref(batch)
    gc.disable()
    try:
        del batch
        assert left() is not None
        give_back()
        assert left() is None
    finally:
        gc.enable()


def test_what_is_loaded_is_not_walked_through_again() -> None:
    before = gc.get_threshold()  # of a test before, maybe, that ran a worker in this process
    gc.set_threshold(700, 10, 10)
    try:
        settle()
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold() == (BETWEEN_COLLECTIONS, 10, 10)
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
