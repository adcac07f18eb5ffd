"""The one way from events to features and states: for scoring, recovery, proof and training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from model import features, newcomers
from model.compiled import compiled
from model.events import TEXT, Rows, blank, joined, opaque
from model.exceptions import GapError
from model.ids import NONE, Hashes
from model.lookups import Dated, Lookups, Store, Table, Vectors, empty, table
from model.state import (
    ITEM,
    ITEM_ATTRIBUTES,
    OLDER,
    PARTITION,
    RATING_STEPS,
    USER,
    USER_ATTRIBUTES,
    advance,
    apply_items,
    duplicates,
    item_deltas,
    meet_items,
    run_partition,
)


@dataclass(frozen=True)
class Observation:
    """All that a prediction is made from, of n events (or n items asked for)."""

    features: NDArray[np.float32]  # (n, F): columns as in features.FEATURES; nan: missing
    recents: Hashes  # (n, 16): the user's recent distinct items, newest first; 0: none
    recent_ratings: NDArray[np.float32]  # (n, 16): stars given to them; nan: none
    recent_actions: NDArray[np.uint8]  # (n, 16): bit k: ACTIONS[k] was done with the item
    # (n, 64): low halves of hashes of items rated before those, newest first; 0: none
    older: NDArray[np.uint32]
    older_ratings: NDArray[np.uint8]  # (n, 64): in 1/32 star
    item_attributes: Rows  # ITEM_ATTRIBUTES (n)
    item_vectors: NDArray[np.intp]  # (n): rows of lookups.vectors.rows; 0: none
    recent_vectors: NDArray[np.intp]  # (n, 16): likewise

    def take(self, rows: NDArray[np.intp]) -> Self:
        """These rows, in this order."""
        return replace(
            self, **{name: column.take(rows, axis=0) for name, column in vars(self).items()}
        )

    def part(self, rows: slice) -> Self:
        """These rows, as a view."""
        return replace(self, **{name: column[rows] for name, column in vars(self).items()})


@dataclass(frozen=True)
class Share:
    """What a batch has of one user partition: n events of u users, in the order of its journal."""

    states: Rows  # USER (u), distinct users
    user_index: NDArray[np.intp]  # (n): each event's row in `states`
    partition: Rows  # PARTITION, shape ()
    events: Rows  # EVENT (n)


@dataclass(frozen=True)
class BatchResult:
    """What a batch of n events of u users gives."""

    observations: Observation  # of all events of its batch
    rows: slice  # its own among them
    duplicate: NDArray[np.bool_]  # (n): repeated; predicted, not applied
    behind: NDArray[np.bool_]  # (n): of before the latest event of its user
    step: NDArray[np.uint64]  # (n): number of each journal row
    seq: NDArray[np.uint64]  # (n): number of each prediction; 0 for what users did not do
    states: Rows  # USER (u)
    partition: Rows  # PARTITION, shape ()
    deltas: Rows  # ITEM_DELTA, one for each item and source topic

    @property
    def observation(self) -> Observation:
        """Of its own events."""
        return self.observations.part(self.rows)


def observe(users: Rows, partition: Rows, events: Rows, lookups: Lookups) -> Observation:
    """What predictions for `events` EVENT (n) are made from; changes nothing.

    `users` USER (n): the state that each event meets; `partition` PARTITION, (n) or (), likewise.
    """
    recents = users["recent"]["item"].copy()
    return _observe(
        _Met(
            users,
            recents,
            lookups.items.take(events["item"]),
            partition,
            lookups.user_attributes.take(events["user"]),
            lookups.item_attributes.take(events["item"]),
            lookups.item_attributes.take(recents),
        ),
        events,
        lookups.vectors,
    )


@dataclass(frozen=True)
class _Met:
    """What n events meet."""

    users: Rows  # USER (n)
    recents: Hashes  # (n, 16): the items in their `recent`
    items: Rows  # ITEM (n)
    partition: Rows  # PARTITION (n) or ()
    user_attributes: Rows  # USER_ATTRIBUTES (n)
    item_attributes: Rows  # ITEM_ATTRIBUTES (n)
    recent_attributes: Rows  # ITEM_ATTRIBUTES (n, 16)


def _observe(met: _Met, events: Rows, vectors: Vectors | None) -> Observation:
    users, attributes = met.users, met.item_attributes
    ratings = users["recent"]["rating"]
    if vectors is None:
        item_vectors = np.zeros(len(events), np.intp)
        recent_vectors = np.zeros(met.recents.shape, np.intp)
        text_known = similarity = None
    else:
        item_vectors = vectors.find(attributes["text"])
        recent_vectors = vectors.find(met.recent_attributes["text"])
        text_known = item_vectors > 0
        similarity = _similarity(vectors.rows, item_vectors, recent_vectors)
    rows = features.compute(
        users,
        met.items,
        met.user_attributes,
        attributes,
        met.recent_attributes,
        met.partition,
        events,
        text_known,
        similarity,
    )
    return Observation(
        rows,
        met.recents,
        np.where(ratings > 0, ratings / np.float32(RATING_STEPS), np.float32(np.nan)),
        users["recent"]["actions"].copy(),
        *_newest_first(users),
        attributes,
        item_vectors,
        recent_vectors,
    )


def _newest_first(users: Rows) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Items and ratings (n, 64) that have left the recent ones, the last to leave first."""
    items = np.zeros(users["older"].shape, np.uint32)
    ratings = np.zeros(items.shape, np.uint8)
    _unroll(users["older"], users["left"], items, ratings)
    return items, ratings


