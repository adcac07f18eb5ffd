"""Results of a long run, each made once: what was cut short goes on from there."""

import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from model import storage

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


class Kept:
    """Arrays by name in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of `name`: made once, and anew where a machine that fell left half of them."""
        path = self.folder / f"{name}.npz"
        if path.exists():
            try:
                with np.load(path) as found:
                    return dict(found)
            except (EOFError, ValueError, BadZipFile, zlib.error) as error:
                logger.warning("%s is damaged and made anew: %s", path, error)
        made = make()
        with storage.beside(self.folder) as temporary:  # its own: another process may make it too
            part = temporary / path.name
            np.savez(part, **cast(Any, made))
            part.replace(path)
        return made

    def trials(self, whose: str) -> Callable[[str, Callable[[], float]], float]:
        """What gives the number of a name: made once."""

        def number(name: str, make: Callable[[], float]) -> float:
            return float(
                self.get(f"{whose} {name}", lambda: {"number": np.array(make())})["number"]
            )

        return number
