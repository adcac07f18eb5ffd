from typing import Any

from rich.console import Console

from bench.peers.beside import summary, table
from bench.peers.work import Mark, Pace, steady


def test_leaves_out_what_lies_before_the_second_mark_and_after_the_last() -> None:
    marks = [Mark(0, 10.0, 1.0), Mark(4, 30.0, 8.0), Mark(8, 31.0, 8.5), Mark(12, 32.0, 9.0)]

    assert steady(marks) == Mark(8, 2.0, 1.0)


def test_marks_the_first_beginning_after_enough_events() -> None:
    pace = Pace(every=4)

    for events in (3, 3, 3, 1, 4):  # calls begin at 0, 3, 6, 9 and 10 events
        pace.begin(events)

    assert [mark.events for mark in pace.marks] == [0, 6, 10]
    assert (pace.events, pace.calls) == (14, 5)


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


def _run(rate: float, processor: float) -> dict[str, Any]:
    return {"events_per_second": rate, "cpu_us_per_event": processor}
