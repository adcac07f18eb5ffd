"""What is known of users, items and a partition, and how events change it.

States are rows of NumPy structured arrays. `advance` takes many events of many users at once and
gives each event the state that it met and each user the state that follows: what one event at a
time would give, bit for bit. To make this so, everything that is added up is rounded to a binary
fraction first (ratings to 1/32 star, logarithms of prices to 1/256, residuals to 1/1024): sums of
such numbers are exact in float64, so they depend neither on order nor on the machine, and an
edited review takes away exactly what it had added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.events import COUNTED, EVENT, PURCHASE, REVIEW, TEXT, Rows, blank, duplicated, opaque
from model.exceptions import LayoutError

Fields = dict[str, NDArray[Any]]
"""Columns by the name of the field that they fill."""

RECENT = 16  # items, and event ids, that a user's state remembers
STARS = 5
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

USER = np.dtype(
    [
        ("step", "<u8"),  # 1 + the journal row applied last; 0: none
        ("last_time", "<i8"),  # ms; latest event; 0: none
        ("first_second", "<u4"),  # s; event applied first; 0: none
        ("session_second", "<u4"),  # s; begin of the current session
        ("session", "<u8"),  # the latest session id seen; 0: none
        ("session_events", "<u4"),  # applied since the session began
        ("sessions", "<u4"),
        ("actions", "<u4", COUNTED),
        ("rating_count", "<u4"),
        ("histogram", "<u4", STARS),  # ratings rounded to 1..5 stars
        ("rating_sum", "<f8"),
        ("rating_square_sum", "<f8"),
        ("residual_sum", "<f8"),  # sum of rating - global mean - item bias, as they were then
        ("price_count", "<u4"),
        ("price_log_sum", "<f8"),  # log(1 + price) of events with a price
        ("paid_count", "<u4"),
        ("paid_log_sum", "<f8"),  # the same of purchases
        ("text_count", "<u4"),
        ("text_sum", "<f8"),  # expected stars of own review texts
        ("recent", SLOT, RECENT),  # last, so that a short history has a short row (`to_bytes`)
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
    ]
)

ITEM_ATTRIBUTES = np.dtype(
    [
        ("version", "<u8"),  # 1 + offset of the record in its items partition; 0: none
        ("first_time", "<i8"),  # ms; of the item's earliest record; 0: none
        ("text", "<u8"),  # hash of `catalog.item_text`; 0: no text
        ("brand", "<u4"),
        ("category", "<u4", 4),  # hash of each prefix of the category path, widest first; 0: none
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


def _sum_columns(names: Sequence[str]) -> dict[str, slice]:
    ends = np.cumsum([int(np.prod(USER[name].shape)) for name in names]).tolist()
    return {
        name: slice(begin, end) for name, begin, end in zip(names, [0, *ends], ends, strict=False)
    }


# The fields of USER that are sums, and their columns in a matrix of all of them.
SUMS = _sum_columns(
    (
        "actions",
        "rating_count",
        "histogram",
        "rating_sum",
        "rating_square_sum",
        "residual_sum",
        "price_count",
        "price_log_sum",
        "paid_count",
        "paid_log_sum",
        "text_count",
        "text_sum",
        "sessions",
    )
)
SUM_COLUMNS = SUMS["sessions"].stop
ITEM_SUMS = (
    "actions",
    "rating_count",
    "histogram",
    "rating_sum",
    "rating_square_sum",
    "price_count",
    "price_log_sum",
)


@dataclass(frozen=True)
class Meeting:
    """n events of u users, sorted by user, and which of them are repetitions."""

    states: Rows  # USER (u), as given
    events: Rows  # EVENT (n), sorted by user
    order: NDArray[np.intp]  # (n): the given position of each sorted row
    users: NDArray[np.intp]  # (k): the rows of `states` that have events
    runs: "_Runs"
    stars: NDArray[np.float64]  # (n)
    rings: "_Rings"
    duplicate: NDArray[np.bool_]  # (n), in the given order


@dataclass(frozen=True)
class Change:
    """What `advance` did: n events, u users."""

    before: Callable[[], Rows]  # USER (n): the state that each event met (its `step` aside)
    states: Rows  # USER (u): the states that follow
    duplicate: NDArray[np.bool_]  # (n): repeated events; not applied
    added: NDArray[np.float64]  # (n, SUM_COLUMNS): what each event added to its user's sums
    new_touch: NDArray[np.bool_]  # (n): the item's first event in the user's session


def meet(
    states: Rows,
    user_index: NDArray[np.intp],
    events: Rows,
    duplicate: NDArray[np.bool_] | None = None,
) -> Meeting:
    """Bring n events, in order, before the states of their u users: the first half of `advance`.

    `states` USER (u); `user_index` (n): each event's row in `states`; `events` EVENT (n);
    `duplicate` (n): as journalled; `None`: found by the event ids remembered. Rows that a user's
    state has applied already must have been left out (`replay.recover`).
    """
    order = np.argsort(user_index, kind="stable")
    events = events.take(order)
    users, segment, sizes = np.unique(user_index[order], return_inverse=True, return_counts=True)
    runs = _Runs(segment, np.cumsum(sizes) - sizes, sizes)
    stars = _stars(events)
    known = None if duplicate is None else duplicate[order]
    rings = _rings(states.take(users), runs, events, stars, known)
    found = np.empty(len(events), np.bool_)
    found[order] = rings.duplicate
    return Meeting(states, events, order, users, runs, stars, rings, found)


def advance(
    meeting: Meeting,
    item_bias: NDArray[np.float32],
    global_mean: NDArray[np.float32],
    step: NDArray[np.uint64],
) -> Change:
    """Apply the events of a meeting to the states of their users.

    `item_bias` and `global_mean` float32 (n): those features of each event; `step` (n): journal
    row numbers. Nothing given is changed.

    Sums are taken along each user's events at once. Only what hangs on what came just before (the
    recent items, the event ids, the latest time) is taken in rounds, by `meet`. The states that
    events met are many bytes, and made when asked for: who follows states alone never does.
    """
    events, order, runs, rings = meeting.events, meeting.order, meeting.runs, meeting.rings
    if not len(events):
        none = meeting.duplicate
        empty = meeting.states[:0]
        return Change(lambda: empty, meeting.states, none, np.empty((0, SUM_COLUMNS)), none)
    old = meeting.states.take(meeting.users)
    is_text = events["action"] == TEXT
    applied = ~rings.duplicate & ~is_text
    sessions, opened = _sessions(old, rings, runs, events, applied)
    added = _added(
        events, applied, meeting.stars, rings.replaced, item_bias[order], global_mean[order]
    )
    text_stars = np.where(is_text & ~rings.duplicate, events["text_stars"], np.nan)
    added[:, SUMS["text_count"].start] = ~np.isnan(text_stars)
    added[:, SUMS["text_sum"].start] = _rounded(np.nan_to_num(text_stars), RESIDUAL_STEPS)
    added[:, SUMS["sessions"].start] = opened
    running = np.ascontiguousarray(np.cumsum(added.T, axis=1).T)
    base = _base(old, running[runs.first] - added[runs.first])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))

    def before() -> Rows:
        rows = old.take(runs.of)
        _set(rows["recent"], rings.before())
        _set(rows, {"last_time": rings.last_time, **sessions.before})
        _set(rows, _fields(base.take(runs.of, axis=0) + running - added))
        return rows.take(back)

    after = duplicated(old)
    _set(after["recent"], rings.after)
    _set(after, {"last_time": rings.last_time_after, **sessions.after})
    _set(after, _fields(base + running[runs.last]))
    after["step"] = step[order][runs.last] + np.uint64(1)
    result = duplicated(meeting.states)
    opaque(result)[meeting.users] = opaque(after)
    return Change(
        before,
        result,
        meeting.duplicate,
        added.take(back, axis=0),
        (applied & (opened | (rings.item_second < sessions.before["session_second"])))[back],
    )


def run_partition(partition: Rows, events: Rows, duplicate: NDArray[np.bool_]) -> Rows:
    """The PARTITION rows, shape (n + 1), that n journal rows meet, and the one after them."""
    stars = _stars(events)
    rated = (stars > 0) & ~duplicate
    added = {
        "step": np.ones(len(events)),
        "seq": events["action"] != TEXT,
        "rating_count": rated,
        "rating_sum": np.where(rated, stars, 0),
        "histogram": _one_hot(np.where(rated, stars, 0)),
    }
    rows = np.repeat(partition.reshape(1), len(events) + 1)
    for name, values in added.items():
        rows[name][1:] += np.cumsum(values, axis=0).astype(PARTITION[name].base)
    return rows


def item_deltas(events: Rows, change: Change) -> Rows:
    """What n events did to their items, but for duplicates and texts.

    ITEM_DELTA rows, one for each item and source topic, sorted by both.
    """
    rows = np.flatnonzero(~change.duplicate & (events["action"] != TEXT))
    source = (events["action"][rows] != REVIEW).astype(np.uint8)
    order = np.lexsort((source, events["item"][rows]))
    rows, source = rows[order], source[order]
    item, time = events["item"][rows], events["time"][rows]
    fresh = np.ones(len(rows), np.bool_)
    fresh[1:] = (item[1:] != item[:-1]) | (source[1:] != source[:-1])
    first = np.flatnonzero(fresh)
    deltas = np.zeros(len(first), ITEM_DELTA)
    if not len(first):
        return deltas
    sums = np.add.reduceat(change.added[rows], first, axis=0)
    for name in ITEM_SUMS:
        deltas[name] = _field(sums, name)
    deltas["item"], deltas["source"] = item[first], source[first]
    deltas["sessions"] = np.add.reduceat(change.new_touch[rows].astype(np.int32), first)
    deltas["first_time"] = np.minimum.reduceat(time, first)
    deltas["last_time"] = np.maximum.reduceat(time, first)
    return deltas


def apply_items(
    states: Rows, item_index: NDArray[np.intp], deltas: Rows, offsets: NDArray[np.uint64]
) -> Rows:
    """ITEM rows (k) after m deltas in the order of their log.

    `item_index` (m): each delta's row in `states`; `offsets` (m): each delta's position in its
    item-updates partition. Deltas that a state has applied already are skipped.
    """
    fresh = offsets >= states["offset"][item_index]
    index, deltas, offsets = item_index[fresh], deltas[fresh], offsets[fresh]
    result = duplicated(states)
    for name in (*ITEM_SUMS, "sessions"):
        np.add.at(result[name], index, deltas[name].astype(ITEM[name].base))
    first = np.where(states["first_time"] == 0, np.iinfo(np.int64).max, states["first_time"])
    np.minimum.at(first, index, deltas["first_time"])
    touched = np.unique(index)
    result["first_time"][touched] = first[touched]
    np.maximum.at(result["last_time"], index, deltas["last_time"])
    np.maximum.at(result["offset"], index, offsets + np.uint64(1))
    return result


@dataclass(frozen=True)
class _Runs:
    """Events sorted by user: k users, each with a run of rows."""

    of: NDArray[np.intp]  # (n): the run of each row
    first: NDArray[np.intp]  # (k): its first row
    size: NDArray[np.intp]  # (k)

    @property
    def last(self) -> NDArray[np.intp]:
        return self.first + self.size - 1

    def latest(
        self, mask: NDArray[np.bool_], values: NDArray[Any], initial: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The value at the latest masked row, before each row (n) and after each run (k).

        `initial` (k): the value of runs in which none came yet.
        """
        newest = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))
        earlier = np.concatenate(([-1], newest[:-1]))
        final = newest[self.last]
        return (
            np.where(earlier >= self.first[self.of], values[earlier], initial[self.of]),
            np.where(final >= self.first, values[final], initial),
        )


