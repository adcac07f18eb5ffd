import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.exceptions import ContractError
from schemas.records import ScoreDigest
from streams.steps import add, close, due, make_steps
from streams.windows import Scored, Sums, Window
from tests.digests import at, digest, ms
from tests.unit.streams.stepped import INSIGHTS, LATER, STABLE, steps_of, trial_digests, window_of


def test_a_window_computed_by_hand() -> None:
    # Step (0, 10]: errors +1 and -1; step (20, 30]: error +2, and one prediction without a rating.
    window = window_of(
        [
            digest(at(9), [(4.0, 3.0), (2.0, 3.0)], lag=7, items={"a": 3, "b": 1}),
            digest(at(30), [(5.0, 3.0), (4.4, None)], lag=4, items={"b": 5}),
        ],
        ms(30),
        INSIGHTS,
    )
    kind = window.kinds["interaction"]
    sums = kind.total().sums
    assert (window.start_ms, window.end_ms, window.step_ms) == (ms(0), ms(30), 10_000)
    assert (sums.count, sums.rated) == (4, 3)
    assert sums.rmse == pytest.approx(math.sqrt((1 + 1 + 4) / 3))
    assert sums.mae == pytest.approx(4 / 3)
    assert sums.mean_rating == pytest.approx(3.0)
    assert sums.mean_predicted == pytest.approx(11 / 3)
    assert sums.total == pytest.approx(15.4)
    assert kind.total().stars == [0, 1, 0, 2, 1]
    assert kind.total().tiers["full"].rated == 3
    assert kind.actions == {"review": 3}
    assert kind.top_items == [("b", 6), ("a", 3)]
    assert kind.lag == 4  # the newest, not a sum over time
    assert kind.workers == 1
    # The step alone: two predictions in the one second that the digest's window lasted.
    assert kind.step["ladder"].sums.count == 2
    assert kind.per_second == pytest.approx(2.0)


def test_a_window_slides() -> None:
    steps = steps_of([digest(at(5), [(3.0, 3.0)]), digest(at(25), [(3.0, 3.0)] * 2)])
    counts: list[int | None] = []
    for end in range(10, 80, 10):
        window = close(steps, ms(end), INSIGHTS)
        total = window.kinds["interaction"].total() if window and window.kinds else None
        counts.append(total.sums.count if total else None)
    # The second is in the windows that end at 30, 40 and 50; an empty one follows, then none.
    assert counts == [1, 1, 3, 2, 2, None, None]
    assert not steps.steps


def test_kinds_and_models_are_kept_apart() -> None:
    window = window_of(
        [
            digest(at(9), [(4.0, 2.0)], version="a"),
            digest(at(9), [(3.0, 2.0)], version="b"),
            digest(at(9), [(2.0, 2.0)], kind="review", worker="texts-0", tier=None, lag=9),
        ],
        ms(10),
        INSIGHTS,
    )
    models = window.kinds["interaction"].models
    assert (models["a"].sums.rmse, models["b"].sums.rmse) == (2.0, 1.0)
    assert window.kinds["review"].total().sums.rmse == 0.0
    assert window.kinds["review"].total().tiers == {}
    assert window.kinds["interaction"].lag == 0
    assert window.kinds["review"].lag == 9
    steps = [digest(at(9), [(4.0, 2.0)]), digest(at(19), [(2.0, 2.0)], kind="review", tier=None)]
    apart = window_of(steps, ms(20), INSIGHTS)
    assert {kind: each.total().sums.count for kind, each in apart.kinds.items()} == {
        "interaction": 1,
        "review": 1,
    }
    # Two models of one worker in one window: its second is not counted twice.
    assert window.kinds["interaction"].per_second == pytest.approx(2.0)


def test_workers_add_up() -> None:
    window = window_of(
        [
            digest(at(8), [(4.0, None)] * 4, lag=100),
            digest(at(10), [(4.0, None)] * 6, lag=50),
            digest(at(10), [(4.0, None)] * 6, worker="scorer-1", lag=7, seconds=2),
        ],
        ms(10),
        INSIGHTS,
    )
    kind = window.kinds["interaction"]
    assert kind.lag == 57
    assert kind.workers == 2
    assert kind.per_second == pytest.approx(10 / 2 + 6 / 2)


