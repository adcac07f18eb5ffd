"""Functions as machine code: loops over rows that NumPy has no one call for."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])

_ANY_ORDER = {"arcp", "contract", "nsz", "reassoc"}  # infinities and what is no number stay


def compiled(function: Function) -> Function:
    """The function, compiled for each kind of its arguments at the first call with them.

    What was compiled is kept beside the source, or in the user's cache folder, for processes to
    come; where neither can be written to, each process compiles anew. Other threads run meanwhile.
    """
    return _compiled(function)


def summing(function: Function) -> Function:
    """As `compiled`, and sums of floats are taken in any order, so several numbers at once."""
    return _compiled(function, fastmath=_ANY_ORDER)


def _compiled(function: Function, **options: Any) -> Function:
    try:
        made = numba.njit(function, cache=True, nogil=True, error_model="numpy", **options)
    except RuntimeError:  # nowhere to keep it
        made = numba.njit(function, nogil=True, error_model="numpy", **options)
    return cast(Function, made)
