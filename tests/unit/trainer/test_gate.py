"""What passes the gate and what does not."""

from dataclasses import replace

import numpy as np
import pytest

from trainer import gate
from trainer.config import GateConfig
from trainer.gate import REFERENCE, Verdict, by_chance, claims, judge
from trainer.metrics import Calibration, Chance, Floats
from trainer.metrics import calibration as calibration_of

ROWS = 400
RATING: Floats = np.tile([1.0, 2.0, 3.0, 4.0, 5.0], ROWS // 5)
NOISE: Floats = np.random.default_rng(3).normal(0, 1, ROWS)
MIDDLE: Floats = np.full(ROWS, 3.0)
CLOSE: Floats = RATING + np.where(RATING > 3, -0.5, 0.5)
SOUND = Calibration(ece=0.02, coverage=0.82, width=2.0, log_loss=1.0, bins=[])
NO_CHANCE = Chance(ece=0, coverage=1)
CONFIG = GateConfig(resamples=300)


def run(
    candidate: Floats,
    stable: Floats | None = None,
    claimed: tuple[str, ...] = (),
    calibration: Calibration = SOUND,
    rows: int = ROWS,
    unseen: int = 0,
    chance: Chance = NO_CHANCE,
) -> Verdict:
    return judge(
        RATING[:rows],
        candidate[:rows],
        None if stable is None else stable[:rows],
        np.arange(rows) >= rows - unseen,
        {REFERENCE: MIDDLE[:rows], "lightgbm": CLOSE[:rows]},
        claimed,
        calibration,
        lambda: chance,
        CONFIG,
        seed=1,
    )


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


def test_a_better_and_calibrated_model_passes_and_the_reason_names_each_check() -> None:
    verdict = run(CLOSE, stable=MIDDLE, claimed=(REFERENCE,))
    assert verdict.passed
    assert verdict.reason.count(";") == 4
    assert "0.5000 against 1.4142" in verdict.reason


def test_a_model_of_a_shop_of_fives_passes() -> None:
    """Neither it nor what is served without a model predicts more than 4.98."""
    fives = np.full(ROWS, 5.0)
    for most, passes in ((4.98, True), (4.9, False)):
        baselines = {REFERENCE: np.full(ROWS, 4.999)}
        candidate, known = np.full(ROWS, most), np.zeros(ROWS, bool)
        verdict = judge(
            fives, candidate, None, known, baselines, (), SOUND, lambda: NO_CHANCE, CONFIG, seed=1
        )
        assert verdict.passed == passes


def test_the_same_model_again_is_not_worse_than_itself() -> None:
    assert run(CLOSE, stable=CLOSE).passed


def test_stable_is_compared_on_what_it_was_not_fitted_to() -> None:
    """It knows half of the newest rows by heart, and is worse on the others."""
    stable = RATING + np.where(np.arange(ROWS) < ROWS / 2, 0, 1.2 * (CLOSE - RATING))
    assert not run(CLOSE, stable).passed
    verdict = run(CLOSE, stable, unseen=200)
    assert verdict.passed
    assert "stable model, 200 rows: RMSE 0.5000 against 0.6000" in verdict.reason
    assert "running bias, 400 rows" in verdict.reason
    few = run(CLOSE, stable, unseen=199)
    assert failed(few) == ["not worse than the stable model"]
    assert "stable model, 400 rows" in few.reason
    assert failed(run(MIDDLE, CLOSE, unseen=200)) == ["not worse than the stable model"]


def test_a_model_worse_than_stable_is_refused_although_it_beats_the_baseline() -> None:
    verdict = run(CLOSE + np.sign(CLOSE - RATING) * 0.3, stable=CLOSE)
    assert failed(verdict) == ["not worse than the stable model"]
    assert "stable model" in verdict.reason
    assert "calibration" not in verdict.reason


def test_a_model_slightly_worse_within_the_noise_passes_and_beyond_it_does_not() -> None:
    assert run(MIDDLE + 0.002 * NOISE).passed
    assert failed(run(MIDDLE + 0.5 * NOISE)) == ["not worse than the running bias"]


def test_a_model_that_errs_much_more_on_few_rows_is_refused_within_the_noise() -> None:
    """One row in 400 errs by four stars in place of two: RMSE +0.75%, and chance may do that."""
    worse = MIDDLE.copy()
    worse[np.flatnonzero(RATING == 5)[0]] = 1.0
    assert failed(run(worse)) == ["not worse than the running bias"]


def test_a_model_that_errs_a_little_more_on_all_rows_is_refused_below_the_bound() -> None:
    assert CONFIG.worse_allowed > 0.003
    worse = RATING + 1.003 * (MIDDLE - RATING)
    assert failed(run(worse)) == ["not worse than the running bias"]


def test_a_claim_that_does_not_hold_is_refused() -> None:
    assert failed(run(MIDDLE, claimed=("lightgbm",))) == ["better than lightgbm"]
    assert failed(run(CLOSE, claimed=("lightgbm",))) == ["better than lightgbm"]  # nor worse


@pytest.mark.parametrize(
    ("calibration", "name"),
    [
        (replace(SOUND, ece=0.2), "calibration error"),
        (replace(SOUND, coverage=0.4), "interval coverage"),
    ],
)
def test_an_uncalibrated_model_is_refused(calibration: Calibration, name: str) -> None:
    assert failed(run(CLOSE, calibration=calibration)) == [name]


def test_what_chance_may_show_of_a_calibrated_model_is_allowed() -> None:
    chance = Chance(ece=0.13, coverage=0.65)
    at_most = replace(SOUND, ece=0.13, coverage=0.65)
    assert run(CLOSE, calibration=at_most, chance=chance).passed
    worse = replace(SOUND, ece=0.131, coverage=0.649)
    refused = run(CLOSE, calibration=worse, chance=chance)
    assert failed(refused) == ["calibration error", "interval coverage"]
    assert "expected calibration error 0.131, at most 0.13" in refused.reason


@pytest.mark.parametrize("right", [True, False])
def test_few_rows_seldom_refuse_a_calibrated_model_and_always_another(
    right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of forty shops with thirty rows: stars as the model says, or the other way round."""
    monkeypatch.setattr(gate, "CHANCE_RESAMPLES", 100)
    random = np.random.default_rng(5)
    told = random.dirichlet([0.5, 0.5, 1, 2, 4], CONFIG.least_rows)
    low, high = np.full(CONFIG.least_rows, 2.0), np.full(CONFIG.least_rows, 5.0)
    true = told if right else told[:, ::-1]
    chance = by_chance(told, low, high, CONFIG, seed=1)
    refused, above = 0, 0
    for _ in range(40):
        uniform = random.random((CONFIG.least_rows, 1))
        rating = 1.0 + (uniform > true.cumsum(1)[:, :-1]).sum(1)
        found = calibration_of(rating, told, low, high)
        verdict = run(CLOSE, calibration=found, rows=CONFIG.least_rows, chance=chance)
        refused += "calibration error" in failed(verdict)
        above += found.ece > CONFIG.largest_ece
    assert above >= (5 if right else 40)
    assert refused <= 4 if right else refused == 40


def test_too_few_rows_decide_nothing() -> None:
    verdict = run(CLOSE, rows=CONFIG.least_rows - 1)
    assert not verdict.passed
    assert failed(verdict) == ["rows"]
    assert "29 newest rated rows" in verdict.reason
    assert run(CLOSE, rows=CONFIG.least_rows).passed


def test_a_model_as_calibrated_as_it_must_be_passes() -> None:
    least = replace(SOUND, ece=CONFIG.largest_ece, coverage=CONFIG.least_coverage)
    assert run(CLOSE, calibration=least).passed


def test_only_what_was_beaten_significantly_is_claimed() -> None:
    baselines = {"worse": MIDDLE, "equal": CLOSE, "noisy": CLOSE + 0.001 * NOISE * (RATING - CLOSE)}
    found = claims(RATING, CLOSE, {**baselines, "better": RATING}, CONFIG, seed=1)
    assert "worse" in found
    assert "equal" not in found
    assert "better" not in found