def test_what_waited_for_a_worker_that_has_gone_waits_for_another() -> None:
    """After a rollout each worker has another name, and for a minute all lag was told twice."""
    insights = INSIGHTS.model_copy(update={"window_seconds": 60})
    old = [digest(at(second), [(4.0, None)], lag=500) for second in (4, 5)]
    new = [digest(at(second), [], worker="scorer-new-0", lag=500) for second in range(6, 31)]
    window = window_of([*old, *new[:5]], ms(20), insights)
    assert (window.kinds["interaction"].lag, window.kinds["interaction"].workers) == (1_000, 2)
    window = window_of([*old, *new], ms(30), insights)
    assert (window.kinds["interaction"].lag, window.kinds["interaction"].workers) == (500, 1)


def test_a_worker_that_tells_seldom_has_not_gone() -> None:
    """Silent for up to 10 s and twice as long as its windows last."""
    insights = INSIGHTS.model_copy(update={"window_seconds": 60})
    seldom = digest(at(10), [(4.0, None)], lag=5, seconds=10)
    for heard, lag in ((40, 7), (40.001, 2)):
        often = digest(at(heard), [(4.0, None)], worker="scorer-1", lag=2)
        window = window_of([seldom, often], ms(50), insights)
        assert window.kinds["interaction"].lag == lag


def test_a_repeated_digest_counts_once() -> None:
    steps = make_steps(INSIGHTS)
    assert add(steps, digest(at(5), [(3.0, 3.0)], name="x"), LATER)[0] == "counted"
    assert add(steps, digest(at(5), [(3.0, 3.0)], name="x"), LATER)[0] == "duplicate"
    window = close(steps, ms(10), INSIGHTS)
    assert window is not None
    assert window.kinds["interaction"].total().sums.count == 1


def test_a_digest_that_misses_its_step_counts_in_the_next() -> None:
    """As one that its worker could not send while a broker failed over."""
    steps = steps_of([digest(at(5), [(3.0, 3.0)])])
    first = close(steps, ms(10), INSIGHTS)
    missed = digest(at(9), [(4.0, 3.0)] * 2)
    assert add(steps, missed, ms(13)) == ("counted", ms(20))
    assert add(steps, missed, ms(14))[0] == "duplicate"
    second = close(steps, ms(20), INSIGHTS)
    assert add(steps, missed, ms(23))[0] == "duplicate"
    assert first is not None
    assert second is not None
    counts = [each.kinds["interaction"].step["ladder"].sums.count for each in (first, second)]
    assert counts == [1, 2]
    assert second.kinds["interaction"].per_second == pytest.approx(2.0)


def test_a_repetition_of_a_worker_whose_clock_is_ahead_counts_once() -> None:
    steps = make_steps(INSIGHTS)
    ahead = digest(at(500), [(3.0, 3.0)])
    assert [add(steps, ahead, ms(now))[0] for now in (5, 15)] == ["counted", "duplicate"]


def test_a_digest_of_steps_gone_by_is_late() -> None:
    steps = make_steps(INSIGHTS, closed=ms(100))
    # The next window is (80, 110].
    assert add(steps, digest(at(80), [(3.0, 3.0)]), ms(120)) == ("late", ms(80))
    assert add(steps, digest(at(80.001), [(3.0, 3.0)]), ms(120)) == ("counted", ms(90))


@pytest.mark.parametrize(("closed", "end"), [(95, 100), (100, 110), (100.001, 110), (109.999, 110)])
def test_a_run_with_other_steps_goes_on_where_windows_ended(closed: float, end: int) -> None:
    steps = make_steps(INSIGHTS, ms(closed))
    assert add(steps, digest(at(end - 1), [(3.0, 3.0)]), ms(112)) == ("counted", ms(end))
    first = due(steps, ms(112), quiet=True)[0]
    assert ms(closed) < first  # the store takes no end that is not greater than the last
    window = close(steps, first, INSIGHTS)
    assert window is not None
    assert window.kinds["interaction"].per_second > 0


def test_a_first_run_skips_what_the_store_would_not_keep() -> None:
    steps = make_steps(INSIGHTS)
    assert add(steps, digest(at(0), [(3.0, 3.0)]), ms(1_010))[0] == "late"
    assert add(steps, digest(at(20), [(3.0, 3.0)]), ms(1_010))[0] == "counted"


def test_a_worker_whose_clock_is_ahead_closes_nothing_early() -> None:
    steps = make_steps(INSIGHTS)
    outcome, place = add(steps, digest(at(500), [(3.0, 3.0)]), ms(15))
    assert (outcome, place) == ("counted", ms(20))
    assert due(steps, ms(15), quiet=False) == []


