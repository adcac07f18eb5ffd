"""What the first ratings of newcomers lately have in common: storms of reviews, once they show.

The running bias takes a user of whom nothing is known for an ordinary one. In a storm (a campaign,
a broken batch, a shop's new public) that is wrong for all who come at once. So newcomers have a
level of their own. Of users' first ratings k = 0, 1, ... before a moment, the newest first, each
with its error e = r - (mean + item bias),

    m = sum f^k e / (sum f^k + h)

is the level that they have lately: least squares about zero, where f^20 = 1/2 and h is a doubt.
First ratings alone, since what else a user rates is no witness of what others are about to.

As a rule m is noise. How far it is believed, p, are the odds of two forecasters, one of whom says m
of the next error and the other nothing, both normal with the variance that errors have, who take
turns now and then (Herbster and Warmuth 1998, "Tracking the best expert": fixed share). The bias of
a user of n ratings takes

    p m D / (D + n)

with it, D being the damping of the user's bias: as much as that still takes on trust.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled
from model.events import Rows
from model.state import stars_of

HALF = 20.0  # first ratings after which one counts half
DOUBT = 5.0  # first ratings' worth of no level
BELIEF = 0.01  # before anything is known, and where one forecaster hands over to the other
TURN = 1e-3  # chance a first rating of that
FORGETTING = 0.999  # of the variance of errors, which begins at 1
CONSTANTS = (HALF, DOUBT, BELIEF, TURN, FORGETTING)

_FADE = 0.5 ** (1 / HALF)


def level(partition: Rows) -> NDArray[np.float64]:
    """Stars by which newcomers are taken to rate apart, p m, as PARTITION rows have it."""
    belief = partition["storm"] + BELIEF  # so that a row of zeros is one that knows nothing
    return belief * partition["late_sum"] / (partition["late_weight"] + DOUBT)


def follow(
    met: Rows,
    after: Rows,
    ends: NDArray[np.intp],
    events: Rows,
    first: NDArray[np.bool_],
    global_mean: NDArray[np.float32],
    item_bias: NDArray[np.float32],
) -> None:
    """Fill in what newcomers are known by in the PARTITION rows of s partitions, side by side.

    Args:
        met: PARTITION (n), as n events meet them.
        after: PARTITION (s), as the events leave them; what newcomers are known by is as before.
        ends: (s) where each partition's events end.
        events: EVENT (n); only ratings are learnt from.
        first: (n) the event counts, and its user has rated nothing before.
        global_mean: (n) the feature, as is item_bias (n).
    """
    _follow(met, after, ends, events, first, global_mean.astype(np.float64) + item_bias)


@compiled
def _follow(met: Any, after: Any, ends: Any, events: Any, first: Any, usual: Any) -> None:
    row = 0
    for part in range(len(ends)):
        state = after[part]
        while row < ends[part]:
            before = met[row]
            before.late_sum, before.late_weight = state.late_sum, state.late_weight
            before.storm = state.storm
            before.error_sum, before.error_count = state.error_sum, state.error_count
            stars = stars_of(events[row])
            if stars > 0 and first[row]:
                _learn(state, stars - usual[row])
            row += 1


@compiled
def _learn(state: Any, error: float) -> None:
    """One more first rating."""
    left = error - state.late_sum / (state.late_weight + DOUBT)
    variance = (1 + state.error_sum) / (1 + state.error_count)
    odds = np.exp((error * error - left * left) / (2 * variance))
    belief = state.storm + BELIEF
    belief = belief * odds / (belief * odds + 1 - belief)
    state.storm = (1 - TURN) * (belief - BELIEF)
    state.late_sum = _FADE * state.late_sum + error
    state.late_weight = _FADE * state.late_weight + 1
    state.error_sum = FORGETTING * state.error_sum + error * error
    state.error_count = FORGETTING * state.error_count + 1
