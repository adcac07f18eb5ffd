"""Score digests into steps, and steps into sliding windows.

Time is cut into steps. A digest belongs to the step in which its window ends or, where that was
closed without it, to the next one; a step is named by its end, in milliseconds since the epoch. The
window written at the end of a step sums the steps of the last `window_ms`. Sums, counts and
sketches merge, so the order of digests is of no matter.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, cast, get_args

from schemas.exceptions import ContractError
from schemas.records import ErrorSums, Kind, ScoreDigest
from streams import sketches
from streams.config import InsightsConfig
from streams.windows import KindWindow, Scored, Sums, Trial, Window, merged, milliseconds

GONE_MS = 10_000  # a worker that is silent for so long while others are heard has gone
_MILLISECOND = timedelta(milliseconds=1)
_KINDS: tuple[Kind, ...] = get_args(Kind)


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
    items: Any = field(default_factory=sketches.name_sketch)
    latency: Any = field(default_factory=sketches.latency_sketch)
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
    end = min(milliseconds(digest.window_end), now_ms)
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
        return kind, sketches.decode_latency(digest.latency_ms)
    except ContractError as error:
        raise ContractError(
            f"Score digest {digest.digest_id} of {digest.worker}: {error}"
        ) from error


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
            trial = 0 if digest.tried_since is None else milliseconds(digest.tried_since), version
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
    items = sketches.name_sketch()
    latency = sketches.latency_sketch()
    newest: dict[str, WorkerStep] = {}
    for step in steps:
        models = merged(models, step.models, Scored())
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
        top_items=sketches.most_frequent(items, insights.top),
        latency_ms=sketches.quantiles(latency),
        lag=sum(worker.lag for worker in here),
        workers=len(here),
    )


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
