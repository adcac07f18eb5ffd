"""Whether a process grows: the slope of its memory over time, and how sure it is.

Memory is sampled every few seconds, and what one sample says the next says again. So samples are
first averaged over blocks of a minute, long enough for batches, flushes and collections to even
out; the least-squares line goes through the block means; and what correlation is left between
neighbouring residuals (compactions come minutes apart) widens its standard error as that of an
autoregressive series of first order. A short series shows less correlation than it has, and a line
laid through it takes some away. That is put back, else the bound of an hour would hold in 77 to 86
runs of a hundred where neighbours correlate by 0.9 or more; it holds in 89 to 94. A moving block
bootstrap would do as well, but needs more blocks than an hour has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

BLOCK_SECONDS = 60.0
LEAST_BLOCKS = 12  # in a short run blocks are shorter than a minute
CONFIDENCE = 0.95
MOST_CORRELATION = 0.95  # a residual that never comes back would make the bound infinite
HIGHEST_BOUND = 5.0  # percent an hour
SPARE_HANDLES = 2  # a connection more or less is no leak
WARM_UP_SHARE, LONGEST_WARM_UP = 0.25, 600.0  # of the time measured; seconds

Floats = NDArray[np.float64]
Sample = Mapping[str, Any]  # `seconds`, and by process `rss`, `uss`, `handles`, `threads`


@dataclass(frozen=True)
class Trend:
    """A line through block means; slope and bound in percent of the mean an hour."""

    mean: float
    slope: float
    bound: float  # the slope is below it with 95% confidence; infinite where there is too little
    blocks: int
    correlation: float  # of neighbouring residuals


@dataclass(frozen=True)
class Judged:
    """What one process did after the warm-up."""

    process: str
    resident: Trend  # bytes
    unique: Trend  # bytes that the process alone has
    handles: tuple[float, float]  # medians of the first and the last quarter
    threads: tuple[float, float]  # told only: native libraries' pools come and go

    @property
    def good(self) -> bool:
        """Whether neither memory nor file handles grow."""
        first, last = self.handles
        return self.resident.bound < HIGHEST_BOUND and last <= first + SPARE_HANDLES

    @property
    def word(self) -> str:
        """The verdict in a word or two."""
        if self.good:
            return "good"
        first, last = self.handles
        grows = self.resident.slope >= HIGHEST_BOUND or last > first + SPARE_HANDLES
        return "grows" if grows else "too unsteady to tell"

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"good": self.good, "verdict": self.word, **asdict(self)}


def judge(samples: Sequence[Sample]) -> list[Judged]:
    """Each process after the warm-up, the first quarter of the time or ten minutes."""
    seconds = np.array([each["seconds"] for each in samples], np.float64)
    warm_up = min(WARM_UP_SHARE * float(np.ptp(seconds)), LONGEST_WARM_UP)
    kept = seconds - seconds[0] >= warm_up

    def values(process: str, what: str) -> Floats:
        found = [each["processes"][process][what] for each in samples]
        return np.array(found, np.float64)[kept]

    return [
        Judged(
            process,
            resident=trend(seconds[kept], values(process, "rss")),
            unique=trend(seconds[kept], values(process, "uss")),
            handles=_quarters(values(process, "handles")),
            threads=_quarters(values(process, "threads")),
        )
        for process in samples[0]["processes"]
    ]


def trend(seconds: Floats, values: Floats) -> Trend:
    """The trend of n values at n times."""
    means, at = _block_means(seconds, values)
    count, mean = len(means), float(values.mean())
    if count < 4:
        return Trend(mean, 0.0, np.inf, count, 0.0)
    hours = (at - at.mean()) / 3_600
    spread = float(hours @ hours)
    slope = float(hours @ means) / spread
    residuals = means - means.mean() - slope * hours
    error = np.sqrt(float(residuals @ residuals) / (count - 2) / spread)
    correlation = _correlation(residuals)
    inflation = (1 + correlation) / (1 - correlation)
    freedom = max(count / inflation - 2, 1.0)
    bound = slope + float(stats.t.ppf(CONFIDENCE, freedom)) * error * np.sqrt(inflation)
    percent = 100 / mean
    return Trend(mean, slope * percent, float(bound) * percent, count, correlation)


def _block_means(seconds: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Means of values and times by block; the last block only if it is whole."""
    since = seconds - seconds[0]
    size = min(BLOCK_SECONDS, (float(since[-1]) or 1.0) / LEAST_BLOCKS)
    blocks = (since // size).astype(int)
    kept = blocks < max(int(since[-1] // size), 1)
    numbers, index = np.unique(blocks[kept], return_inverse=True)
    count = np.bincount(index, minlength=len(numbers))
    return np.bincount(index, values[kept]) / count, np.bincount(index, seconds[kept]) / count


def _correlation(residuals: Floats) -> float:
    """Of neighbouring residuals; none where it is negative, which would narrow the bound.

    That of n residuals of a line is about (2 + 4 r) / n below the true one, r.
    """
    square, count = float(residuals @ residuals), len(residuals)
    if square <= 0:
        return 0.0
    seen = residuals[1:] @ residuals[:-1] / square
    return float(np.clip((count * seen + 2) / max(count - 4, 1), 0, MOST_CORRELATION))


def _quarters(values: Floats) -> tuple[float, float]:
    """Medians of the first and last quarter: a leak stays, an open file of a moment does not."""
    quarter = max(len(values) // 4, 1)
    return median(values[:quarter].tolist()), median(values[-quarter:].tolist())