@dataclass(frozen=True)
class _Rings:
    before: Callable[[], Fields]  # of SLOT, (n, 16)
    after: Fields  # of SLOT, (k, 16)
    last_time: NDArray[np.int64]  # (n): before each row
    last_time_after: NDArray[np.int64]  # (k)
    duplicate: NDArray[np.bool_]  # (n)
    replaced: NDArray[np.float64]  # (n): stars given to the item before; 0: none
    item_second: NDArray[np.int64]  # (n): when the user met the item before; -1: never


def _rings(
    states: Rows,
    runs: _Runs,
    events: Rows,
    stars: NDArray[np.float64],
    duplicate: NDArray[np.bool_] | None,
) -> _Rings:
    """Recent items and event ids along each run, in rounds: round r takes the r-th of each run.

    Users stand sorted by the size of their runs, so that those in a round are the first ones. The
    second, rating and actions of a slot travel in one number.
    """
    n, k = len(events), len(states)
    rounds = np.arange(n) - runs.first[runs.of]
    busy = np.argsort(-runs.size, kind="stable")
    rank = np.empty_like(busy)
    rank[busy] = np.arange(k)
    order = np.argsort(rounds * k + rank[runs.of])  # rows round by round

    recent = states.take(busy)["recent"]
    ids, items, marks = recent["event_id"].copy(), recent["item"].copy(), _marks(recent)
    last_time = states["last_time"][busy]
    before_ids, before_items, before_marks = (np.empty((n, RECENT), np.uint64) for _ in range(3))
    before_time = np.empty(n, np.int64)
    earlier = np.zeros(n, np.uint64)  # marks of the item's slot, 0 where it has none

    event_id, item = events["event_id"][order][:, None], events["item"][order][:, None]
    time, counted = events["time"][order], events["action"][order] != TEXT
    given = None if duplicate is None else duplicate[order]
    repeated = np.empty(n, np.bool_)
    mark = _event_marks(events, stars)[order]
    keep = np.where(mark & _RATING, ~_RATING, ~np.uint64(0))  # a new rating drops the old one

    rows, slots = np.arange(k), np.arange(1, RECENT)
    end = 0
    for width in np.bincount(rounds).tolist():
        begin, end = end, end + width
        now = slice(begin, end)
        round_ids, round_items, round_marks = ids[:width], items[:width], marks[:width]
        before_ids[now], before_items[now], before_marks[now] = round_ids, round_items, round_marks
        before_time[now] = last_time[:width]
        fresh = ~((round_ids == event_id[now]).any(1) if given is None else given[now])
        repeated[now] = ~fresh
        np.copyto(round_ids[:, 1:], before_ids[now, :-1], where=fresh[:, None])
        np.copyto(round_ids[:, :1], event_id[now], where=fresh[:, None])
        touch = fresh & counted[now]
        np.maximum(last_time[:width], time[now], out=last_time[:width], where=touch)
        found = round_items == item[now]
        place, row = found.argmax(1), rows[:width]
        known = found[row, place]
        old = np.where(known, round_marks[row, place], np.uint64(0))
        earlier[now] = old
        new = (np.maximum(old, mark[now]) & _SECOND) | (((old & keep[now]) | mark[now]) & ~_SECOND)
        # Slots before the item's own, or all but the last, move down by one.
        depth = np.where(touch, np.where(known, place, RECENT - 1), 0)
        moved = depth[:, None] >= slots
        np.copyto(round_items[:, 1:], before_items[now, :-1], where=moved)
        np.copyto(round_marks[:, 1:], before_marks[now, :-1], where=moved)
        np.copyto(round_items[:, 0], item[now, 0], where=touch)
        np.copyto(round_marks[:, 0], new, where=touch)

    back = np.empty_like(order)
    back[order] = np.arange(n)
    met = earlier[back]
    return _Rings(
        lambda: _slots(
            *(ring.take(back, axis=0) for ring in (before_ids, before_items, before_marks))
        ),
        _slots(*(ring.take(rank, axis=0) for ring in (ids, items, marks))),
        before_time[back],
        last_time[rank],
        repeated[back],
        ((met & _RATING) >> _RATING_SHIFT) / float(RATING_STEPS),
        np.where(met > 0, (met >> _SECOND_SHIFT).astype(np.int64), -1),
    )


