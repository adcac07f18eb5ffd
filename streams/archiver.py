"""Every topic of the contract into Delta Lake, each row once.

The rows of a commit and the offset after them (a Delta application transaction for each topic
and partition) become visible together, so the archive itself knows where to go on: a consumer
starts at `positions`, not at its group's committed offsets. delta-rs does not refuse an
application transaction that it has seen, so the recorded offset is compared here before each
commit, and rows below it are left out. Two archivers that own the same partition for a moment
(one wakes up late) can therefore not double a row: the later commit conflicts, looks again, and
finds its rows there.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import reduce
from itertools import product
from operator import attrgetter, or_

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message
from deltalake import CommitProperties, DeltaTable, Schema, Transaction, write_deltalake

from schemas import archive
from schemas.archive import Row
from schemas.exceptions import ContractError, UnreachableError
from schemas.topics import BY_NAME
from streams.compaction import WRITER, Compactor, compact, until_committed
from streams.config import ArchiveConfig
from streams.dead_letters import headers_of
from streams.exceptions import StoreError
from streams.memory import give_back
from streams.metrics import Metrics
from streams.processor import CLAIM_SECONDS, Offsets, Outcome

BATCH = 5_000  # records in one turn
LINGER_SECONDS = 0.5  # decoding costs a call a topic; well under the wait for a flush
FLUSH_BYTES = 16 * 1024 * 1024  # of keys and values; a backlog takes no more memory than this
HELD_COMMITS = 20  # a table that is kept open grows with each (75 KB in delta-rs 1.6): open anew
# Every commit lists the log's files (22 ms for a thousand), and an hour has a thousand commits.
# Readers open the newest version, and versions older than this serve nobody.
LOG_RETENTION = "interval 1 hours"

_ORDER = [("kafka_partition", "ascending"), ("kafka_offset", "ascending")]


class Archive:
    """The Delta tables of an archive, being written.

    `append` collects rows, `commit` writes one Delta commit a topic. Not for several threads.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, str] | None = None,
        compact_every: int = 100,
        on_due: Callable[[str], None] | None = None,
    ) -> None:
        """`on_due` is called with each topic to be compacted; when absent it is done at once."""
        self.url = url
        self._options = dict(options or {})
        self._compact_every = compact_every
        self._on_due = on_due or (lambda topic: compact(url, topic, self._options))
        self._commits: dict[str, int] = {}
        self._pending: dict[str, list[pa.Table]] = {}  # decoded when taken: compact, and at once
        self._recorded: dict[tuple[str, int], int] = {}  # the position when last looked at
        self._next: dict[tuple[str, int], int] = {}  # the offset after the last row taken
        # Tables as our last commits left them: opening one and its transactions costs far more.
        self._left: dict[str, DeltaTable] = {}

    def positions(
        self, topic: str, partitions: Iterable[int], until: float = math.inf
    ) -> dict[int, int | None]:
        """The offset after the last archived row of partitions, as recorded; none if none is.

        Rows below it are left out from now on; rows taken but not committed are dropped. What is
        not read by `until` (of the monotonic clock) is left out, but for the first partition.
        Raises UnreachableError when storage does not answer.
        """
        found: dict[int, int | None] = {}
        with archive.reached(archive.table_url(self.url, topic)):
            table = archive.open_table(self.url, topic, self._options)
            for partition in partitions:  # delta-rs (1.6) reads of the log for each
                if found and time.monotonic() > until:
                    break
                self.drop(topic, partition)
                recorded = None if table is None else _recorded(table, topic, partition)
                self._recorded[topic, partition] = self._next[topic, partition] = recorded or 0
                found[partition] = recorded
        return found

    def append(self, topic: str, rows: Iterable[Row]) -> int:
        """Takes rows of a topic in offset order for the next commit; how many were new.

        Raises ContractError for a topic that the contract does not have.
        """
        if topic not in BY_NAME:
            raise ContractError(f"topic {topic!r} is not in the contract, so it has no table")
        taken: list[Row] = []
        for row in rows:
            place = (topic, row.partition)
            if place not in self._next:
                self.positions(topic, [row.partition])
            if row.offset >= self._next[place]:
                taken.append(row)
                self._next[place] = row.offset + 1
        if taken:
            self._pending.setdefault(topic, []).append(archive.table(topic, taken))
        return len(taken)

    def drop(self, topic: str, partition: int) -> None:
        """Forgets the rows of a partition that are not committed, and its position."""
        self._next.pop((topic, partition), None)
        others = pc.field("kafka_partition") != partition
        self._pending[topic] = [
            kept for table in self._pending.get(topic, []) if len(kept := table.filter(others))
        ]

    def commit(self) -> int:
        """Writes all rows taken; how many. Raises UnreachableError when storage does not answer.

        After an error, what was not written is still held: call again, or `drop` it.
        """
        written = 0
        for topic in [topic for topic, tables in self._pending.items() if tables]:
            with archive.reached(archive.table_url(self.url, topic)):
                written += self._commit_topic(topic)
            self._pending[topic] = []
            self._commits[topic] = self._commits.get(topic, 0) + 1
            if self._commits[topic] % self._compact_every == 0:
                self._on_due(topic)
        return written

    @until_committed
    def _commit_topic(self, topic: str) -> int:
        """One look at the recorded offsets and one commit on the version looked at."""
        table, ours = self._newest(topic)
        pending = pa.concat_tables(self._pending[topic])
        recorded: dict[int, int] = {}
        for partition in pending["kafka_partition"].unique().to_pylist():
            before = self._recorded[topic, partition]
            recorded[partition] = before if ours else _recorded(table, topic, partition) or 0
            if recorded[partition] < before:
                raise ContractError(
                    f"{archive.table_url(self.url, topic)} went back: partition {partition} stood "
                    f"at offset {before} and now stands at {recorded[partition]}. Was the table "
                    "deleted or restored? Start the archiver again to archive from there."
                )
        offset, partition = pc.field("kafka_offset"), pc.field("kafka_partition")
        new = [(partition == number) & (offset >= first) for number, first in recorded.items()]
        rows = pending.filter(reduce(or_, new)).sort_by(_ORDER)
        if not len(rows):
            return 0
        last = rows.group_by("kafka_partition").aggregate([("kafka_offset", "max")])
        after = {each["kafka_partition"]: each["kafka_offset_max"] + 1 for each in last.to_pylist()}
        version = table.version()
        # Committed on the version whose transactions are known: where another commit has
        # recorded one of these partitions meanwhile, delta-rs refuses this one.
        write_deltalake(
            table,
            rows,
            mode="append",
            # A release before or after this one knows other fields of the record.
            schema_mode=None if _has_fields_of(table, rows.schema) else "merge",
            writer_properties=WRITER,
            commit_properties=CommitProperties(
                app_transactions=[
                    Transaction(_application(topic, partition), offset)
                    for partition, offset in after.items()
                ]
            ),
        )
        self._recorded |= {(topic, partition): offset for partition, offset in after.items()}
        if table.version() == version + 1:
            self._left[topic] = table
        return len(rows)

    def _newest(self, topic: str) -> tuple[DeltaTable, bool]:
        """A topic's table, and whether nobody has committed to it since we last did."""
        left = self._left.pop(topic, None)
        if left is None:
            return self._table(topic), False
        if self._commits.get(topic, 0) % HELD_COMMITS:
            return (left, True) if _still_newest(left) else (self._table(topic), False)
        found = self._table(topic)
        return found, found.version() == left.version()

    def _table(self, topic: str) -> DeltaTable:
        found = archive.open_table(self.url, topic, self._options)
        if found is not None:
            return found
        return DeltaTable.create(
            archive.table_url(self.url, topic),
            archive.schema(topic),
            mode="ignore",
            name=topic,
            description=BY_NAME[topic].meaning,
            configuration={"delta.logRetentionDuration": LOG_RETENTION},
            storage_options=self._options,
        )


