"""Each protection of the loop, switched off: what the harness must then find.

These replace functions of a running worker, for the harness alone. Starcast itself has no such
switch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from streams import store as stores
from streams.loop import Loop, Polled
from streams.processor import Offsets, Outcome
from streams.store import Call, Store
from streams.user_states import UserStates

SETTLED_COMMITS = 5
REJOIN_SECONDS = 30.0  # a worker that was thrown out is back with its partitions, or gives up


def without_guard() -> None:
    """A batch that was refused is committed with the generation that the worker joins next."""
    transact = Loop._transact

    def again(self: Loop, outcome: Outcome, batch: Polled | None) -> None:
        transact(self, outcome, batch)
        if batch is None or batch.opened is None:
            return
        ownership = self._ownership
        wanted = {ownership._position(each) for each in batch.offsets}
        until = time.monotonic() + REJOIN_SECONDS
        while not _settled(self) and time.monotonic() < until:
            ownership.consumer.consume(1, 0.2)  # paused: only callbacks come
            if not wanted <= ownership.owned:
                continue
            metadata = ownership.consumer.consumer_group_metadata()
            newer = self._opened(batch.messages, batch.offsets, metadata)
            if newer is not None:
                newer.processed.set()
                transact(self, outcome, newer)
                if self._flight is not None and self._settle():  # it began, and was committed
                    return

    Loop._transact = again


def _settled(loop: Loop) -> bool:
    """Whether a batch's transaction was committed: a refused one leaves nothing live."""
    return loop._settle() and bool(loop.live)


def without_fence() -> None:
    """Whoever writes to the store does, whichever claim came last."""
    round_trip = Store._round_trip

    def unfenced(self: Store, calls: Sequence[Call], parts: stores.Keys = ()) -> list[Any]:
        forced = [_forced(self, call, round_trip) for call in calls]
        return forced + (round_trip(self, (), parts) if parts else [])

    stores.Store._round_trip = unfenced


def _forced(store: Store, call: Call, round_trip: Callable[[Store, Sequence[Call]], Any]) -> Any:
    if call.function == "starcast_read":
        return store.client.mget(call.keys[1:]) if call.keys[1:] else []
    if call.function != "starcast_write":
        return round_trip(store, [call])[0]
    done = 0
    while not done:  # the owner may write in between
        newest = store.client.hget(call.keys[0], "token")
        writes = store.client.hget(call.keys[0], "writes")
        arguments = [newest or b"", writes or b"0", *call.arguments[2:]]
        (done,) = round_trip(store, [replace(call, arguments=arguments)])
    return done


def without_count() -> None:
    """An owner writes on though the store has lost some of what it wrote."""
    round_trip = Store._round_trip

    def uncounted(self: Store, calls: Sequence[Call], parts: stores.Keys = ()) -> list[Any]:
        done = [round_trip(self, [_recounted(self, call)])[0] for call in calls]
        return done + (round_trip(self, (), parts) if parts else [])

    stores.Store._round_trip = uncounted


def _recounted(store: Store, call: Call) -> Call:
    if call.function not in ("starcast_read", "starcast_write"):
        return call
    writes = store.client.hget(call.keys[0], "writes")
    return replace(call, arguments=[call.arguments[0], writes or b"0", *call.arguments[2:]])


def without_order() -> None:
    """States are written before the commit, once a worker has settled in.

    While workers join, commits are refused so often that the shop would never come to the fault.
    """
    transact = Loop._transact
    committed = 0

    def early(self: Loop, outcome: Outcome, batch: Polled | None) -> None:
        nonlocal committed
        if committed < SETTLED_COMMITS:
            transact(self, outcome, batch)
            committed += _settled(self)
            return
        write, outcome.write = outcome.write, None
        send = self._sender.send

        def send_and_write(outcome: Outcome, failed: Any = None) -> Any:
            delivered = send(outcome, failed)
            self._sender.close(10)
            if write is not None:
                write(delivered)
            return delivered

        self._sender.send = send_and_write
        try:
            transact(self, outcome, batch)
        finally:
            self._sender.send = send

    Loop._transact = early


def without_recovery() -> None:
    """A new owner takes the store's states as they are, and the committed offsets."""

    def blind(self: UserStates, committed: Offsets) -> Offsets:
        from streams.reader import USER_STATE
        from streams.user_states import Held, decode_header

        for claim in self._store.claim_all(USER_STATE, committed):
            self._held[claim.partition] = Held(claim, decode_header(claim.data))
        return committed

    UserStates.claim = blind


SWITCHES: dict[str, Callable[[], None]] = {
    "guard": without_guard,
    "fence": without_fence,
    "count": without_count,
    "order": without_order,
    "recovery": without_recovery,
}