_RATING_SHIFT, _SECOND_SHIFT = np.uint64(8), np.uint64(16)
_RATING = np.uint64(0xFF00)
_SECOND = ~np.uint64(0xFFFF)


def _marks(slots: Rows) -> NDArray[np.uint64]:
    second, rating = slots["second"].astype(np.uint64), slots["rating"].astype(np.uint64)
    return (second << _SECOND_SHIFT) | (rating << _RATING_SHIFT) | slots["actions"]


def _event_marks(events: Rows, stars: NDArray[np.float64]) -> NDArray[np.uint64]:
    second, rating = _second(events).astype(np.uint64), (stars * RATING_STEPS).astype(np.uint64)
    action = np.where(events["action"] < COUNTED, 1 << (events["action"] % COUNTED), 0)
    return (second << _SECOND_SHIFT) | (rating << _RATING_SHIFT) | action.astype(np.uint64)


def _slots(ids: NDArray[np.uint64], items: NDArray[np.uint64], marks: NDArray[np.uint64]) -> Fields:
    return {
        "event_id": ids,
        "item": items,
        "second": marks >> _SECOND_SHIFT,
        "rating": marks >> _RATING_SHIFT & np.uint64(0xFF),
        "actions": marks & np.uint64(0xFF),
    }


@dataclass(frozen=True)
class _Sessions:
    """Fields of sessions, and of the first time."""

    before: Fields  # (n)
    after: Fields  # (k)


