"""Rebuilding the states of one partition from archive and topics, while workers run.

The header is cleared before the states: whoever takes the partition over meanwhile begins at the
beginning too; states tell what they have applied, and attributes are then cleared once more, so
both may write. A worker that runs is fenced by the claim, claims again and goes on from the header;
then it is the command's writes that are refused, and the command only waits until the worker is
through.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from confluent_kafka import Message
from numpy.typing import NDArray

from schemas import archive
from schemas.exceptions import StarcastError
from schemas.journal import TOPICS
from streams.admin import committed
from streams.catalog import KINDS, Catalog, prices_key
from streams.claims import header_data, header_offset
from streams.clients import group_name
from streams.config import ArchiveConfig, KafkaConfig, StatesConfig
from streams.exceptions import FencedError, JournalGapError
from streams.items import Items
from streams.journal import read_journal
from streams.metrics import make_metrics
from streams.processor import Offsets, Processor
from streams.reader import ITEM_KIND, ITEM_STATE, USER_KIND, USER_STATE
from streams.store import Store
from streams.tail import archived_end, bounds, read_archived, read_log, read_topic
from streams.user_states import MARKER_SECONDS, UserStates, decode_header

ATTEMPTS = 50  # a busy worker may claim again while its states are being cleared
PAUSE_SECONDS = 0.05
KINDS_OF_STATES = 3  # that `rebuild` tells of
STALL_SECONDS = 120.0  # a worker that has taken over recovers thousands of records in this time


@dataclass(frozen=True)
class Shop:
    """Where states lie, and what they come from."""

    store: Store
    kafka: KafkaConfig
    archive: ArchiveConfig
    states: StatesConfig

    def committed(self, processor: str, topics: Iterable[str], partition: int) -> dict[str, int]:
        """The next offset of topics that a processor's group reads; 0 where it has read nothing."""
        places = committed(self.kafka, group_name(self.kafka, processor))
        return {topic: places.get(topic, {}).get(partition, 0) for topic in topics}


@dataclass(frozen=True)
class Rebuilt:
    """What became of one kind of states in one partition."""

    what: str
    partition: int
    taken_over: bool  # a worker that runs did the rest
    seconds: float


def rebuild(shop: Shop, partition: int) -> Iterator[Rebuilt]:
    """Rebuild all that the store has of a partition, kind by kind.

    Raises `JournalGapError`, before anything is changed, where archive and topics do not reach back
    to the beginning.
    """
    require_journal(shop, partition)
    require_updates(shop, partition, _offset(shop, ITEM_STATE, partition))
    yield _attributes(shop, partition)
    yield _items(shop, partition)
    yield _users(shop, partition)


def require_journal(shop: Shop, partition: int) -> None:
    """Raise `JournalGapError` unless archive and topic have the journal from its first row."""
    due = 0
    for entry in read_journal(shop.kafka, shop.archive, partition, 0):
        require_rows(partition, due, entry.journal.steps)
        due += len(entry.journal.steps)


def require_rows(partition: int, due: int, steps: NDArray[np.uint64]) -> None:
    """Raise `JournalGapError` unless rows of a journal are those from step `due` on."""
    wrong = np.flatnonzero(steps != due + np.arange(len(steps), dtype=np.uint64))
    if len(wrong):
        raise JournalGapError(
            f"Journal partition {partition} lacks row {due + wrong[0]}: archive and topic do not "
            "have all of it from the beginning, so its states cannot be computed again. Point "
            "STARCAST_ARCHIVE__URL at the archive of this shop."
        )


def require_updates(shop: Shop, partition: int, end: int) -> None:
    """Raise `JournalGapError` unless archive and topic have all item updates before `end`."""
    topic = "item-updates"
    low, _ = bounds(shop.kafka, topic, [partition])[partition]
    if not low or not end:
        return
    first = next(read_archived(shop.kafka, shop.archive, topic, partition, 0, low), None)
    # A first transaction that was aborted has offsets, but no rows.
    begins = first is not None and (first[0].offset() == 0 or _archived_from_the_start(shop))
    if not begins or archived_end(shop.archive, topic, partition) < min(low, end):
        raise JournalGapError(
            f"Topic {topic} partition {partition} begins at offset {low}, and the archive at "
            f"{shop.archive.url} does not have all before: its states cannot be computed again. "
            "Point STARCAST_ARCHIVE__URL at the archive of this shop."
        )


def _archived_from_the_start(shop: Shop) -> bool:
    """Whether the archiver was there before retention was: it has the first row of all journals."""
    rows = archive.read(shop.archive.url, "journal", shop.archive.storage_options)
    firsts = rows.group_by("kafka_partition").agg(pl.col("first_step").min())
    steps = archive.collect(firsts, archive.table_url(shop.archive.url, "journal"))["first_step"]
    return len(steps) > 0 and bool((steps == 0).all())


def _attributes(shop: Shop, partition: int) -> Rebuilt:
    """Item and user attributes and running prices, through the catalog's own code."""
    committed = shop.committed("catalog", KINDS, partition)
    until = {
        kind: max(_offset(shop, kind, partition), committed[topic]) for topic, kind in KINDS.items()
    }

    def clear() -> None:
        prices = prices_key(shop.store, partition)
        _clear(shop.store, ITEM_KIND, partition, header_data(0), prices)
        _clear(shop.store, USER_KIND, partition, header_data(0))

    def compute() -> None:
        catalog = Catalog(shop.store, shop.kafka.topic_prefix, make_metrics())
        starts = catalog.claim({partition: {}})[partition]
        for topic in catalog.topics:
            for batch in read_log(shop.kafka, shop.archive, topic, partition):
                _work(catalog, [each for each in batch if (each.offset() or 0) >= starts[topic]])

    return _rebuild(
        shop,
        "attributes",
        partition,
        clear,
        compute,
        lambda: all(_offset(shop, kind, partition) >= end for kind, end in until.items()),
    )


