"""ECharts options of the dashboard's charts, from windows.

Colours are CSS variables of `dashboard.css`: the charts are drawn as SVG in the page, so light and
dark are the browser's matter alone. The hues are Okabe and Ito's, told apart by colour-blind eyes,
and no two series differ by hue alone: true ratings are dashed, versions are named on their lines.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from schemas.records import Kind
from streams.dashboard_view import LADDER, Swap, short
from streams.windows import KindWindow, Scored, Window

MOST_POINTS = 240  # a line has no more; longer ranges are thinned
GAP_STEPS = 3  # steps without a window after which a line breaks
SWAP_LABELS = 6  # newest swaps that are named; older ones keep their line
VERSION_COLORS = 6  # --version-1 … in dashboard.css

TIERS = {
    "global": "Nothing known",
    "item_text": "Item's text",
    "item_state": "Item's past",
    "user_state": "User's past",
    "full": "User and item",
}
KINDS: dict[Kind, str] = {
    "interaction": "Interactions",
    "review": "Review texts",
    "request": "Requests",
}

Options = dict[str, Any]

_SHORT_NUMBER = (
    "v => v >= 1e6 ? +(v / 1e6).toFixed(1) + 'M' : v >= 1e3 ? +(v / 1e3).toFixed(1) + 'k' : v"
)
_TWO_DIGITS = "v => v == null ? '–' : (+v).toFixed(2)"
_PER_SECOND = "v => v == null ? '–' : v.toFixed(1) + ' /s'"
_WAITING = "v => v == null ? '–' : Math.round(v).toLocaleString() + ' waiting'"
_CLOCK = """v => {
  const time = new Date(v), clock = time.toTimeString();
  if (clock.startsWith("00:00:00"))
    return time.toLocaleDateString([], { day: "numeric", month: "short" });
  return clock.slice(0, clock.slice(6, 8) === "00" ? 5 : 8);
}"""
_PERCENT = "p => p.value.toFixed(p.value >= 10 || !p.value ? 0 : 1) + '%'"
_HEADROOM = "v => Math.ceil(v.max * 2 + 0.2) / 2"


def flow(windows: Sequence[Window], swaps: Sequence[Swap]) -> Options:
    """Predictions a second above what waits, by kind, over time."""
    kinds: list[Kind] = [kind for kind in KINDS if any(kind in each.kinds for each in windows)]
    parts = thinned(windows)
    rates: list[Options] = []
    lags: list[Options] = []
    for number, kind in enumerate(kinds):
        rate = [_rate(part, kind) for part in parts]
        lag = [now.lag if now else None for now in _newest(parts, kind)]
        color = f"var(--kind-{number + 1})"
        rates.append(_line(KINDS[kind], _points(parts, rate, 0), color, area=not number))
        lags.append(
            _line(KINDS[kind], _points(parts, lag, None), color)
            | {"xAxisIndex": 1, "yAxisIndex": 1}
        )
        rates[-1]["tooltip"] = {":valueFormatter": _PER_SECOND}
        lags[-1]["tooltip"] = {":valueFormatter": _WAITING}
    if rates:
        rates[0] |= {"markLine": _swap_lines(swaps, windows)}
        lags[0] |= {"markLine": _swap_lines(swaps, windows, named=False)}
    low, high = _span(windows)
    axis = _time_axis(low, high)
    hidden = axis | {"axisLabel": {"show": False}, "axisTick": {"show": False}}
    return _base() | {
        "grid": [
            {"left": 44, "right": 16, "top": 48, "height": 124},
            {"left": 44, "right": 16, "top": 214, "height": 60},
        ],
        "legend": _legend([KINDS[kind] for kind in kinds]) if len(kinds) > 1 else {"show": False},
        "axisPointer": {"link": [{"xAxisIndex": "all"}]},
        "xAxis": [hidden | {"gridIndex": 0}, axis | {"gridIndex": 1}],
        "yAxis": [
            _value_axis("Predictions a second", _SHORT_NUMBER) | {"min": 0, "gridIndex": 0},
            _value_axis("Waiting to be scored", _SHORT_NUMBER)
            | {"min": 0, "gridIndex": 1, "splitNumber": 2, "minInterval": 1, "nameGap": 12},
        ],
        "series": rates + lags,
    }


def against(windows: Sequence[Window], kind: Kind, swaps: Sequence[Swap]) -> Options:
    """Mean predicted and mean true rating of the same events over time."""
    parts = thinned(windows)
    means = [now.total().sums if now else None for now in _newest(parts, kind)]
    predicted = [sums.mean_predicted if sums else None for sums in means]
    true = [sums.mean_rating if sums else None for sums in means]
    known = [value for value in predicted + true if value is not None]
    series = [
        _line("Predicted", _points(parts, predicted, None), "var(--predicted)", width=2.5),
        _line("True", _points(parts, true, None), "var(--true)", dash=[6, 4]),
    ]
    series[0]["markLine"] = _swap_lines(swaps, windows)
    low, high = _span(windows)
    low_stars, high_stars, tick = _bounds(min(known, default=1.0), max(known, default=5.0))
    return _base(_TWO_DIGITS) | {
        "grid": {"left": 38, "right": 16, "top": 50, "bottom": 28},
        "legend": _legend(["Predicted", "True"]),
        "xAxis": _time_axis(low, high),
        "yAxis": _value_axis("", "v => v.toFixed(1)")
        | {"min": low_stars, "max": high_stars, "interval": tick},
        "series": series,
    }


def error(
    windows: Sequence[Window],
    kind: Kind,
    swaps: Sequence[Swap],
    versions: Sequence[str],
    measure: str = "rmse",
) -> Options:
    """The error of each model version over time, in stars; a line names its version."""
    parts = thinned(windows)
    series: list[Options] = []
    for version in versions:
        values = [_error_of(now, version, measure) for now in _newest(parts, kind)]
        if any(value is not None for value in values):
            color = version_color(version, versions)
            series.append(_line(short(version), _points(parts, values, None), color))
    if series:
        series[0]["markLine"] = _swap_lines(swaps, windows)
    low, high = _span(windows)
    return _base(_TWO_DIGITS) | {
        "grid": {"left": 38, "right": 16, "top": 50, "bottom": 28},
        "legend": _legend([each["name"] for each in series]),
        "xAxis": _time_axis(low, high),
        "yAxis": _value_axis("", "v => v.toFixed(1)") | {"min": 0, ":max": _HEADROOM},
        "series": series,
    }


def stars(scored: Scored) -> Options:
    """How often which number of stars was predicted."""
    total = max(sum(scored.stars), 1)
    bars = [
        {"value": round(100 * count / total, 2), "count": count, "name": f"{number} ★"}
        for number, count in enumerate(scored.stars, 1)
    ]
    return _base() | {
        "tooltip": {"show": False},
        "grid": {"left": 8, "right": 8, "top": 26, "bottom": 24},
        "xAxis": {
            "type": "category",
            "data": [bar["name"] for bar in bars],
            "axisTick": {"show": False},
            "axisLine": {"lineStyle": {"color": "var(--line)"}},
            "axisLabel": {"color": "var(--muted)"},
        },
        "yAxis": {"show": False, "min": 0},
        "series": [
            {
                "type": "bar",
                "name": "Predicted",
                "data": bars,
                "barWidth": "62%",
                "itemStyle": {"color": "var(--predicted)", "borderRadius": [3, 3, 0, 0]},
                "emphasis": {"disabled": True},
                "label": {
                    "show": True,
                    "position": "top",
                    "color": "var(--ink)",
                    ":formatter": _PERCENT,
                },
            }
        ],
    }


def tiers(scored: Scored, measure: str = "rmse") -> Options:
    """The error by how much was known, least first; beside it how many ratings it stands on."""
    rows = [(name, scored.tiers[tier]) for tier, name in TIERS.items() if tier in scored.tiers]
    rows.reverse()  # ECharts draws the first category at the bottom
    data = [
        {"value": round(getattr(sums, measure) or 0, 4), "rated": sums.rated, "count": sums.count}
        for _, sums in rows
    ]
    return _base() | {
        "tooltip": {"show": False},
        "grid": {"left": 92, "right": 104, "top": 6, "bottom": 6},
        "xAxis": {"type": "value", "show": False, "min": 0},
        "yAxis": {
            "type": "category",
            "data": [name for name, _ in rows],
            "axisTick": {"show": False},
            "axisLine": {"show": False},
            "axisLabel": {"color": "var(--ink)", "width": 88, "overflow": "truncate"},
        },
        "series": [
            {
                "type": "bar",
                "name": "Error by tier",
                "data": data,
                "barMaxWidth": 20,
                "itemStyle": {"color": "var(--tier)", "borderRadius": [0, 3, 3, 0]},
                "emphasis": {"disabled": True},
                "label": {
                    "show": True,
                    "position": "right",
                    ":formatter": (
                        "p => p.data.rated ? '{v|' + p.value.toFixed(2) + '}{n|' + "
                        "p.data.rated.toLocaleString() + '}' : '{n|no ratings}'"
                    ),
                    "rich": {
                        "v": {"color": "var(--ink)", "fontSize": 12, "fontWeight": 600},
                        "n": {"color": "var(--muted)", "fontSize": 11, "padding": [0, 0, 0, 9]},
                    },
                },
            }
        ],
    }


def version_color(version: str, versions: Sequence[str]) -> str:
    """A version's colour, the same in all charts while the order of versions stands."""
    if version == LADDER:
        return "var(--ladder)"
    numbered = [each for each in versions if each != LADDER]
    return f"var(--version-{numbered.index(version) % VERSION_COLORS + 1})"