def _sessions(
    old: Rows, rings: _Rings, runs: _Runs, events: Rows, applied: NDArray[np.bool_]
) -> tuple[_Sessions, NDArray[np.bool_]]:
    """What sessions events met and left, and which events opened one, (n)."""
    named, second = events["session"] != 0, _second(events)
    session, session_after = runs.latest(applied & named, events["session"], old["session"])
    renamed: NDArray[np.bool_] = events["session"] != session
    silent: NDArray[np.bool_] = (rings.last_time == 0) | (
        events["time"] - rings.last_time > SESSION_GAP
    )
    opened = applied & np.where(named, renamed, silent)
    since, since_after = runs.latest(opened, second, old["session_second"])
    count = np.cumsum(applied)
    earlier = count - applied
    start = earlier[runs.first]
    begun, begun_after = runs.latest(opened, earlier, start - old["session_events"])

    opening = applied & (earlier == start[runs.of])  # the first event applied of each run
    first = old["first_second"].copy()
    newcomer = opening & (first == 0)[runs.of]
    first[runs.of[newcomer]] = second[newcomer]
    met = np.where(earlier > start[runs.of], first[runs.of], old["first_second"][runs.of])
    before: Fields = {
        "session": session,
        "session_second": since,
        "session_events": earlier - begun,
        "first_second": met,
    }
    after: Fields = {
        "session": session_after,
        "session_second": since_after,
        "session_events": count[runs.last] - begun_after,
        "first_second": first,
    }
    return _Sessions(before, after), opened


