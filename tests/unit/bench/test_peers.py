import subprocess
import sys
import time
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from bench.peers import beside, launch
from bench.peers.beside import installed, summary, table
from bench.peers.launch import PEERS, Peer, PeerError
from bench.peers.work import Mark, Pace, Processes, steady
from streams.config import KafkaConfig

BUSY = "sum(range(20_000_000)); print(flush=True); input()"  # works, says so, waits


def test_leaves_out_what_lies_before_the_second_mark_and_after_the_last() -> None:
    marks = [Mark(0, 10.0, 1.0), Mark(4, 30.0, 8.0), Mark(8, 31.0, 8.5), Mark(12, 32.0, 9.0)]

    assert steady(marks) == Mark(8, 2.0, 1.0)


def test_marks_the_first_beginning_after_enough_events() -> None:
    pace = Pace(every=4)

    for events in (3, 3, 3, 1, 4):  # calls begin at 0, 3, 6, 9 and 10 events
        pace.begin(events)

    assert [mark.events for mark in pace.marks] == [0, 6, 10]
    assert (pace.events, pace.calls) == (14, 5)


def test_takes_processor_time_from_the_clock_it_is_given() -> None:
    pace = Pace(every=1, cpu_seconds=iter((1.5, 4.0)).__next__)

    pace.begin(1)
    pace.begin(1)

    assert [mark.cpu_seconds for mark in pace.marks] == [1.5, 4.0]


def test_counts_the_processes_that_a_peer_has_started() -> None:
    alone = Processes()
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with_child, only_child = Processes(), Processes(child.pid)
        assert only_child.cpu_seconds() > 0
        assert with_child.cpu_seconds() >= alone.cpu_seconds() + only_child.cpu_seconds() - 0.1
        assert with_child.memory_mb() > alone.memory_mb()
        child.communicate(b"\n")


def test_says_plainly_which_peers_cannot_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def python(peer: Peer) -> Path:
        if peer.name in ("quix", "flink"):
            raise PeerError("no such version of [this]")
        return Path(peer.name)

    monkeypatch.setattr(beside, "python", python)
    said = StringIO()

    found = installed(["quix", "faust", "flink"], Console(file=said, width=200))

    assert found == {"faust": Path("faust")}
    assert said.getvalue().splitlines() == [
        "quix could not be installed: no such version of [this]",
        "flink could not be installed: no such version of [this]",
        "Left out, since they could not be installed here: quix, flink",
    ]


def test_copies_a_peers_jars_and_makes_its_environment_again_when_they_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[str] = []

    def install(command: list[Any]) -> None:
        commands.append(Path(command[0]).name)
        (tmp_path / "own/peer/lib/python3.11/site-packages").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(launch, "_install", install)
    monkeypatch.setattr(launch, "ENVIRONMENTS", tmp_path / "own")
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
    (tmp_path / "peer.txt").write_text("a==1")
    peer = Peer("peer", "A peer", batches=True, exactly_once=True, own_environment=True)

    launch.python(peer)
    launch.python(peer)
    (tmp_path / "peer.pom.xml").write_text("<project/>")
    launch.python(peer)
    launch.python(peer)

    assert commands == ["uv", "uv", "uv", "uv", "mvn"]


def test_goes_on_after_a_peer_that_failed_whatever_it_said() -> None:
    said = StringIO()

    def run(name: str) -> dict[str, Any]:
        if name == "flink":
            raise PeerError("no answer [/127.0.0.1:9092]")  # as a JVM writes an address
        return _run(90.0, 5.0)

    runs = beside.measure(["flink", "faust"], 1, run, Console(file=said, width=200))

    assert runs == {"faust": [_run(90.0, 5.0)]}
    assert "flink is left out: no answer [/127.0.0.1:9092]\n" in said.getvalue()


def test_ends_what_a_peer_has_started_when_it_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peer = tmp_path / "python"
    peer.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {tmp_path}/child; wait\n")
    peer.chmod(0o755)
    monkeypatch.setattr(launch, "RUN_SECONDS", 2.0)

    with pytest.raises(PeerError, match="did not end within 2 s"):
        launch.run(PEERS["faust"], peer, KafkaConfig(), "redis://", "models", 10, 5)

    until = time.monotonic() + 30.0
    while _runs(int((tmp_path / "child").read_text())):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_compares_with_each_peer_and_the_fastest() -> None:
    ours = {"events_per_second": [900, 1_000, 1_300], "cpu_us_per_event": 50.0}
    runs = {"slow": [_run(50.0, 400.0), _run(150.0, 600.0)], "fast": [_run(400.0, 75.0)]}

    found = summary(ours, runs)

    assert (found["ratio_to_slow"], found["ratio_to_fast"]) == (10.0, 2.5)
    assert (found["cpu_ratio_to_slow"], found["cpu_ratio_to_fast"]) == (10.0, 1.5)
    assert (found["best_peer"], found["ratio_to_best_peer"]) == ("fast", 2.5)


def test_says_nothing_where_no_peer_ran() -> None:
    assert summary({"events_per_second": [1], "cpu_us_per_event": 1.0}, {}) == {}


def test_tells_what_a_peer_does_otherwise() -> None:
    figures = summary(
        {"events_per_second": [900], "cpu_us_per_event": 50.0},
        {name: [_run(90.0, 5.0) | {"events_per_call": 1}] for name in ("faust", "kafka_streams")},
    )
    console = Console(width=120)

    with console.capture() as capture:
        console.print(table(figures))

    assert "Kafka Streams, ONNX: reads items once" in capture.get()
    assert "Faust, take:" not in capture.get()


def _runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _run(rate: float, processor: float) -> dict[str, Any]:
    return {"events_per_second": rate, "cpu_us_per_event": processor}
