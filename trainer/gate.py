"""The gate: whether a new model may serve.

On the newest rows, which it was not fitted on, a candidate must be
1. not worse than the model in service, nor than the running bias, which is served without a model:
   not significantly (paired bootstrap of the difference in squared error), and its RMSE at most
   `worse_allowed` above. The model in service was fitted to all rows of its time, the candidate
   that is judged was not, so they are compared on rows that are newer, where there are enough,
2. better than every baseline that it claims to beat,
3. calibrated: small expected calibration error, intervals that cover. Where rows are so few that
   a model that is right may exceed these bounds by chance, more is allowed.

A baseline is claimed when the candidate beat it significantly on its validation rows (`claims`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from model.distribution import HIGHEST, LOWEST
from model.ids import Hashes
from trainer.config import GateConfig
from trainer.metrics import (
    Calibration,
    Chance,
    Difference,
    Floats,
    calibrated_by_chance,
    paired,
    scores,
    shown_difference,
)

REFERENCE = "bias_running"  # what is served when there is no model
CHANCE_RESAMPLES = 500  # of the newest rows, each of them whole: it takes longer than a bootstrap's


@dataclass(frozen=True)
class Check:
    """One condition of the gate, and what was measured, in words."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """Whether the candidate may serve, with every check."""

    passed: bool
    checks: tuple[Check, ...]

    @property
    def reason(self) -> str:
        """The failed checks, or all when none failed, in one line."""
        shown = [check for check in self.checks if not check.passed] or list(self.checks)
        return "; ".join(check.reason for check in shown)


def claims(
    rating: Floats,
    candidate: Floats,
    baselines: Mapping[str, Floats],
    config: GateConfig,
    seed: int,
) -> tuple[str, ...]:
    """The baselines that the candidate beat significantly, on its validation rows.

    Args:
        rating: (n) true ratings.
        candidate: (n) predicted ratings.
        baselines: name to predicted ratings (n).
        config: confidence and resamples of the paired bootstrap.
        seed: of the bootstrap.
    """
    return tuple(
        name
        for name, other in baselines.items()
        if difference(rating, candidate, other, config, seed).high < 0
    )


def judge(
    rating: Floats,
    candidate: Floats,
    stable: Floats | None,
    unseen: NDArray[np.bool_],
    baselines: Mapping[str, Floats],
    claimed: Sequence[str],
    calibration: Calibration,
    chance: Callable[[], Chance],
    config: GateConfig,
    seed: int,
) -> Verdict:
    """Judge a candidate on the newest rows.

    Args:
        rating: (n) true ratings.
        candidate: (n) predicted ratings of a model that was not fitted on these rows.
        stable: (n) predicted ratings of the model in service, or None when there is none.
        unseen: (n) which rows are newer than all that the model in service was fitted to.
        baselines: name to predicted ratings (n), `REFERENCE` among them.
        claimed: names of `claims`.
        calibration: the candidate's, on these rows.
        chance: tells what its distributions and intervals would show on them if they were right;
            asked where a bound is exceeded alone, for of many rows it takes minutes.
        config: bounds.
        seed: of the bootstrap.
    """
    if len(rating) < config.least_rows:
        few = f"only {len(rating)} newest rated rows, {config.least_rows} are needed to judge"
        return Verdict(False, (Check("rows", False, few),))
    checks = [_better(name, rating, candidate, baselines[name]) for name in claimed]
    every = np.ones(len(rating), bool)
    served = np.clip(baselines[REFERENCE], LOWEST, HIGHEST)  # as a distribution needs it
    compared = [("running bias", served, every)]
    if stable is not None:
        compared.append(
            ("stable model", stable, unseen if unseen.sum() >= config.least_unseen else every)
        )
    checks += [
        _not_worse(name, rating[rows], candidate[rows], other[rows], config, seed)
        for name, other, rows in compared
    ]
    largest, least = config.largest_ece, config.least_coverage
    if calibration.ece > largest or calibration.coverage < least:
        shown = chance()
        largest, least = max(largest, shown.ece), min(least, shown.coverage)
    checks.append(
        Check(
            "calibration error",
            calibration.ece <= largest,
            f"expected calibration error {calibration.ece:.3f}, at most {largest:.3g}",
        )
    )
    checks.append(
        Check(
            "interval coverage",
            calibration.coverage >= least,
            f"80% intervals hold {calibration.coverage:.0%} of ratings, at least {least:.0%}",
        )
    )
    return Verdict(all(check.passed for check in checks), tuple(checks))


def _better(name: str, rating: Floats, candidate: Floats, other: Floats) -> Check:
    ours, theirs = scores(rating, candidate).rmse, scores(rating, other).rmse
    return Check(
        f"better than {name}",
        ours < theirs,
        f"claims to beat {name}: RMSE {ours:.4f} against {theirs:.4f}",
    )


def _not_worse(
    name: str,
    rating: Floats,
    candidate: Floats,
    other: Floats,
    config: GateConfig,
    seed: int,
) -> Check:
    gap = difference(rating, candidate, other, config, seed)
    ours, theirs = scores(rating, candidate).rmse, scores(rating, other).rmse
    near = ours <= theirs * (1 + config.worse_allowed)
    return Check(
        f"not worse than the {name}",
        near and gap.low <= 0,
        f"{name}, {len(rating):,} rows: RMSE {ours:.4f} against {theirs:.4f}, difference in "
        f"squared error {shown_difference(asdict(gap))}",
    )


def difference(
    rating: Floats,
    model: Floats,
    other: Floats,
    config: GateConfig,
    seed: int,
    users: Hashes | None = None,
) -> Difference:
    """`metrics.paired` of ratings and predictions (n), as the gate's settings say."""
    return paired(
        rating,
        model,
        other,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=seed,
        users=users,
    )


def by_chance(
    distribution: Floats, low: Floats, high: Floats, config: GateConfig, seed: int
) -> Chance:
    """`metrics.calibrated_by_chance` of predictions (n), as the gate's settings say."""
    return calibrated_by_chance(
        distribution,
        low,
        high,
        confidence=config.confidence,
        resamples=CHANCE_RESAMPLES,
        seed=seed,
    )
