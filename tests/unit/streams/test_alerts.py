import json
import math

import jsonschema
import pytest

from schemas.codec import encode
from schemas.export import json_schema
from streams.alerts import alerts
from streams.config import InsightsConfig
from streams.steps import close
from streams.windows import Window
from tests.digests import at, digest, ms
from tests.unit.streams.stepped import INSIGHTS, steps_of, trial_digests, window_of


class TestAlerts:
    insights = InsightsConfig(
        window_seconds=10,
        step_seconds=10,
        least_rated=2,
        highest_rmse=1.0,
        highest_lag=100,
        largest_drift=0.5,
        clear_ratio=0.9,
    )

    def window(self, error: float, rated: int = 4, lag: int = 0, sign: int = 1) -> Window:
        """Errors of both signs, so that the mean is off by nothing, unless `sign` is 0."""
        signs = [1 if sign == 0 or index % 2 else -1 for index in range(rated)]
        pairs: list[tuple[float, float | None]] = [(3.0 + each * error, 3.0) for each in signs]
        return window_of([digest(at(9), pairs, lag=lag)], ms(10), self.insights)

    def test_nothing_crossed(self) -> None:
        window = self.window(1.0, lag=100)
        assert alerts(window, [], self.insights) == []
        assert window.firing == []

    def test_an_alert_says_what_and_by_how_much(self) -> None:
        window = self.window(1.25)
        (alert,) = alerts(window, [], self.insights)
        assert (alert.rule, alert.severity, alert.subject) == ("rmse", "warning", "interaction")
        assert alert.value == pytest.approx(1.25)
        assert (alert.threshold, alert.window_end) == (1.0, at(10))
        assert "1.25" in alert.text
        jsonschema.validate(json.loads(encode(alert)), json_schema("alerts"))
        assert window.firing == ["rmse/interaction"]

    def test_far_beyond_is_critical(self) -> None:
        (alert,) = alerts(self.window(0.0, lag=201), [], self.insights)
        assert (alert.rule, alert.severity) == ("lag", "critical")

    def test_drift_is_either_way(self) -> None:
        (alert,) = alerts(self.window(0.6, sign=0), [], self.insights)
        assert alert.rule == "drift"
        (alert,) = alerts(self.window(-0.6, sign=0), [], self.insights)
        assert alert.rule == "drift"

    def test_few_ratings_prove_nothing(self) -> None:
        assert alerts(self.window(1.9, rated=1), [], self.insights) == []
        assert len(alerts(self.window(1.9, rated=2), [], self.insights)) == 1

    def test_once_a_crossing_with_hysteresis(self) -> None:
        firing: list[str] = []
        raised: list[int] = []
        for error in (1.1, 1.2, 0.95, 1.1, 0.89, 1.1):
            window = self.window(error)
            raised.append(len(alerts(window, firing, self.insights)))
            firing = window.firing
        assert raised == [1, 0, 0, 0, 0, 1]

    def test_what_cannot_be_judged_neither_clears_nor_fires(self) -> None:
        window = self.window(1.9, rated=1)
        assert alerts(window, ["rmse/interaction", "rmse/review"], self.insights) == []
        assert window.firing == ["rmse/interaction", "rmse/review"]


class TestTrials:
    def test_an_alert_when_the_canary_errs_more(self) -> None:
        insights = INSIGHTS.model_copy(update={"worse_canary": 1.5, "highest_rmse": 9})
        steps = steps_of([*trial_digests(5, "shadow"), *[digest(at(55), [(3.0, 3.0)])]], insights)
        window = close(steps, ms(10), insights)
        assert window is not None
        (alert,) = alerts(window, [], insights)
        assert (alert.rule, alert.severity, alert.subject) == ("canary", "warning", "interaction")
        assert alert.value == pytest.approx(0.75 / math.sqrt(0.15625))
        assert "MAE 1.50 over 2 ratings, that of stable 0.75 over 2" in alert.text
        assert window.firing == ["canary/b/0"]
        assert alerts(window, window.firing, insights) == []
        few = insights.model_copy(update={"least_rated": 3})
        assert alerts(window, [], few) == []
        for role in ("stable", "shadow"):  # one more of either, of which the other has too few
            one_more = digest(at(6), [(3.0, 3.0)], version="ab"[role == "shadow"], role=role)
            uneven = window_of([*trial_digests(5, "shadow"), one_more], ms(10), few)
            assert alerts(uneven, [], few) == []
        # A window in which it predicts nothing says nothing new of it.
        later = close(steps, ms(60), insights)
        assert later is not None
        assert later.trial == window.trial
        assert alerts(later, [], insights) == []
        assert alerts(later, ["canary/b/0"], insights) == []
        assert later.firing == ["canary/b/0"]

    def test_a_trial_with_few_events_is_told_once_and_the_next_one_again(self) -> None:
        """A canary of a small shop's few users is quiet for minutes."""
        changes = {"worse_canary": 1.5, "highest_rmse": 9, "largest_drift": 9}
        insights = INSIGHTS.model_copy(update=changes)
        steps = steps_of(
            [
                *trial_digests(5, "canary"),
                digest(at(55), [(3.0, 3.0)]),
                *trial_digests(105, "canary"),
                digest(at(155), [(3.0, 3.0)]),
                *trial_digests(205, "canary", version="c"),
            ],
            insights,
            ms(300),
        )
        told: dict[int, str] = {}
        firing = ["canary/interaction"]  # as a release before wrote it
        for end in range(10, 220, 10):
            window = close(steps, ms(end), insights)
            for alert in alerts(window, firing, insights) if window else []:
                told[end] = alert.text[:1]
            firing = window.firing if window else firing
        assert told == {10: "b", 210: "c"}
        assert firing == ["canary/c/0"]

    def test_a_version_that_is_tried_again_is_told_again(self) -> None:
        changes = {"worse_canary": 1.5, "highest_rmse": 9, "largest_drift": 9}
        insights = INSIGHTS.model_copy(update=changes)
        digests = [*trial_digests(5, "canary", since=1), *trial_digests(15, "canary", since=11)]
        steps = steps_of(digests, insights)
        firing: list[str] = []
        for end in (10, 20):
            window = close(steps, ms(end), insights)
            assert window is not None
            assert len(alerts(window, firing, insights)) == 1
            firing = window.firing