def _added(
    events: Rows,
    applied: NDArray[np.bool_],
    stars: NDArray[np.float64],
    replaced: NDArray[np.float64],
    item_bias: NDArray[np.float32],
    global_mean: NDArray[np.float32],
) -> NDArray[np.float64]:
    """What each event adds to the sums of ratings, actions and prices, (n, SUM_COLUMNS)."""
    rated = applied & (stars > 0)
    edit = rated & (replaced > 0)
    first = applied & ~edit
    new, old = np.where(rated, stars, 0), np.where(edit, replaced, 0)
    residual = _rounded(stars - global_mean - item_bias, RESIDUAL_STEPS)
    priced = applied & ~np.isnan(events["price"])
    price = _rounded(np.log1p(np.where(priced, events["price"], 0).astype(np.float64)), LOG_STEPS)
    paid = priced & (events["action"] == PURCHASE)
    values = {
        "actions": (events["action"][:, None] == np.arange(COUNTED)) & first[:, None],
        "rating_count": rated & ~edit,
        "histogram": _one_hot(new) - _one_hot(old),
        "rating_sum": new - old,
        "rating_square_sum": new * new - old * old,
        "residual_sum": np.where(edit, new - old, np.where(rated, residual, 0)),
        "price_count": priced,
        "price_log_sum": price,
        "paid_count": paid,
        "paid_log_sum": np.where(paid, price, 0),
    }
    added = np.zeros((len(events), SUM_COLUMNS))
    for name, value in values.items():
        added[:, SUMS[name]] = value.reshape(len(events), -1)
    return added


