"""Alerts: the rules that a window is judged by, and which of them it crosses."""

from collections.abc import Iterable
from datetime import UTC, datetime

from schemas.records import Alert, Kind
from streams.config import InsightsConfig
from streams.windows import KindWindow, Trial, Window


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


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1_000, UTC)
