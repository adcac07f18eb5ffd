"""What is known of users, items and a partition, and how events change it.

States are rows of NumPy structured arrays. `advance` takes many events of many users and gives
each event the state that it met and each user the state that follows, in compiled loops. Everything
that is added up is rounded to a binary fraction first (ratings to 1/32 star, logarithms of prices
to 1/256, residuals to 1/1024): sums of such numbers are exact in float64, so they depend neither on
order nor on the machine, and an edited review takes away exactly what it had added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled
from model.events import (
    COUNTED,
    EVENT,
    FORGET,
    PURCHASE,
    REVIEW,
    TEXT,
    Rows,
    blank,
    duplicated,
    joined,
)

RECENT = 16  # items, and event ids, that a user's state remembers
OLDER = 64  # ratings that it remembers of items that are not recent any more
STARS = 5
LEVELS = 4  # a category path is known by this many prefixes
RATING_STEPS = 32  # to a star: the finest binary fraction that fits a byte
LOG_STEPS = 256
RESIDUAL_STEPS = 1024
SESSION_GAP = 30 * 60 * 1000  # ms of silence after which events without a session open a new one

SLOT = np.dtype(
    [
        ("event_id", "<u8"),  # the slot's newest-first event applied, of any item
        ("item", "<u8"),  # the slot's newest-first distinct item; 0: none
        ("second", "<u4"),  # since 1970, of the newest event with the item
        ("rating", "u1"),  # of the item by the user, in 1/32 star; 0: none
        ("actions", "u1"),  # bit k: ACTIONS[k] was done with the item
    ]
)

RATED = np.dtype([("item", "<u4"), ("rating", "u1")])  # low half of the hash; 1/32 star

USER = np.dtype(
    [
        ("step", "<u8"),  # 1 + the journal row applied last; 0: none
        ("last_time", "<i8"),  # ms; latest event; 0: none
        ("first_second", "<u4"),  # s; event applied first; 0: none
        ("session_second", "<u4"),  # s; begin of the current session
        ("session", "<u8"),  # the latest session id seen; 0: none
        ("rating_sum", "<f8"),
        ("rating_square_sum", "<f8"),
        ("residual_sum", "<f8"),  # sum of rating - global mean - item bias, as they were then
        ("price_log_sum", "<f8"),  # log(1 + price) of events with a price
        ("paid_log_sum", "<f8"),  # the same of purchases
        ("text_sum", "<f8"),  # expected stars of own review texts
        # Counters, side by side: stored in as few bytes as the largest needs (`to_bytes`).
        ("session_events", "<u4"),  # applied since the session began
        ("sessions", "<u4"),
        ("actions", "<u4", COUNTED),
        ("rating_count", "<u4"),
        ("histogram", "<u4", STARS),  # ratings rounded to 1..5 stars
        ("price_count", "<u4"),
        ("paid_count", "<u4"),
        ("text_count", "<u4"),
        ("left", "<u4"),  # rated items that have left `recent`
        # Last, so that a short history has a short row (`to_bytes`).
        ("recent", SLOT, RECENT),
        ("older", RATED, OLDER),  # item number k to leave stands at k modulo OLDER
    ]
)

ITEM = np.dtype(
    [
        ("offset", "<u8"),  # next offset of its item-updates partition to apply; 0: none was
        ("first_time", "<i8"),  # ms; 0: none
        ("last_time", "<i8"),
        ("actions", "<i8", COUNTED),
        ("rating_count", "<i8"),
        ("histogram", "<i8", STARS),
        ("rating_sum", "<f8"),
        ("rating_square_sum", "<f8"),
        ("price_count", "<i8"),
        ("price_log_sum", "<f8"),
        ("sessions", "<i8"),  # (user, session) pairs that touched it
    ]
)

# What one batch did to one item by way of one topic.
ITEM_DELTA = np.dtype(
    [
        ("item", "<u8"),
        ("source", "u1"),  # position in SOURCES
        ("actions", "<i4", COUNTED),
        ("rating_count", "<i4"),
        ("histogram", "<i4", STARS),
        ("rating_sum", "<f8"),
        ("rating_square_sum", "<f8"),
        ("price_count", "<i4"),
        ("price_log_sum", "<f8"),
        ("sessions", "<i4"),
        ("first_time", "<i8"),
        ("last_time", "<i8"),
    ]
)
SOURCES = ("reviews", "behavior")

# One partition of users: where its journal stands, and the running mean of its ratings. Every
# rated event applied counts once, edits too: so its row follows from journal rows alone, whatever
# the users' states have applied already.
PARTITION = np.dtype(
    [
        ("step", "<u8"),  # journal rows applied
        ("seq", "<u8"),  # predictions made
        ("rating_count", "<u8"),
        ("rating_sum", "<f8"),
        ("histogram", "<u8", STARS),
        # What newcomers rated lately, `model.newcomers`. It fades, so it is no exact sum; but it is
        # the same wherever ratings come in the same order, as they do in a journal.
        ("late_sum", "<f8"),
        ("late_weight", "<f8"),
        ("storm", "<f8"),  # belief in their level, less what it begins with
        ("error_sum", "<f8"),  # squares of the errors
        ("error_count", "<f8"),
    ]
)

ITEM_ATTRIBUTES = np.dtype(
    [
        ("version", "<u8"),  # 1 + offset of the record in its items partition; 0: none
        ("first_time", "<i8"),  # ms; of the item's earliest record; 0: none
        ("text", "<u8"),  # hash of `catalog.item_text`; 0: no text
        ("brand", "<u4"),
        ("category", "<u4", LEVELS),  # hashes of the path's prefixes, widest first; 0: none
        ("price", "<f4"),
        ("price_rank", "<f4"),  # 0 to 1 among the prices of its category
    ]
)

USER_ATTRIBUTES = np.dtype(
    [
        ("version", "<u8"),
        ("gender", "<u4"),
        ("region", "<u4"),
        ("age", "<f4"),  # years
    ]
)

# Running prices of a category (a prefix of a path).
CATEGORY = np.dtype([("count", "<i8"), ("log_sum", "<f8"), ("log_square_sum", "<f8")])


def layout_hash(dtypes: Sequence[np.dtype[Any]]) -> str:
    """8 hex digits that change when a field of these dtypes does."""
    return sha256("\n".join(repr(dtype.descr) for dtype in dtypes).encode()).hexdigest()[:8]


LAYOUT_HASH = layout_hash(
    (EVENT, USER, ITEM, ITEM_DELTA, PARTITION, ITEM_ATTRIBUTES, USER_ATTRIBUTES, CATEGORY)
)


@dataclass(frozen=True)
class Change:
    """What `advance` did: n events, u users."""

    met: Rows  # USER (n): the state that each event met (its `step` aside); (0) when not asked for
    states: Rows  # USER (u): the states that follow
    duplicate: NDArray[np.bool_]  # (n): repeated events; not applied
    replaced: NDArray[np.float64]  # (n): stars that an edit took away; 0: none
    new_touch: NDArray[np.bool_]  # (n): the item's first event in the user's session
    first: NDArray[np.bool_]  # (n): it counts, and its user had rated nothing before


def duplicates(states: Rows, user_index: NDArray[np.intp], events: Rows) -> NDArray[np.bool_]:
    """Which of n events, in order, repeat one of the last 16 of their user (n).

    `states` USER (u); `user_index` (n): each event's row in `states`; `events` EVENT (n).
    """
    found = np.empty(len(events), np.bool_)
    _find_duplicates(states["recent"]["event_id"].copy(), user_index, events, found)
    return found


def advance(
    states: Rows,
    user_index: NDArray[np.intp],
    events: Rows,
    duplicate: NDArray[np.bool_],
    item_bias: NDArray[np.float32],
    global_mean: NDArray[np.float32],
    step: NDArray[np.uint64],
    observed: bool = True,
) -> Change:
    """Apply n events, in order, to the states of their u users.

    `states` USER (u); `user_index` (n): each event's row in `states`; `events` EVENT (n);
    `duplicate` (n): as journalled, or as `duplicates` found; `item_bias` and `global_mean` float32
    (n): those features of each event; `step` (n): journal row numbers; `observed`: the states that
    events met are wanted. Nothing given is changed.

    A FORGET leaves a blank state, which the store does not keep, and meets one: what had been
    known of the user goes nowhere any more.
    """
    met = np.empty(len(events) if observed else 0, USER)
    after = duplicated(states)
    replaced = np.zeros(len(events))
    touched = np.zeros(len(events), np.bool_)
    first = np.zeros(len(events), np.bool_)
    given = (user_index, events, duplicate, item_bias, global_mean, step)
    _advance(after, *given, blank(USER, 1), met, replaced, touched, first)
    return Change(met, after, duplicate, replaced, touched, first)


def run_partition(partition: Rows, events: Rows, duplicate: NDArray[np.bool_]) -> Rows:
    """The PARTITION rows, shape (n + 1), that n journal rows meet, and the one after them."""
    rows = np.empty(len(events) + 1, PARTITION)
    rows[0] = partition
    _run_partition(rows, events, duplicate)
    return rows


def item_deltas(events: Rows, change: Change, ends: Sequence[int] = ()) -> list[Rows]:
    """What n events did to their items, but for duplicates and what users did not do.

    `ends`: where each partition's events end; of one when there are none. Of each partition
    ITEM_DELTA rows, one for each item and source topic, sorted by both.
    """
    rows = np.flatnonzero(~change.duplicate & (events["action"] < TEXT))
    ends = ends or [len(events)]
    partition = np.searchsorted(ends, rows, "right")
    item, source = events["item"][rows], (events["action"][rows] != REVIEW).astype(np.uint8)
    order = np.lexsort((source, item, partition))
    keys = [each[order] for each in (partition, item, source)]
    begins = np.ones(len(rows), np.bool_)
    begins[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    deltas = np.zeros(int(begins.sum()), ITEM_DELTA)
    _add_deltas(deltas, begins, rows[order], keys[2], events, change.replaced, change.new_touch)
    cuts = np.searchsorted(keys[0][begins], np.arange(len(ends) + 1)).tolist()
    return [deltas[begin:end] for begin, end in pairwise(cuts)]


def apply_items(
    states: Rows, item_index: NDArray[np.intp], deltas: Rows, offsets: NDArray[np.uint64]
) -> Rows:
    """ITEM rows (k) after m deltas in the order of their log.

    `item_index` (m): each delta's row in `states`; `offsets` (m): each delta's position in its
    item-updates partition. Deltas that a state has applied already are skipped: those below the
    offset that it stood at.
    """
    result = duplicated(states)
    _apply_items(result, states["offset"].copy(), item_index, deltas, offsets)
    return result


def meet_items(
    states: Rows,
    item_index: NDArray[np.intp],
    ends: NDArray[np.intp],
    deltas: Sequence[Rows],
    delta_index: NDArray[np.intp],
    offsets: NDArray[np.uint64],
) -> tuple[Rows, Rows]:
    """The ITEM rows (n) that events of several batches meet, and those (k) after all batches.

    `states` ITEM (k); `item_index` (n): each event's row there; `ends`: where each batch's events
    end; `deltas` of each batch, (m) together, with their rows in `states` and their offsets (m).
    """
    met, after = np.empty(len(item_index), ITEM), duplicated(states)
    delta_ends = np.cumsum([len(each) for each in deltas])
    given = (item_index, ends, joined(deltas), delta_index, offsets, delta_ends)
    _meet_items(after, *given, met)
    return met, after


@compiled
def _find_duplicates(ids: Any, user_index: Any, events: Any, found: Any) -> None:
    for row in range(len(events)):
        ring, event_id = ids[user_index[row]], events[row].event_id
        if events[row].action == FORGET:
            ring[:] = 0
            found[row] = False
            continue
        found[row] = (ring == event_id).any()
        if not found[row]:
            for slot in range(RECENT - 1, 0, -1):
                ring[slot] = ring[slot - 1]
            ring[0] = event_id


@compiled
def _advance(
    states: Any,
    user_index: Any,
    events: Any,
    duplicate: Any,
    item_bias: Any,
    global_mean: Any,
    step: Any,
    nothing: Any,
    met: Any,
    replaced: Any,
    touched: Any,
    first: Any,
) -> None:
    """Change `states` in place; fill the others (`met` unless it is empty)."""
    for row in range(len(events)):
        user, event = states[user_index[row]], events[row]
        if event.action == FORGET:
            states[user_index[row]] = nothing[0]
            first[row] = True
            if len(met):
                met[row] = nothing[0]
            continue
        if len(met):
            met[row] = user
        user.step = step[row] + np.uint64(1)
        if duplicate[row]:
            continue
        first[row] = user.rating_count == 0
        recent = user.recent
        for slot in range(RECENT - 1, 0, -1):
            recent[slot].event_id = recent[slot - 1].event_id
        recent[0].event_id = event.event_id
        if event.action == TEXT:
            if not np.isnan(event.text_stars):
                user.text_count += np.uint32(1)
                user.text_sum += _rounded(np.float64(event.text_stars), RESIDUAL_STEPS)
            continue
        second = np.uint32(event.time // 1000)
        opened = _sit(user, event, second)
        user.last_time = max(user.last_time, event.time)
        stars = stars_of(event)
        old, seen = _touch(user, event, second, stars)
        touched[row] = opened or seen < int(user.session_second)
        if stars > 0:
            replaced[row] = old
            if old > 0:
                user.residual_sum += stars - old
            else:
                usual = np.float64(global_mean[row]) + np.float64(item_bias[row])
                user.residual_sum += _rounded(stars - usual, RESIDUAL_STEPS)
        _count(user, event, stars, replaced[row])
        if event.action == PURCHASE and not np.isnan(event.price):
            user.paid_count += np.uint32(1)
            user.paid_log_sum += _price(event)


@compiled
def _sit(user: Any, event: Any, second: Any) -> bool:
    """Go on with the user's session, or open one: whether it was opened."""
    if event.session != 0:
        opened = event.session != user.session
    else:
        opened = user.last_time == 0 or event.time - user.last_time > SESSION_GAP
    if opened:
        user.session_second = second
        user.session_events = np.uint32(0)
        user.sessions += np.uint32(1)
    user.session_events += np.uint32(1)
    if event.session != 0:
        user.session = event.session
    if user.first_second == 0:
        user.first_second = second
    return opened


