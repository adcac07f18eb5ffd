"""A small flood of bad records on a real Kafka and store; the large one is run by hand."""

import time
from pathlib import Path

import pytest

from schemas.codec import decode
from schemas.topics import BY_NAME
from tests.faults.bad_records import run, summary
from tests.faults.spoiling import accepted, spoilt, strange

TIME = b'"event_time":"2026-01-01T00:00:00Z"'
GOOD = [
    b'{"event_id":"a","user_id":"b","item_id":"c",%b,"rating":4,"text":"so"}' % TIME,
    b'{"event_id":"d","user_id":"e","item_id":"f",%b,"action":"view","price":9.5}' % TIME,
]


@pytest.mark.slow
def test_bad_records_become_dead_letters_and_good_ones_do_not_notice(
    kafka: str, store_server: str, tmp_path: Path
) -> None:
    report = run(kafka, store_server, tmp_path, records=2_000, seed=2)
    assert report.differences == {}, summary(report)
    assert report.good == 2_000
    assert sum(report.spoilt.values()) == 2_000
    assert min(report.spoilt.values()) > 0
    assert 0 < report.still_good < 1_000
    assert report.letters == 2_000 - report.still_good
    assert report.predictions == 2_000 + report.still_good


@pytest.mark.parametrize("topic", ["reviews", "behavior"])
@pytest.mark.parametrize("seed", range(4))
def test_the_contract_is_read_alike_by_two_readers(topic: str, seed: int) -> None:
    values = [value for _, value in spoilt(GOOD, 2_000, seed)]
    decoded = decode(BY_NAME[topic], values, [(0, at) for at in range(len(values))])
    far = time.time() * 1_000 + 1e15  # nothing lies in the future of this
    assert [record is not None for record in decoded.records] == [
        accepted(topic, value, far) for value in values
    ]


def test_the_same_seed_gives_the_same_records() -> None:
    assert list(spoilt(GOOD, 200, 3)) == list(spoilt(GOOD, 200, 3))
    assert list(spoilt(GOOD, 200, 3)) != list(spoilt(GOOD, 200, 4))
    assert strange(20, 1) == strange(20, 1)
