"""The rows that a model is fitted on: a shop's history, replayed.

It comes from a record file, or from the archive (`trainer.archived`), and goes through
`model.replay.History`. That of an archive has the feature rows that the scorer saw; it is replayed
too, for the recent items, and for feature rows of another feature table or encoder.

The label of a row is the rating of the review event itself. A behaviour event whose user rated the
item later is not labelled: which of the views that led to a rating should carry it is a choice that
the states would have to share, and none is made yet.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from model import features
from model.catalog import describe_items, describe_users, item_text
from model.events import (
    EVENT,
    LATE_MS,
    REVIEW,
    Rows,
    blank,
    from_behavior,
    from_reviews,
    from_text_features,
)
from model.ids import hash_ids
from model.lookups import Dated, Lookups, Store, Vectors, dated, empty
from model.network import Inputs, concatenate, gather
from model.replay import History, Observation
from model.state import CATEGORY, ITEM, ITEM_ATTRIBUTES, USER_ATTRIBUTES
from schemas.files import LineError, read_records
from schemas.records import Behavior, Item, Record, Review, TextFeatures, User
from trainer.clean import REVIEW_COLUMNS
from trainer.exceptions import TrainerError
from trainer.metrics import Floats
from trainer.progress import OnProgress

logger = logging.getLogger(__name__)

Ties = Literal["instant", "arrival"]
"""What rows of one time know of each other.

`arrival`: each sees those before it, as live. `instant`: none sees another, as when data are dated
by the day and their order within it is chance.
"""

_REASONS = 5  # of lines left out that are told
_LATE_SHARE = 0.05  # of events that are late in a stream's record
_BEYOND = "rating: Input should be less than or equal to 5"
_SLIPS, _SLIPS_SHARE = 2, 0.05  # reviews beyond, in however few, and of many; more are no slips
_RESCALE = (
    "Its ratings are of another scale, and those up to 5 alone say nothing of the shop: bring all "
    "to 1 to 5, of 1 to 10 by 1 + (stars - 1) * 4 / 9."
)
_MEND = "Write it anew: `starcast schema reviews` and docs/produce.md, A file of your own, say how."
_READ = 20_000  # records of a file in memory at once: each takes 2 KB, and its columns a quarter
_ROWS_OF = {Review: from_reviews, Behavior: from_behavior, TextFeatures: from_text_features}
_BATCH_EVENTS = 64  # of a replay: item states follow after each batch, as they do live
_LARGEST_BATCH = 512  # of the replay of a long log
_AT_ONCE = 2_048  # events of instants; no figure hangs on it
_BATCHES = 1_000  # into which a log is cut at least, where the two bounds allow it


@dataclass(frozen=True)
class Journalled:
    """Feature rows as the scorer saw them, of the n reviews with stars of a log, in its order."""

    features: NDArray[np.float32]  # (n, F)
    usable: NDArray[np.bool_]  # (n): the row is of this code's feature table
    encoder: NDArray[np.str_]  # (n): hash of the encoder whose vectors were read; "" for none


@dataclass(frozen=True)
class Log:
    """A shop's history: n events in the order they were applied, and what is known beside them."""

    events: Rows  # EVENT (n)
    reviews: pl.DataFrame  # REVIEW_COLUMNS; `row` is a position in `events`
    items: Sequence[tuple[int, Item]]  # and the number of events that came before it was known
    users: Sequence[tuple[int, User]]
    journalled: Journalled | None = None

    def __len__(self) -> int:
        return len(self.events)

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which events (n) are reviews with stars."""
        return labelled(self.events)

    @property
    def rated(self) -> int:
        """Number of reviews with stars."""
        return self.reviews["rating"].count()


@dataclass(frozen=True)
class Examples:
    """n rated rows with all that a network reads, in the order of the log."""

    row: NDArray[np.int64]  # (n): positions in the log's events
    events: Rows  # EVENT (n)
    inputs: Inputs
    rating: Floats  # (n)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def history(self) -> Floats:
        """Ratings (n) that each row's user had given before it."""
        return self._count("user_ratings")

    @property
    def item_history(self) -> Floats:
        """Ratings (n) that each row's item had got before it."""
        return self._count("item_ratings")

    def take(self, rows: NDArray[np.int64]) -> "Examples":
        """These examples."""
        return Examples(
            self.row[rows], self.events[rows], self.inputs.take(rows), self.rating[rows]
        )

    def _count(self, feature: str) -> Floats:
        counts = self.inputs.features[:, features.INDEX[feature]]
        return np.rint(np.expm1(counts.astype(np.float64)))