@compiled
def _unroll(older: Any, left: Any, items: Any, ratings: Any) -> None:
    for row in range(len(older)):
        end = np.int64(left[row])
        for slot in range(min(end, OLDER)):
            place = older[row, (end - 1 - slot) % OLDER]
            items[row, slot], ratings[row, slot] = place.item, place.rating


def run_batch(shares: Sequence[Share], lookups: Lookups) -> tuple[list[BatchResult], Observation]:
    """Observe and apply a batch: what each share gives, and the observation of all, in order.

    Users' states and the running means are as each event met them; `lookups` as the batch began.
    All shares pass each step at once: many small arrays cost more than one. Nothing given is
    changed.
    """
    events = joined([share.events for share in shares])
    states = joined([share.states for share in shares])
    rows, users = (
        _spans([len(each) for each in of])
        for of in zip(*((s.events, s.states) for s in shares), strict=True)
    )
    index = np.concatenate(
        [share.user_index + span.start for share, span in zip(shares, users, strict=True)]
    )
    duplicate = duplicates(states, index, events)
    runs = [
        run_partition(share.partition, share.events, duplicate[span])
        for share, span in zip(shares, rows, strict=True)
    ]
    partitions, after = joined([run[:-1] for run in runs]), joined([run[-1:] for run in runs])
    step = partitions["step"].copy()
    seq = np.where(events["action"] < TEXT, partitions["seq"], np.uint64(0))
    global_mean, item_bias = features.biases(lookups.items.take(events["item"]), partitions)
    change = advance(states, index, events, duplicate, item_bias, global_mean, step)
    ends = [span.stop for span in rows]
    given = np.array(ends, np.intp), events, change.first, global_mean, item_bias
    newcomers.follow(partitions, after, *given)
    observation = observe(change.met, partitions, events, lookups)
    behind = events["time"] < change.met["last_time"]
    deltas = item_deltas(events, change, ends)
    results = [
        BatchResult(
            observation,
            span,
            duplicate[span],
            behind[span],
            step[span],
            seq[span],
            change.states[theirs],
            after[number].reshape(()),
            deltas[number],
        )
        for number, (span, theirs) in enumerate(zip(rows, users, strict=True))
    ]
    return results, observation


def _spans(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *sizes]).tolist()
    return [slice(begin, end) for begin, end in pairwise(ends)]


def recover(
    states: Rows,
    user_index: NDArray[np.intp],
    partition: Rows,
    events: Rows,
    rows: NDArray[np.float32],
    duplicate: NDArray[np.bool_],
    step: NDArray[np.uint64],
) -> tuple[Rows, Rows]:
    """States and partition after n journal rows, skipping what each has applied already.

    Bit for bit what `run_batch` gave when the rows were written. Feature `rows` (n, F),
    `duplicate` and `step` (n) as journalled, in the order of the journal; any number of batches
    at once. Rows of nobody, erased since, count in the partition alone. Raises GapError when rows
    between the partition's and these are missing.
    """
    new = step >= partition["step"]
    if not np.array_equal(step[new], partition["step"] + np.arange(new.sum(), dtype=np.uint64)):
        raise GapError(
            f"The journal does not go on where the store ends: row {partition['step']} is missing"
            " or out of order. Read the journal from the position in the partition's header, or"
            " rebuild the partition from the archive."
        )
    fresh = (step >= states["step"][user_index]) & (events["user"] != NONE)
    mean, item_bias, ratings = (
        rows[:, features.INDEX[name]] for name in ("global_mean", "item_bias", "user_ratings")
    )
    change = advance(
        states,
        user_index[fresh],
        events.compress(fresh),
        duplicate[fresh],
        item_bias[fresh],
        mean[fresh],
        step[fresh],
        observed=False,
    )
    late, repeated = events.compress(new), duplicate[new]
    run = run_partition(partition, late, repeated)
    first = ~repeated & (ratings[new] == 0)
    ends = np.array([len(late)], np.intp)
    newcomers.follow(run[:-1], run[-1:], ends, late, first, mean[new], item_bias[new])
    return change.states, run[-1].reshape(())


