"""A model of the commit and recovery protocol: one partition, its log and its workers.

It runs no code of ours, and is small enough to search every interleaving (`search.py`).

In the model, and in the code:

- `Worker` and its `phase`: `streams.loop.Loop` with a scorer, and where its one thread stands.
- `World.generation`, `owner`, `rebalance`: the group coordinator; a rebalance is a generation.
- `poll joins`: `Consumer.consume` that serves `_on_revoke` and `_on_assign`: `drop`, join again.
- `poll reads`, `Worker.rows`: `_turn`: a batch with its metadata, and `process`: read, number.
- `committed`: `_claim_pending`: `Consumer.committed`, which waits for stable offsets.
- `claim`: `Store.claim` (`starcast_claim`): the token, the count of writes, the header.
- `recover`: `UserStates._recover` and `_compare`: the journal from the header to its stable end.
- `write`: `Store.write` (`starcast_write`): a chunk of keys, and the header with the last one.
- `check`: `UserStates.check`: a claim that no longer holds is noticed without events.
- `offsets`, `send`, `commit`: `_opened` and `_transact`: `send_offsets_to_transaction`, outputs,
  `commit_transaction`.
- `start`, `reopen`: `Sender.start` of a new worker, and of one that was fenced.
- `Entry`, `World.journal`: a transaction's records in the partition of the journal.
- `Header`: `streams.user_states.HEADER`: `journal`, `ends`, the partition's `step`.
- `State`: a user's state: the events applied, in order, and the `step` after the last one.
- `Transaction`, `marker`, `timeout`: the transaction coordinator: epochs, markers, time limit.
- `failover`, `empty`: a replica without the last writes takes over; the store loses all.

A worker that sleeps is one that no step is given to: it may wake at any time, so every worker is a
zombie somewhere in the search. A crash may come after any step, and so may any other fault.

Facts of Kafka. A transaction is open from its first offsets or outputs on. An offset commit is
checked against the generation that it carries when it is sent, not when its transaction is
committed; generation -1 with no member is not checked. A commit is decided first and seen later, in
the journal and in the offsets, in either order; until then the last stable offset stays below it.
`init_transactions` aborts the open transaction of its id, and waits for a decided one. A consumer
that was thrown out may still hand out what it had fetched.

Left out: more than one partition and input topic (one transaction commits all of them together),
at-least-once mode, a store that answers late or not at all (a crash there is worse), retention and
the archive, expiry, and what features and predictions say. A late look at the metadata may find
any generation that the member could have; librdkafka gives fewer. A worker that was thrown out
between `committed` and `recover` may find the store ahead of offsets that are old by then, and ends
with an error; here it starts again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

_Value = TypeVar("_Value")
_Holder = TypeVar("_Holder", "Store", "Worker")

KEYS = 2  # event n is of key n % KEYS: two events in a row are two chunks of a write
BATCH = 2  # most events in one
LOST = 2  # most of the last store calls that a failover loses


@dataclass(frozen=True)
class Protections:
    """What keeps the protocol right; a search without one of them must find out."""

    guard: bool = True  # the generation is read with the poll, and none below 1 is sent
    fence: bool = True  # the store refuses an old token
    order: bool = True  # states are written after the commit
    recovery: bool = True  # a claim applies the journal first
    count: bool = True  # the store refuses a count of writes that does not follow
    stable: bool = True  # a new owner waits until the committed offsets are stable
    skip: bool = True  # a state leaves out the steps that it has applied


class State(NamedTuple):
    """One key's state."""

    applied: tuple[int, ...] = ()  # input positions
    step: int = 0  # the step after the last one applied


class Header(NamedTuple):
    """Up to where a partition's states stand."""

    journal: int = 0  # next entry
    end: int = 0  # next input position
    step: int = 0  # next step


class Store(NamedTuple):
    """What the store has of the partition."""

    token: int = 0
    writes: int = 0
    header: Header = Header()
    states: tuple[State, ...] = (State(),) * KEYS


