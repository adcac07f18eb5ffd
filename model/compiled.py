"""Functions as machine code: loops over rows that NumPy has no one call for."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., object])

# A loop holds what it calls and reads of other files, at whose changes numba does not look: without
# this in its name, the machine code of the release before would serve after an update.
_SOURCES = sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:8]

_ANY_ORDER = {"arcp", "contract", "nsz", "reassoc"}  # infinities and what is no number stay


def compiled(function: Function) -> Function:
    """The function, compiled for each kind of its arguments at the first call with them.

    What was compiled is kept beside the source, or in the user's cache folder, for processes to
    come, until a source of this package changes; where neither can be written to, each process
    compiles anew. Other threads run meanwhile.
    """
    return _compiled(function)


def summing(function: Function) -> Function:
    """As `compiled`, and sums of floats are taken in any order, so several numbers at once."""
    return _compiled(function, fastmath=_ANY_ORDER)


def _compiled(function: Any, **options: Any) -> Any:
    function.__qualname__ += f"_{_SOURCES}"
    try:
        return numba.njit(function, cache=True, nogil=True, error_model="numpy", **options)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(function, nogil=True, error_model="numpy", **options)