@compiled
def _touch(user: Any, event: Any, second: Any, stars: float) -> tuple[float, int]:
    """Bring the item to the front of the recent ones.

    Gives the stars that it had (0: none), and when the user met it before (-1: never).
    """
    recent, place = user.recent, 0
    while place < RECENT and recent[place].item != event.item:
        place += 1
    rating = actions = np.uint8(0)
    seen = -1
    if place < RECENT:
        seen = int(recent[place].second)
        second = max(second, recent[place].second)
        rating, actions = recent[place].rating, recent[place].actions
    else:
        place = RECENT - 1
        _leave(user)
    old = rating / RATING_STEPS
    for slot in range(place, 0, -1):
        recent[slot].item = recent[slot - 1].item
        recent[slot].second = recent[slot - 1].second
        recent[slot].rating = recent[slot - 1].rating
        recent[slot].actions = recent[slot - 1].actions
    recent[0].item = event.item
    recent[0].second = second
    recent[0].rating = np.uint8(stars * RATING_STEPS) if stars > 0 else rating
    recent[0].actions = actions | np.uint8(1 << event.action)
    return old, seen


@compiled
def _leave(user: Any) -> None:
    """Keep the rating of the recent item that is about to be forgotten."""
    last = user.recent[RECENT - 1]
    if last.rating > 0:
        place = user.older[user.left % np.uint32(OLDER)]
        place.item = np.uint32(last.item & np.uint64(0xFFFF_FFFF))
        place.rating = last.rating
        user.left += np.uint32(1)


