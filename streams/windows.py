"""The arithmetic of insights: score digests into steps, steps into sliding windows, and alerts.

Time is cut into steps. A digest belongs to the step in which its window ends or, where that was
closed without it, to the next one; a step is named by its end, in milliseconds since the epoch. The
window written at the end of a step sums the steps of the last `window_ms`. Sums, counts and
sketches merge, so the order of digests is of no matter, and predictions of one kind are never
summed with those of another.
"""

import base64
import binascii
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar, cast, get_args

import datasketches  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError, computed_field

from schemas.exceptions import ContractError
from schemas.records import Alert, ErrorSums, Kind, ScoreDigest
from streams.config import InsightsConfig

WINDOWS_KEY = "insights:windows"  # after the key prefix; a Redis stream, its ids are window ends
WINDOW_FIELD = b"window"

KLL_K = 200  # rank error about 1.3%, at some 2 KB a sketch
FREQUENT_LOG_SIZE = 10  # at most 768 names are counted at once, however many there are
_MILLISECOND = timedelta(milliseconds=1)
GONE_MS = 10_000  # a worker that is silent for so long while others are heard has gone
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

_SKETCHES = cast(Any, datasketches)  # the wheel has no type information
_KINDS: tuple[Kind, ...] = get_args(Kind)


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
            tiers=_merged(self.tiers, other.tiers, Sums()),
            stars=[a + b for a, b in zip(self.stars, other.stars, strict=True)],
        )


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
        apart = abs(self.since_ms - _milliseconds(since))
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


@dataclass
class WorkerStep:
    """One worker in one step: its newest lag, and how fast it predicted."""

    time: int = 0
    lag: int = 0
    count: int = 0
    spans: dict[int, int] = field(default_factory=dict[int, int])  # window end → length, ms

    def per_second(self) -> float:
        """Predictions a second while its digests' windows lasted, which need not fit the step."""
        return self.count * 1_000 / max(sum(self.spans.values()), 1)

    def has_gone(self, latest: int) -> bool:
        """Whether others were heard of until so much later that they have what it left."""
        return latest - self.time > GONE_MS + 2 * max(self.spans.values(), default=0)


@dataclass
class KindStep:
    """What the digests of one step and kind sum up to."""

    models: dict[str, Scored] = field(default_factory=dict[str, Scored])
    stable: Scored = field(default_factory=Scored)
    trials: dict[tuple[int, str], Scored] = field(  # by begin and version of canary or shadow
        default_factory=dict[tuple[int, str], Scored]
    )
    actions: Counter[str] = field(default_factory=Counter[str])
    items: Any = field(default_factory=lambda: _frequent())
    latency: Any = field(default_factory=lambda: _SKETCHES.kll_floats_sketch(KLL_K))
    workers: dict[str, WorkerStep] = field(default_factory=dict[str, WorkerStep])


@dataclass
class Step:
    """One step's digests: which have been counted, and their sums by kind."""

    digest_ids: set[str] = field(default_factory=set[str])
    kinds: dict[Kind, KindStep] = field(default_factory=dict[Kind, KindStep])


@dataclass
class Steps:
    """The steps that a window may still need. `closed` is the end of the last window written."""

    step_ms: int
    window_ms: int
    grace_ms: int
    keep_ms: int  # windows older than this are not kept
    closed: int | None = None
    resumed: int = 0  # what an earlier run closed: digests up to it are counted in its windows
    newest: int = 0  # latest end of a digest's window
    steps: dict[int, Step] = field(default_factory=dict[int, Step])
    idle: bool = True  # nothing happened in the last window written
    trial: Trial | None = None  # up to the last step closed


def make_steps(
    insights: InsightsConfig, closed: int | None = None, trial: Trial | None = None
) -> Steps:
    """No digests yet; `closed` is where an earlier run, perhaps of other steps, stopped.

    `trial`: of that run's last window.
    """
    step_ms = max(round(insights.step_seconds * 1_000), 1)
    count = max(round(insights.window_seconds * 1_000 / step_ms), 1)
    if closed is not None:
        closed = closed // step_ms * step_ms
    return Steps(
        step_ms=step_ms,
        window_ms=count * step_ms,
        grace_ms=round(insights.grace_seconds * 1_000),
        keep_ms=insights.keep_windows * step_ms,
        closed=closed,
        resumed=closed or 0,
        trial=trial,
    )


