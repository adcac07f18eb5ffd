"""What the archive holds of a shop's history, as a record file has it: to begin anew elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from math import inf
from typing import Literal

import orjson
import polars as pl

from schemas import archive, journal
from schemas.codec import decode, encode
from schemas.topics import BY_NAME

HISTORY = ("items", "users", "reviews", "behavior")
"""Topics that a shop sends, first those whose records are to be known when others come."""

_DESCRIBED = ("items", "users")  # what was sent of one last is all that counts
_CHUNK = 200_000  # records whose values are in memory at once


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
    The places of all are put in order first (100 bytes of memory each), then values are read in
    that order, `_CHUNK` at a time.

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
    frames = [archive.read(url, topic, options) for topic in HISTORY]

    def places(number: int) -> pl.DataFrame:
        """Where the records of a topic are, and by what time each comes, partition by partition."""
        topic = HISTORY[number]
        described = topic in _DESCRIBED
        rows = frames[number].filter(good if described else taken)
        if len(ends := gone.get(topic, events)):
            name = pl.col("item_id" if topic == "items" else "user_id").cast(pl.Binary)
            stood = pl.col("kafka_offset" if described else "kafka_timestamp")
            end = name.replace_strict(ends["name"], ends["end"], default=None)
            rows = rows.filter(end.is_null() | (stood > end))
        # Nothing happened after Kafka took it: one time from the future would keep all that
        # follows from its place.
        time = pl.min_horizontal("event_time", "kafka_timestamp")
        found = rows.select(
            pl.lit(number, pl.UInt8).alias("topic"),
            *archive.PLACE,
            "kafka_timestamp",
            # Of what is first in each partition the earliest: a late record goes as it is first.
            time.cum_max().over("kafka_partition").alias("time"),
        )
        return archive.collect(found, archive.table_url(url, topic))

    def values(number: int, chosen: pl.DataFrame) -> pl.DataFrame:
        """The values of records of a topic, each with its position in the order."""
        rows, came = frames[number], chosen["kafka_timestamp"]
        if not came.has_nulls():  # else files and row groups could not be told apart by it
            rows = rows.filter(pl.col("kafka_timestamp").is_between(came.min(), came.max()))
        found = rows.join(chosen.lazy(), on=archive.PLACE).select("at", "topic", "kafka_value")
        return archive.collect(found, archive.table_url(url, HISTORY[number]))

    # Stable: among records of one time topics stand as in HISTORY, then partitions.
    order = pl.concat([places(number) for number in range(len(HISTORY))])
    order = order.sort("time", maintain_order=True).drop("time").with_row_index("at")
    for chunk in order.iter_slices(_CHUNK):
        parts = [values(number, part) for (number,), part in chunk.group_by("topic")]
        for number, value in pl.concat(parts).sort("at").select("topic", "kafka_value").iter_rows():
            yield HISTORY[number], _on_one_line(HISTORY[number], value)


def _on_one_line(topic: str, value: bytes) -> bytes:
    try:
        return orjson.dumps(orjson.loads(value))
    except orjson.JSONEncodeError:  # a field that nobody knows is too deep to be written again
        (record,) = decode(BY_NAME[topic], [value], [(0, 0)]).records
        assert record is not None  # the archive has its columns
        return encode(record)


def _erased(
    url: str,
    topics: Sequence[str],
    column: Literal["kafka_offset", "kafka_timestamp"],
    options: Mapping[str, str] | None,
) -> pl.DataFrame:
    """By key, where by this column its last null value in these topics stands."""
    nulls = [
        archive.collect(
            archive.read(url, topic, options)
            .filter(pl.col("kafka_value").is_null())
            .select(pl.col("kafka_key").alias("name"), end=column)  # any bytes: a producer's
            .drop_nulls(),
            archive.table_url(url, topic),
        )
        for topic in topics
    ]
    return pl.concat(nulls).group_by("name").agg(pl.col("end").max())
