"""What the archive holds of a shop's history, as a record file has it: to begin anew elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from heapq import merge
from math import inf
from operator import itemgetter
from typing import Any, Literal

import orjson
import polars as pl

from schemas import archive, journal

HISTORY = ("items", "users", "reviews", "behavior")
"""Topics that a shop sends, first those whose records are to be known when others come."""

_DESCRIBED = ("items", "users")  # what was sent of one last is all that counts
_HELD_ROWS = 200_000  # of all partitions together
_LEAST_CHUNK = 500

_Row = tuple[datetime, int, bytes]  # when it happened, position in HISTORY, value


def history(
    url: str,
    options: Mapping[str, str] | None = None,
    *,
    since: datetime | None = None,
    before: datetime | None = None,
    longest_future_seconds: float = inf,
) -> Iterator[tuple[str, bytes]]:
    """Topic and value of each record that the shop sent, in the order of time.

    Partitions are merged by event time, each in its own order: a late record stands where it came.
    Left out is what breaks the contract, events further in the future than `longest_future_seconds`
    when Kafka took them, what users did before they were erased, and what has been deleted.
    `since` and `before` bound when Kafka took an event. Raises UnreachableError when a file of the
    archive cannot be read.
    """
    event_time, came = pl.col("event_time"), pl.col("kafka_timestamp")
    good = event_time.is_not_null()  # what breaks the contract has no columns
    # Items and users are not bounded: their Kafka time is their producer's, who may set it at will.
    ahead = (event_time - came).dt.total_milliseconds()
    taken = good & (ahead <= longest_future_seconds * 1_000)
    if since is not None:
        taken &= came >= since
    if before is not None:
        taken &= came < before
    events = _erased(url, journal.TOPICS, "kafka_timestamp", options)
    gone = {topic: _erased(url, [topic], "kafka_offset", options) for topic in _DESCRIBED}
    spans = {topic: _spans(url, topic, options) for topic in HISTORY}
    chunk = max(_LEAST_CHUNK, _HELD_ROWS // max(sum(map(len, spans.values())), 1))

    def partition(place: int, number: int) -> Iterator[_Row]:
        topic = HISTORY[place]
        described = topic in _DESCRIBED
        frame = archive.read(url, topic, options, partitions=[number])
        frame = frame.filter(good if described else taken)
        first, last = spans[topic][number]
        for at in range(first, last + 1, chunk):
            rows = frame.filter(
                pl.col("kafka_offset").is_between(at, min(at + chunk - 1, last))
            ).select(
                # Nothing happened after Kafka took it: one time from the future would keep all
                # that follows from its place.
                pl.min_horizontal("event_time", "kafka_timestamp").alias("time"),
                "kafka_offset" if described else "kafka_timestamp",
                "item_id" if topic == "items" else "user_id",
                "kafka_value",
            )
            found = archive.collect(rows, archive.table_url(url, topic))
            for time, stood, name, value in found.iter_rows():
                end = gone.get(topic, events).get(name)
                if end is None or stood > end:
                    yield time, place, value

    parts = [
        partition(place, number) for place, topic in enumerate(HISTORY) for number in spans[topic]
    ]
    # Of what is first in each partition the earliest: a late record goes as soon as it is first.
    for _, place, value in merge(*parts, key=itemgetter(0, 1)):
        yield HISTORY[place], orjson.dumps(orjson.loads(value))  # on one line


def _spans(url: str, topic: str, options: Mapping[str, str] | None) -> dict[int, tuple[int, int]]:
    """The first and the last archived offset of each partition."""
    offset = pl.col("kafka_offset")
    bounds = archive.read(url, topic, options).group_by("kafka_partition")
    bounds = bounds.agg(offset.min().alias("first"), offset.max().alias("last"))
    found = archive.collect(bounds.sort("kafka_partition"), archive.table_url(url, topic))
    return {number: (first, last) for number, first, last in found.iter_rows()}


def _erased(
    url: str,
    topics: Sequence[str],
    column: Literal["kafka_offset", "kafka_timestamp"],
    options: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Where, by this column, the last null value of each key stands in these topics."""
    last: dict[str, Any] = {}
    for topic in topics:
        nulls = archive.read(url, topic, options).filter(
            pl.col("kafka_value").is_null()
            & pl.col("kafka_key").is_not_null()
            & pl.col(column).is_not_null()
        )
        newest = nulls.group_by("kafka_key").agg(pl.col(column).max())
        for key, at in archive.collect(newest, archive.table_url(url, topic)).iter_rows():
            name = key.decode(errors="replace")
            last[name] = max(at, last.get(name, at))
    return last
