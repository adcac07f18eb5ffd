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
# Arrays of a batch stay in the C library's heaps from one batch to the next: a page that has gone
# back costs two to three microseconds to get again in a virtual machine, and 2,000 events touch
# 3,000 of them. What is larger goes back as it is freed, and so does the end of a heap beyond this;
# all else within `GIVE_BACK_SECONDS`. Left to itself the library moves both limits as it goes.
AT_ONCE = 8 * 1024 * 1024  # bytes
HEAP_END = 64 * 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def settle() -> None:
    """What is loaded by now stays, and so does the memory that batches pass on to each other.

    No collection walks through what stays, and they are fewer.
    """
    gc.freeze()
    gc.set_threshold(BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
    library = _library()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, AT_ONCE)
        library.mallopt(_M_TRIM_THRESHOLD, HEAP_END)


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