class Archiver:
    """One worker's archiver, a processor of `streams.loop`.

    The archive itself knows where to read on, so a row is neither lost nor doubled by a crash.
    """

    name = "archiver"
    topics = tuple(BY_NAME)
    together = False
    transactional = False
    batch_size = BATCH
    linger_seconds = LINGER_SECONDS

    def __init__(self, config: ArchiveConfig, topic_prefix: str, metrics: Metrics) -> None:
        options = config.storage_options
        self._compactor = Compactor(config.url, options)
        self._archive = Archive(config.url, options, config.compact_every, self._compactor.ask)
        self._config = config
        self._prefix = topic_prefix
        self._metrics = metrics
        self._rows = 0
        self._bytes = 0
        self._since: float | None = None  # when the oldest row that waits was taken
        self.lag = 0

    def claim(self, committed: Offsets) -> Offsets:
        """Where to read each topic on: after its last archived row.

        What is not looked up after `CLAIM_SECONDS` is left out.
        """
        wanted: dict[str, list[int]] = {}
        for partition, topics in committed.items():
            for topic in topics:
                wanted.setdefault(topic, []).append(partition)
        starts: Offsets = {}
        until = time.monotonic() + CLAIM_SECONDS
        for topic, partitions in wanted.items():
            if starts and time.monotonic() > until:
                break
            with _pausing():
                found = self._archive.positions(topic, partitions, until)
            for partition, at in found.items():
                starts.setdefault(partition, {})[topic] = -1 if at is None else at
        return starts

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget what waits of these partitions; their next owner reads it again."""
        for topic, partition in product(self.topics, set(partitions)):
            self._archive.drop(topic, partition)

    def process(self, messages: list[Message]) -> Outcome:
        """Take the messages of a poll for the next commit."""
        rows: dict[str, list[Row]] = {}
        for message in messages:
            key, value = message.key(), message.value()
            kind, timestamp = message.timestamp()
            rows.setdefault(message.topic() or "", []).append(
                Row(
                    message.partition() or 0,
                    message.offset() or 0,
                    timestamp if kind else None,
                    _bytes(key),
                    _bytes(value),
                    [(name, _bytes(found)) for name, found in headers_of(message)],
                )
            )
            self._bytes += len(key or b"") + len(value or b"")
        for topic, found in rows.items():
            with _pausing():
                self._rows += self._archive.append(topic.removeprefix(self._prefix), found)
        if self._rows and self._since is None:
            self._since = time.monotonic()
        return Outcome()

    def idle(self) -> Outcome | None:
        """Commit what waits, when enough does or one row has waited long enough."""
        if self._since is not None and (
            self._rows >= self._config.flush_rows
            or self._bytes >= FLUSH_BYTES
            or time.monotonic() - self._since >= self._config.flush_seconds
        ):
            self._commit()
        self._compactor.turn()
        return None

    def close(self) -> None:
        """Commit what waits."""
        try:
            self._commit()
        finally:
            self._compactor.close()

    def _commit(self) -> None:
        with _pausing():
            written = self._archive.commit()
        self._metrics.events.labels(self.name, "row").inc(written)
        self._rows, self._bytes, self._since = 0, 0, None
        if written:
            give_back()


@contextmanager
def _pausing() -> Generator[None]:
    """An archive that does not answer pauses the loop, as a store does."""
    try:
        yield
    except UnreachableError as error:
        raise StoreError(str(error)) from error


def _application(topic: str, partition: int) -> str:
    return f"{topic}/{partition}"


def _still_newest(table: DeltaTable) -> bool:
    """Whether the version that the table was left at is there and the newest."""
    version = table.version()
    table.update_incremental()
    return table.version() == version and bool(table.history(1))


def _has_fields_of(table: DeltaTable, schema: pa.Schema) -> bool:
    """Those within fields, too."""
    ours, theirs = (
        sorted(each.fields, key=attrgetter("name"))
        for each in (Schema.from_arrow(schema), table.schema())
    )
    return ours == theirs


def _recorded(table: DeltaTable, topic: str, partition: int) -> int | None:
    return table.transaction_version(_application(topic, partition))


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