class Entry(NamedTuple):
    """What one transaction wrote to the journal."""

    rows: tuple[tuple[int, int], ...]  # input position, step
    stage: str = "open"  # then "aborted", or "decided" and "committed"


class Transaction(NamedTuple):
    """What the coordinator knows of one transactional id."""

    epoch: int = 0
    entry: int | None = None  # the open or decided transaction's
    offset: int | None = None  # that it commits, until the marker is there


class Worker(NamedTuple):
    """One worker's memory.

    Phases: down, out, asked, claimed, live, polled, bound, sent, written; fenced by Kafka.
    """

    phase: str = "down"
    epoch: int = 0
    generation: int = 0  # as it knows it; 0: it is in none
    owns: bool = False
    late: bool = False  # it has claimed since it was thrown out; its next poll tells
    position: int = 0  # next input to read
    token: int = 0
    writes: int = 0
    header: Header = Header()
    cache: tuple[State | None, ...] = (None,) * KEYS
    rows: tuple[tuple[int, int], ...] = ()  # of the batch
    left: tuple[tuple[int, State], ...] = ()  # chunks still to be written
    reached: Header = Header()  # the header that goes with the last of them


class World(NamedTuple):
    """Everything at one moment."""

    end: int  # of the input
    faults: int  # that may still happen
    workers: tuple[Worker, ...]
    transactions: tuple[Transaction, ...]
    generation: int = 1
    owner: int = 0
    committed: int = 0
    journal: tuple[Entry, ...] = ()
    store: Store = Store()
    past: tuple[Store, ...] = ()  # before the last calls, which a failover may lose
    broken: str = ""  # what a step broke


Steps = Iterator[tuple[str, World]]


def begin(events: int, faults: int, workers: int = 2) -> World:
    """A world in which nothing has happened yet."""
    return World(events, faults, (Worker(),) * workers, (Transaction(),) * workers)