def from_file(path: Path) -> Log:
    """The history in a record file, in the file's order.

    A line that breaks the contract, of which the stream would make a dead letter, is left out; how
    many for which reason is logged.

    Raises:
        ContractError: the file cannot be read.
        TrainerError: it holds no event, or half of its lines are left out, or ratings of another
            scale: what is measured on the rest says nothing of the shop.
    """
    events: list[Rows] = []
    tables = [_review_table([], [])]
    items: list[tuple[int, Item]] = []
    users: list[tuple[int, User]] = []
    count = good = 0
    bad: list[LineError] = []
    found = (each.record for each in read_records(path, bad.append))
    while records := list(islice(found, _READ)):
        good += len(records)
        known = count
        kinds: dict[type[Record], list[Any]] = {Review: [], Behavior: [], TextFeatures: []}
        rows: dict[type[Record], list[int]] = {kind: [] for kind in kinds}
        for record in records:
            if isinstance(record, Item):
                items.append((count, record))
            elif isinstance(record, User):
                users.append((count, record))
            elif type(record) in kinds:
                kinds[type(record)].append(record)
                rows[type(record)].append(count)
                count += 1
        part = blank(EVENT, count - known)
        for kind, rows_of in _ROWS_OF.items():
            part[np.array(rows[kind], np.intp) - known] = rows_of(kinds[kind])
        events.append(part)
        tables.append(_review_table(kinds[Review], rows[Review]))
    reviews = pl.concat(tables, rechunk=True)
    beyond = sum(error.kind.endswith(_BEYOND) for error in bad)
    if beyond > max(_SLIPS, _SLIPS_SHARE * (beyond + len(reviews))):
        raise TrainerError(f"{_left_out(path, bad, good)}\n{_RESCALE}")
    if len(bad) > good:
        raise TrainerError(f"{_left_out(path, bad, good)}\n{_MEND}")
    if bad:
        logger.warning(_left_out(path, bad, good))
    if not count:
        raise TrainerError(
            f"{path} holds no reviews, behavior or text-features to learn from. {_MEND}"
        )
    log = Log(np.concatenate(events), reviews, items, users)
    for odd in _out_of_place(path, log.events["time"], [at for at, _ in items]):
        logger.warning(odd)
    return log


def _review_table(reviews: Sequence[Review], rows: Sequence[int]) -> pl.DataFrame:
    """REVIEW_COLUMNS (n) of reviews (n) at these positions (n) in a log."""
    return pl.DataFrame(
        {
            "row": rows,
            "event_id": [review.event_id for review in reviews],
            "user_id": [review.user_id for review in reviews],
            "item_id": [review.item_id for review in reviews],
            "time": [review.event_time for review in reviews],
            "rating": [review.rating for review in reviews],
            "title": [review.title for review in reviews],
            "text": [review.text for review in reviews],
        },
        schema=REVIEW_COLUMNS,
    )


def _out_of_place(path: Path, time: NDArray[np.int64], known: Sequence[int]) -> Iterator[str]:
    """What the order of a file's lines spoils: event times (n), events before each item."""
    late = int((time < np.maximum.accumulate(time) - LATE_MS).sum())
    if late > _LATE_SHARE * len(time):
        yield (
            f"{path} is not in the order of time: {late:,} of {len(time):,} events are more than a "
            "day older than one before them. Sort its lines by event_time (`evaluate` does so by "
            "itself), since they are learnt from in their order."
        )
    last = sum(before == len(time) for before in known)
    if last > len(known) / 2:
        yield (
            f"{last:,} of {len(known):,} items of {path} stand behind all events, so that no event "
            "knows them: put each before its first event."
        )