def thinned(windows: Sequence[Window]) -> list[list[Window]]:
    """Windows in groups of equal length, as many as a line has points; at a gap a group ends."""
    size = -(-len(windows) // MOST_POINTS)
    parts: list[list[Window]] = []
    for window in windows:
        if not parts or len(parts[-1]) == size or _is_gap(parts[-1][-1], window):
            parts.append([])
        parts[-1].append(window)
    return parts


def _bounds(least: float, most: float) -> tuple[float, float, float]:
    """Round ends of a star axis around the values, within one to five, and its interval."""
    tick = next(tick for tick in (0.1, 0.2, 0.5, 1.0) if (most - least) / tick <= 4 or tick == 1.0)
    low = max(math.floor(least / tick - 0.5) * tick, 1.0)
    high = min(math.ceil(most / tick + 0.5) * tick, 5.0)
    return round(low, 1), round(high, 1), tick


def _is_gap(last: Window, following: Window) -> bool:
    return following.end_ms - last.end_ms > GAP_STEPS * following.step_ms


def _rate(part: Sequence[Window], kind: Kind) -> float:
    return sum(each.kinds[kind].per_second for each in part if kind in each.kinds) / len(part)


def _newest(parts: Sequence[Sequence[Window]], kind: Kind) -> list[KindWindow | None]:
    """The kind's part of the newest window of each group."""
    return [part[-1].kinds.get(kind) for part in parts]


def _error_of(window: KindWindow | None, version: str, measure: str) -> float | None:
    scored = window.models.get(version) if window else None
    return getattr(scored.sums, measure) if scored else None


def _points(
    parts: Sequence[Sequence[Window]], values: Iterable[float | None], rest: float | None
) -> list[list[float | None]]:
    """Points [time, value]; where windows are missing, `rest` on both sides of the gap."""
    points: list[list[float | None]] = []
    last: Window | None = None
    for part, value in zip(parts, values, strict=True):
        first, end = part[0], part[-1].end_ms
        if last and _is_gap(last, first):
            points += [[last.end_ms + first.step_ms, rest], [first.end_ms - first.step_ms, rest]]
        points.append([end, None if value is None else round(value, 4)])
        last = part[-1]
    return points


def _span(windows: Sequence[Window]) -> tuple[int | None, int | None]:
    if not windows:
        return None, None
    return windows[0].end_ms - windows[0].step_ms, windows[-1].end_ms


def _base(value_format: str | None = None) -> Options:
    tooltip: Options = {
        "trigger": "axis",
        "confine": True,
        "className": "chart-tip",
        "backgroundColor": "var(--raised)",
        "borderColor": "var(--line)",
        "textStyle": {"color": "var(--ink)", "fontSize": 12},
        "axisPointer": {"lineStyle": {"color": "var(--muted)", "type": "solid", "width": 1}},
    }
    if value_format:
        tooltip[":valueFormatter"] = value_format
    return {
        "animation": False,
        "textStyle": {"fontFamily": "inherit", "fontSize": 12, "color": "var(--muted)"},
        "tooltip": tooltip,
        "aria": {"enabled": False},
    }


def _legend(names: Sequence[str]) -> Options:
    return {
        "show": True,
        "data": list(names),
        "type": "scroll",
        "left": "right",
        "top": 0,
        "itemWidth": 22,
        "itemHeight": 10,
        "icon": None,
        "textStyle": {"color": "var(--ink)", "fontSize": 12},
        "pageIconColor": "var(--muted)",
        "pageTextStyle": {"color": "var(--muted)"},
        "inactiveColor": "var(--faint)",
    }


def _time_axis(low: int | None, high: int | None) -> Options:
    return {
        "type": "time",
        "min": low,
        "max": high,
        "axisLine": {"lineStyle": {"color": "var(--line)"}},
        "axisTick": {"show": False},
        "axisLabel": {
            "color": "var(--muted)",
            "hideOverlap": True,
            "showMinLabel": False,
            "showMaxLabel": False,
            "margin": 10,
            "fontSize": 11,
            ":formatter": _CLOCK,
        },
        "splitLine": {"show": False},
    }


def _value_axis(name: str, label: str) -> Options:
    return {
        "type": "value",
        "name": name,
        "nameLocation": "end",
        "nameGap": 24,
        "nameTextStyle": {"color": "var(--muted)", "align": "left", "padding": [0, 0, 0, -36]},
        "splitNumber": 3,
        "splitLine": {"lineStyle": {"color": "var(--grid)"}},
        "axisLabel": {"color": "var(--muted)", "fontSize": 11, ":formatter": label},
    }


def _line(
    name: str,
    points: list[list[float | None]],
    color: str,
    dash: list[int] | None = None,
    width: float = 2,
    area: bool = False,
) -> Options:
    line: Options = {
        "type": "line",
        "name": name,
        "data": points,
        "showSymbol": len(points) == 1,
        "symbol": "circle",
        "symbolSize": 6,
        "lineStyle": {"color": color, "width": width, "type": dash or "solid"},
        "itemStyle": {"color": color},
        "emphasis": {"disabled": True},
    }
    if area:
        line["areaStyle"] = {"color": color, "opacity": 0.14}
    return line


def _swap_lines(swaps: Sequence[Swap], windows: Sequence[Window], named: bool = True) -> Options:
    """A mark line for each swap in the span of the windows."""
    low, high = _span(windows)
    marks: list[Options] = []
    within = [
        swap for swap in swaps if low is not None and high is not None and low <= swap.at_ms <= high
    ]
    for number, swap in enumerate(within):
        label = named and number >= len(within) - SWAP_LABELS
        name = f"▾ {short(swap.version)}" + (" (back)" if swap.how == "rollback" else "")
        marks.append({"xAxis": swap.at_ms, "name": name, "label": {"show": label}})
    return {
        "silent": True,
        "symbol": "none",
        "animation": False,
        "lineStyle": {"color": "var(--swap)", "type": [3, 3], "width": 1.5},
        "label": {
            "position": "end",
            "rotate": 0,
            "distance": 3,
            "formatter": "{b}",
            "color": "var(--swap)",
            "fontSize": 11,
        },
        "data": marks,
    }
