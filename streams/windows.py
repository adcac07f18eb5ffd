"""What a window of insights is: what was predicted in a span of time, as the dashboard reads it.

Predictions of one kind are never summed with those of another, and those of a shadow stand in its
trial alone. Windows lie in the store, in a stream whose ids are their ends.
"""

import math
from datetime import datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, computed_field

from schemas.records import Kind

WINDOWS_KEY = "insights:windows"  # after the key prefix; a Redis stream, its ids are window ends
WINDOW_FIELD = b"window"


class Sums(BaseModel):
    """Predictions counted, and their errors where the true rating was seen."""

    count: int = 0
    total: float = 0.0  # of all predicted ratings
    rated: int = 0
    squared: float = 0.0
    absolute: float = 0.0
    rating: float = 0.0  # true ratings
    predicted: float = 0.0  # predicted ratings of those rated

    def __add__(self, other: "Sums") -> "Sums":
        named = Sums.model_fields
        return Sums(**{name: getattr(self, name) + getattr(other, name) for name in named})

    @computed_field
    @property
    def rmse(self) -> float | None:
        """Root mean squared error in stars; None when nothing was rated."""
        return (max(self.squared, 0.0) / self.rated) ** 0.5 if self.rated else None

    @computed_field
    @property
    def mae(self) -> float | None:
        """Mean absolute error in stars; None when nothing was rated."""
        return self.absolute / self.rated if self.rated else None

    @computed_field
    @property
    def mean_rating(self) -> float | None:
        """Mean true rating; None when nothing was rated."""
        return self.rating / self.rated if self.rated else None

    @computed_field
    @property
    def mean_predicted(self) -> float | None:
        """Mean predicted rating of what was rated, to be held against `mean_rating`."""
        return self.predicted / self.rated if self.rated else None


class Scored(BaseModel):
    """What one model predicted: all of it, by tier, and how often which number of stars."""

    sums: Sums = Sums()
    tiers: dict[str, Sums] = {}
    stars: list[int] = [0, 0, 0, 0, 0]

    def __add__(self, other: "Scored") -> "Scored":
        return Scored(
            sums=self.sums + other.sums,
            tiers=merged(self.tiers, other.tiers, Sums()),
            stars=[a + b for a, b in zip(self.stars, other.stars, strict=True)],
        )


_Sum = TypeVar("_Sum", Sums, Scored)


def merged(one: dict[str, _Sum], other: dict[str, _Sum], zero: _Sum) -> dict[str, _Sum]:
    """Sums by name added up; `zero` is that of a name that `one` lacks."""
    return one | {name: one.get(name, zero) + value for name, value in other.items()}


class KindWindow(BaseModel):
    """Predictions of one kind: in the sliding window, and in its last step alone."""

    models: dict[str, Scored]
    step: dict[str, Scored]
    per_second: float  # in the last step
    actions: dict[str, int]
    top_items: list[tuple[str, int]]
    lag: int
    workers: int
    latency_ms: dict[str, float] | None = None  # p50, p90, p99 and max

    def total(self) -> Scored:
        """All models together, over the sliding window."""
        return sum(self.models.values(), Scored())


class Trial(BaseModel):
    """Interactions of a version on trial and, of the same steps, those of stable.

    Times are milliseconds since the epoch. A shadow predicts the events that stable answers, a
    canary those of other users.
    """

    version: str
    since_ms: int = 0  # when the registry began it; 0: not told
    start_ms: int
    end_ms: int  # of the last step in which it predicted
    canary: Scored = Scored()
    stable: Scored = Scored()

    def is_of(self, version: str, since: datetime | None) -> bool:
        """Whether it is the trial of a version that began then, as the registry has it."""
        if since is None or not self.since_ms:  # neither tells of every trial
            return self.version == version
        apart = abs(self.since_ms - milliseconds(since))
        return self.version == version and apart <= 1  # records have no microseconds

    @computed_field
    @property
    def standard_errors(self) -> float | None:
        """By how many standard errors the canary's mean absolute error is above stable's.

        None before both have ratings that differ in error. Errors are taken as if none had to do
        with another: of a shadow, which errs with stable, the true number lies further from 0.
        """
        means, variances = zip(
            *(_mean_and_variance(each.sums) for each in (self.canary, self.stable)), strict=True
        )
        if not sum(variances) > 0:
            return None
        return (means[0] - means[1]) / sum(variances) ** 0.5


def _mean_and_variance(sums: Sums) -> tuple[float, float]:
    """The mean absolute error, and the variance of this mean; nan without ratings."""
    if not sums.rated:
        return math.nan, math.nan
    mean = sums.absolute / sums.rated
    return mean, max(sums.squared / sums.rated - mean**2, 0.0) / sums.rated


class Window(BaseModel):
    """A sliding window as the dashboard reads it. Times are milliseconds since the epoch."""

    start_ms: int
    end_ms: int
    step_ms: int
    grace_ms: int = 0  # it was written so long after its end, at least
    kinds: dict[Kind, KindWindow]
    trial: Trial | None = None  # the newest one, also when it is over
    firing: list[str] = []  # rules beyond their thresholds, as rule/kind or canary/version/begin


def last_window(client: Any, key: str) -> Window | None:
    """The newest window in the store's stream; raises the errors of the client.

    Of one that another release wrote in another form nothing is known but its end.
    """
    rows: Any = client.xrevrange(key, count=1)
    if not rows:
        return None
    name, fields = rows[0]
    try:
        return Window.model_validate_json(fields[WINDOW_FIELD])
    except (ValidationError, KeyError):
        end = int(name.partition(b"-")[0])
        return Window(start_ms=end, end_ms=end, step_ms=1, kinds={})


def milliseconds(time: datetime) -> int:
    """A time as windows have it, since the epoch."""
    return round(time.timestamp() * 1_000)