def _left_out(path: Path, bad: Sequence[LineError], good: int) -> str:
    """How many lines break the contract, for which reasons, the most frequent first."""
    first: dict[str, LineError] = {}
    for error in bad:
        first.setdefault(error.kind, error)
    told = Counter(error.kind for error in bad).most_common()
    return (
        f"{len(bad):,} of {len(bad) + good:,} lines of {path} break the contract and are left out: "
        + "; ".join(
            f"{count:,} {kind} (the first: line {first[kind].line}{first[kind].found})"
            for kind, count in told[:_REASONS]
        )
    )


def labelled(events: Rows) -> NDArray[np.bool_]:
    """Which of EVENT rows (n) are reviews with stars."""
    return (events["action"] == REVIEW) & ~np.isnan(events["rating"])


def item_texts(log: Log) -> dict[int, str]:
    """The texts of a log's items that an encoder has to read, by their hash."""
    texts = {text: None for _, item in log.items if (text := item_text(item))}
    return dict(zip(hash_ids(list(texts)).tolist(), texts, strict=True))


def sorted_by_time(log: Log) -> Log:
    """The same history in the order of event times; rows of one time keep theirs.

    An item or user is known after all events that came before it in the given order, so no event
    knows more for the sorting.
    """
    order = np.argsort(log.events["time"], kind="stable")
    if np.array_equal(order, np.arange(len(order))):
        return log
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    known = np.concatenate([[0], np.maximum.accumulate(place) + 1])
    rows = pl.Series("row", place[log.reviews["row"].to_numpy()])
    return Log(
        log.events[order],
        log.reviews.with_columns(rows).sort("row"),
        sorted(((int(known[count]), item) for count, item in log.items), key=lambda each: each[0]),
        sorted(((int(known[count]), user) for count, user in log.users), key=lambda each: each[0]),
    )