class Model:
    """The steps that a world may take next."""

    def __init__(self, on: Protections, slots: Sequence[int] = (0, 1)) -> None:
        """`slots` says which transactional id each worker has."""
        self.on = on
        self.slots = slots
        self.shared = len(set(slots)) < len(slots)  # two workers fence each other for ever

    def steps(self, world: World) -> Steps:
        """All next worlds: what workers and Kafka do, then what goes wrong."""
        yield from self.work(world)
        if world.faults:
            for name, after in self.faults(world):
                yield name, after._replace(faults=world.faults - 1)

    def work(self, world: World) -> Steps:
        """The steps of workers and of Kafka that need no fault; none is left at rest."""
        yield from self._markers(world)
        for at, worker in enumerate(world.workers):
            for name, after in self._worker_steps(world, at, worker):
                yield f"{name} {at}", after

    def faults(self, world: World) -> Steps:
        """What may go wrong."""
        for at, worker in enumerate(world.workers):
            moved = world._replace(generation=world.generation + 1, owner=at)
            yield f"rebalance to {at}", moved
            if worker.phase != "down":
                yield f"crash {at}", self._put(world, at, Worker())
        for slot, transaction in enumerate(world.transactions):
            if _stage(world, transaction) == "open":
                yield f"timeout {slot}", _abort(world, slot)
        for lost, store in enumerate(reversed(world.past), 1):
            yield f"failover loses {lost}", world._replace(store=store, past=())
        if world.store != Store():
            yield "empty", world._replace(store=Store(), past=())

    # -- Kafka ----------------------------------------------------------------------------------

    def _markers(self, world: World) -> Steps:
        for slot, each in enumerate(world.transactions):
            if each.entry is not None and _stage(world, each) == "decided":
                after = _set_stage(world, each.entry, "committed")
                yield f"marker in journal {slot}", _settled(after, slot)
            decided = _stage(world, each) in ("decided", "committed")
            if each.offset is not None and decided:
                back = "committed offsets went back" if each.offset < world.committed else ""
                after = world._replace(committed=each.offset, broken=back)
                after = _with(after, slot, each._replace(offset=None))
                yield f"marker in offsets {slot}", _settled(after, slot)

    # -- workers --------------------------------------------------------------------------------

    def _worker_steps(self, world: World, at: int, worker: Worker) -> Steps:
        slot = self.slots[at]
        transaction = world.transactions[slot]
        fenced = worker.epoch != transaction.epoch
        match worker.phase:
            case "down":
                yield from self._start(world, at, "start", Worker(phase="out"))
            case "fenced":
                yield from self._start(world, at, "reopen", _dropped(worker))
            case "out" if worker.generation != world.generation:
                yield "poll joins", self._join(world, at)
                if not worker.late:  # a turn claims before it polls
                    yield from self._committed(world, at, worker)
            case "out":
                yield from self._committed(world, at, worker)
            case "asked":
                yield "claim", self._claim(world, at, worker)
            case "claimed" if worker.left:
                yield from self._write(world, at, worker, "claimed")
            case "claimed":
                yield from self._recover(world, at, worker)
            case "live":
                yield from self._poll(world, at, worker)
            case "polled" if fenced or not _stage(world, transaction):
                yield from self._offsets(world, at, worker, fenced)
            case "bound":
                yield from self._send(world, at, worker, fenced)
            case "sent" if worker.left and not self.on.order:
                yield from self._write(world, at, worker, "sent")
            case "sent":
                yield "commit", self._commit(world, at, worker, fenced)
            case "written":
                yield from self._write(world, at, worker, "live")
            case _:  # a transaction of the same id waits for its markers
                return

    def _start(self, world: World, at: int, name: str, worker: Worker) -> Steps:
        slot = self.slots[at]
        stage = _stage(world, world.transactions[slot])
        if stage in ("decided", "committed"):
            return  # Kafka ends that one first
        if name == "reopen" and self.shared:
            if not world.faults:
                return
            world = world._replace(faults=world.faults - 1)
        world = _abort(world, slot)
        yield name, self._put(world, at, worker._replace(epoch=world.transactions[slot].epoch))

    def _join(self, world: World, at: int) -> World:
        epoch, owns = world.workers[at].epoch, world.owner == at
        return self._put(world, at, Worker("out", epoch, world.generation, owns))

    def _committed(self, world: World, at: int, worker: Worker) -> Steps:
        pending = any(each.offset is not None for each in world.transactions)
        if worker.owns and not (pending and self.on.stable):
            asked = worker._replace(phase="asked", position=world.committed)
            yield "committed", self._put(world, at, asked)

    def _claim(self, world: World, at: int, worker: Worker) -> World:
        tokens = [each.token for each in (world.store, *world.past, *world.workers)]
        store = world.store
        world = _stored(world, store._replace(token=max(tokens) + 1))
        claimed = worker._replace(
            phase="claimed" if self.on.recovery else "live",
            late=worker.generation != world.generation,
            token=world.store.token,
            writes=store.writes,
            header=store.header,
        )
        return _ranked(self._put(world, at, claimed))

    def _recover(self, world: World, at: int, worker: Worker) -> Steps:
        stable = next(
            (n for n, each in enumerate(world.journal) if each.stage in ("open", "decided")),
            len(world.journal),
        )
        entries = world.journal[worker.header.journal : stable]
        rows = [row for each in entries if each.stage == "committed" for row in each.rows]
        if rows:
            yield "recover", self._apply(world, at, worker, rows, stable)
        elif worker.header.end == worker.position:
            yield "recover", self._put(world, at, worker._replace(phase="live"))
        elif worker.header.end > worker.position:  # StoreAheadError ends the process
            mine = worker.generation == world.generation
            broken = "an owner found its store ahead of Kafka" if mine else ""
            yield "recover", self._put(world, at, Worker())._replace(broken=broken)

    def _apply(
        self, world: World, at: int, worker: Worker, rows: Sequence[tuple[int, int]], journal: int
    ) -> World:
        """Rows computed from states as the store or the cache has them; chunks to be written."""
        if None in worker.cache and self._refused(world, worker):
            return self._put(world, at, _dropped(worker))
        states = [
            known or stored for known, stored in zip(worker.cache, world.store.states, strict=True)
        ]
        for position, step in rows:
            state = states[position % KEYS]
            if step >= state.step or not self.on.skip:
                states[position % KEYS] = State((*state.applied, position), step + 1)
        keys = sorted({position % KEYS for position, _ in rows})
        last, step = rows[-1]
        return self._put(
            world,
            at,
            worker._replace(
                left=tuple((key, states[key]) for key in keys),
                reached=Header(journal, last + 1, step + 1),
            ),
        )

    def _poll(self, world: World, at: int, worker: Worker) -> Steps:
        if worker.generation != world.generation:
            yield "poll joins", self._join(world, at)
            if worker.late:
                return
        for count in range(1, min(BATCH, world.end - worker.position) + 1):
            first = worker.header.step
            rows = tuple((worker.position + n, first + n) for n in range(count))
            after = self._apply(world, at, worker, rows, -1)
            if (polled := after.workers[at]).phase == "live":
                polled = polled._replace(
                    phase="polled", rows=rows, position=worker.position + count
                )
                after = self._put(after, at, polled)
            yield f"poll reads {count}", after
        if self._refused(world, worker):
            yield "check", self._put(world, at, _dropped(worker))

    def _send(self, world: World, at: int, worker: Worker, fenced: bool) -> Steps:
        if fenced:
            yield "send", self._put(world, at, worker._replace(phase="fenced"))
            return
        entry = len(world.journal)
        reached = worker.reached._replace(journal=entry + 1)
        world = world._replace(journal=(*world.journal, Entry(worker.rows)))
        slot = self.slots[at]
        world = _with(world, slot, world.transactions[slot]._replace(entry=entry))
        yield "send", self._put(world, at, worker._replace(phase="sent", reached=reached))

    def _offsets(self, world: World, at: int, worker: Worker, fenced: bool) -> Steps:
        if fenced:
            yield "offsets", self._put(world, at, worker._replace(phase="fenced"))
            return
        slot = self.slots[at]
        generations = {worker.generation}
        if not self.on.guard and worker.generation != world.generation:
            generations |= {-1, world.generation}
        for generation in sorted(generations):
            if generation in (-1, world.generation):
                bound = world.transactions[slot]._replace(offset=worker.position)
                after = self._put(_with(world, slot, bound), at, worker._replace(phase="bound"))
            else:
                after = self._put(_abort(world, slot, fence=False), at, _dropped(worker))
            yield f"offsets under {generation}", after

    def _commit(self, world: World, at: int, worker: Worker, fenced: bool) -> World:
        if fenced:
            return self._put(world, at, worker._replace(phase="fenced"))
        entry = world.transactions[self.slots[at]].entry
        assert entry is not None
        world = _set_stage(world, entry, "decided")
        phase = "written" if worker.left else "live"
        return self._put(world, at, worker._replace(phase=phase, rows=()))

    def _write(self, world: World, at: int, worker: Worker, then: str) -> Steps:
        """One chunk; the header goes with the last."""
        if self._refused(world, worker):
            yield "write", self._put(world, at, _dropped(worker))
            return
        (key, state), *left = worker.left
        store, fenced = world.store, worker.token < world.store.token
        store = store._replace(
            writes=store.writes + 1,
            states=_replaced(store.states, key, state),
            header=store.header if left else worker.reached,
        )
        world = _stored(world, store)
        if fenced:
            world = world._replace(broken="a fenced worker's write changed the store")
        worker = worker._replace(
            left=tuple(left), writes=worker.writes + 1, cache=_replaced(worker.cache, key, state)
        )
        if not left:
            worker = worker._replace(phase=then, header=worker.reached, reached=Header())
        yield "write", self._put(world, at, worker)

    def _refused(self, world: World, worker: Worker) -> bool:
        """Whether the store refuses a worker's read or write."""
        store = world.store
        return (self.on.fence and store.token != worker.token) or (
            self.on.count and store.writes != worker.writes
        )

    def _put(self, world: World, at: int, worker: Worker) -> World:
        return world._replace(workers=_replaced(world.workers, at, worker))


