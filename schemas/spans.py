"""Lengths of time, as settings have them.

They end: Python neither waits for ever nor has dates without end, and `inf` in a setting would stop
whoever counts with it.
"""

from typing import Annotated

from pydantic import Field

_LONGEST_DAYS = 36_525  # a century
LONGEST_SECONDS = _LONGEST_DAYS * 86_400

Days = Annotated[float, Field(le=_LONGEST_DAYS)]
Seconds = Annotated[float, Field(le=LONGEST_SECONDS)]
