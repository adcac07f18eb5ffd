"""A batch gives what its events alone would give, and recovery gives what the batch gave."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.events import ACTIONS, EVENT, FORGET, REVIEW, TEXT, Rows, blank
from model.exceptions import GapError
from model.features import INDEX
from model.lookups import Lookups, dated, empty, table, vectors_of
from model.replay import (
    BatchResult,
    History,
    Observation,
    Share,
    _similarity,
    observe,
    recover,
    run_batch,
)
from model.state import (
    ITEM,
    ITEM_ATTRIBUTES,
    OLDER,
    PARTITION,
    RECENT,
    USER,
    USER_ATTRIBUTES,
    apply_items,
)

USERS = np.arange(1, 5, dtype=np.uint64)
ITEMS = np.arange(1, 31, dtype=np.uint64) * (np.uint64(1 << 58 | 1))
START = 1_700_000_000_000


@st.composite
def histories(draw: st.DrawFn, most: int = 50, forgets: bool = False) -> Rows:
    """Events of a few users and items with repetitions, edits, late events, texts, erasures."""
    size = draw(st.integers(1, most))
    seed = draw(st.integers(0, 2**32 - 1))
    users, items, ids = (draw(st.integers(1, bound)) for bound in (len(USERS), len(ITEMS), 80))
    random = np.random.default_rng(seed)
    events = blank(EVENT, size)
    events["user"] = USERS[random.integers(0, users, size)]
    events["item"] = ITEMS[random.integers(0, items, size)]
    events["event_id"] = random.integers(1, ids + 1, size)
    events["action"] = random.choice([REVIEW, REVIEW, *range(len(ACTIONS) + forgets)], size)
    events["time"] = START + np.cumsum(random.integers(-400_000, 2_000_000, size))
    events["session"] = random.integers(0, 3, size)
    stars = random.choice([np.nan, 1, 2, 3.5, 4, 4.3, 5], size)
    events["rating"] = np.where(events["action"] == REVIEW, stars, np.nan)
    price = random.choice([np.nan, 0, 9.99, 12, 500], size)
    events["price"] = np.where(events["action"] == REVIEW, np.nan, price)
    events["text_stars"] = np.where(events["action"] == TEXT, random.uniform(1, 5, size), np.nan)
    erased = events["action"] == FORGET
    for name in ("item", "event_id", "time", "session"):
        events[name][erased] = 0
    events["price"][erased] = np.nan
    return events


def surroundings() -> Lookups:
    """Items and users of which much, little or nothing is known."""
    random = np.random.default_rng(3)
    items, attributes = blank(ITEM, len(ITEMS)), blank(ITEM_ATTRIBUTES, len(ITEMS))
    items["rating_count"] = random.integers(0, 9, len(ITEMS))
    items["rating_sum"] = items["rating_count"] * random.integers(32, 160, len(ITEMS)) / 32
    items["rating_square_sum"] = items["rating_sum"] * 5
    items["actions"][:, :3] = random.integers(0, 9, (len(ITEMS), 3))
    attributes["version"] = 1
    attributes["brand"] = random.integers(0, 4, len(ITEMS))
    attributes["category"][:, 0] = random.integers(0, 3, len(ITEMS))
    attributes["category"][:, 1] = attributes["category"][:, 0] * random.integers(0, 9, len(ITEMS))
    attributes["price"] = random.choice([np.nan, 5, 10, 13, 400], len(ITEMS))
    attributes["text"] = np.where(random.random(len(ITEMS)) < 0.7, ITEMS, 0)
    people = blank(USER_ATTRIBUTES, 2)
    people["gender"], people["age"] = [1, 2], [30, np.nan]
    vectors = random.normal(size=(20, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Lookups(
        table(ITEMS[:25], items[:25]),
        table(ITEMS[:28], attributes[:28]),
        table(USERS[:2], people),
        vectors_of(ITEMS[:20], vectors),
    )


def run(states: Rows, partition: Rows, events: Rows, lookups: Lookups) -> BatchResult:
    """Run a batch whose users' states are those of USERS, in their order."""
    share = Share(states, np.searchsorted(USERS, events["user"]), partition, events)
    return run_batch([share], lookups)[0][0]


