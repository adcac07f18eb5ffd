from collections.abc import Iterator
from typing import Any

import pytest

from streams import dashboard_charts as charts
from streams.dashboard_view import LADDER, Swap, together, totals
from tests.digests import at, digest, ms
from tests.unit.streams.snapshots import windows_of

NEW = "20260101T000000-1a2b3c4d"


WINDOWS = windows_of(
    [
        digest(at(5), [(4.0, 3.0)] * 10, lag=7),
        digest(at(15), [(4.0, 4.0)] * 20, version=NEW, lag=3),
        digest(at(15), [(5.0, 4.0)] * 2, kind="review", tier=None, version=NEW),
    ],
    20,
)
SWAPS = [Swap(ms(12), NEW, "promote")]


def named(options: dict[str, Any], name: str, axis: int = 0) -> dict[str, Any]:
    (found,) = [
        each
        for each in options["series"]
        if each["name"] == name and each.get("yAxisIndex", 0) == axis
    ]
    return found


def texts(options: Any) -> Iterator[str]:
    if isinstance(options, dict):
        for key, value in options.items():
            yield from texts(key)
            yield from texts(value)
    elif isinstance(options, list):
        for value in options:
            yield from texts(value)
    elif isinstance(options, str):
        yield options


def test_flow_draws_rates_and_lags_by_kind() -> None:
    options = charts.flow(WINDOWS, SWAPS)
    assert named(options, "Interactions")["data"] == [[ms(10), 10.0], [ms(20), 20.0]]
    assert named(options, "Interactions", axis=1)["data"] == [[ms(10), 7], [ms(20), 3]]
    assert named(options, "Review texts")["data"] == [[ms(10), 0], [ms(20), 2.0]]
    assert options["legend"]["data"] == ["Interactions", "Review texts"]
    (mark,) = named(options, "Interactions")["markLine"]["data"]
    assert (mark["xAxis"], mark["name"]) == (ms(12), "▾ 1a2b3c4d")


def test_predicted_against_true_is_of_one_kind() -> None:
    options = charts.against(WINDOWS, "interaction", SWAPS)
    assert named(options, "Predicted")["data"] == [[ms(10), 4.0], [ms(20), 4.0]]
    assert named(options, "True")["data"] == [
        [ms(10), 3.0],
        [ms(20), pytest.approx(110 / 30, 1e-4)],
    ]
    options = charts.against(WINDOWS, "review", [])
    assert named(options, "Predicted")["data"] == [[ms(10), None], [ms(20), 5.0]]


def test_error_has_a_line_for_each_version() -> None:
    options = charts.error(WINDOWS, "interaction", SWAPS, [LADDER, NEW])
    assert named(options, "cold start")["data"] == [[ms(10), 1.0], [ms(20), 1.0]]
    assert named(options, "1a2b3c4d")["data"] == [[ms(10), None], [ms(20), 0.0]]
    assert charts.error(WINDOWS, "request", [], [LADDER])["series"] == []


def test_bars_of_stars_add_up_and_tiers_start_with_the_least_known() -> None:
    scored = together(totals(WINDOWS, "interaction").values())
    bars = charts.stars(scored)["series"][0]["data"]
    assert [bar["value"] for bar in bars] == [0, 0, 0, 100, 0]
    windows = windows_of(
        [
            digest(at(5), [(4.0, 3.0)], tier="full"),
            digest(at(6), [(5.0, 3.0)], tier="global"),
            digest(at(7), [(5.0, None)], tier="item_text"),
        ],
        10,
    )
    options = charts.tiers(together(totals(windows, "interaction").values()))
    # ECharts draws the first category at the bottom.
    assert options["yAxis"]["data"] == ["User and item", "Item's text", "Nothing known"]
    data = options["series"][0]["data"]
    assert [(bar["value"], bar["rated"]) for bar in data] == [(1.0, 1), (0, 0), (2.0, 1)]