def _base(states: Rows, less: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums of states less these, (k, SUM_COLUMNS)."""
    base = np.empty((len(states), SUM_COLUMNS))
    for name, columns in SUMS.items():
        base[:, columns] = states[name].reshape(len(states), -1)
    return base - less


def _fields(sums: NDArray[np.float64]) -> Fields:
    return {name: _field(sums, name) for name in SUMS}


def _field(sums: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    columns = sums[:, SUMS[name]]
    return columns if USER[name].shape else columns[:, 0]


def _set(rows: Rows, fields: Fields) -> None:
    for name, values in fields.items():
        rows[name] = values


def _stars(events: Rows) -> NDArray[np.float64]:
    """Ratings rounded to 1/32 star; 0: none."""
    rated = (events["action"] == REVIEW) & ~np.isnan(events["rating"])
    return _rounded(np.where(rated, events["rating"], 0).astype(np.float64), RATING_STEPS)


def _star(stars: NDArray[np.float64]) -> NDArray[np.intp]:
    """Whole stars, halves up."""
    return np.floor(stars + 0.5).astype(np.intp)


def _one_hot(stars: NDArray[np.float64]) -> NDArray[np.int8]:
    return (_star(stars)[:, None] == np.arange(1, STARS + 1)).astype(np.int8)


def _rounded(values: NDArray[Any], steps: int) -> NDArray[np.float64]:
    return np.rint(values.astype(np.float64) * steps) / steps


def _second(events: Rows) -> NDArray[np.int64]:
    return events["time"] // 1000


def to_bytes(rows: Rows) -> list[bytes]:
    """Rows as the store keeps them: little endian, packed, zeros at the end cut off."""
    size, data = rows.dtype.itemsize, rows.tobytes()
    return [data[at : at + size].rstrip(b"\0") for at in range(0, len(data), size)]


def from_bytes(values: Sequence[bytes | None], dtype: np.dtype[Any]) -> Rows:
    """Rows of what `to_bytes` wrote, shape (n,); `None` gives a blank row.

    Raises LayoutError for a value longer than a row.
    """
    size, missing = dtype.itemsize, blank(dtype, 1).tobytes()
    data = b"".join(missing if value is None else value.ljust(size, b"\0") for value in values)
    if len(data) != size * len(values):
        longest = max(len(value) for value in values if value is not None)
        raise LayoutError(
            f"A stored state has {longest} bytes where layout {LAYOUT_HASH} has {size}: another"
            " layout wrote under this key. Rebuild the store under this layout."
        )
    return np.frombuffer(data, dtype).copy()