def _items(shop: Shop, partition: int) -> Rebuilt:
    """Item states, through the code of `items`."""
    topic = "item-updates"
    committed = shop.committed("items", [topic], partition)[topic]
    until = max(_offset(shop, ITEM_STATE, partition), committed)

    def compute() -> None:
        items = Items(shop.store, shop.kafka, shop.archive, make_metrics())
        starts: Offsets = {}
        while partition not in starts:  # each claim applies some of what only the archive has
            starts = items.claim({partition: {}})
        start = {partition: starts[partition][topic]}
        for batch in read_topic(
            shop.kafka, topic, start=start, partitions=[partition], strict=True
        ):
            _work(items, batch)

    return _rebuild(
        shop,
        "item states",
        partition,
        lambda: _clear(shop.store, ITEM_STATE, partition, header_data(0)),
        compute,
        lambda: _offset(shop, ITEM_STATE, partition) >= until,
    )


def _users(shop: Shop, partition: int) -> Rebuilt:
    """User states, as a worker recovers them."""
    before = decode_header(shop.store.header(USER_STATE, partition))["ends"]
    committed = shop.committed("scorer", TOPICS, partition)
    until = np.maximum([committed[topic] for topic in TOPICS], before)

    def reached() -> bool:
        ends = decode_header(shop.store.header(USER_STATE, partition))["ends"]
        return bool((np.maximum(ends, 0) >= until).all())

    def compute() -> None:
        # The owner compares the journal's end with the committed offsets; here they move on.
        kafka = shop.kafka.model_copy(update={"exactly_once": False})
        states = UserStates(shop.store, kafka, shop.archive, shop.states)
        states.claim({partition: {}})
        deadline = time.monotonic() + MARKER_SECONDS
        while not reached() and time.monotonic() < deadline:
            time.sleep(PAUSE_SECONDS)
            if not states.claim({partition: {}}):  # it was not through
                deadline = time.monotonic() + MARKER_SECONDS

    return _rebuild(
        shop,
        "user states",
        partition,
        lambda: _clear(shop.store, USER_STATE, partition, decode_header(None).tobytes()),
        compute,
        reached,
    )


def _rebuild(
    shop: Shop,
    what: str,
    partition: int,
    clear: Callable[[], None],
    compute: Callable[[], None],
    reached: Callable[[], bool],
) -> Rebuilt:
    began, taken_over = time.monotonic(), False
    _insist(clear, what, partition)
    try:
        compute()
    except FencedError:
        taken_over = True
        _wait(shop, what, partition, reached)
    if not reached():
        raise StarcastError(
            f"The {what} of partition {partition} are computed, but archive and topics end before "
            "what had been applied to them. Were topics or offsets reset?"
        )
    return Rebuilt(what, partition, taken_over, time.monotonic() - began)


def _insist(clear: Callable[[], None], what: str, partition: int) -> None:
    for _ in range(ATTEMPTS):
        try:
            return clear()
        except FencedError:
            time.sleep(PAUSE_SECONDS)
    raise StarcastError(
        f"The {what} of partition {partition} could not be cleared: workers claim it again and "
        "again. Stop the workers, then try again."
    )


def _wait(shop: Shop, what: str, partition: int, reached: Callable[[], bool]) -> None:
    """Until the worker that has taken over is through; what it has not reached grows less."""
    kinds = (USER_STATE, ITEM_STATE, ITEM_KIND, USER_KIND)
    headers, since = None, time.monotonic()
    while not reached():
        now = [shop.store.header(kind, partition) for kind in kinds]
        if now != headers:
            headers, since = now, time.monotonic()
        if time.monotonic() - since > STALL_SECONDS:
            raise StarcastError(
                f"A worker has taken over the {what} of partition {partition}, but has written "
                f"nothing for {STALL_SECONDS:.0f} s. Look at its log; run the command again."
            )
        time.sleep(PAUSE_SECONDS)


def _clear(store: Store, kind: bytes, partition: int, header: bytes, *more: bytes) -> None:
    """Clear a partition's header, then delete its states; raises FencedError as `write` does.

    Attributes do not tell what they have applied, so one that was written since they were listed
    would be described again beside itself: then too it raises FencedError.
    """
    before = store.header(kind, partition)
    keys = [*store.scan(kind, partition), *more]  # before the claim: it walks through the store
    claim = store.claim(kind, partition)
    if kind in KINDS.values() and claim.data != before:
        raise FencedError("A worker wrote attributes while they were listed.")
    store.write(claim, [], [], header)
    store.write(claim, keys, [b""] * len(keys), header)


def _work(processor: Processor, messages: Sequence[Message]) -> None:
    """Apply messages outside any loop; dead letters were sent when they came first."""
    for at in range(0, len(messages), processor.batch_size):
        outcome = processor.process(list(messages[at : at + processor.batch_size]))
        if outcome.finish is not None:
            outcome.finish({})


def _offset(shop: Shop, kind: bytes, partition: int) -> int:
    return header_offset(shop.store.header(kind, partition))