def test_swaps_outside_the_range_are_not_marked_and_only_the_newest_are_named() -> None:
    early, late = Swap(ms(-50), "x-0", "promote"), Swap(ms(90), "x-1", "promote")
    many = [Swap(ms(10 + number / 10), f"v-{number}", "promote") for number in range(9)]
    options = charts.against(WINDOWS, "interaction", [early, *many, late])
    marks = named(options, "Predicted")["markLine"]["data"]
    assert [mark["name"] for mark in marks] == [f"▾ {number}" for number in range(9)]
    assert sum(mark["label"]["show"] for mark in marks) == charts.SWAP_LABELS
    assert marks[-1]["label"]["show"]
    back = charts.against(WINDOWS, "interaction", [Swap(ms(15), NEW, "rollback")])
    assert named(back, "Predicted")["markLine"]["data"][0]["name"].endswith("(back)")


def test_a_gap_breaks_lines_and_brings_rates_to_rest() -> None:
    windows = windows_of([digest(at(5), [(4.0, 3.0)])], 10) + windows_of(
        [digest(at(995), [(4.0, 3.0)])], 1_000
    )
    rates = named(charts.flow(windows, []), "Interactions")["data"]
    assert rates == [[ms(10), 1.0], [ms(20), 0], [ms(990), 0], [ms(1_000), 1.0]]
    means = named(charts.against(windows, "interaction", []), "True")["data"]
    assert [value for _, value in means] == [3.0, None, None, 3.0]


def test_long_ranges_are_thinned_to_what_a_line_can_show() -> None:
    windows = windows_of(
        [digest(at(10 * step - 1), [(4.0, 3.0)] * step) for step in range(1, 501)], 5_000
    )
    parts = charts.thinned(windows)
    assert [window for part in parts for window in part] == list(windows)
    assert len(parts) <= charts.MOST_POINTS
    points = named(charts.flow(windows, []), "Interactions")["data"]
    assert points[0] == [parts[0][-1].end_ms, pytest.approx(sum(range(1, 4)) / 3)]
    assert points[-1][0] == windows[-1].end_ms


def test_no_line_is_drawn_across_a_gap_in_a_long_range() -> None:
    """Two days of an hour and more, with a night between: 250 windows and 253 are thinned."""
    days = [
        windows_of(
            [digest(at(begin + 10 * step), [(4.0, 3.0)]) for step in range(1, count)],
            begin + 10 * count,
        )[-count:]
        for begin, count in ((0, 250), (50_000, 253))
    ]
    evening, morning = days[0][-1].end_ms, days[1][0].end_ms
    rates = named(charts.flow([*days[0], *days[1]], []), "Interactions")["data"]
    night = [point for point in rates if evening <= point[0] < morning]
    assert night[0][0] == evening
    assert night[1:] == [[evening + 10_000, 0], [morning - 10_000, 0]]
    means = named(charts.against([*days[0], *days[1]], "interaction", []), "True")["data"]
    assert [value for time, value in means if evening < time < morning] == [None, None]


@pytest.mark.parametrize(
    ("least", "most", "bounds"),
    [(4.02, 4.17, (3.9, 4.3, 0.1)), (1.0, 5.0, (1.0, 5.0, 1.0)), (3.1, 4.4, (2.5, 5.0, 0.5))],
)
def test_star_axes_have_round_ends(
    least: float, most: float, bounds: tuple[float, float, float]
) -> None:
    assert charts._bounds(least, most) == bounds


def test_versions_keep_their_colours_and_colours_are_the_page_s() -> None:
    known = [LADDER, "a", "b"]
    assert charts.version_color(LADDER, known) == "var(--ladder)"
    assert charts.version_color("a", known) == charts.version_color("a", [*known, "c"])
    assert charts.version_color("a", known) != charts.version_color("b", known)
    options = [
        charts.flow(WINDOWS, SWAPS),
        charts.error(WINDOWS, "interaction", SWAPS, [LADDER, NEW]),
        charts.stars(together(totals(WINDOWS, "interaction").values())),
        charts.tiers(together(totals(WINDOWS, "interaction").values())),
    ]
    # A fixed colour would be wrong in one of light and dark; an address would need the network.
    assert not [text for text in texts(options) if text.startswith("#") or "://" in text]


def test_nothing_at_all_is_an_empty_chart() -> None:
    assert charts.flow([], [])["series"] == []
    assert named(charts.against([], "interaction", SWAPS), "True")["data"] == []