Outcome = Literal["counted", "duplicate", "late"]


def add(steps: Steps, digest: ScoreDigest, now_ms: int) -> tuple[Outcome, int]:
    """Count a digest; its outcome and its step.

    A digest that was counted before is a duplicate; one whose step lies before every window to
    come, or before those kept, is late. A worker's clock that is ahead of `now_ms` does not close
    steps early. Raises ContractError for a digest that mixes kinds or carries a broken sketch.
    """
    kind, latency = _checked(digest)
    end = min(_milliseconds(digest.window_end), now_ms)
    place = -(-end // steps.step_ms) * steps.step_ms
    oldest = now_ms - steps.keep_ms
    if steps.closed is not None:
        oldest = max(oldest, steps.closed + steps.step_ms - steps.window_ms)
    if place <= oldest:
        return "late", place
    if any(digest.digest_id in step.digest_ids for step in steps.steps.values()):
        return "duplicate", place
    if steps.closed is not None and steps.resumed < place <= steps.closed:
        place = steps.closed + steps.step_ms
    step = steps.steps.setdefault(place, Step())
    step.digest_ids.add(digest.digest_id)
    steps.newest = max(steps.newest, end)
    _add_to_kind(step.kinds.setdefault(kind, KindStep()), digest, latency, end)
    return "counted", place


def due(steps: Steps, now_ms: int, quiet: bool) -> list[int]:
    """Ends of the steps that can be closed, oldest first.

    While digests are being caught up with, their own time closes steps, so that no window misses
    what is still unread; when it is `quiet`, the wall clock does.
    """
    limit = (now_ms if quiet else min(now_ms, steps.newest)) - steps.grace_ms
    if steps.closed is None:
        first = min(steps.steps, default=limit + 1)
    else:
        first = steps.closed + steps.step_ms
        if not any(place > steps.closed - steps.window_ms for place in steps.steps):
            # Hours without digests: nothing between is worth a window.
            first = max(first, limit // steps.step_ms * steps.step_ms)
    return list(range(first, limit + 1, steps.step_ms))


def is_ahead(steps: Steps, now_ms: int) -> bool:
    """Whether the last window ends in the future by more than its length: a clock was put back.

    By less, the next windows are only waited for, as where another machine's clock was ahead.
    """
    return steps.closed is not None and steps.closed > now_ms + steps.window_ms


def close(steps: Steps, end_ms: int, insights: InsightsConfig) -> Window | None:
    """The window ending at `end_ms`; forgets the steps that no later window needs.

    None when nothing was scored, waits or was scored in the window before: hours of silence must
    not push out the windows kept.
    """
    start = end_ms - steps.window_ms
    members = [step for place, step in steps.steps.items() if start < place <= end_ms]
    last = steps.steps.get(end_ms, Step())
    kinds: dict[Kind, KindWindow] = {
        kind: _kind_window([step.kinds[kind] for step in members if kind in step.kinds], insights)
        for kind in _KINDS
        if any(kind in step.kinds for step in members)
    }
    for kind, step in last.kinds.items():
        kinds[kind].step = step.models
        kinds[kind].per_second = sum(worker.per_second() for worker in step.workers.values())
    if "interaction" in last.kinds:
        steps.trial = _continued(steps.trial, last.kinds["interaction"], end_ms, steps.step_ms)
    steps.closed = end_ms
    for place in [place for place in steps.steps if place <= start + steps.step_ms]:
        del steps.steps[place]
    was_idle, steps.idle = steps.idle, not any(_busy(kind) for kind in kinds.values())
    if was_idle and steps.idle:
        return None
    return Window(
        start_ms=start,
        end_ms=end_ms,
        step_ms=steps.step_ms,
        grace_ms=steps.grace_ms,
        kinds=kinds,
        trial=steps.trial,
    )


def alerts(window: Window, firing: Iterable[str], insights: InsightsConfig) -> list[Alert]:
    """Alerts for the thresholds that `window` crosses; sets `window.firing`.

    A rule that fires (it stands in `firing`, the window before's) stays silent until its value
    has been seen at `clear_ratio` of its threshold or below. Each trial fires for itself.
    """
    trial = window.trial
    trial_name = f"canary/{trial.version}/{trial.since_ms}" if trial else ""
    before = {name for name in firing if not name.startswith("canary/") or name == trial_name}
    still = set(before)
    raised: list[Alert] = []
    for kind, summed in window.kinds.items():
        rules = _rules(kind, summed, insights)
        if kind == "interaction" and trial and trial.end_ms > window.start_ms:
            rules += _trial_rules(trial, insights)
        for rule, value, threshold, text in rules:
            name = trial_name if rule == "canary" else f"{rule}/{kind}"
            fired = name in before
            if value <= threshold * (insights.clear_ratio if fired else 1.0):
                still.discard(name)
                continue
            still.add(name)
            if not fired:
                raised.append(
                    Alert(
                        alert_id=f"{rule}-{kind}-{window.end_ms}",
                        rule=rule,
                        severity="critical" if value > 2 * threshold else "warning",
                        window_start=_time(window.start_ms),
                        window_end=_time(window.end_ms),
                        value=value,
                        threshold=threshold,
                        subject=kind,
                        text=text,
                    )
                )
    window.firing = sorted(still)
    return raised


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


def encode_latency(milliseconds: NDArray[np.float32]) -> str | None:
    """The `latency_ms` of a digest: a KLL sketch in base64; None for no values."""
    if not milliseconds.size:
        return None
    return base64.b64encode(_sketch_of(milliseconds)).decode()


def _sketch_of(values: NDArray[np.float32]) -> bytes:
    sketch = _SKETCHES.kll_floats_sketch(KLL_K)
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


def _checked(digest: ScoreDigest) -> tuple[Kind, Any]:
    """The digest's one kind and its latency sketch."""
    if len(digest.kinds) != 1 or not set(digest.kinds) <= set(_KINDS):
        raise ContractError(
            f"Score digest {digest.digest_id} of {digest.worker} counts kinds "
            f"{sorted(digest.kinds)}: its errors belong to none. Send one of {list(_KINDS)} each."
        )
    kind = cast(Kind, next(iter(digest.kinds)))
    if digest.latency_ms is None:
        return kind, None
    try:
        data = base64.b64decode(digest.latency_ms, validate=True)
        if not _is_sound(data):
            raise ValueError("its parts do not fit together")
        sketch = _SKETCHES.kll_floats_sketch.deserialize(data)
    except (binascii.Error, ValueError, IndexError, RuntimeError) as error:
        raise ContractError(
            f"Score digest {digest.digest_id} of {digest.worker}: latency_ms is no KLL sketch of "
            f"floats in base64 ({error})."
        ) from error
    return kind, sketch


def _add_to_kind(step: KindStep, digest: ScoreDigest, latency: Any, end: int) -> None:
    count, version = sum(digest.kinds.values()), digest.model_version
    if count:
        scored = Scored(
            sums=_sums(count, digest.errors, digest.predicted_sum),
            tiers={
                tier: _sums(tier_count, digest.errors_by_tier.get(tier, ErrorSums()))
                for tier, tier_count in digest.tiers.items()
            },
            stars=digest.stars,
        )
        if digest.role == "stable":
            step.stable += scored
        else:
            trial = 0 if digest.tried_since is None else _milliseconds(digest.tried_since), version
            step.trials[trial] = step.trials.get(trial, Scored()) + scored
        if digest.role != "shadow":
            step.models[version] = step.models.get(version, Scored()) + scored
    if digest.role == "shadow":
        return
    step.actions.update(digest.actions)
    for name, weight in digest.top_items.items():
        if weight > 0:
            step.items.update(name, weight)
    if latency is not None:
        step.latency.merge(latency)
    worker = step.workers.setdefault(digest.worker, WorkerStep())
    worker.count += count
    worker.spans[end] = max(round((digest.window_end - digest.window_start) / _MILLISECOND), 0)
    worker.time, worker.lag = max((worker.time, worker.lag), (end, digest.lag))


def _sums(count: int, errors: ErrorSums, total: float = 0.0) -> Sums:
    return Sums(
        count=count,
        total=total,
        rated=errors.count,
        squared=errors.squared,
        absolute=errors.absolute,
        rating=errors.rating,
        predicted=errors.predicted,
    )


def _kind_window(steps: list[KindStep], insights: InsightsConfig) -> KindWindow:
    models: dict[str, Scored] = {}
    actions: Counter[str] = Counter()
    items = _frequent()
    latency = _SKETCHES.kll_floats_sketch(KLL_K)
    newest: dict[str, WorkerStep] = {}
    for step in steps:
        models = _merged(models, step.models, Scored())
        actions.update(step.actions)
        items.merge(step.items)
        latency.merge(step.latency)
        for name, worker in step.workers.items():
            if name not in newest or worker.time >= newest[name].time:
                newest[name] = worker
    latest = max((worker.time for worker in newest.values()), default=0)
    here = [worker for worker in newest.values() if not worker.has_gone(latest)]
    return KindWindow(
        models=models,
        step={},
        per_second=0.0,
        actions=dict(actions.most_common()),
        top_items=_top(items, insights.top),
        latency_ms=_quantiles(latency),
        lag=sum(worker.lag for worker in here),
        workers=len(here),
    )


def _quantiles(latency: Any) -> dict[str, float] | None:
    if latency.is_empty():
        return None
    found = latency.get_quantiles(list(QUANTILES.values()))
    quantiles = dict(zip(QUANTILES, (float(value) for value in found), strict=True))
    return quantiles | {"max": float(latency.get_max_value())}


def _rules(
    kind: Kind, summed: KindWindow, insights: InsightsConfig
) -> list[tuple[str, float, float, str]]:
    """Rule, value, threshold and text of what can be judged."""
    limit = insights.highest_lag
    text = f"{summed.lag:,} records wait to be scored ({kind}), more than {limit:,}."
    rules = [("lag", float(summed.lag), float(limit), text)]
    sums = summed.total().sums
    if sums.rated >= insights.least_rated:
        rmse = sums.rmse or 0.0
        predicted, true = sums.predicted / sums.rated, sums.rating / sums.rated
        highest = insights.highest_rmse
        text = f"RMSE {rmse:.2f} over {sums.rated:,} ratings ({kind}), above {highest:g}."
        rules.append(("rmse", rmse, highest, text))
        text = (
            f"Mean predicted rating {predicted:.2f}, mean true rating {true:.2f} over "
            f"{sums.rated:,} ratings ({kind}): more than {insights.largest_drift:g} apart."
        )
        rules.append(("drift", abs(predicted - true), insights.largest_drift, text))
    return rules


def _trial_rules(trial: Trial, insights: InsightsConfig) -> list[tuple[str, float, float, str]]:
    """The same of a trial."""
    canary, stable, limit = trial.canary.sums, trial.stable.sums, insights.worse_canary
    if min(canary.rated, stable.rated) < insights.least_rated:
        return []
    above = trial.standard_errors or 0.0
    text = (
        f"{trial.version} on trial: MAE {canary.mae or 0:.2f} over {canary.rated:,} ratings, that "
        f"of stable {stable.mae or 0:.2f} over {stable.rated:,}: {above:.1f} standard errors "
        f"above it, more than {limit:g}."
    )
    return [("canary", above, limit, text)]


def _continued(trial: Trial | None, step: KindStep, end: int, step_ms: int) -> Trial | None:
    """A trial with one more step; a later one, perhaps of the same version, takes its place."""
    for (since, version), scored in step.trials.items():
        if trial is None or (trial.since_ms, trial.version) != (since, version):
            if trial is not None and since < trial.since_ms:
                continue  # of a worker that has not heard of the later one
            trial = Trial(version=version, since_ms=since, start_ms=end - step_ms, end_ms=end)
        trial = trial.model_copy(
            update={
                "end_ms": end,
                "canary": trial.canary + scored,
                "stable": trial.stable + step.stable,
            }
        )
    return trial


def _busy(summed: KindWindow) -> bool:
    return summed.lag > 0 or any(scored.sums.count for scored in summed.models.values())


_Sum = TypeVar("_Sum", Sums, Scored)


def _merged(one: dict[str, _Sum], other: dict[str, _Sum], zero: _Sum) -> dict[str, _Sum]:
    return one | {name: one.get(name, zero) + value for name, value in other.items()}


def _frequent() -> Any:
    return _SKETCHES.frequent_strings_sketch(FREQUENT_LOG_SIZE)


def _top(sketch: Any, most: int) -> list[tuple[str, int]]:
    """The most frequent names, biggest first; names of equal counts in their own order."""
    kind = _SKETCHES.frequent_items_error_type.NO_FALSE_NEGATIVES
    rows = [(str(name), int(estimate)) for name, estimate, _, _ in sketch.get_frequent_items(kind)]
    return sorted(rows, key=lambda row: (-row[1], row[0]))[:most]


def _milliseconds(time: datetime) -> int:
    return round(time.timestamp() * 1_000)


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1_000, UTC)