def assert_same_observations(one: Observation, other: Observation) -> None:
    assert one.features.tobytes() == other.features.tobytes()
    assert one.recents.tobytes() == other.recents.tobytes()
    assert one.recent_ratings.tobytes() == other.recent_ratings.tobytes()
    assert one.recent_actions.tobytes() == other.recent_actions.tobytes()
    assert one.older.tobytes() == other.older.tobytes()
    assert one.older_ratings.tobytes() == other.older_ratings.tobytes()
    assert one.item_attributes.tobytes() == other.item_attributes.tobytes()
    assert one.item_vectors.tolist() == other.item_vectors.tolist()
    assert one.recent_vectors.tolist() == other.recent_vectors.tolist()


def joined(observations: Sequence[Observation]) -> Observation:
    fields = zip(*(vars(part).values() for part in observations), strict=True)
    return Observation(*(np.concatenate(parts) for parts in fields))


def test_who_comes_before_the_latest_event_of_their_user_is_behind() -> None:
    events = blank(EVENT, 5)
    events["user"], events["item"], events["event_id"] = [1, 1, 1, 2, 1], 1, range(1, 6)
    events["time"] = START + np.array([5, 5, 4, 3, 6])
    result = run(blank(USER, len(USERS)), blank(PARTITION, ()), events, surroundings())
    assert result.behind.tolist() == [False, False, True, False, False]


@settings(max_examples=60)
@given(histories(forgets=True), st.integers(1, 20))
def test_a_batch_gives_what_its_events_alone_give(events: Rows, size: int) -> None:
    lookups, states, partition = surroundings(), blank(USER, len(USERS)), blank(PARTITION, ())
    partition["rating_count"], partition["rating_sum"] = 7, 29.5
    whole = run(states, partition, events, lookups)
    parts: list[BatchResult] = []
    for begin in range(0, len(events), size):
        part = run(states, partition, events[begin : begin + size], lookups)
        states, partition = part.states, part.partition
        parts.append(part)
    assert states.tobytes() == whole.states.tobytes()
    assert partition.tobytes() == whole.partition.tobytes()
    assert_same_observations(joined([part.observation for part in parts]), whole.observation)
    for name in ("duplicate", "step", "seq"):
        together = np.concatenate([getattr(part, name) for part in parts])
        assert together.tolist() == getattr(whole, name).tolist()


