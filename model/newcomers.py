"""What the ratings of newcomers lately have in common: a storm of reviews, once it proves itself.

The running bias takes a user of whom nothing is known for an ordinary one. In a storm (a campaign,
a broken batch, a shop's new public) that is wrong for all who come at once. So newcomers have a
level of their own, from which a user of n ratings lies D / (D + n) away, D being the damping of the
user's bias: the share of the bias that is still taken on trust. Of the ratings k = 0, 1, ... before
a moment, the newest first, each with its error e = r - (mean + item bias + user bias),

    m = sum f^k x e / (sum f^k x^2 + h),    x = D / (D + n),

is the level that they have lately: least squares about zero, where f^30 = 1/2 and h is a doubt.

As a rule it is noise. How far it is believed, p, are the odds of two forecasters, one of whom says
x m of the next error and the other nothing, both normal with the variance that errors have, who
take turns now and then (Herbster and Warmuth 1998, "Tracking the best expert": fixed share). Errors
of one user, or of one item, are no independent witnesses, so each counts for half (Grünwald 2012,
"The safe Bayesian"). The bias takes p x m with it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled
from model.events import Rows
from model.state import stars_of

USER_DAMPING = 6.0  # ratings. Tuned on the running bias of Musical Instruments and Gift Cards.
HALF = 30.0  # ratings after which one counts half
DOUBT = 15.0  # ratings' worth of no level
BELIEF = 0.01  # before anything is known, and where one forecaster hands over to the other
TURN = 1e-3  # chance a rating of that
WITNESS = 0.5  # what each error counts for
FORGETTING = 0.999  # of the variance of errors, which begins at 1
CONSTANTS = (USER_DAMPING, HALF, DOUBT, BELIEF, TURN, WITNESS, FORGETTING)

_FADE = 0.5 ** (1 / HALF)


def trust(ratings: NDArray[Any]) -> NDArray[np.float64]:
    """The share of users' biases (n) that is taken on trust, x, by their numbers of ratings (n)."""
    return np.asarray(USER_DAMPING / (USER_DAMPING + ratings), np.float64)


def level(partition: Rows) -> NDArray[np.float64]:
    """Stars by which newcomers are taken to rate apart, p m, as PARTITION rows have it."""
    belief = partition["storm"] + BELIEF  # so that a row of zeros is one that knows nothing
    return belief * partition["late_sum"] / (partition["late_weight"] + DOUBT)


def usual(
    global_mean: NDArray[np.float32], item_bias: NDArray[np.float32], user_bias: NDArray[np.float32]
) -> NDArray[np.float64]:
    """What the running bias says (n) without newcomers' level, of the features (n) of its parts."""
    return global_mean.astype(np.float64) + item_bias + user_bias


def follow(
    met: Rows,
    after: Rows,
    ends: NDArray[np.intp],
    events: Rows,
    duplicate: NDArray[np.bool_],
    usual: NDArray[np.float64],
    ratings: NDArray[np.float32],
) -> None:
    """Fill in what newcomers are known by in the PARTITION rows of s partitions, side by side.

    Args:
        met: PARTITION (n), as n events meet them.
        after: PARTITION (s), as the events leave them; what newcomers are known by is as before.
        ends: (s) where each partition's events end.
        events: EVENT (n); only ratings are learnt from.
        duplicate: (n) those that repeat another, from which nothing is learnt.
        usual: (n) as the function says.
        ratings: (n) log(1 + n), the feature.
    """
    x = trust(np.expm1(ratings.astype(np.float64)))
    _follow(met, after, ends, events, duplicate, usual, x)


@compiled
def _follow(
    met: Any, after: Any, ends: Any, events: Any, duplicate: Any, usual: Any, trusted: Any
) -> None:
    row = 0
    for part in range(len(ends)):
        state = after[part]
        while row < ends[part]:
            before = met[row]
            before.late_sum, before.late_weight = state.late_sum, state.late_weight
            before.storm = state.storm
            before.error_sum, before.error_count = state.error_sum, state.error_count
            stars = stars_of(events[row])
            if stars > 0 and not duplicate[row]:
                _learn(state, stars - usual[row], trusted[row])
            row += 1


@compiled
def _learn(state: Any, error: float, x: float) -> None:
    """One more rating, of a user of whom a share x is taken on trust."""
    left = error - x * state.late_sum / (state.late_weight + DOUBT)
    variance = (1 + state.error_sum) / (1 + state.error_count)
    odds = np.exp(WITNESS * (error * error - left * left) / (2 * variance))
    belief = state.storm + BELIEF
    belief = belief * odds / (belief * odds + 1 - belief)
    state.storm = (1 - TURN) * (belief - BELIEF)
    state.late_sum = _FADE * state.late_sum + x * error
    state.late_weight = _FADE * state.late_weight + x * x
    state.error_sum = FORGETTING * state.error_sum + error * error
    state.error_count = FORGETTING * state.error_count + 1
