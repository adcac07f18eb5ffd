"""What charts write on their axes, by the browser's clock."""

import pytest
from playwright.sync_api import Page

from streams.dashboard_charts import _CLOCK


@pytest.mark.parametrize(
    ("time", "told"),
    [("9, 5, 0", "09:05"), ("9, 5, 30", "09:05:30"), ("0, 5, 0", "00:05"), ("0, 0, 0", "Jan 31")],
)
def test_times_are_told_as_a_clock_and_midnights_as_a_day(page: Page, time: str, told: str) -> None:
    assert page.evaluate(f"({_CLOCK})(new Date(2026, 0, 31, {time}).getTime())") == told