@settings(max_examples=40)
@given(histories(forgets=True))
def test_shares_of_a_batch_give_what_each_alone_gives(events: Rows) -> None:
    """Users 1 and 2 in one partition, 3 and 4 in another, and a third without events."""
    lookups, rows = surroundings(), blank(PARTITION, 3)
    rows["rating_count"], rows["rating_sum"] = [7, 0, 1], [29.5, 0, 5]
    shares: list[Share] = []
    for number, mine in enumerate(([1, 2], [3, 4], [])):
        chosen = events[np.isin(events["user"], mine)]
        index = np.searchsorted(np.array(mine, np.uint64), chosen["user"])
        shares.append(Share(blank(USER, len(mine)), index, rows[number].copy(), chosen))
    results, observation = run_batch(shares, lookups)
    alone = [run_batch([share], lookups)[0][0] for share in shares]
    for one, other in zip(results, alone, strict=True):
        assert_same_observations(one.observation, other.observation)
        for name in ("duplicate", "step", "seq", "states", "partition", "deltas"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
    assert_same_observations(joined([one.observation for one in results]), observation)


@pytest.mark.parametrize("left", [0, 3, OLDER, OLDER + 5])
def test_older_ratings_are_read_newest_first(left: int) -> None:
    states = blank(USER, 1)
    states["left"] = left
    for number in range(left):
        states["older"][0, number % OLDER] = number + 1, 32 * (1 + number % 5)
    events = blank(EVENT, 1)
    found = observe(states, blank(PARTITION, ()), events, surroundings())
    newest = list(range(left, max(left - OLDER, 0), -1))
    assert found.older[0].tolist() == newest + [0] * (OLDER - len(newest))
    stars = [32 * (1 + (number - 1) % 5) for number in newest]
    assert found.older_ratings[0].tolist() == stars + [0] * (OLDER - len(newest))


@settings(max_examples=60)
@given(histories())
def test_states_are_those_of_a_plain_reading(events: Rows) -> None:
    """Beside lists and dictionaries that hold every event."""
    result = run(blank(USER, len(USERS)), blank(PARTITION, ()), events, surroundings())
    for user, state in zip(USERS, result.states, strict=True):
        ids: list[int] = []
        ring: list[int] = []
        given: dict[int, float] = {}
        older: list[tuple[int, float]] = []
        ratings: list[tuple[int, float]] = []
        duplicates: list[bool] = []
        for event in events[events["user"] == user]:
            item = int(event["item"])
            duplicates.append(int(event["event_id"]) in ids[:RECENT])
            if duplicates[-1]:
                continue
            ids.insert(0, int(event["event_id"]))
            if event["action"] == TEXT:
                continue
            if item in ring:
                ring.remove(item)
            ring.insert(0, item)
            gone = [
                (forgotten & 0xFFFF_FFFF, given.pop(forgotten, 0)) for forgotten in ring[RECENT:]
            ]
            older += [each for each in gone if each[1]]
            del ring[RECENT:]
            if not np.isnan(event["rating"]):
                rating = round(float(event["rating"]) * 32) / 32
                if item in given:
                    ratings.remove((item, given[item]))
                ratings.append((item, rating))
                given[item] = rating
        mine = events["user"] == user
        assert result.duplicate[mine].tolist() == duplicates
        filled = state["recent"]["item"] > 0
        assert state["recent"]["item"][filled].tolist() == ring
        assert state["recent"]["event_id"].tolist()[: len(ids)] == ids[:RECENT]
        kept = zip(state["older"]["item"].tolist(), state["older"]["rating"] / 32, strict=True)
        assert list(kept)[: state["left"]] == older
        assert state["left"] == len(older)
        stars = state["recent"]["rating"][filled] / 32
        assert dict(zip(ring, stars.tolist(), strict=True)) == {k: given.get(k, 0) for k in ring}
        assert state["rating_count"] == len(ratings)
        assert state["rating_sum"] == sum(rating for _, rating in ratings)
        assert state["histogram"].sum() == len(ratings)


@settings(max_examples=60)
@given(histories(), st.data())
def test_the_answer_is_never_in_the_question(events: Rows, data: st.DataObject) -> None:
    lookups, states, partition = surroundings(), blank(USER, len(USERS)), blank(PARTITION, ())
    row = data.draw(st.integers(0, len(events) - 1))
    other = events.copy()
    other["rating"][row] = data.draw(st.sampled_from([np.nan, 1, 5]))
    other["text_stars"][row] = data.draw(st.sampled_from([np.nan, 1, 5]))
    one, two = (run(states, partition, rows, lookups).observation for rows in (events, other))
    upto = slice(0, row + 1)
    assert one.features[upto].tobytes() == two.features[upto].tobytes()
    assert one.recent_ratings[upto].tobytes() == two.recent_ratings[upto].tobytes()


@settings(max_examples=60)
@given(histories(forgets=True), st.integers(1, 20), st.data())
def test_recovery_gives_what_was_and_skips_what_is_applied(
    events: Rows, size: int, data: st.DataObject
) -> None:
    lookups = surroundings()
    states, partition = [blank(USER, len(USERS))], [blank(PARTITION, ())]
    results: list[BatchResult] = []
    for begin in range(0, len(events), size):
        result = run(states[-1], partition[-1], events[begin : begin + size], lookups)
        states.append(result.states)
        partition.append(result.partition)
        results.append(result)
    features = np.concatenate([result.observation.features for result in results])
    duplicate = np.concatenate([result.duplicate for result in results])
    step = np.concatenate([result.step for result in results])
    # Each user, and the header, may stand after another batch.
    stored = blank(USER, len(USERS))
    for user in range(len(USERS)):
        stored[user] = states[data.draw(st.integers(0, len(results)))][user]
    header = partition[data.draw(st.integers(0, len(results)))]
    user_index = np.searchsorted(USERS, events["user"])
    for _ in range(2):
        stored, header = recover(stored, user_index, header, events, features, duplicate, step)
        assert stored.tobytes() == states[-1].tobytes()
        assert header.tobytes() == partition[-1].tobytes()


@settings(max_examples=60)
@given(histories(forgets=True))
def test_who_comes_back_is_as_another_user(events: Rows) -> None:
    """What a user did before each erasure might as well have been done by somebody else."""
    around = surroundings()
    lookups = Lookups(around.items, around.item_attributes, empty(USER_ATTRIBUTES), around.vectors)
    lives, others = np.zeros(len(events), np.uint64), events.copy()
    for user in USERS:
        mine = events["user"] == user
        lives[mine] = np.cumsum(events["action"][mine] == FORGET)
    others["user"] += lives * np.uint64(100)
    others["user"][events["action"] == FORGET] = 99  # who has never been seen
    users, index = np.unique(others["user"], return_inverse=True)
    same = run(blank(USER, len(USERS)), blank(PARTITION, ()), events, lookups)
    share = Share(blank(USER, len(users)), index, blank(PARTITION, ()), others)
    ((apart,), _) = run_batch([share], lookups)
    for place, user in enumerate(USERS):
        life = int((events["action"][events["user"] == user] == FORGET).sum())
        found = apart.states[users == user + np.uint64(100 * life)]
        expected = found if len(found) else blank(USER, 1)
        assert same.states[place].tobytes() == expected[0].tobytes()
    assert same.partition.tobytes() == apart.partition.tobytes()
    assert same.deltas.tobytes() == apart.deltas.tobytes()
    assert_same_observations(same.observation, apart.observation)


def test_rows_of_nobody_count_in_the_partition_and_make_no_state() -> None:
    """As a journal has them in which a user was erased."""
    lookups, partition = surroundings(), blank(PARTITION, ())
    events = blank(EVENT, 3)
    events["user"], events["item"], events["event_id"] = [1, 2, 1], ITEMS[:3], [1, 2, 3]
    events["rating"] = [5, 4, 2]
    whole = run(blank(USER, len(USERS)), partition, events, lookups)
    erased, rows = events.copy(), whole.observation.features.copy()
    for at in (0, 2):
        erased[at] = blank(EVENT, 1)[0]
        erased["rating"][at] = events["rating"][at]
    states, after = recover(
        blank(USER, 2), np.array([0, 1, 0]), partition, erased, rows, whole.duplicate, whole.step
    )
    assert states[0].tobytes() == blank(USER, 1).tobytes()
    assert states[1].tobytes() == whole.states[1].tobytes()
    assert after.tobytes() == whole.partition.tobytes()


def test_a_hole_in_the_journal_is_refused() -> None:
    events = blank(EVENT, 2)
    features = np.zeros((2, 100), np.float32)
    for step in ([1, 2], [0, 2]):
        with pytest.raises(GapError, match="Read the journal from"):
            recover(
                blank(USER, 1),
                np.zeros(2, np.intp),
                blank(PARTITION, ()),
                events,
                features,
                np.zeros(2, np.bool_),
                np.array(step, np.uint64),
            )


@settings(max_examples=60)
@given(histories(), st.integers(1, 20))
def test_item_deltas_sum_to_the_same_whatever_the_batches(events: Rows, size: int) -> None:
    lookups = surroundings()

    def sums(size: int) -> tuple[Rows, Rows]:
        states, partition, items = (
            blank(USER, len(USERS)),
            blank(PARTITION, ()),
            blank(ITEM, len(ITEMS)),
        )
        for number, begin in enumerate(range(0, len(events), size)):
            result = run(states, partition, events[begin : begin + size], lookups)
            states, partition = result.states, result.partition
            index = np.searchsorted(ITEMS, result.deltas["item"])
            items = apply_items(items, index, result.deltas, np.full(len(index), number, np.uint64))
        items["offset"] = 0
        return states, items

    users, items = sums(size)
    assert items.tobytes() == sums(len(events))[1].tobytes()
    for name in ("actions", "histogram", "rating_count", "rating_sum", "rating_square_sum"):
        assert np.array_equal(items[name].sum(0), users[name].sum(0))
    assert items["price_log_sum"].sum() == users["price_log_sum"].sum()


@settings(max_examples=60)
@given(histories())
def test_what_is_sent_twice_changes_nothing(events: Rows) -> None:
    lookups, partition = surroundings(), blank(PARTITION, ())
    events["event_id"] = np.arange(1, len(events) + 1)
    once = run(blank(USER, len(USERS)), partition, events, lookups)
    newest = np.flatnonzero(events["user"] == events["user"][-1])[-RECENT:]
    again = run(once.states, once.partition, events[newest], lookups)
    assert again.duplicate.all()
    assert len(again.deltas) == 0
    again.states["step"] = once.states["step"]
    assert again.states.tobytes() == once.states.tobytes()
    assert again.partition["rating_count"] == once.partition["rating_count"]


@settings(max_examples=60)
@given(histories(forgets=True))
def test_predictions_are_numbered_without_holes(events: Rows) -> None:
    partition = blank(PARTITION, ())
    partition["seq"], partition["step"] = 40, 50
    result = run(blank(USER, len(USERS)), partition, events, surroundings())
    predicted = events["action"] < TEXT
    assert result.seq[predicted].tolist() == list(range(40, 40 + predicted.sum()))
    assert not result.seq[~predicted].any()
    assert result.step.tolist() == list(range(50, 50 + len(events)))
    assert result.partition["seq"] == 40 + predicted.sum()


@settings(max_examples=60)
@given(histories(), st.integers(1, 30))
def test_a_history_is_live_scoring(events: Rows, size: int) -> None:
    known = surroundings()
    history = History(known.item_attributes, known.user_attributes, known.vectors, size)
    half = len(events) // 2 // size * size
    replayed = [*history.run(events[:half]), *history.run(events[half:])]
    states, partition, items = (
        blank(USER, len(USERS)),
        blank(PARTITION, ()),
        blank(ITEM, len(ITEMS)),
    )
    for begin, batch in zip(range(0, len(events), size), replayed, strict=True):
        lookups = Lookups(
            table(ITEMS, items), known.item_attributes, known.user_attributes, known.vectors
        )
        live = run(states, partition, events[begin : begin + size], lookups)
        states, partition = live.states, live.partition
        index = np.searchsorted(ITEMS, live.deltas["item"])
        items = apply_items(items, index, live.deltas, np.full(len(index), begin, np.uint64))
        assert_same_observations(batch.result.observation, live.observation)
    seen = np.searchsorted(USERS, history.users.hashes)
    assert history.users.rows.tobytes() == states[seen].tobytes()
    assert (
        history.items.rows.tobytes()
        == items[np.searchsorted(ITEMS, history.items.hashes)].tobytes()
    )
    assert history.partition.tobytes() == partition.tobytes()


def test_slices_of_a_history_cover_it() -> None:
    events = blank(EVENT, 10)
    events["user"], events["item"] = 1, 2
    events["event_id"] = np.arange(1, 11)
    batches = list(History(batch_events=4).run(events))
    assert [(batch.rows.start, batch.rows.stop) for batch in batches] == [(0, 4), (4, 8), (8, 10)]


def test_texts_are_alike_by_the_product_of_their_vectors() -> None:
    """Of 18 numbers, two more than are summed side by side."""
    vectors = np.random.default_rng(4).normal(size=(4, 18)).astype(np.float32)
    items, recents = np.array([1, 0, 3]), np.zeros((3, RECENT), np.intp)
    recents[:, :3] = [[2, 0, 3], [2, 3, 0], [3, 0, 0]]
    found = _similarity(vectors, items, recents)
    expected = np.full((3, RECENT), np.nan, np.float32)
    for row, slot in ((0, 0), (0, 2), (2, 0)):
        expected[row, slot] = vectors[items[row]] @ vectors[recents[row, slot]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_empty_batch_changes_nothing() -> None:
    states, partition = blank(USER, 1), blank(PARTITION, ())
    lookups = Lookups(empty(ITEM), empty(ITEM_ATTRIBUTES), empty(USER_ATTRIBUTES))
    share = Share(states, np.empty(0, np.intp), partition, blank(EVENT, 0))
    (result,), _ = run_batch([share], lookups)
    assert len(result.observation.features) == len(result.deltas) == 0
    assert result.states.tobytes() == states.tobytes()
    assert result.partition.tobytes() == partition.tobytes()


def test_observing_is_what_a_batch_observes() -> None:
    lookups, partition = surroundings(), blank(PARTITION, ())
    random: Any = np.random.default_rng(0)
    events = blank(EVENT, 4)
    events["user"], events["item"] = USERS, random.choice(ITEMS, 4)
    events["event_id"], events["time"] = np.arange(1, 5), START
    states = run(blank(USER, 4), partition, events, lookups).states
    events["event_id"] += np.uint64(9)
    events["time"] += 1000
    found = observe(states, partition, events, lookups)
    assert_same_observations(found, run(states, partition, events, lookups).observation)
    known, alike = (found.features[:, INDEX[f"text_{name}"]] for name in ("known", "similarity"))
    assert known.any()  # of some texts there are vectors
    assert not np.isnan(alike).all()


@settings(max_examples=60)
@given(histories(), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_instants_at_once_are_instants_one_by_one(
    events: Rows, size: int, together: int, half: int
) -> None:
    """Of more events than a batch, too; attributes come between them, and rows that nobody asks."""
    events["time"] = START + np.arange(len(events)) // together * 1000
    known = surroundings()
    half = min(half * together, len(events))
    attributes = known.item_attributes
    items = dated(attributes.hashes, np.full(len(attributes.hashes), half), attributes.rows[:-1])
    people = known.user_attributes
    users = dated(people.hashes, np.full(len(people.hashes), half), people.rows[:-1])
    one, all_at_once = (History(vectors=known.vectors, batch_events=size) for _ in range(2))
    chosen = np.flatnonzero(events["action"] != TEXT)
    expected: list[Observation] = []
    for begin in range(0, len(events), together):
        if begin >= half:
            one.item_attributes, one.user_attributes = attributes, people
        instant = events[begin : begin + together]
        observation, _ = one.look(instant)
        expected.append(observation.take(np.flatnonzero(instant["action"] != TEXT)))
        for _ in one.run(instant):
            pass
    cut = len(events) // together // 2 * together
    found = [
        all_at_once.run_instants(
            events[part], chosen[(chosen >= part.start) & (chosen < part.stop)] - part.start,
            part.start, items, users,
        )
        for part in (slice(0, cut), slice(cut, len(events)))
        if part.start < part.stop
    ]  # fmt: skip
    assert_same_observations(joined(found), joined(expected))
    for at_once, alone in ((all_at_once.users, one.users), (all_at_once.items, one.items)):
        by_hash = np.argsort(at_once.hashes), np.argsort(alone.hashes)
        assert (at_once.hashes[by_hash[0]] == alone.hashes[by_hash[1]]).all()
        assert at_once.rows[by_hash[0]].tobytes() == alone.rows[by_hash[1]].tobytes()
    assert all_at_once.partition.tobytes() == one.partition.tobytes()


@settings(max_examples=40)
@given(histories(), st.integers(1, 30))
def test_states_are_the_same_without_a_look(events: Rows, size: int) -> None:
    known = surroundings()
    looked = History(known.item_attributes, known.user_attributes, known.vectors, size)
    for _ in looked.run(events):
        pass
    applied = History(batch_events=size)
    applied.apply(events)
    assert applied.users.hashes.tolist() == looked.users.hashes.tolist()
    assert applied.users.rows.tobytes() == looked.users.rows.tobytes()
    assert applied.partition.tobytes() == looked.partition.tobytes()
    items = np.argsort(applied.items.hashes), np.argsort(looked.items.hashes)
    assert (applied.items.hashes[items[0]] == looked.items.hashes[items[1]]).all()
    assert applied.items.rows[items[0]].tobytes() == looked.items.rows[items[1]].tobytes()
