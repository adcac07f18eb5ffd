"""Small files of an archive's table merged into large ones, in a process of its own.

A compaction holds row groups and gives what it held back to the system only by ending. In a process
that ends, an archiver neither grows nor stands still for it.

`python -m streams.compaction` compacts the table that standard input names, and tells its claim.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial

import stamina
import structlog
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties
from deltalake.exceptions import CommitFailedError

from schemas import archive
from schemas.exceptions import StarcastError

# Files are merged up to this size. Those below it are written again by each compaction, so a larger
# one means more work for each row.
COMPACTED_BYTES = 32 * 1024 * 1024
# Rows that a compaction holds at once; with delta-rs' million its memory grows with the table.
ROW_GROUP = 50_000
WRITER = WriterProperties(compression="ZSTD", compression_level=1, max_row_group_size=ROW_GROUP)
# A reader that opened a version may go on reading it for this long after a compaction.
VACUUM_HOURS = 24
LEASE_SECONDS = 120  # a claim is let go so long after it was renewed last, as by one that died
RENEW_SECONDS = 30.0
LONGEST_SECONDS = 3_600  # one that hangs would be renewed for ever
NICENESS = 10  # archiving comes first, so that a busy machine does not fall behind
# Others commit to the same table in between, each a few times a second.
COMMIT_ATTEMPTS = 10
CLOSE_SECONDS = 5.0  # a stop that waited for a long compaction would be cut short itself

# Applications whose versions say until when a table is claimed, and by whom.
_CLAIM, _HOLDER = "compaction", "compaction-holder"
_PROPERTY = "starcast.compactionHolder"  # of a table whose claim had run out
_COMMAND = [sys.executable, "-m", "streams.compaction"]
_log = structlog.get_logger(__name__)

until_committed = stamina.retry(
    on=CommitFailedError, attempts=COMMIT_ATTEMPTS, wait_initial=0.02, wait_max=1.0
)
"""Decorates what looks at the newest version of a table and commits on it."""


def compact(
    url: str,
    topic: str,
    options: Mapping[str, str],
    on_claim: Callable[[int], object] = lambda holder: None,
) -> None:
    """Merges small files of a topic, and deletes those that no reader can still be reading.

    `on_claim` hears whose the claim is, for `take_back`. One that does not get its
    commit in between those of archivers is given up; the next may do better. Raises
    UnreachableError when storage does not answer.
    """
    where = archive.table_url(url, topic)
    with archive.reached(where), claimed(url, topic, options) as table:
        if table is None:
            return
        on_claim(table.transaction_version(_HOLDER) or 0)
        try:
            table.optimize.compact(
                target_size=COMPACTED_BYTES, max_concurrent_tasks=1, writer_properties=WRITER
            )
            table.vacuum(
                retention_hours=VACUUM_HOURS,
                dry_run=False,
                enforce_retention_duration=False,
                full=True,  # also what one that was killed has left
            )
            table.cleanup_metadata()
        except CommitFailedError as error:
            _log.warning("compaction given up", table=where, reason=str(error))


class ClaimLostError(StarcastError):
    """A table that another may rewrite by now."""


@contextmanager
def claimed(url: str, topic: str, options: Mapping[str, str]) -> Generator[DeltaTable | None]:
    """The newest version of a table, whose files nobody else rewrites while the block runs.

    None where there is no table, or another holds it. delta-rs (1.6) lets two that rewrite the same
    files both succeed, which doubles their rows. So who rewrites first claims the table by an
    application transaction of its own, for which a second claim does conflict. The claim is renewed
    meanwhile and taken back in the end. One that was not renewed in time is taken over, and what
    its holder may yet commit, as one that slept, is refused.
    """
    where = archive.table_url(url, topic)
    table = archive.open_table(url, topic, options)
    until = 0 if table is None else table.transaction_version(_CLAIM) or 0
    if table is None or until > time.time():
        yield None
        return
    holder = secrets.randbits(62)
    try:
        _claim(table, holder)
    except CommitFailedError as error:
        _log.info("a table is left to who rewrites it", table=where, reason=str(error))
        yield None
        return
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(where, options, holder, done), daemon=True)
    renewing.start()
    try:
        if until:
            _refuse_others(table, holder)
        table.update_incremental()
        yield table
    finally:
        done.set()
        renewing.join()
        _release(where, options, holder)


def look_again(table: DeltaTable) -> None:
    """Look at the newest version of a claimed table.

    Raises ClaimLostError when another has claimed it since: what was read is then not the newest.
    """
    holder = table.transaction_version(_HOLDER)
    table.update_incremental()
    if table.transaction_version(_HOLDER) != holder:
        raise ClaimLostError(
            f"The claim on {table.table_uri} ran out, and another has rewritten the table since. "
            "Run the command again."
        )


def take_back(url: str, topic: str, options: Mapping[str, str], holder: int) -> None:
    """Take back the claim of who has ended without doing so; any other claim stays.

    Raises UnreachableError when storage does not answer.
    """
    where = archive.table_url(url, topic)
    with archive.reached(where):
        _release(where, options, holder)


def _renew(where: str, options: Mapping[str, str], holder: int, done: threading.Event) -> None:
    """Renew a claim until `done`, or until it is another's."""
    while not done.wait(RENEW_SECONDS):
        try:
            with archive.reached(where):
                table = DeltaTable(where, storage_options=dict(options))
                if table.transaction_version(_HOLDER) != holder:
                    return
                _claim(table, holder)
        except StarcastError as error:
            _log.warning("a claim was not renewed", table=where, reason=str(error))


