"""Entries of a data set as a record file: in the order of time, those that keep the contract."""

import heapq
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import count, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson

from schemas.codec import GOT, decode
from schemas.exceptions import ContractError
from schemas.files import write_records
from schemas.topics import BY_NAME
from starcast.importers.reading import Skips

RUN = 500_000  # entries sorted in memory at once, about a gigabyte of long reviews
MOST_RUNS = 128  # files that are open at once: systems allow a process 256 or 1,024
BATCH = 2_000  # records validated at once
FIRST, THEN = 0, 1  # at the same time, items and users go before events


@dataclass(frozen=True)
class ImportReport:
    """How many records of each topic were written, and what was left out or changed and why."""

    counts: Mapping[str, int]
    skipped: Mapping[str, tuple[int, str]]  # by reason: how many, and where the first stands
    changed: Mapping[str, tuple[int, str]]  # likewise, of what was written otherwise than it stood


@dataclass(frozen=True, slots=True)
class Entry:
    """A record to be written, and where it came from."""

    order: tuple[str, int]  # RFC 3339 time, all of one format; then items and users first
    topic: str
    value: Mapping[str, Any]
    place: str


def in_order(entries: Iterator[Entry], out: Path) -> Iterator[Entry]:
    """The entries by time; those of one time in the order given, items and users first."""
    key = attrgetter("order")
    run = sorted(islice(entries, RUN), key=key)
    if len(run) < RUN:
        yield from run
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=out.parent) as folder:
        names = map(str, count())
        runs: list[Path] = []
        while run:
            if len(runs) == MOST_RUNS:
                merged = heapq.merge(*map(_read_run, runs), key=key)
                first = _write_run(Path(folder, next(names)), merged)
                for each in runs:
                    each.unlink()
                runs = [first]
            runs.append(_write_run(Path(folder, next(names)), run))
            run = sorted(islice(entries, RUN), key=key)
        yield from heapq.merge(*map(_read_run, runs), key=key)


def _write_run(path: Path, entries: Iterable[Entry]) -> Path:
    with path.open("wb") as file:
        for entry in entries:
            file.write(orjson.dumps(astuple(entry)) + b"\n")
    return path


def _read_run(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file:
        for line in file:
            (when, rank), topic, value, place = orjson.loads(line)
            yield Entry((when, rank), topic, value, place)


def write(
    entries: Iterator[Entry], out: Path, skips: Skips, changes: Skips | None = None
) -> ImportReport:
    """Write the entries that keep the contract.

    Raises ContractError when most do not: what is left would be taken for the set.
    """
    counts = write_records(out, _good(entries, skips))
    return ImportReport(dict(counts), skips.reasons, changes.reasons if changes else {})


def _good(entries: Iterator[Entry], skips: Skips) -> Iterator[tuple[str, bytes]]:
    """The values that keep the contract. Raises ContractError, at the end, when most do not."""
    kept = left_out = 0
    while batch := list(islice(entries, BATCH)):
        values = [orjson.dumps(entry.value) for entry in batch]
        bad: set[int] = set()
        for topic in {entry.topic for entry in batch}:
            of_topic = [index for index, entry in enumerate(batch) if entry.topic == topic]
            decoded = decode(
                BY_NAME[topic], [values[at] for at in of_topic], [(0, at) for at in of_topic]
            )
            for rejection in decoded.rejections:
                bad.add(rejection.offset)
                reason, _, _ = rejection.reason.partition(GOT)
                place = batch[rejection.offset].place
                skips.add(f"{topic} {rejection.field or ''}: {reason}", place)
        for index, entry in enumerate(batch):
            if index not in bad:
                yield entry.topic, values[index]
        left_out += len(bad)
        kept += len(batch) - len(bad)
    reasons = "; ".join(f"{place}: {why}" for why, (_, place) in skips.reasons.items())
    if not kept:
        raise ContractError(f"no line gave a record ({reasons[:500] or 'the files are empty'})")
    if left_out > kept:
        raise ContractError(
            f"{left_out:,} of {left_out + kept:,} records break the contract ({reasons[:500]}); "
            "nothing is written, since what is left is not the set"
        )
