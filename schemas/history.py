"""What the archive holds of a shop's history, as a record file has it: to begin anew elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from heapq import merge
from operator import itemgetter

import orjson
import polars as pl

from schemas import archive, journal

HISTORY = ("items", "users", "reviews", "behavior")
"""Topics that a shop sends, first those whose records are to be known when others come."""

_HELD_ROWS = 200_000  # of all partitions together
_LEAST_CHUNK = 500

_Row = tuple[datetime, int, bytes]  # when it happened, position in HISTORY, value


def history(
    url: str,
    options: Mapping[str, str] | None = None,
    *,
    since: datetime | None = None,
    before: datetime | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Topic and value of each record that the shop sent, in the order of time.

    Partitions are merged by event time, each in its own order: a late record stands where it came.
    Left out is what breaks the contract, and what users did before they were erased. `since` and
    `before` bound when Kafka took a record. Raises UnreachableError when a file of the archive
    cannot be read.
    """
    taken = pl.col("event_time").is_not_null()  # what breaks the contract has no columns
    if since is not None:
        taken &= pl.col("kafka_timestamp") >= since
    if before is not None:
        taken &= pl.col("kafka_timestamp") < before
    events = _erased(url, journal.TOPICS, options)
    erased = {"items": {}, "users": _erased(url, ["users"], options)}
    spans = {topic: _spans(url, topic, options) for topic in HISTORY}
    chunk = max(_LEAST_CHUNK, _HELD_ROWS // max(sum(map(len, spans.values())), 1))

    def partition(place: int, number: int) -> Iterator[_Row]:
        topic = HISTORY[place]
        frame = archive.read(url, topic, options, partitions=[number]).filter(taken)
        first, last = spans[topic][number]
        for at in range(first, last + 1, chunk):
            rows = frame.filter(
                pl.col("kafka_offset").is_between(at, min(at + chunk - 1, last))
            ).select(
                # Nothing happened after Kafka took it: one time from the future would keep all
                # that follows from its place.
                pl.min_horizontal("event_time", "kafka_timestamp").alias("time"),
                "kafka_timestamp",
                "item_id" if topic == "items" else "user_id",
                "kafka_value",
            )
            found = archive.collect(rows, archive.table_url(url, topic))
            for time, came, name, value in found.iter_rows():
                end = erased.get(topic, events).get(name)
                if end is None or (came is not None and came > end):
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
    url: str, topics: Sequence[str], options: Mapping[str, str] | None
) -> dict[str, datetime]:
    """When each user's last null value came in one of these topics."""
    last: dict[str, datetime] = {}
    for topic in topics:
        nulls = archive.read(url, topic, options).filter(
            pl.col("kafka_value").is_null() & pl.col("kafka_key").is_not_null()
        )
        newest = nulls.group_by("kafka_key").agg(pl.col("kafka_timestamp").max())
        for key, time in archive.collect(newest, archive.table_url(url, topic)).iter_rows():
            if time is not None:
                name = key.decode(errors="replace")
                last[name] = max(time, last.get(name, time))
    return last
