"""A larger shop, with numbers that are easily multiplied."""

from dataclasses import replace

import pytest

from bench.extrapolation import LABEL, Measured, Wanted, extrapolate, power_of_two
from schemas.exceptions import StarcastError

HERE = Measured(
    worker_us=100, kafka_us=20, store_us=10, kafka_bytes=500, user_bytes=400, worker_mb=1_000
)
SHOP = Wanted(users=1e9, events_per_second=1e6)


def test_cores_come_from_processor_time_an_event() -> None:
    needed = extrapolate(HERE, SHOP)
    # 1e6 events × 100 µs = 100 busy cores, and half of each core is to stay free.
    assert needed.worker_cores == pytest.approx(200)
    assert needed.workers == 200
    assert needed.kafka_cores == pytest.approx(120)  # 20 busy, three copies, half free
    assert needed.store_primaries == 20
    assert needed.store_cores == 40  # and a replica of each
    assert needed.partitions == 512  # two a worker, rounded up


def test_a_shop_that_needs_more_partitions_than_there_are_is_refused() -> None:
    assert extrapolate(HERE, replace(SHOP, events_per_second=1e7)).partitions == 4_096
    with pytest.raises(StarcastError, match="2,050 workers need 8,192 partitions"):
        extrapolate(HERE, replace(SHOP, events_per_second=1.025e7))


def test_bytes_come_from_users_and_from_what_events_leave() -> None:
    needed = extrapolate(HERE, SHOP)
    assert needed.store_gb == pytest.approx(800)  # 1e9 users × 400 bytes, twice
    assert needed.memory_gb == pytest.approx(800 + 200 * 1.048576)
    # 1e6 × 500 bytes a second for seven days, three times
    assert needed.kafka_disk_tb == pytest.approx(907.2)


def test_machines_are_what_cores_or_memory_need() -> None:
    assert extrapolate(HERE, SHOP).machines == 12  # 360 cores of 32; memory alone needs 8
    assert extrapolate(HERE, replace(SHOP, machine_gb=32.0)).machines == 32


def test_money_needs_a_price() -> None:
    assert extrapolate(HERE, SHOP).cost_a_month is None
    priced = extrapolate(HERE, replace(SHOP, core_hour=0.05, gb_month=0.02))
    assert priced.cost_a_month == pytest.approx(12 * 32 * 730 * 0.05 + 907_200 * 0.02)


def test_figures_say_what_they_are() -> None:
    assert extrapolate(HERE, SHOP).figures(HERE, SHOP)["label"] == LABEL


@pytest.mark.parametrize(("least", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_powers_of_two(least: int, power: int) -> None:
    assert power_of_two(least) == power