# -- what must always be so ------------------------------------------------------------------------


def broken(world: World) -> str:
    """What a world breaks; empty: nothing."""
    if world.broken:
        return world.broken
    rows = _decided(world.journal)
    if rows != [(n, n) for n in range(len(rows))]:
        return f"the journal is not each input once and in order: {rows}"
    header = world.store.header
    if header.journal > len(world.journal):
        return "the header is ahead of the journal"
    if header.end != len(_decided(world.journal[: header.journal])):
        return f"the header says input {header.end}, the journal before it does not"
    return ""


def broken_at_rest(world: World) -> str:
    """What is broken when no worker has anything left to do."""
    if world.workers[world.owner].phase == "fenced":
        return ""  # by a worker with the same transactional id: an operator must part them
    fold = tuple(tuple(range(key, world.end, KEYS)) for key in range(KEYS))
    found = tuple(state.applied for state in world.store.states)
    if world.committed != world.end:
        return f"the owner rests at input {world.committed} of {world.end}"
    if found != fold:
        return f"states are {found}, the journal gives {fold}"
    if world.store.header.end != world.end:
        return f"the header rests at {world.store.header}"
    return ""


# -- small changes ---------------------------------------------------------------------------------


def _replaced(values: tuple[_Value, ...], at: int, value: _Value) -> tuple[_Value, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _decided(journal: Sequence[Entry]) -> list[tuple[int, int]]:
    """The rows of transactions that Kafka has decided to commit."""
    return [row for each in journal if each.stage in ("decided", "committed") for row in each.rows]


def _dropped(worker: Worker) -> Worker:
    """As after `drop`: only the membership and the producer are left."""
    return Worker("out", worker.epoch, worker.generation, worker.owns, worker.late)


def _stage(world: World, transaction: Transaction) -> str:
    """Empty: there is none."""
    if transaction.entry is None:
        return "" if transaction.offset is None else "open"
    return world.journal[transaction.entry].stage


def _set_stage(world: World, entry: int, stage: str) -> World:
    changed = world.journal[entry]._replace(stage=stage)
    return world._replace(journal=_replaced(world.journal, entry, changed))


def _with(world: World, slot: int, transaction: Transaction) -> World:
    return world._replace(transactions=_replaced(world.transactions, slot, transaction))


def _settled(world: World, slot: int) -> World:
    """A transaction is over when both of its markers are there."""
    each = world.transactions[slot]
    if each.offset is None and _stage(world, each) == "committed":
        return _with(world, slot, each._replace(entry=None))
    return world


def _abort(world: World, slot: int, fence: bool = True) -> World:
    """End the open transaction of an id, and fence the producer that had it."""
    each = world.transactions[slot]
    if each.entry is not None:
        world = _set_stage(world, each.entry, "aborted")
    return _with(world, slot, Transaction(each.epoch + fence))


def _stored(world: World, store: Store) -> World:
    past = (*world.past, world.store)[-LOST:] if world.faults else ()
    return world._replace(store=store, past=past)


def _ranked(world: World) -> World:
    """The same with the lowest tokens and counts that compare alike: fewer worlds differ."""
    holders = (world.store, *world.past, *world.workers)
    rank = {token: at for at, token in enumerate(sorted({each.token for each in holders} | {0}))}
    counting = (world.store, *world.past, *(each for each in world.workers if each.token))
    least = min(each.writes for each in counting)
    return world._replace(
        store=_renamed(world.store, rank, least),
        past=tuple(_renamed(each, rank, least) for each in world.past),
        workers=tuple(_renamed(each, rank, least) for each in world.workers),
    )


def _renamed(holder: _Holder, rank: Mapping[int, int], least: int) -> _Holder:
    if not holder.token:
        return holder
    return holder._replace(token=rank[holder.token], writes=holder.writes - least)
