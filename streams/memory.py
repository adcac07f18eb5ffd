"""What a long-lived worker does about memory: batches pass it on, and it is seldom searched.

A page that has gone back to the system costs two to three microseconds to get again in a virtual
machine, and 2,000 events touch 3,000 of them: so what one batch frees is kept for the next. A large
flush or a backlog frees more than that, and it goes back.
"""

import ctypes
import gc
import sys
from functools import cache
from typing import Any

import pyarrow as pa

# Objects between two looks for cycles. A batch makes tens of thousands of records, none in a cycle;
# after Python's 700 each, a third of an archiver's decoding was walking through them.
BETWEEN_COLLECTIONS = 50_000
GIVE_BACK_SECONDS = 60.0  # a worker is no larger for longer than its work
# The C library moves these two as it goes, up to 32 and 64 MiB, so a worker was as large as it had
# happened to free. Fixed, it is as large as its largest batches, and stays so.
AT_ONCE = 8 * 1024 * 1024  # bytes of an array that goes back as it is freed
KEPT = 128 * 1024 * 1024  # free bytes in its heaps that a worker may keep
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class HeapUse(ctypes.Structure):
    """What glibc's `mallinfo2` tells of all heaps, in bytes and numbers of parts."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),  # hblkhd: mapped on their own
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),  # fordblks: free in heaps
        )
    ]


def settle() -> None:
    """What is loaded by now stays, and so does what batches pass on to each other.

    No collection walks through what stays, and they are fewer.
    """
    gc.freeze()
    gc.set_threshold(BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
    library = _library()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, AT_ONCE)
        library.mallopt(_M_TRIM_THRESHOLD, KEPT)


def give_back(keep: int = 0) -> None:
    """What large and seldom work (a flush, a backlog) has freed goes back; milliseconds.

    Allocators keep it for the next time, each in its own pools, so a process stays as large as its
    largest moment has made it, and objects in cycles wait for a collection that `settle` has made
    rare. Heaps of the C library stay as they are while no more than `keep` bytes in them are free,
    and where it has no `malloc_trim`.
    """
    gc.collect()
    pa.default_memory_pool().release_unused()
    library = _library()
    if library is not None and _free(library) > keep:
        library.malloc_trim(0)


def _free(library: Any) -> int:
    """Free bytes in the heaps; no end of them where the library (glibc before 2.33) is silent."""
    if not hasattr(library, "mallinfo2"):
        return sys.maxsize
    library.mallinfo2.restype = HeapUse
    return library.mallinfo2().fordblks


@cache
def _library() -> Any:
    library = ctypes.CDLL(None)  # what this process has loaded
    return library if hasattr(library, "malloc_trim") else None