@compiled
def _count(sums: Any, event: Any, stars: float, replaced: float) -> None:
    """Count an event in the sums of a user or of an item."""
    if replaced > 0:
        _mark(sums, replaced, -1)
        sums.rating_sum -= replaced
        sums.rating_square_sum -= replaced * replaced
    else:
        sums.actions[event.action] += 1
        sums.rating_count += stars > 0
    if stars > 0:
        _mark(sums, stars, 1)
        sums.rating_sum += stars
        sums.rating_square_sum += stars * stars
    if not np.isnan(event.price):
        sums.price_count += 1
        sums.price_log_sum += _price(event)


@compiled
def _mark(sums: Any, stars: float, count: Any) -> None:
    """Add to the histogram where a rating is."""
    star = int(np.floor(stars + 0.5))  # halves up
    if 1 <= star <= STARS:
        sums.histogram[star - 1] += count


@compiled
def _run_partition(rows: Any, events: Any, duplicate: Any) -> None:
    for row in range(len(events)):
        rows[row + 1] = rows[row]
        after, event = rows[row + 1], events[row]
        after.step += np.uint64(1)
        if event.action < TEXT:
            after.seq += np.uint64(1)
        stars = stars_of(event)
        if stars > 0 and not duplicate[row]:
            after.rating_count += np.uint64(1)
            after.rating_sum += stars
            _mark(after, stars, np.uint64(1))