def test_due_waits_for_the_grace_and_for_digests_to_catch_up_with() -> None:
    steps = steps_of([digest(at(5), [(3.0, 3.0)])])
    assert due(steps, ms(11), quiet=True) == []
    assert due(steps, ms(12), quiet=True) == [ms(10)]
    # While digests stream in, their own time closes steps: much may still be unread.
    assert due(steps, ms(500), quiet=False) == []
    add(steps, digest(at(33), [(3.0, 3.0)]), ms(500))
    add(steps, digest(at(6), [(3.0, 3.0)]), ms(500))  # of a worker that is behind
    assert due(steps, ms(500), quiet=False) == [ms(10), ms(20), ms(30)]


def test_due_jumps_over_hours_of_silence() -> None:
    steps = steps_of([digest(at(5), [(3.0, 3.0)])])
    for end in due(steps, ms(60), quiet=True):
        close(steps, end, INSIGHTS)
    assert due(steps, ms(36_000), quiet=True) == [ms(35_990)]


def test_silence_is_written_once_and_waiting_records_are_no_silence() -> None:
    steps = steps_of([digest(at(5), [], lag=3), digest(at(45), [], lag=0)])
    written = [close(steps, ms(end), INSIGHTS) for end in range(10, 90, 10)]
    assert [bool(window) for window in written] == [True] * 3 + [True] + [False] * 4
    assert written[3] is not None
    assert written[3].kinds == {}


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": {"interaction": 1, "review": 1}},
        {"kinds": {}},
        {"kinds": {"guess": 1}},
        {"latency_ms": "no base64!"},
        {"latency_ms": "AAAA"},
    ],
)
def test_digests_that_cannot_be_counted(change: dict[str, object]) -> None:
    steps = make_steps(INSIGHTS)
    with pytest.raises(ContractError, match="scorer-0"):
        add(steps, digest(at(5), [(3.0, 3.0)]).model_copy(update=change), LATER)
    assert not steps.steps


class TestTrials:
    def test_a_shadow_is_in_no_sum_but_its_trial(self) -> None:
        window = window_of(trial_digests(5, "shadow"), ms(10), INSIGHTS)
        alone = window_of(trial_digests(5, "shadow")[:1], ms(10), INSIGHTS)
        assert window.kinds == alone.kinds
        assert alone.trial is None
        assert window.trial is not None
        assert (window.trial.version, window.trial.start_ms, window.trial.end_ms) == (
            "b",
            ms(0),
            ms(10),
        )
        assert window.trial.canary.sums.rmse == pytest.approx(math.sqrt(2.5))
        assert window.trial.canary.tiers["full"].rated == 2
        assert (window.trial.stable.sums.count, window.trial.stable.sums.rated) == (3, 2)
        # Means 1.5 and 0.75; variances 0.25 and 0.0625 of one, the half of it of the mean of two.
        above = 0.75 / math.sqrt(0.125 + 0.03125)
        assert window.trial.standard_errors == pytest.approx(above)

    def test_a_canary_is_in_all_sums_once(self) -> None:
        window = window_of(trial_digests(5, "canary"), ms(10), INSIGHTS)
        kind = window.kinds["interaction"]
        assert kind.total().sums.count == 5
        assert (kind.lag, kind.workers, kind.per_second) == (3, 1, 5.0)
        assert window.trial is not None
        assert window.trial.canary == kind.models["b"]
        assert window.trial.stable == kind.models["a"]

    def test_a_trial_is_summed_from_its_beginning_beside_the_same_steps(self) -> None:
        steps = steps_of(
            [
                digest(at(5), STABLE, version="a"),  # before it began
                *trial_digests(15, "shadow"),
                digest(at(25), STABLE, version="a"),  # it answered nobody here
                *trial_digests(65, "canary"),
                digest(at(75), STABLE, version="a"),
            ]
        )
        windows = [close(steps, ms(end), INSIGHTS) for end in range(10, 90, 10)]
        trials = [window.trial for window in windows if window]
        assert [trial and trial.canary.sums.count for trial in trials] == [None, *[2] * 5, *[4] * 2]
        last = trials[-1]
        assert last is not None
        assert (last.start_ms, last.end_ms) == (ms(10), ms(70))
        assert last.stable.sums.count == 6

    def test_a_later_run_adds_to_what_the_last_window_has(self) -> None:
        first = window_of(trial_digests(5, "shadow"), ms(10), INSIGHTS)
        written = Window.model_validate_json(first.model_dump_json(exclude_none=True))
        steps = make_steps(INSIGHTS, written.end_ms, written.trial)
        for each in trial_digests(15, "shadow"):
            add(steps, each, ms(90))
        window = close(steps, ms(20), INSIGHTS)
        assert window is not None
        assert window.trial is not None
        assert window.trial.start_ms == ms(0)
        assert (window.trial.canary.sums.rated, window.trial.stable.sums.rated) == (4, 4)

    def test_another_version_begins_anew(self) -> None:
        steps = steps_of([*trial_digests(5, "shadow"), *trial_digests(15, "canary", "c")])
        windows = [close(steps, ms(end), INSIGHTS) for end in (10, 20)]
        assert windows[1] is not None
        assert windows[1].trial is not None
        assert (windows[1].trial.version, windows[1].trial.canary.sums.count) == ("c", 2)

    def test_a_version_that_is_tried_again_begins_anew(self) -> None:
        steps = steps_of(
            [
                *trial_digests(5, "canary", since=1),
                *trial_digests(15, "shadow", since=1),  # another share, the same trial
                *trial_digests(25, "canary", since=20),
                *trial_digests(35, "canary", since=20),
                *trial_digests(36, "canary", since=1),  # of a worker that has not looked yet
            ]
        )
        windows = [close(steps, ms(end), INSIGHTS) for end in (10, 20, 30, 40)]
        trials = [window.trial for window in windows if window and window.trial]
        assert [(each.start_ms, each.canary.sums.count) for each in trials] == [
            (ms(0), 2),
            (ms(0), 4),
            (ms(20), 2),
            (ms(20), 4),
        ]

    def test_requests_are_no_trial(self) -> None:
        asked = digest(at(5), [(3.0, None)], kind="request", version="b", role="canary")
        assert window_of([asked], ms(10), INSIGHTS).trial is None

    def test_of_a_shadow_alone_nothing_is_written_and_nothing_lost(self) -> None:
        steps = steps_of([*trial_digests(5, "shadow")[1:], *trial_digests(15, "shadow")])
        assert close(steps, ms(10), INSIGHTS) is None
        window = close(steps, ms(20), INSIGHTS)
        assert window is not None
        assert window.kinds["interaction"].workers == 1
        assert window.trial is not None
        assert window.trial.canary.sums.count == 4


