"""What a long-lived worker does about memory: fewer collections, and what is free given back."""

import ctypes
import gc
from functools import cache
from typing import Any

import pyarrow as pa

# Objects between two looks for cycles. A batch makes tens of thousands of records, none in a cycle;
# after Python's 700 each, a third of an archiver's decoding was walking through them.
BETWEEN_COLLECTIONS = 50_000
GIVE_BACK_SECONDS = 60.0  # a worker is no larger for longer than its work


def settle() -> None:
    """Say that what is loaded by now stays: no collection walks through it, and they are fewer."""
    gc.freeze()
    gc.set_threshold(BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])


def give_back() -> None:
    """What large and seldom work (a flush, a backlog) has freed goes back; milliseconds.

    Allocators keep it for the next time, each in its own pools, so a process stays as large as its
    largest moment has made it, and objects in cycles wait for a collection that `settle` has made
    rare. Where the C library has no `malloc_trim`, its own pools stay.
    """
    gc.collect()
    pa.default_memory_pool().release_unused()
    library = _library()
    if library is not None:
        library.malloc_trim(0)


@cache
def _library() -> Any:
    library = ctypes.CDLL(None)  # what this process has loaded
    return library if hasattr(library, "malloc_trim") else None