@until_committed
def _release(where: str, options: Mapping[str, str], holder: int) -> None:
    """Take a claim back, so that the next compaction need not wait for its end."""
    table = DeltaTable(where, storage_options=dict(options))
    if table.transaction_version(_HOLDER) == holder and table.transaction_version(_CLAIM):
        _claim(table, holder, 0)


def _claim(table: DeltaTable, holder: int, seconds: float = LEASE_SECONDS) -> None:
    """A commit of nothing but application transactions."""
    until = int(time.time() + seconds) if seconds else 0
    table.create_write_transaction(
        [],
        "append",
        table.schema(),
        commit_properties=CommitProperties(
            app_transactions=[Transaction(_CLAIM, until), Transaction(_HOLDER, holder)]
        ),
    )


@until_committed
def _refuse_others(table: DeltaTable, holder: int) -> None:
    """Have delta-rs refuse all that is yet to be committed on what was read before.

    Appends are made anew then; what rewrites files is given up. A change of metadata does so.
    """
    table.update_incremental()
    table.alter.set_table_properties({_PROPERTY: str(holder)}, raise_if_not_exists=False)


class Compactor:
    """Compactions of an archive, one at a time, each in a process. Not for several threads."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        self._url = url
        self._options = dict(options)
        self._waiting: dict[str, None] = {}  # topics, in order
        self._running: tuple[str, subprocess.Popen[bytes]] | None = None

    def ask(self, topic: str) -> None:
        """A topic is to be compacted, after those that wait."""
        self._waiting[topic] = None
        self.turn()

    def turn(self) -> None:
        """Notice an end, start what waits. Costs next to nothing otherwise."""
        if self._running is not None:
            topic, process = self._running
            if process.poll() is None:
                return
            self._running = None
            claim, _ = process.communicate()
            if process.returncode:
                _log.warning("a compaction failed", topic=topic, code=process.returncode)
                self._take_back(topic, claim)
        if self._waiting:
            topic = next(iter(self._waiting))
            del self._waiting[topic]
            self._running = (topic, self._start(topic))

    def close(self) -> None:
        """Wait a little for the one that runs, then end it and take its claim back."""
        if self._running is None:
            return
        topic, process = self._running
        self._running = None
        try:
            process.communicate(timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            claim, _ = process.communicate()
            self._take_back(topic, claim)

    def _take_back(self, topic: str, claim: bytes) -> None:
        """Take back what a process that has ended said of its claim, if it came so far."""
        if not claim:
            return
        try:
            take_back(self._url, topic, self._options, int(claim))
        except StarcastError as error:
            _log.warning("a claim is left to run out", topic=topic, reason=str(error))

    def _start(self, topic: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        asked = {"url": self._url, "topic": topic, "options": self._options}
        if process.stdin is not None:  # not an argument, which others could read
            process.stdin.write(json.dumps(asked).encode())
            process.stdin.close()
            process.stdin = None  # else `communicate` would flush what is closed
        return process


def main() -> None:
    """Compact what standard input names."""
    # Ctrl-C reaches the whole group; the archiver says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(LONGEST_SECONDS)  # which ends it
    os.nice(NICENESS)
    asked = json.load(sys.stdin)
    try:
        compact(asked["url"], asked["topic"], asked["options"], partial(print, flush=True))
    except StarcastError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
