"""Comparing stored states with a recount from archive and topics, while workers run.

A partition's header is read first, then its states: a state that has applied more than the header
says was written since, and is left out. The others must be, bit for bit, what the log up to the
header gives.
"""

from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from typing import Any

import numpy as np
from confluent_kafka import Message
from numpy.typing import NDArray

from model.events import DAY_MS, EVENT, Rows
from model.ids import Hashes, hash_ids
from model.lookups import Store as Rowstore
from model.lookups import Table, empty
from model.replay import recover
from model.state import CATEGORY, ITEM, ITEM_ATTRIBUTES, LAYOUT_HASH, USER, apply_items
from model.state_bytes import from_bytes
from model.updates import from_updates
from schemas.journal import TOPICS
from streams.catalog import (
    Entry,
    attributes_of,
    describe_log,
    entries_of,
    item_value,
    price_table,
    prices_key,
    user_value,
)
from streams.claims import header_offset
from streams.exceptions import JournalGapError
from streams.inputs import Inputs, split
from streams.journal import read_journal
from streams.reader import ITEM_KIND, ITEM_STATE, USER_KIND, USER_STATE, hashes_of, partition_keys
from streams.rebuild import Shop, require_rows, require_updates
from streams.store import Store
from streams.tail import read_log
from streams.user_states import decode_header
from streams.verification import Verification

TRANSACTIONS = 32  # of the journal, applied at once: bounds memory, not the result
HISTORY = ("first_time", "price_rank")  # of attributes: they hang on records that came before
CHECKS = ("user states", "item states", "item attributes", "user attributes")


def check_states(
    shop: Shop, partitions: list[int], progress: Callable[[str, int], None] = lambda *_: None
) -> Verification:
    """Recount partitions and compare; `progress` is told of each check that begins.

    Where archive and topics do not have all from the beginning, that is told, and counts as a
    difference: nothing was compared.
    """
    report = Verification()
    checks = (_check_users, _check_items, _check_item_attributes, _check_user_attributes)
    for partition in partitions:
        for what, check in zip(CHECKS, checks, strict=True):
            progress(what, partition)
            try:
                check(report, shop, partition)
            except JournalGapError as error:
                report.differences[f"{what} not compared"] += 1
                report.notes.append(str(error))
    return report


def _check_users(report: Verification, shop: Shop, partition: int) -> None:
    data = shop.store.header(USER_STATE, partition)
    if data is None:
        read = any(shop.committed("scorer", TOPICS, partition).values())
        _check_header(report, "user", partition, not read)
        return
    header = decode_header(data)
    users, state, paused = _recount_users(shop, partition, int(header["journal"]))
    hashes, stored = _stored(shop.store, USER_STATE, partition, USER, users.hashes)
    expected = _rows(users, hashes)
    kept = stored["step"] <= header["partition"]["step"]
    if shop.store.header(USER_STATE, partition) != data:  # then who is gone may have been erased
        kept &= (stored["step"] > 0) | (expected["step"] == 0)
    _tell_newer(report, "users", partition, int((~kept).sum()))
    if shop.states.expire_after_days:
        gone = np.isin(hashes, np.array(sorted(paused), np.uint64)) | (stored["step"] == 0)
        if (gone & kept).any():
            report.notes.append(
                f"partition {partition}: {int((gone & kept).sum())} users whose state may have "
                "expired since were left out"
            )
        kept &= ~gone
    report.check_states("user", hashes[kept], stored[kept], expected[kept])
    _check_header(report, "user", partition, bool(header["partition"] == state))


def _recount_users(shop: Shop, partition: int, end: int) -> tuple[Rowstore, Rows, set[int]]:
    """User states and partition state at a position of the journal.

    And the users who once came back after so long that their state may have expired between.
    """
    users, state = Rowstore(USER), decode_header(None)["partition"].copy()
    paused: set[int] = set()
    newest = 0
    entries = takewhile(
        lambda entry: entry.last_offset < end,
        read_journal(shop.kafka, shop.archive, partition, 0),
    )
    days = shop.states.expire_after_days
    size = 1 if days else TRANSACTIONS  # states expire between transactions
    while several := [entry.journal for entry in islice(entries, size)]:
        if any(each.layout_hash != LAYOUT_HASH for each in several):
            raise JournalGapError(
                f"Journal partition {partition} holds rows of another layout than this version's "
                f"{LAYOUT_HASH}. Check with the version that wrote it."
            )
        steps = np.concatenate([each.steps for each in several])
        require_rows(partition, int(state["step"]), steps)
        events = np.concatenate([each.events for each in several]).view(EVENT)
        hashes, index = np.unique(events["user"], return_inverse=True)
        places = users.place(hashes)
        newest = max(newest, int(events["time"].max(initial=0)))
        if days:
            last = users.rows["last_time"][places]
            paused |= set(hashes[(last > 0) & (last < newest - days * DAY_MS)].tolist())
        users.rows[places], state = recover(
            users.rows[places],
            index,
            state.copy(),
            events,
            np.concatenate([each.features for each in several]),
            np.concatenate([each.duplicates for each in several]),
            steps,
        )
    return users, state, paused


