"""Results of a long run, each made once: what was cut short goes on from there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class Kept:
    """Arrays by name in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of `name`: made once."""
        path = self.folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as found:
                return dict(found)
        made = make()
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **cast(Any, made))
        part.replace(path)
        return made

    def trials(self, whose: str) -> Callable[[str, Callable[[], float]], float]:
        """What gives the number of a name: made once."""

        def number(name: str, make: Callable[[], float]) -> float:
            return float(
                self.get(f"{whose} {name}", lambda: {"number": np.array(make())})["number"]
            )

        return number
