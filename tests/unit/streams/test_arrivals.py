"""The order of a batch's events."""

from typing import Any

import numpy as np
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st

from model.events import EVENT
from model.ids import hash_ids
from schemas import journal
from streams.arrivals import arrange, input_ends
from streams.inputs import split_columns
from tests.unit.streams.events import KINDS, PARTITIONS, log, record
from tests.unit.streams.messages import NOW_MS, PREFIX, message

logs = st.dictionaries(
    st.tuples(st.sampled_from(KINDS), st.integers(0, PARTITIONS - 1)),
    st.lists(st.integers(-50, 50), min_size=1, max_size=8),
    max_size=6,
)


@given(logs, st.randoms(use_true_random=False))
def test_a_partitions_own_order_is_kept(
    appended: dict[tuple[str, int], list[int]], random: Any
) -> None:
    """Whatever the brokers' clocks say, and however a poll mixes the partitions."""
    left = {
        (kind, partition): [
            message(kind, record(kind, at), partition, at, timestamp=(2, NOW_MS + clock))
            for at, clock in enumerate(clocks)
        ]
        for (kind, partition), clocks in appended.items()
    }
    polled: list[Message] = []
    while left:
        chosen = random.choice(sorted(left))
        polled.append(left[chosen].pop(0))
        if not left[chosen]:
            del left[chosen]
    inputs, _ = split_columns(polled, PREFIX, "scorer")
    arrived = arrange(inputs)
    rows = list(
        zip(
            arrived.partitions.tolist(),
            arrived.topics.tolist(),
            arrived.offsets.tolist(),
            strict=True,
        )
    )
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    for (kind, partition), clocks in appended.items():
        topic = journal.TOPICS.index(kind)
        assert [row[2] for row in rows if row[:2] == (partition, topic)] == list(range(len(clocks)))
    assert len(rows) == len(polled)
    for at, (partition, topic, offset) in enumerate(rows):
        wanted = record(KINDS[topic], offset).model_dump(include={*arrived.ids})
        assert {name: ids[at] for name, ids in arrived.ids.items()} == wanted
        assert (arrived.messages[at].partition(), arrived.messages[at].offset()) == (
            partition,
            offset,
        )


def test_topics_are_merged_by_the_time_of_their_append() -> None:
    clocks = {"reviews": [10, 40], "behavior": [5, 20, 50]}
    polled = [
        message(kind, record(kind, at), 0, at, timestamp=(2, NOW_MS + clock))
        for kind, times in clocks.items()
        for at, clock in enumerate(times)
    ]
    arrived = arrange(split_columns(polled, PREFIX, "scorer")[0])
    assert (arrived.timestamps - NOW_MS).tolist() == [5, 10, 20, 40, 50]
    np.testing.assert_array_equal(arrived.events["event_id"], hash_ids(arrived.ids["event_id"]))


def test_nothing_arrives() -> None:
    assert arrange({}).events.dtype == EVENT
    assert not len(arrange({}).events)


def test_ends_stand_after_the_last_message_of_each_topic() -> None:
    polled = [
        *log("reviews", 0, [record("reviews", 0)], 7),
        *log("behavior", 2, [record("behavior", 0), b"spoilt"], 3),
        *log("text-features", 0, [record("text-features", 0)]),
    ]
    assert input_ends(polled, PREFIX) == {0: [8, -1, 1], 2: [-1, 5, -1]}
