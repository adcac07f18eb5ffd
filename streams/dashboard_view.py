"""From what the dashboard follows to what it says: stages, totals, model swaps, the JSON API.

Functions of a snapshot alone. A range is so many milliseconds back from the newest window.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel

from model.ladder import VERSION as LADDER
from schemas.records import Kind
from streams.config import KafkaConfig
from streams.dashboard_data import Snapshot
from streams.windows import KindWindow, Scored, Sums, Trial, Window

SILENT_STEPS = 4  # steps without a window until the page says that nothing comes any more
SILENT_MS = 15_000  # beyond a step and its grace


@dataclass(frozen=True)
class Stage:
    """One thing that must be there before the page has all to show; they come in this order."""

    name: str
    done: bool
    title: str
    text: str
    command: str = ""


@dataclass(frozen=True)
class Swap:
    """A model version that came into service."""

    at_ms: int
    version: str
    how: str  # promote, rollback or seen


class ModelRow(BaseModel):
    """A model version and how its predictions fared."""

    version: str
    name: str
    role: str  # in service, canary 10%, shadow, or empty
    since_ms: int | None
    by: str = ""
    reason: str = ""
    sums: Sums


def stages(snapshot: Snapshot, kafka: KafkaConfig) -> list[Stage]:
    """What the page waits for and has got."""
    windows, topics = snapshot.windows, snapshot.topics
    scored = bool(snapshot.predictions) or any(_count(window) for window in windows)
    asked = snapshot.broker.up is not None
    broker_text = snapshot.broker.reason or f"Asking {kafka.bootstrap_servers} …"
    stable = snapshot.registry.stable
    return [
        Stage("broker", snapshot.broker.up is True, "Kafka answers", broker_text),
        Stage(
            "store",
            snapshot.store.up is True,
            "The store answers",
            snapshot.store.reason or "Asking Redis …",
        ),
        Stage(
            "topics",
            asked and snapshot.broker.up is True and not topics.missing,
            "Topics exist",
            f"Missing: {', '.join(topics.missing) or 'not known yet'}.",
            "starcast topics apply",
        ),
        Stage(
            "events",
            topics.events > 0 or scored,
            "Events arrive",
            "No reviews or behavior yet: nothing has been produced to Kafka.",
            "starcast produce FILE",
        ),
        Stage(
            "predictions",
            scored,
            "The scorer predicts",
            f"{topics.events:,} events are in Kafka, but none has been scored.",
            "starcast run scorer items catalog",
        ),
        Stage(
            "insights",
            bool(windows),
            "Insights sums up",
            "There are predictions, but no window of them in the store yet.",
            "starcast run insights",
        ),
        Stage(
            "ratings",
            any(rated(window) for window in windows),
            "Ratings come in",
            "No true rating seen yet: errors show as soon as a review with stars is scored.",
        ),
        Stage(
            "model",
            stable is not None,
            "A model is in service",
            "Predictions come from running means (cold start) until a first model is trained.",
            "starcast retrain",
        ),
    ]


def rated(window: Window) -> int:
    """Interactions in a window whose true rating was seen."""
    kind = window.kinds.get("interaction")
    return sum(scored.sums.rated for scored in kind.models.values()) if kind else 0


def in_range(windows: Sequence[Window], range_ms: int | None) -> list[Window]:
    """The windows of the last `range_ms` before the newest; all for None."""
    if range_ms is None or not windows:
        return list(windows)
    first = windows[-1].end_ms - range_ms
    return [window for window in windows if window.end_ms > first]


def totals(windows: Iterable[Window], kind: Kind) -> dict[str, Scored]:
    """What each model version predicted of a kind; every step counts once."""
    found: dict[str, Scored] = {}
    for window in windows:
        if kind in window.kinds:
            for version, scored in window.kinds[kind].step.items():
                found[version] = found.get(version, Scored()) + scored
    return found


def together(scored: Iterable[Scored]) -> Scored:
    """All versions in one."""
    return sum(scored, Scored())


def newest(snapshot: Snapshot, kind: Kind, now_ms: int) -> KindWindow | None:
    """The newest window's part of a kind; None when there is none or it is too old to be now."""
    if not snapshot.windows or silent(snapshot, now_ms):
        return None
    return snapshot.windows[-1].kinds.get(kind)


def last_busy(windows: Sequence[Window]) -> KindWindow | None:
    """The interactions of the newest window that has any."""
    kinds = (window.kinds.get("interaction") for window in reversed(windows))
    return next((kind for kind in kinds if kind and kind.models), None)


def silent(snapshot: Snapshot, now_ms: int) -> bool:
    """Whether windows have stopped coming; one of the future tells of a clock, not of now."""
    if not snapshot.windows:
        return True
    last = snapshot.windows[-1]
    usual = max(SILENT_STEPS * last.step_ms, SILENT_MS + last.step_ms + last.grace_ms)
    return abs(now_ms - last.end_ms) > usual