def replay(
    log: Log,
    vectors: Vectors | None,
    encoder: str,
    width: int,
    on_progress: OnProgress,
    ties: Ties = "arrival",
    still: int | None = None,
    rows: NDArray[np.int64] | None = None,
) -> Examples:
    """Rated reviews of a log as the scorer met them, or would have.

    Args:
        log: the history; in the order of time when ties are those of an instant.
        vectors: of item texts, by text hash, or None when there is no encoder.
        encoder: the hash of what made them, "" for none. Journalled features count where they
            were computed with the same.
        width: of the vectors that the network reads.
        on_progress: called with events replayed and events in all.
        ties: what events of one time know of each other.
        still: from this event on nothing is learnt any more: states and attributes stand still.
        rows: positions of those that are given, in order; all when absent, repeated events and
            edits of an earlier review among them.
    """
    batch_events = min(max(_BATCH_EVENTS, len(log) // _BATCHES), _LARGEST_BATCH)
    history = History(vectors=vectors, batch_events=batch_events)
    labelled = np.flatnonzero(log.labelled)
    row = labelled if rows is None else rows
    rated = np.zeros(len(log), np.bool_)
    rated[row] = True
    parts: list[Inputs] = []

    def observed(events: Rows, observation: Observation) -> None:
        if len(events):
            parts.append(gather(events, observation, Lookups(*nothing, vectors), width))

    nothing = empty(ITEM), empty(ITEM_ATTRIBUTES), empty(USER_ATTRIBUTES)
    end = len(log) if still is None else still
    counts, sold = [count for count, _ in log.items], [item for _, item in log.items]
    items = _dated_items(sold, _since(log, counts, ties, batch_events))
    counts, people = [count for count, _ in log.users], [user for _, user in log.users]
    users = _dated_users(people, _since(log, counts, ties, batch_events))
    if ties == "arrival":
        for start, stop in _spans(end, np.concatenate([items.since, users.since])):
            history.item_attributes = items.at(start)
            history.user_attributes = users.at(start)
            for batch in history.run(log.events[start:stop]):
                span = slice(start + batch.rows.start, start + batch.rows.stop)
                chosen = np.flatnonzero(rated[span])
                observed(log.events[span][chosen], batch.result.observation.take(chosen))
                on_progress(span.stop, len(log))
    else:
        for start, stop in _instants(log.events["time"][:end]):
            events, chosen = log.events[start:stop], np.flatnonzero(rated[start:stop])
            observed(events[chosen], history.run_instants(events, chosen, start, items, users))
            on_progress(stop, len(log))
    history.item_attributes, history.user_attributes = items.at(end - 1), users.at(end - 1)
    for start in range(end, len(log), _AT_ONCE):
        events = log.events[start : start + _AT_ONCE]
        asked = events[rated[start : start + len(events)]]
        observed(asked, history.look(asked)[0])
        on_progress(start + len(events), len(log))
    inputs = concatenate(parts)
    if log.journalled is not None and ties == "arrival" and still is None:
        journalled, at = log.journalled, np.searchsorted(labelled, row)
        seen = (journalled.usable & (journalled.encoder == encoder))[at]
        inputs.features[seen] = journalled.features[at[seen]]
    return Examples(row, log.events[row], inputs, log.events["rating"][row].astype(np.float64))


def _spans(end: int, since: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Spans of events before `end` between which attributes change."""
    starts = np.unique(np.append(since, 0))
    yield from pairwise([*starts[starts < end].tolist(), end])


def _instants(time: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Spans of whole instants among times (n): as many as are replayed at once."""
    if len(time):
        starts = np.flatnonzero(np.r_[True, np.diff(time) != 0])
        begins = starts[np.r_[True, np.diff(starts // _AT_ONCE) > 0]]
        yield from pairwise([*begins.tolist(), len(time)])


def _since(log: Log, counts: Sequence[int], ties: Ties, batch_events: int) -> NDArray[np.int64]:
    """From which event on a record is known that came after so many.

    What comes within a batch of the replay is known to the next one, and what comes within an
    instant, whose rows are not parted, to the next.
    """
    before = np.array(counts, np.int64)
    if ties == "arrival":
        return -(-before // batch_events) * batch_events
    time = log.events["time"]
    return np.where(before > 0, np.searchsorted(time, time[before - 1], "right"), 0)


def _dated_items(items: Sequence[Item], since: NDArray[np.int64]) -> Dated:
    """Attributes of items, each known since an event; of one event's the newest of each item."""
    newest = {
        (event, item.item_id): item for event, item in zip(since.tolist(), items, strict=True)
    }
    events, names = [event for event, _ in newest], [name for _, name in newest]
    hashes, found = hash_ids(names), blank(ITEM_ATTRIBUTES, len(names))
    known, categories = Store(ITEM_ATTRIBUTES), empty(CATEGORY)
    described = [*newest.values()]
    for run in _distinct_runs(names):
        places = known.place(hashes[run])
        found[run], categories = describe_items(
            described[run], [1] * len(places), known.rows.take(places), categories
        )
        known.rows[places] = found[run]
    return dated(hashes, np.array(events, np.int64), found)


def _distinct_runs(names: Sequence[str]) -> Iterator[slice]:
    """Slices of names, one after another, in which none is repeated."""
    seen: set[str] = set()
    begin = 0
    for place, name in enumerate(names):
        if name in seen:
            yield slice(begin, place)
            seen, begin = set(), place
        seen.add(name)
    yield slice(begin, len(names))


def _dated_users(users: Sequence[User], since: NDArray[np.int64]) -> Dated:
    rows = describe_users(users, [1] * len(users))
    return dated(hash_ids([user.user_id for user in users]), since, rows)
