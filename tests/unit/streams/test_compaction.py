"""Compactions in processes of their own."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.table import TableOptimizer
from structlog.testing import capture_logs

from schemas import archive
from schemas.archive import Row
from schemas.examples import EXAMPLES
from streams import compaction
from streams.archiver import Archive
from streams.compaction import Compactor, claimed, compact

VALUE = json.dumps(EXAMPLES["behavior"]).encode()


def small_files(url: Path, topic: str = "behavior", count: int = 3) -> None:
    written = Archive(str(url))
    for offset in range(count):
        written.append(topic, [Row(0, offset, 1_795_521_600_000, b"k", VALUE)])
        written.commit()


def files(url: Path, topic: str = "behavior") -> int:
    return len(DeltaTable(str(url / topic)).file_uris())


def until_done(compactor: Compactor) -> None:
    deadline = time.monotonic() + 60
    while compactor._running is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        compactor.turn()


def test_topics_are_compacted_one_after_the_other(tmp_path: Path) -> None:
    for topic in ("behavior", "reviews"):
        small_files(tmp_path, topic)
    compactor = Compactor(str(tmp_path), {})
    for topic in ("behavior", "reviews", "reviews"):
        compactor.ask(topic)
    assert compactor._running is not None
    assert compactor._running[0] == "behavior"
    assert [*compactor._waiting] == ["reviews"]
    until_done(compactor)
    assert (files(tmp_path), files(tmp_path, "reviews")) == (1, 1)
    rows = archive.read(str(tmp_path), "behavior", columns=["kafka_offset"]).collect()
    assert rows["kafka_offset"].to_list() == [0, 1, 2]


def test_a_table_that_another_has_claimed_is_left_alone(tmp_path: Path) -> None:
    small_files(tmp_path)
    table = DeltaTable(str(tmp_path / "behavior"))
    compaction._claim(table, 7)
    compact(str(tmp_path), "behavior", {})
    assert files(tmp_path) == 3
    compaction._release(str(tmp_path / "behavior"), {}, 7)
    compact(str(tmp_path), "behavior", {})
    assert files(tmp_path) == 1


def test_one_that_is_overtaken_gives_its_claim_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_files(tmp_path)

    def overtaken(*_: Any, **__: Any) -> None:
        raise CommitFailedError("others were faster")

    with monkeypatch.context() as patched, capture_logs() as told:
        patched.setattr(TableOptimizer, "compact", overtaken)
        compact(str(tmp_path), "behavior", {})
    assert [each["event"] for each in told] == ["compaction given up"]
    compact(str(tmp_path), "behavior", {})
    assert files(tmp_path) == 1


def test_versions_that_serve_nobody_go(tmp_path: Path) -> None:
    small_files(tmp_path, count=5)
    table = DeltaTable(str(tmp_path / "behavior"))
    table.create_checkpoint()
    log = tmp_path / "behavior" / "_delta_log"
    old = time.time() - 2 * 3_600
    for path in log.iterdir():
        os.utime(path, (old, old))
    compact(str(tmp_path), "behavior", {})
    kept = sorted(int(path.stem) for path in log.glob("*.json"))
    assert kept[0] >= table.version()
    rows = archive.read(str(tmp_path), "behavior", columns=["kafka_offset"]).collect()
    assert rows["kafka_offset"].to_list() == [0, 1, 2, 3, 4]


def test_one_that_fails_is_told_and_the_next_begins(tmp_path: Path) -> None:
    small_files(tmp_path)
    (tmp_path / "reviews").write_text("no folder")
    compactor = Compactor(str(tmp_path), {"timeout": "never"})
    with capture_logs() as told:
        compactor.ask("reviews")
        compactor.ask("behavior")
        compactor._options = {}
        until_done(compactor)
    assert files(tmp_path) == 1
    assert [(each["event"], each["topic"]) for each in told] == [("a compaction failed", "reviews")]


def test_storage_that_does_not_answer_is_told_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "reviews").write_text("no folder")
    asked = {"url": str(tmp_path), "topic": "reviews", "options": {"timeout": "never"}}
    done = subprocess.run(
        [sys.executable, "-m", "streams.compaction"],
        input=json.dumps(asked),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("the archive at ")
    assert "Traceback" not in done.stderr


def test_one_that_hangs_is_ended() -> None:
    code = (
        "import time\n"
        "from streams import compaction\n"
        "compaction.LONGEST_SECONDS = 1\n"
        "compaction.compact = lambda *_: time.sleep(60)\n"
        "compaction.main()"
    )
    asked = json.dumps({"url": "", "topic": "", "options": {}}).encode()
    assert subprocess.run([sys.executable, "-c", code], input=asked).returncode == -signal.SIGALRM


def test_a_claim_is_renewed_while_files_are_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while delta-rs works: it must not hold Python back."""
    small_files(tmp_path)
    monkeypatch.setattr(compaction, "RENEW_SECONDS", 0.01)
    where, renewed = str(tmp_path / "behavior"), list[int]()
    claim = compaction._claim

    def counted(table: DeltaTable, holder: int, *seconds: float) -> None:
        claim(table, holder, *seconds)
        renewed.append(holder)

    monkeypatch.setattr(compaction, "_claim", counted)
    with claimed(str(tmp_path), "behavior", {}) as table:
        assert table is not None
        while len(renewed) < 5:
            table.to_pyarrow_table()
        table.optimize.compact()
    assert len(set(renewed)) == 1
    assert DeltaTable(where).transaction_version("compaction") == 0
    assert files(tmp_path) == 1


