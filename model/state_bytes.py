"""States as bytes: how the store keeps the rows of `state`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled
from model.events import Rows, blank
from model.exceptions import LayoutError
from model.state import LAYOUT_HASH, USER

_BEGINS = {name: place[1] for name, place in (USER.fields or {}).items()}  # bytes in a row
_COUNTERS = slice(_BEGINS["session_events"], _BEGINS["recent"])  # of 4 bytes each


def to_bytes(rows: Rows) -> list[bytes]:
    """Rows as the store keeps them: little endian, packed, zeros at the end cut off.

    Before a USER row stands one byte: how many bytes each of its counters has, 1, 2 or 4.
    """
    data = _matrix(rows.tobytes(), rows.dtype.itemsize)
    if rows.dtype != USER:
        return _cut(data)
    packed = np.empty(data.size + len(data), np.uint8)
    ends = np.empty(len(data), np.int64)
    _pack(data, _COUNTERS.start, _COUNTERS.stop, packed, ends)
    whole, places = packed[: ends[-1] if len(ends) else 0].tobytes(), [0, *ends.tolist()]
    return [whole[begin:end] for begin, end in pairwise(places)]


@compiled
def _pack(data: Any, begin: int, end: int, packed: Any, ends: Any) -> None:
    """Write USER rows (n, bytes) one after another; `ends` (n): of each in `packed`."""
    at = 0
    for row in range(len(data)):
        mine, first = data[row], at
        used = len(mine)
        while used and mine[used - 1] == 0:
            used -= 1
        width = 1
        for byte in range(begin, end, 4):
            if mine[byte + 2] or mine[byte + 3]:
                width = 4
            elif mine[byte + 1]:
                width = max(width, 2)
        packed[at] = width
        at = _copy(mine, 0, min(used, begin), packed, at + 1)
        for byte in range(begin, min(used, end), 4):
            for lower in range(width):
                packed[at + lower] = mine[byte + lower]
            at += width
        at = _copy(mine, end, used, packed, at)
        while packed[at - 1] == 0:
            at -= 1
        if at == first + 1:
            at = first  # nothing but the width
        ends[row] = at


@compiled
def _copy(source: Any, begin: int, end: int, target: Any, at: int) -> int:
    """Copy bytes begin to end, if there are any; gives where they end in the target."""
    if end <= begin:
        return at
    target[at : at + end - begin] = source[begin:end]
    return at + end - begin


def from_bytes(values: Sequence[bytes | None], dtype: np.dtype[Any]) -> Rows:
    """Rows of what `to_bytes` wrote, shape (n,); `None` gives a blank row.

    Raises LayoutError for a value that is not of this layout.
    """
    if dtype != USER:
        missing = blank(dtype, 1).tobytes()
        given = [missing if value is None else value for value in values]
        return _padded(given, dtype.itemsize).view(dtype)[:, 0]
    given = [value or b"" for value in values]
    ends = np.cumsum(np.fromiter(map(len, given), np.int64, len(given)))
    data = np.zeros((len(given), USER.itemsize), np.uint8)
    packed = np.frombuffer(b"".join(given), np.uint8)
    if (bad := _unpack(packed, ends, _COUNTERS.start, _COUNTERS.stop, data)) >= 0:
        value = given[bad]
        raise _other_layout(
            f"has {len(value)} bytes and begins with {value[0]}",
            f"begins with 1, 2 or 4 and has at most {USER.itemsize + 1}",
        )
    return data.view(USER)[:, 0]


@compiled
def _unpack(packed: Any, ends: Any, begin: int, end: int, data: Any) -> int:
    """What `_pack` wrote to rows of zeros (n, bytes); gives the first bad row, or -1."""
    at = 0
    for row in range(len(ends)):
        last, mine = ends[row], data[row]
        if at == last:
            continue
        width = packed[at]
        at += 1
        if width not in (1, 2, 4) or last - at > len(mine) - (end - begin) // 4 * (4 - width):
            return row
        byte = _copy(packed, at, min(last, at + begin), mine, 0)
        at += byte
        while at < last and byte < end:
            for lower in range(min(last - at, width)):
                mine[byte + lower] = packed[at + lower]
            at, byte = at + width, byte + 4
        _copy(packed, at, last, mine, byte)
        at = last
    return -1


def _matrix(data: bytes, size: int) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(-1, size)


def _cut(data: NDArray[np.uint8]) -> list[bytes]:
    size, whole = data.shape[1], data.tobytes()
    return [whole[at : at + size].rstrip(b"\0") for at in range(0, len(whole), size)]


def _padded(values: Sequence[bytes], size: int) -> NDArray[np.uint8]:
    data = b"".join(value.ljust(size, b"\0") for value in values)
    if len(data) != size * len(values):
        raise _other_layout(f"has {max(map(len, values))} bytes", f"has {size}")
    return _matrix(data, size).copy()


def _other_layout(found: str, wanted: str) -> LayoutError:
    return LayoutError(
        f"A stored state {found} where layout {LAYOUT_HASH} {wanted}: another layout wrote under"
        " this key. Rebuild the store under this layout."
    )
