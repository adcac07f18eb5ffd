import pytest

from streams.alerts import alerts
from tests.digests import at, digest, ms
from tests.unit.streams.stepped import INSIGHTS, trial_digests, window_of


class TestTrials:
    @pytest.mark.parametrize(
        ("version", "since", "is_it"),
        [("b", 20.0004, True), ("b", None, True), ("b", 1, False), ("c", 20, False)],
    )
    def test_it_is_the_trial_that_the_registry_began(
        self, version: str, since: float | None, is_it: bool
    ) -> None:
        window = window_of(trial_digests(25, "canary", since=20), ms(30), INSIGHTS)
        assert window.trial is not None
        assert window.trial.is_of(version, None if since is None else at(since)) == is_it
        untold = window_of(trial_digests(25, "canary"), ms(30), INSIGHTS).trial
        assert untold is not None  # by a worker of the release before
        assert untold.is_of("b", at(1))

    def test_few_ratings_or_errors_all_alike_tell_nothing(self) -> None:
        unrated = digest(at(5), [(3.0, None)], version="b", role="shadow")
        window = window_of([*trial_digests(5, "shadow")[:1], unrated], ms(10), INSIGHTS)
        assert window.trial is not None
        assert window.trial.standard_errors is None
        same = [digest(at(5), [(4.0, 3.0)] * 2, role=role) for role in ("stable", "shadow")]
        window = window_of(same, ms(10), INSIGHTS)
        assert window.trial is not None
        assert window.trial.standard_errors is None
        insights = INSIGHTS.model_copy(update={"highest_rmse": 9, "largest_drift": 9})
        assert alerts(window, [], insights) == []