def _similarity(
    vectors: NDArray[np.float32], items: NDArray[np.intp], recents: NDArray[np.intp]
) -> NDArray[np.float32]:
    """Cosines, shape (n, 16), of each item's vector with the recents'; nan where either is none."""
    cosines = np.full(recents.shape, np.nan, np.float32)
    _compare(vectors, items, recents, cosines)
    return cosines


@compiled
def _compare(vectors: Any, items: Any, recents: Any, cosines: Any) -> None:
    width = vectors.shape[1]
    whole = width - width % _LANES
    lanes = np.empty(_LANES, np.float32)
    for row in range(len(items)):
        if items[row] == 0:
            continue
        item = vectors[items[row]]
        for slot in range(recents.shape[1]):
            if recents[row, slot] == 0:
                continue
            recent = vectors[recents[row, slot]]
            lanes[:] = 0
            for begin in range(0, whole, _LANES):
                for lane in range(_LANES):
                    lanes[lane] += item[begin + lane] * recent[begin + lane]
            total = np.float32(0)
            for lane in range(_LANES):
                total += lanes[lane]
            for at in range(whole, width):
                total += item[at] * recent[at]
            cosines[row, slot] = total


_LANES = 16  # sums side by side, in one order on every machine


def _firsts(instant: NDArray[np.intp], index: NDArray[np.intp]) -> NDArray[np.intp]:
    """Of each event (n) the first row of its instant with the same index."""
    key = instant * (index.max(initial=0) + 1) + index
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first[inverse]


@dataclass(frozen=True)
class HistoryBatch:
    """A slice of a replayed history and what it gave."""

    rows: slice  # of the events given to `History.run`
    lookups: Lookups
    result: BatchResult


