"""Sketches that merge: of latencies for quantiles, of names for the most frequent ones."""

import base64
import binascii
from typing import Any, cast

import datasketches  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

from schemas.exceptions import ContractError

KLL_K = 200  # rank error about 1.3%, at some 2 KB a sketch
FREQUENT_LOG_SIZE = 10  # at most 768 names are counted at once, however many there are
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

_SKETCHES = cast(Any, datasketches)  # the wheel has no type information


def encode_latency(milliseconds: NDArray[np.float32]) -> str | None:
    """The `latency_ms` of a digest: a KLL sketch in base64; None for no values."""
    if not milliseconds.size:
        return None
    return base64.b64encode(_sketch_of(milliseconds)).decode()


def decode_latency(encoded: str) -> Any:
    """The sketch in the `latency_ms` of a digest; raises ContractError where there is none."""
    try:
        data = base64.b64decode(encoded, validate=True)
        if not _is_sound(data):
            raise ValueError("its parts do not fit together")
        return _SKETCHES.kll_floats_sketch.deserialize(data)
    except (binascii.Error, ValueError, IndexError, RuntimeError) as error:
        raise ContractError(
            f"latency_ms is no KLL sketch of floats in base64 ({error})."
        ) from error


def latency_sketch() -> Any:
    """A KLL sketch of no values."""
    return _SKETCHES.kll_floats_sketch(KLL_K)


def quantiles(latency: Any) -> dict[str, float] | None:
    """Those in `QUANTILES`, and max; None of no values."""
    if latency.is_empty():
        return None
    found = latency.get_quantiles(list(QUANTILES.values()))
    named = dict(zip(QUANTILES, (float(value) for value in found), strict=True))
    return named | {"max": float(latency.get_max_value())}


def name_sketch() -> Any:
    """A sketch of no names, for `most_frequent`."""
    return _SKETCHES.frequent_strings_sketch(FREQUENT_LOG_SIZE)


def most_frequent(names: Any, most: int) -> list[tuple[str, int]]:
    """The most frequent names, biggest first; names of equal counts in their own order."""
    kind = _SKETCHES.frequent_items_error_type.NO_FALSE_NEGATIVES
    rows = [(str(name), int(estimate)) for name, estimate, _, _ in names.get_frequent_items(kind)]
    return sorted(rows, key=lambda row: (-row[1], row[0]))[:most]


def _sketch_of(values: NDArray[np.float32]) -> bytes:
    sketch = latency_sketch()
    sketch.update(np.ascontiguousarray(values, np.float32))
    return sketch.serialize()


_HEAD = 8  # bytes, the same in each sketch of one value, and in each of more
_ONE, _MORE = (_sketch_of(np.zeros(count, np.float32))[:_HEAD] for count in (1, 2))


def _is_sound(data: bytes) -> bool:
    """Whether a sketch is one that `encode_latency` may have made.

    The library trusts what a sketch says of its own parts: of one wrong byte it never comes back,
    or ends the process. Raises ValueError or IndexError for less than a sketch.
    """
    if data[:_HEAD] == _ONE:
        return len(data) == _HEAD + 4 and bool(np.isfinite(np.frombuffer(data[_HEAD:], "<f4")[0]))
    count, least_k, levels = int.from_bytes(data[8:16], "little"), data[16:18], data[18]
    starts = np.frombuffer(data, "<u4", levels, 20).astype(np.int64)
    sizes = np.diff(starts, append=_capacity(levels))  # of the levels; a value of level i is 2**i
    values = np.frombuffer(data, "<f4", offset=20 + 4 * levels)  # the least, the most, all kept
    return (
        data[:_HEAD] == _MORE
        and least_k == data[4:6]
        and 0 < levels <= 32
        and bool((sizes >= 0).all())
        and int((sizes << np.arange(levels)).sum()) == count
        and len(values) == 2 + sizes.sum()
        and bool(np.isfinite(values).all())
    )


def _capacity(levels: int) -> int:
    """How many values a sketch of so many levels has room for: two thirds a level, 8 at least."""
    return sum(max(8, ((2 * KLL_K << depth) // 3**depth + 1) // 2) for depth in range(levels))
