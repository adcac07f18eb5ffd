"""The checks' own arithmetic."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from confluent_kafka import Message

from model.ids import hash_ids, partitions_of
from starcast.settings import Settings
from tests.faults import check
from tests.faults.check import FORGOTTEN, WINDOW, Verdict, applied, check_predictions
from tests.faults.forgotten import Forgotten
from tests.faults.numbered import Numbered
from tests.faults.world import PARTITIONS, FaultyShop

Logs = dict[str, list[list[dict[str, Any]]]]  # by topic, of each partition


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Logs:
    """What the topics of a shop hold, to be changed by a test."""
    held: Logs = defaultdict(lambda: [[] for _ in range(PARTITIONS)])

    def read(_: object, topic: str) -> Iterator[list[Message]]:
        for partition, log in enumerate(held[topic]):
            for offset, value in enumerate(map(orjson.dumps, log)):
                yield [Message(topic=topic, partition=partition, offset=offset, value=value)]

    monkeypatch.setattr(check, "read_topic", read)
    return held


@pytest.fixture
def shop(logs: Logs) -> FaultyShop:
    """A shop whose events were answered as they should be."""
    nobody: Any = None
    events = Numbered(600, 20, 1_700_000_000_000)
    made = FaultyShop("a", Settings(), nobody, events, [], nobody)
    for topic, key, value in events.messages():
        (partition,) = partitions_of(hash_ids([key.decode()]), PARTITIONS).tolist()
        record, log = orjson.loads(value), logs[topic][partition]
        source = {"topic": topic, "partition": partition, "offset": len(log)}
        log.append(record)
        made.played.update([topic, "sent"])
        answers = logs["predicted-ratings"][partition]
        if topic == "score-requests":
            answers += [
                {"kind": "request", "request_id": record["request_id"], "item_id": item}
                for item in record["item_ids"]
            ]
        else:
            seq = sum("seq" in each for each in answers)
            names = {name: record[name] for name in ("event_id", "user_id")}
            answers.append({"kind": "interaction", **names, "source": source, "seq": seq})
    return made


def wrong(shop: FaultyShop) -> set[str]:
    verdict = Verdict()
    check_predictions(shop, verdict, Forgotten(shop, [], {}))
    return set(verdict.wrong)


def test_a_shop_that_is_well_is_clean(shop: FaultyShop) -> None:
    assert wrong(shop) == set()


GAP = "seq without gap or repeat"


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda log: log.pop(0), {"lost", "answers an event", GAP}),
        (lambda log: log.append(log[-1]), {"duplicated", "answers an event", GAP}),
        (lambda log: log.append(log.pop(0)), {"order of a user", GAP}),
        (lambda log: log[-1].update(seq=10_000), {GAP}),
    ],
)
def test_harm_to_one_answer_is_found(
    shop: FaultyShop, logs: Logs, harm: Callable[[Any], None], found: set[str]
) -> None:
    for log in logs["predicted-ratings"]:
        requests = [each for each in log if each["kind"] == "request"]
        log[:] = [each for each in log if each["kind"] != "request"]
        if log:
            harm(log)
        log += requests
    assert wrong(shop) == found


def test_a_lost_input_and_a_lost_ranking_are_found(shop: FaultyShop, logs: Logs) -> None:
    max(logs["reviews"], key=len).pop()
    (ranked, *_) = (
        (log, each)
        for log in logs["predicted-ratings"]
        for each in log
        if each["kind"] == "request"
    )
    ranked[0].remove(ranked[1])
    assert wrong(shop) == {"sent", "requests answered once", "answers an event"}


def test_a_repetition_counts_again_once_its_user_has_had_a_window_of_others() -> None:
    others = list(range(1, WINDOW))  # one fewer than the window
    assert applied(["u"] * (WINDOW + 1), [0, *others, 0])[0] == [0, *others]
    others.append(WINDOW)
    assert applied(["u"] * (WINDOW + 2), [0, *others, 0])[0] == [0, *others, 0]
    assert applied(["u", *["v"] * WINDOW, "u"], [0, *others, 0])[0] == [0, *others]


def test_of_a_user_who_was_forgotten_counts_what_came_later() -> None:
    users = ["u", "v", "u", "u", "u", "u"]
    assert applied(users, [0, 1, 2, FORGOTTEN, 2, 2]) == ([0, 1, 2, 2], [1, 2])
    assert applied(["u", "u"], [0, FORGOTTEN]) == ([0], [])