def test_one_that_slept_beyond_its_claim_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose machine stood still: both would succeed, and double the rows."""
    small_files(tmp_path)
    url = str(tmp_path)
    with claimed(url, "behavior", {}) as slept:
        assert slept is not None
        with claimed(url, "behavior", {}) as other:
            assert other is None
        later = time.time() + compaction.LEASE_SECONDS + 1
        monkeypatch.setattr(compaction.time, "time", lambda: later)
        with claimed(url, "behavior", {}) as other:
            assert other is not None
            other.optimize.compact()
            with pytest.raises(CommitFailedError, match="Metadata changed"):
                slept.optimize.compact()
            with pytest.raises(compaction.ClaimLostError):
                compaction.look_again(slept)
    rows = archive.read(url, "behavior", columns=["kafka_offset"]).collect()
    assert rows["kafka_offset"].to_list() == [0, 1, 2]
    assert files(tmp_path) == 1


def test_an_append_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(tmp_path)
    written = Archive(str(tmp_path))
    written.append("behavior", [Row(0, 3, 1_795_521_600_000, b"k", VALUE)])
    left, newest = [True], Archive._newest

    def overtaken(self: Archive, topic: str) -> tuple[DeltaTable, bool]:
        found = newest(self, topic)
        if left:
            left.clear()
            compaction._refuse_others(DeltaTable(str(tmp_path / "behavior")), 7)
        return found

    monkeypatch.setattr(Archive, "_newest", overtaken)
    assert written.commit() == 1
    rows = archive.read(str(tmp_path), "behavior", columns=["kafka_offset"]).collect()
    assert rows["kafka_offset"].to_list() == [0, 1, 2, 3]


def test_one_that_is_killed_leaves_no_claim_to_its_archiver(tmp_path: Path) -> None:
    small_files(tmp_path)
    code = (
        "import os, signal\n"
        "from deltalake.table import TableOptimizer\n"
        "from streams import compaction\n"
        "TableOptimizer.compact = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "compaction.main()"
    )
    compactor = Compactor(str(tmp_path), {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compaction, "_COMMAND", [sys.executable, "-c", code])
        compactor.ask("behavior")
    with capture_logs() as told:
        until_done(compactor)
    assert [(each["event"], each["code"]) for each in told] == [("a compaction failed", -9)]
    compact(str(tmp_path), "behavior", {})
    assert files(tmp_path) == 1


def test_files_that_one_that_was_killed_left_go_after_a_day(tmp_path: Path) -> None:
    small_files(tmp_path)
    left, new = (tmp_path / "behavior" / f"part-0-{name}.parquet" for name in ("left", "new"))
    for path in (left, new):
        path.write_bytes(b"rows")
    old = time.time() - (compaction.VACUUM_HOURS + 1) * 3_600
    for path in (tmp_path / "behavior").glob("*.parquet"):
        if path != new:
            os.utime(path, (old, old))
    compact(str(tmp_path), "behavior", {})
    assert not left.exists()
    # One may still be written, and those that were merged may still be read.
    assert len(list((tmp_path / "behavior").glob("*.parquet"))) == 1 + 1 + 3


def test_a_stop_does_not_wait_for_long_and_leaves_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_files(tmp_path)
    monkeypatch.setattr(compaction, "CLOSE_SECONDS", 0.1)
    compaction._claim(DeltaTable(str(tmp_path / "behavior")), 7)
    code = "import time; print(7, flush=True); time.sleep(600)"
    slow = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    monkeypatch.setattr(Compactor, "_start", lambda self, topic: slow)
    compactor = Compactor(str(tmp_path), {})
    compactor.ask("behavior")
    assert slow.stdout is not None
    select.select([slow.stdout], [], [])  # until it has told
    compactor.close()
    assert slow.returncode == -9
    compactor.close()  # nothing is left to wait for
    compact(str(tmp_path), "behavior", {})
    assert files(tmp_path) == 1


def test_the_claim_of_another_is_not_taken_back(tmp_path: Path) -> None:
    small_files(tmp_path)
    compaction._claim(DeltaTable(str(tmp_path / "behavior")), 7)
    compaction.take_back(str(tmp_path), "behavior", {}, 6)
    compact(str(tmp_path), "behavior", {})
    assert files(tmp_path) == 3


def test_a_compaction_tells_its_claim(tmp_path: Path) -> None:
    small_files(tmp_path)
    claims: list[int] = []
    compact(str(tmp_path), "behavior", {}, claims.append)
    holder = DeltaTable(str(tmp_path / "behavior")).transaction_version("compaction-holder")
    assert claims == [holder]