pairs = st.lists(st.tuples(st.floats(1, 5), st.none() | st.integers(1, 5).map(float)), max_size=4)
digests = st.lists(
    st.builds(
        lambda end, pairs, worker, version, lag: digest(
            at(end), pairs, worker=worker, version=version, lag=lag, latencies_ms=[1.0]
        ),
        st.integers(1, 60),
        pairs,
        st.sampled_from(["scorer-0", "scorer-1"]),
        st.sampled_from(["ladder", "b"]),
        st.integers(0, 9),
    ),
    max_size=12,
    unique_by=lambda each: each.digest_id,
)


@given(digests, st.randoms(use_true_random=False), st.integers(0, 3))
def test_neither_order_nor_repetition_changes_a_window(
    found: list[ScoreDigest], shuffler: random.Random, repeats: int
) -> None:
    def windows(sent: Sequence[ScoreDigest]) -> list[str]:
        steps = make_steps(INSIGHTS)
        for each in sent:
            add(steps, each, ms(90))
        closed = [close(steps, ms(end), INSIGHTS) for end in range(10, 100, 10)]
        return [_rounded(window) for window in closed if window]

    again = found * (repeats + 1)
    shuffler.shuffle(again)
    assert windows(again) == windows(found)


def _rounded(window: Window) -> str:
    """Without the last digits of sums, which do depend on the order."""
    dumped = window.model_copy(deep=True)
    for kind in dumped.kinds.values():
        kind.per_second = round(kind.per_second, 6)
        for models in (kind.models, kind.step):
            for name, scored in models.items():
                models[name] = Scored(
                    sums=_rounded_sums(scored.sums),
                    tiers={tier: _rounded_sums(sums) for tier, sums in scored.tiers.items()},
                    stars=scored.stars,
                )
            items = sorted(models.items())
            models.clear()
            models.update(items)
    return dumped.model_dump_json()


def _rounded_sums(sums: Sums) -> Sums:
    return Sums(**{name: round(getattr(sums, name), 6) for name in Sums.model_fields})


@given(digests)
def test_steps_together_are_all_that_was_sent(found: list[ScoreDigest]) -> None:
    steps = steps_of(found)
    closed = [close(steps, ms(end), INSIGHTS) for end in range(10, 100, 10)]
    counts = [
        scored.sums.count
        for window in closed
        if window
        for kind in window.kinds.values()
        for scored in kind.step.values()
    ]
    assert sum(counts) == sum(each.kinds["interaction"] for each in found)
