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
# Bytes from which freed memory goes back at once. Left to itself the C library raises this to what
# was freed last, up to 32 MiB, and keeps a backlog's larger batches in its heaps: a scorer swung by
# 33 MiB between batches of 1,000 and 2,000 events, and by 13 with this, at the same speed.
AT_ONCE = 256 * 1024
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def settle() -> None:
    """What is loaded by now stays, and large arrays are freed at once.

    No collection walks through what stays, and they are fewer.
    """
    gc.freeze()
    gc.set_threshold(BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
    library = _library()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, AT_ONCE)


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