class History:
    """Replays events of many users as one partition, as the live scorer would have met them.

    Item states follow after each batch, as they do live at best. Attributes and vectors may be
    replaced between two calls of `run`.
    """

    def __init__(
        self,
        item_attributes: Table | None = None,
        user_attributes: Table | None = None,
        vectors: Vectors | None = None,
        batch_events: int = 512,
    ) -> None:
        self.item_attributes = item_attributes or empty(ITEM_ATTRIBUTES)
        self.user_attributes = user_attributes or empty(USER_ATTRIBUTES)
        self.vectors = vectors
        self.batch_events = batch_events
        self.users = Store(USER)
        self.items = Store(ITEM)
        self.partition = blank(PARTITION, ())

    def run(self, events: Rows) -> Iterator[HistoryBatch]:
        """Observe and apply `events` EVENT (n), in order, batch by batch."""
        for begin in range(0, len(events), self.batch_events):
            rows = slice(begin, min(begin + self.batch_events, len(events)))
            batch = events[rows]
            lookups = self._lookups(batch)
            users, user_index = self.users.distinct(batch["user"])
            states = self.users.rows.take(users)
            (result,), _ = run_batch([Share(states, user_index, self.partition, batch)], lookups)
            opaque(self.users.rows)[users] = opaque(result.states)
            self._follow(result.partition, result.deltas, result.step[0])
            yield HistoryBatch(rows, lookups, result)

    def look(self, events: Rows) -> tuple[Observation, Lookups]:
        """What `events` EVENT (n) would be predicted from now; changes nothing."""
        lookups = self._lookups(events)
        users = self.users.place(events["user"])
        return observe(self.users.rows.take(users), self.partition, events, lookups), lookups

    def apply(self, events: Rows) -> None:
        """Apply `events` EVENT (n), in order, and observe nothing; states are those of `run`."""
        for begin in range(0, len(events), self.batch_events):
            batch = events[begin : begin + self.batch_events]
            users, user_index = self.users.distinct(batch["user"])
            states = self.users.rows.take(users)
            places = self.items.place(batch["item"])  # before `rows` is looked at: it may grow
            items = self.items.rows.take(places)
            duplicate = duplicates(states, user_index, batch)
            partitions = run_partition(self.partition, batch, duplicate)
            step = partitions["step"][:-1].copy()
            global_mean, item_bias = features.biases(items, partitions[:-1])
            change = advance(
                states, user_index, batch, duplicate, item_bias, global_mean, step, observed=False
            )
            met, after, ends = partitions[:-1], partitions[-1:], np.array([len(batch)], np.intp)
            newcomers.follow(met, after, ends, batch, change.first, global_mean, item_bias)
            opaque(self.users.rows)[users] = opaque(change.states)
            (deltas,) = item_deltas(batch, change)
            self._follow(partitions[-1].reshape(()), deltas, step[0])

    def run_instants(
        self,
        events: Rows,
        chosen: NDArray[np.intp],
        number: int,
        item_attributes: Dated,
        user_attributes: Dated,
    ) -> Observation:
        """Apply `events` EVENT (n), whole instants in the order of time, and observe `chosen` (k).

        Events of one time meet what was known before that time; what they leave is what `run` of
        each instant alone would. `number` of the first event is what attributes are dated by.
        """
        rows = np.arange(len(events))
        begins = np.flatnonzero(np.r_[True, events["time"][1:] != events["time"][:-1]])
        instant = np.searchsorted(begins, rows, "right") - 1
        began = begins[instant]
        cuts = np.flatnonzero((rows - began) % self.batch_events == 0)  # batches of an instant
        ends = np.append(cuts[1:], len(events))
        users, user_index = self.users.distinct(events["user"])
        items, item_index = self.items.distinct(events["item"])
        states = self.users.rows.take(users)
        duplicate = duplicates(states, user_index, events)
        run = run_partition(self.partition, events, duplicate)
        step = run["step"][:-1].copy()
        # What events do to their items asks for no bias; the biases of users ask for the items.
        none = np.zeros(len(events), np.float32)
        change = advance(states, user_index, events, duplicate, none, none, step, observed=False)
        deltas = item_deltas(events, change, ends.tolist())
        told = joined(deltas)["item"]
        items_met, items_after = meet_items(
            self.items.rows.take(items),
            item_index,
            ends,
            deltas,
            np.searchsorted(items, self.items.place(told)),
            np.repeat(step[cuts], [len(each) for each in deltas]),
        )
        global_mean, item_bias = features.biases(items_met, run[:-1])
        change = advance(states, user_index, events, duplicate, item_bias, global_mean, step)
        given = events, change.first, global_mean, item_bias
        newcomers.follow(run[:-1], run[-1:], np.array([len(events)]), *given)
        opaque(self.users.rows)[users] = opaque(change.states)
        opaque(self.items.rows)[items] = opaque(items_after)
        self.partition = run[-1].reshape(())

        asked = events.take(chosen)
        met = change.met.take(_firsts(instant, user_index)[chosen])
        recents, at = met["recent"]["item"].copy(), number + chosen
        return _observe(
            _Met(
                met,
                recents,
                items_met.take(_firsts(instant, item_index)[chosen]),
                run.take(began[chosen]),
                user_attributes.take(asked["user"], at),
                item_attributes.take(asked["item"], at),
                item_attributes.take(recents, at[:, None]),
            ),
            asked,
            self.vectors,
        )

    def _items(self, events: Rows) -> Table:
        items = np.unique(events["item"])
        rows = self.items.place(items)  # before `rows` is looked at: the store may grow
        return table(items, self.items.rows.take(rows))

    def _lookups(self, events: Rows) -> Lookups:
        return Lookups(
            self._items(events), self.item_attributes, self.user_attributes, self.vectors
        )

    def _follow(self, partition: Rows, deltas: Rows, step: np.uint64) -> None:
        """Keep what a batch did to the partition and, `step` (its first), to items."""
        self.partition = partition
        rows, item_index = self.items.distinct(deltas["item"])
        offsets = np.full(len(deltas), step, np.uint64)
        followed = apply_items(self.items.rows.take(rows), item_index, deltas, offsets)
        opaque(self.items.rows)[rows] = opaque(followed)