def _check_items(report: Verification, shop: Shop, partition: int) -> None:
    end = header_offset(shop.store.header(ITEM_STATE, partition))
    if not end:
        read = any(shop.committed("items", ["item-updates"], partition).values())
        _check_header(report, "item", partition, not read)
        return
    require_updates(shop, partition, end)
    items = Rowstore(ITEM)
    for batch in _log(shop, "item-updates", partition, end):
        updates = _good(shop, "item-updates", batch)
        offsets = updates.offsets().astype(np.uint64)
        deltas = from_updates(updates.records)
        hashes, index = np.unique(deltas["item"], return_inverse=True)
        places = items.place(hashes)
        items.rows[places] = apply_items(items.rows[places], index, deltas, offsets)
    hashes, stored = _stored(shop.store, ITEM_STATE, partition, ITEM, items.hashes)
    expected = _rows(items, hashes)
    kept = stored["offset"] <= end
    _tell_newer(report, "items", partition, int((~kept).sum()))
    report.check_states("item", hashes[kept], stored[kept], expected[kept])


def _check_item_attributes(report: Verification, shop: Shop, partition: int) -> None:
    store = shop.store
    end = header_offset(store.header(ITEM_KIND, partition))
    known: dict[str, Rows] = {}
    expected: dict[str, bytes] = {}
    prices, seen = empty(CATEGORY), 0
    for batch in _log(shop, "items", partition, end):
        entries = entries_of(_good(shop, "items", batch), partition)
        rows, prices = describe_log(entries, known, prices)
        for (name, record, _), row in zip(entries, rows, strict=True):
            expected[name] = item_value(row, record)
        seen += len(batch)
    found = price_table(store.read([prices_key(store, partition)])[0])
    whole = seen == end
    if not whole:
        report.notes.append(
            f"items partition {partition}: {end - seen} records are neither in the topic, which is "
            f"compacted, nor in the archive; {' and '.join(HISTORY)} were not compared"
        )
    still = _check_attributes(
        report, shop, ITEM_KIND, partition, end, expected, bytes if whole else _without_history
    )
    if still:
        same = _counted(found) == _counted(prices)
        report.check("running prices", np.array([same]), lambda _: f"partition {partition}")


def _check_user_attributes(report: Verification, shop: Shop, partition: int) -> None:
    end = header_offset(shop.store.header(USER_KIND, partition))
    newest: dict[str, Entry] = {}
    for batch in _log(shop, "users", partition, end):
        entries = entries_of(_good(shop, "users", batch), partition)
        newest |= {entry[0]: entry for entry in entries}
    expected = {name: user_value(record, version) for name, record, version in newest.values()}
    _check_attributes(report, shop, USER_KIND, partition, end, expected, bytes)


def _check_attributes(
    report: Verification,
    shop: Shop,
    kind: bytes,
    partition: int,
    end: int,
    expected: dict[str, bytes],
    compared: Callable[[bytes], bytes],
) -> bool:
    """Compare stored attributes, as far as no newer record wrote them; whether none came since."""
    store, whose = shop.store, "item" if kind == ITEM_KIND else "user"
    by_hash = dict(zip(hash_ids(list(expected)).tolist(), expected.values(), strict=True))
    hashes = np.union1d(
        np.array(list(by_hash), np.uint64), hashes_of(store.scan(kind, partition))
    ).tolist()
    keys = partition_keys(store, kind, partition, np.array(hashes, np.uint64))
    stored = [value or b"" for value in store.read(keys)]
    still = header_offset(store.header(kind, partition)) == end
    kept = [
        (hash_, value)
        for hash_, value in zip(hashes, stored, strict=True)
        if int.from_bytes(value[:8], "little") <= end and (value or still)
    ]
    same = [compared(value) == compared(by_hash.get(hash_, b"")) for hash_, value in kept]
    report.check(
        f"{whose} attributes",
        np.array(same, bool),
        lambda at: f"{whose} hash {kept[at][0]:#x} in the store",
    )
    return still


def _without_history(value: bytes) -> bytes:
    """Attributes as the newest record alone gives them."""
    if not value:
        return value
    row = attributes_of([value])
    for name in HISTORY:
        row[name] = 0
    return row.tobytes() + value[ITEM_ATTRIBUTES.itemsize :]


def _log(shop: Shop, topic: str, partition: int, end: int) -> Iterator[list[Message]]:
    """All that is left of a partition before offset `end`, in batches."""
    for batch in read_log(shop.kafka, shop.archive, topic, partition):
        before = [each for each in batch if (each.offset() or 0) < end]
        if before:
            yield before
        if len(before) < len(batch):
            return


def _good(shop: Shop, topic: str, messages: list[Message]) -> Inputs[list[Any]]:
    """The good records of a batch; the others became dead letters when they came."""
    return split(messages, shop.kafka.topic_prefix, "check")[0][topic]


def _stored(
    store: Store, kind: bytes, partition: int, dtype: np.dtype[Any], known: Hashes
) -> tuple[Hashes, Rows]:
    """Hashes that are known or stored, and the stored rows; blank where there is none."""
    hashes = np.union1d(known, hashes_of(store.scan(kind, partition)))
    return hashes, from_bytes(store.read(partition_keys(store, kind, partition, hashes)), dtype)


def _rows(known: Rowstore, hashes: Hashes) -> Rows:
    """The rows of hashes; blank for one that is not known."""
    places = known.place(hashes)
    return known.rows[places]


def _counted(prices: Table) -> dict[int, bytes]:
    """Prices by category, without categories that lost their last."""
    rows = zip(prices.hashes.tolist(), prices.rows[:-1], strict=True)
    return {category: row.tobytes() for category, row in rows if row["count"]}


def _tell_newer(report: Verification, what: str, partition: int, count: int) -> None:
    if count:
        report.notes.append(f"partition {partition}: {count} {what} were written meanwhile")


def _check_header(report: Verification, whose: str, partition: int, same: bool) -> None:
    there: NDArray[np.bool_] = np.array([same])
    report.check(f"{whose} header", there, lambda _: f"partition {partition} in the store")