@compiled
def _add_deltas(
    deltas: Any, begins: Any, rows: Any, source: Any, events: Any, replaced: Any, touched: Any
) -> None:
    """Fill `deltas` from events in the order of `rows`; a delta `begins` with some of them."""
    at = -1
    for place in range(len(rows)):
        row = rows[place]
        event = events[row]
        at += begins[place]
        last = deltas[at]
        if begins[place]:
            last.item, last.source = event.item, source[place]
            last.first_time = last.last_time = event.time
        _count(last, event, stars_of(event), replaced[row])
        last.sessions += touched[row]
        last.first_time = min(last.first_time, event.time)
        last.last_time = max(last.last_time, event.time)


@compiled
def _apply_items(states: Any, stood: Any, item_index: Any, deltas: Any, offsets: Any) -> None:
    for row in range(len(deltas)):
        item = item_index[row]
        if offsets[row] >= stood[item]:
            _apply_item(states[item], deltas[row], offsets[row])


@compiled
def _meet_items(
    states: Any,
    item_index: Any,
    ends: Any,
    deltas: Any,
    delta_index: Any,
    offsets: Any,
    delta_ends: Any,
    met: Any,
) -> None:
    row = delta = 0
    for batch in range(len(ends)):
        while row < ends[batch]:
            met[row] = states[item_index[row]]
            row += 1
        while delta < delta_ends[batch]:
            _apply_item(states[delta_index[delta]], deltas[delta], offsets[delta])
            delta += 1


@compiled
def _apply_item(state: Any, delta: Any, offset: Any) -> None:
    for action in range(COUNTED):
        state.actions[action] += delta.actions[action]
    for star in range(STARS):
        state.histogram[star] += delta.histogram[star]
    state.rating_count += delta.rating_count
    state.rating_sum += delta.rating_sum
    state.rating_square_sum += delta.rating_square_sum
    state.price_count += delta.price_count
    state.price_log_sum += delta.price_log_sum
    state.sessions += delta.sessions
    if state.first_time == 0 or delta.first_time < state.first_time:
        state.first_time = delta.first_time
    state.last_time = max(state.last_time, delta.last_time)
    state.offset = max(state.offset, offset + np.uint64(1))


@compiled
def stars_of(event: Any) -> float:
    """An event's rating, rounded to 1/32 star; 0: none."""
    if event.action != REVIEW or np.isnan(event.rating):
        return 0.0
    return _rounded(np.float64(event.rating), RATING_STEPS)


@compiled
def _price(event: Any) -> float:
    return _rounded(np.log1p(np.float64(event.price)), LOG_STEPS)


@compiled
def _rounded(value: float, steps: int) -> float:
    return np.rint(value * steps) / steps