def swaps(snapshot: Snapshot) -> list[Swap]:
    """When which model version came into service, oldest first.

    The registry tells; of versions that it does not know, the first window that names them.
    """
    told = [
        Swap(round(change.at.timestamp() * 1_000), change.version, change.what)
        for change in snapshot.registry.history
        if change.what in ("promote", "rollback")
    ]
    known = {change.version for change in snapshot.registry.history} | {LADDER}
    seen: list[Swap] = []
    for index, window in enumerate(snapshot.windows):
        kind = window.kinds.get("interaction")
        for version in kind.step if kind else ():
            if version not in known:
                known.add(version)
                if index:
                    seen.append(Swap(window.end_ms, version, "seen"))
    return sorted(told + seen, key=lambda swap: swap.at_ms)


def versions(snapshot: Snapshot) -> list[str]:
    """All model versions in the order of their coming; the ladder first."""
    order = dict.fromkeys([LADDER, *(swap.version for swap in swaps(snapshot))])
    if snapshot.registry.canary is not None:
        order[snapshot.registry.canary.version] = None
    for window in snapshot.windows:
        for kind in window.kinds.values():
            order |= dict.fromkeys(kind.step)
    return list(order)


def short(version: str) -> str:
    """A version as charts name it: the end of its name, which tells versions apart."""
    if version == LADDER:
        return "cold start"
    return version.rpartition("-")[2][:8] or version


def trial(snapshot: Snapshot) -> Trial | None:
    """What is counted of the version that is on trial now."""
    registry = snapshot.registry
    named, since = registry.canary, registry.tried_since
    found = snapshot.windows[-1].trial if snapshot.windows else None
    return found if named and found and found.is_of(named.version, since) else None


def model_rows(snapshot: Snapshot, found: Mapping[str, Scored]) -> list[ModelRow]:
    """Versions with predictions among `found` (see `totals`) or a part to play, newest first."""
    registry = snapshot.registry
    stable = registry.stable.version if registry.stable else LADDER
    canary = registry.canary
    since = {swap.version: swap.at_ms for swap in swaps(snapshot)}
    told = {change.version: change for change in registry.history}
    rows: list[ModelRow] = []
    for version in reversed(versions(snapshot)):
        sums = found.get(version, Scored()).sums
        role, since_ms = "", since.get(version)
        if version == stable:
            role = "in service"
        elif canary is not None and version == canary.version:
            role, since_ms = canary.role, round(canary.at.timestamp() * 1_000)
        if not (sums.count or role):
            continue
        change = told.get(version)
        rows.append(
            ModelRow(
                version=version,
                name=short(version),
                role=role,
                since_ms=since_ms,
                by=change.by if change else "",
                reason=change.reason if change else "",
                sums=sums,
            )
        )
    return rows


def summary(snapshot: Snapshot, kafka: KafkaConfig, now_ms: int) -> dict[str, Any]:
    """The numbers of the page, for programs."""
    registry = snapshot.registry
    return {
        "now_ms": now_ms,
        "servers": {
            name: {"up": link.up, "reason": link.reason or None}
            for name, link in (
                ("kafka", snapshot.broker),
                ("store", snapshot.store),
                ("models", snapshot.models),
            )
        },
        "waiting_for": [stage.name for stage in stages(snapshot, kafka) if not stage.done],
        "events": snapshot.topics.events,
        "predictions": snapshot.topics.predictions,
        "stable": registry.stable.model_dump(mode="json") if registry.stable else None,
        "canary": registry.canary.model_dump(mode="json") if registry.canary else None,
        "trial": now_tried.model_dump(mode="json") if (now_tried := trial(snapshot)) else None,
        "swaps": [vars(swap) for swap in swaps(snapshot)],
        "last_window_ms": snapshot.windows[-1].end_ms if snapshot.windows else None,
        "silent": silent(snapshot, now_ms),
        "kinds": {
            kind: _kind_summary(snapshot, kind, now_ms)
            for kind in cast(tuple[Kind, ...], ("interaction", "review", "request"))
            if any(kind in window.kinds for window in snapshot.windows)
        },
        "alerts": [alert.model_dump(mode="json") for alert in snapshot.alerts],
    }


def _kind_summary(snapshot: Snapshot, kind: Kind, now_ms: int) -> dict[str, Any]:
    found = totals(snapshot.windows, kind)
    now = newest(snapshot, kind, now_ms)
    return {
        "per_second": now.per_second if now else None if silent(snapshot, now_ms) else 0.0,
        "lag": now.lag if now else None,
        "workers": now.workers if now else 0,
        "latency_ms": now.latency_ms if now else None,
        "window": now.total().sums.model_dump() if now else None,
        "all": together(found.values()).model_dump(),
        "models": {version: scored.model_dump() for version, scored in found.items()},
    }


def _count(window: Window) -> int:
    return sum(
        scored.sums.count for kind in window.kinds.values() for scored in kind.models.values()
    )
