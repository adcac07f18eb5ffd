"""Memory that is free but held, given back to the system."""

import ctypes
from functools import cache
from typing import Any

import pyarrow as pa

GIVE_BACK_SECONDS = 60.0  # a worker is no larger for longer than its work


def give_back() -> None:
    """What large and seldom work (a flush, a backlog) has freed goes back; milliseconds.

    Allocators keep it for the next time, each in its own pools, so a process stays as large as its
    largest moment has made it. Does nothing where the C library has no `malloc_trim`.
    """
    pa.default_memory_pool().release_unused()
    library = _library()
    if library is not None:
        library.malloc_trim(0)


@cache
def _library() -> Any:
    library = ctypes.CDLL(None)  # what this process has loaded
    return library if hasattr(library, "malloc_trim") else None
