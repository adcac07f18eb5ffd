"""The dashboard's words and tables as HTML. Everything that comes from outside is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from schemas.records import Alert, Kind
from streams.config import KafkaConfig
from streams.dashboard_charts import KINDS, TIERS, version_color
from streams.dashboard_data import Link, Prediction, Snapshot
from streams.dashboard_view import (
    LADDER,
    ModelRow,
    Stage,
    model_rows,
    newest,
    short,
    silent,
    stages,
)
from streams.dashboard_view import trial as tried
from streams.windows import Scored, Sums

ROWS = 14  # newest predictions shown

STAR = (
    '<svg viewBox="0 0 34 34" aria-hidden="true"><path fill="var(--predicted)" d="M17 1.8l4.6 '
    "9.6 10.5 1.4-7.7 7.3 1.9 10.5L17 25.5l-9.3 5.1 1.9-10.5-7.7-7.3 10.5-1.4z"
    '"/><path fill="var(--true)" d="M17 1.8v23.7l-9.3 5.1 1.9-10.5-7.7-7.3 10.5-1.4z" '
    'opacity=".92"/></svg>'
)
THEME_ICON = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" '
    'aria-hidden="true"><circle cx="12" cy="12" r="9"/><path fill="currentColor" '
    'd="M12 3a9 9 0 0 1 0 18z"/></svg>'
)
_DONE = (
    '<svg viewBox="0 0 16 16" aria-hidden="true"><path fill="none" stroke="currentColor" '
    'stroke-width="2.2" d="M3 8.5l3.4 3.4L13 4.8"/></svg>'
)
_NOW = (
    '<svg viewBox="0 0 16 16" aria-hidden="true"><path fill="none" stroke="currentColor" '
    'stroke-width="2.2" d="M8 2a6 6 0 1 1-6 6"/></svg>'
)
_LATER = (
    '<svg viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="5.4" fill="none" '
    'stroke="currentColor" stroke-width="1.8"/></svg>'
)
_UP = (
    '<svg viewBox="0 0 10 10" aria-hidden="true"><circle cx="5" cy="5" r="4" '
    'fill="currentColor"/></svg>'
)
_DOWN = (
    '<svg viewBox="0 0 10 10" aria-hidden="true"><path stroke="currentColor" '
    'stroke-width="2.2" d="M1.5 1.5l7 7m0-7l-7 7"/></svg>'
)
_ERRORS = (
    '<tr><th>Version</th><th class="num">Ratings</th><th class="num">RMSE</th>'
    '<th class="num">MAE</th><th class="num">Off by</th></tr>'
)
_WAIT_TITLES = {
    "broker": "Waiting for Kafka",
    "store": "Waiting for the store",
    "topics": "Waiting for topics",
    "events": "Waiting for events",
    "predictions": "Waiting for predictions",
    "insights": "Waiting for insights",
    "ratings": "No ratings yet",
    "model": "No model yet",
}


def chips(snapshot: Snapshot, now_ms: int) -> str:
    """Which servers answer, and whether numbers still come."""
    quiet = silent(snapshot, now_ms)
    numbers = Link(True if not quiet else None, "quiet" if snapshot.windows else "not yet")
    return "".join(
        _chip(name, link)
        for name, link in (
            ("Kafka", snapshot.broker),
            ("Store", snapshot.store),
            ("Models", snapshot.models),
            ("Numbers", numbers),
        )
    )


def _chip(name: str, link: Link) -> str:
    if link.up is None:
        return f'<span class="chip asked">{_LATER}{name}: {link.reason or "asking"}</span>'
    if link.up:
        return f'<span class="chip up">{_UP}{name}</span>'
    return f'<span class="chip down" title="{escape(link.reason)}">{_DOWN}{name}: silent</span>'


def waiting(snapshot: Snapshot, kafka: KafkaConfig) -> str:
    """What the page waits for before it has anything to show; empty once it has."""
    if snapshot.windows:
        return ""
    path = stages(snapshot, kafka)
    now = next((stage for stage in path if not stage.done), None)
    if now is None:
        return ""
    todo = (
        f'<p class="todo">To go on: <code>{escape(now.command)}</code></p>' if now.command else ""
    )
    items = "".join(_step(stage, stage is now) for stage in path)
    return (
        f"<h2>{_WAIT_TITLES[now.name]}</h2>"
        f'<p class="why">{escape(now.text)}</p>{todo}<ol class="steps">{items}</ol>'
    )


def _step(stage: Stage, now: bool) -> str:
    icon = _DONE if stage.done else _NOW if now else _LATER
    state = "done" if stage.done else "now" if now else "later"
    return f'<li class="{state}">{icon}{stage.title}</li>'


def notes(snapshot: Snapshot, kafka: KafkaConfig, now_ms: int) -> str:
    """What is missing or gone while there are things to show."""
    if not snapshot.windows:
        return ""
    lines: list[str] = []
    for stage in stages(snapshot, kafka):
        if stage.done or stage.name in ("events", "predictions", "insights"):
            continue
        if stage.name == "topics" and not snapshot.broker.up:
            continue  # nobody knows which are missing
        server = stage.name in ("broker", "store", "topics")
        gone = ""
        if stage.name in ("broker", "store"):
            gone = f"{'' if stage.text.endswith('.') else '.'} What was seen last is shown."
        command = f" <code>{escape(stage.command)}</code>" if stage.command else ""
        lines.append(
            f'<div class="note{" bad" if server else ""}"><b>{_WAIT_TITLES[stage.name]}</b>'
            f"<span>{escape(stage.text)}{gone}{command}</span></div>"
        )
    if snapshot.models.up is False:
        lines.append(
            '<div class="note bad"><b>Models folder</b>'
            f"<span>{escape(snapshot.models.reason)}</span></div>"
        )
    if silent(snapshot, now_ms) and snapshot.broker.up and snapshot.store.up:
        last = snapshot.windows[-1].end_ms
        lines.append(
            f'<div class="note"><b>Nothing new</b><span>The last window ended {_time(last)}: '
            "nothing is being scored, or the scorer or insights has stopped.</span></div>"
        )
    return "".join(lines)


def tiles(snapshot: Snapshot, everything: Sums, now_ms: int) -> str:
    """The six numbers of interactions that tell whether all is well.

    `everything` sums up the range; without ratings in the window of now, errors are its.
    """
    now = newest(snapshot, "interaction", now_ms)
    firing = {
        name.partition("/")[0]
        for name in (snapshot.windows[-1].firing if now else [])
        if name.endswith("/interaction")
    }
    sums = now.total().sums if now else Sums()
    where = "" if sums.rated else " in this range"
    sums = sums if sums.rated else everything
    latency = now.latency_ms if now else None
    rate = now.per_second if now else 0.0
    waits = _behind(now.lag, rate) if now else "not told by the scorer now"
    told = _NONE if silent(snapshot, now_ms) else compact(rate)
    error, means, off, ratings = _NONE, _NONE, "", "no ratings yet"
    if sums.rated:
        error = f"{_number(sums.rmse)} <small>stars</small>"
        several = "s" if sums.rated != 1 else ""
        ratings = f"MAE {_number(sums.mae)}, {compact(sums.rated)} rating{several}{where}"
        means = (
            f'<span class="vs-predicted">{_number(sums.mean_predicted)}</span> <small>against'
            f'</small> <span class="vs-true">{_number(sums.mean_rating)}</span>'
        )
        off = f"{_signed(sums)} stars off"
    stable = snapshot.registry.stable
    model, model_text = "cold start", "from running means, no model yet"
    if stable:
        model = escape(short(stable.version))
        model_text = f"promoted {_time(round(stable.at.timestamp() * 1_000))}"
    range_text = f"{compact(everything.count)} in this range"
    return "".join(
        [
            _tile("Predictions a second", told, range_text),
            _tile(
                "Waiting to be scored", compact(now.lag) if now else _NONE, waits, "lag" in firing
            ),
            _tile(
                "Latency, median",
                _milliseconds(latency["p50"]) if latency else _NONE,
                f"99% within {_milliseconds(latency['p99'])}" if latency else "",
            ),
            _tile("Error, RMSE", error, ratings, "rmse" in firing),
            _tile("Mean predicted, true", means, off, "drift" in firing),
            _tile("Model", model, model_text),
        ]
    )


def _behind(lag: int, rate: float) -> str:
    """How long what waits would take at the rate of now."""
    if not lag:
        return "caught up"
    if lag < rate:
        return "less than a second behind"
    return f"about {_seconds(lag / rate)} behind" if rate >= 1 else "behind"


def _tile(name: str, value: str, text: str, alarm: bool = False) -> str:
    style, sign = (" alarm", '<b class="severity critical">Alert</b> ') if alarm else ("", "")
    return (
        f'<dl class="tile{style}"><dt>{name}</dt>'
        f'<dd class="value">{value}</dd><dd class="sub">{sign}{text}</dd></dl>'
    )


def predictions(rows: Sequence[Prediction], kind: Kind, versions: Sequence[str]) -> str:
    """The newest predictions of a kind, each on the scale of one to five stars."""
    shown = [row for row in rows if row.kind == kind][:ROWS]
    if not shown:
        return f'<p class="blank">No predictions for {KINDS[kind].lower()} yet.</p>'
    body = "".join(_prediction(row, versions) for row in shown)
    return (
        "<table><thead><tr><th>Item</th><th>1 to 5 stars</th>"
        '<th class="num">Predicted</th><th class="num">True</th><th class="known">Known, model</th>'
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def _prediction(row: Prediction, versions: Sequence[str]) -> str:
    marks = "".join(f'<i style="left:{25 * tick}%"></i>' for tick in range(5))
    if row.low is not None and row.high is not None:
        low, high = _place(row.low), _place(row.high)
        marks += f'<span class="interval" style="left:{low:.1f}%;width:{high - low:.1f}%"></span>'
    if row.truth is not None:
        marks += f'<span class="truth" style="left:{_place(row.truth):.1f}%"></span>'
    if row.rating is not None:
        marks += f'<span class="dot" style="left:{_place(row.rating):.1f}%"></span>'
    what = escape(_ACTIONS.get(row.action, row.action or "event"))
    span = 'aria-hidden="true"'
    if row.low is not None and row.high is not None:
        span = f'role="img" aria-label="80% interval from {row.low:.1f} to {row.high:.1f}"'
    known = TIERS.get(row.tier, "Its own text" if row.kind == "review" else row.tier)
    if row.rating is None:
        known = "Asked too late"
    return (
        f'<tr><td><div class="title">{_name(row.title or row.item_id)}</div>'
        f'<div class="meta">{_time(row.predicted_ms)} · {what} by {_name(row.user_id)}</div></td>'
        f'<td><div class="scale" {span}>{marks}</div></td>'
        f'<td class="num strong" data-label="Predicted">{_number(row.rating)}</td>'
        f'<td class="num" data-label="True">{_stars(row.truth)}</td>'
        f'<td class="known"><span class="meta">{escape(known)}</span><span class="meta">'
        f"{_swatch(row.version, versions)}{escape(short(row.version))}</span></td></tr>"
    )


def models(snapshot: Snapshot, found: Mapping[str, Scored], versions: Sequence[str]) -> str:
    """Model versions with their errors among `found`, newest first."""
    rows = model_rows(snapshot, found)
    if not rows:
        return '<p class="blank">No model version has predicted anything in this range.</p>'
    body = "".join(_model(row, versions) for row in rows)
    return f"<table><thead>{_ERRORS}</thead><tbody>{body}</tbody></table>"


def _model(row: ModelRow, versions: Sequence[str]) -> str:
    role, stable = "", " stable" if row.role == "in service" else ""
    since = "from running means" if row.version == LADDER else "not in service"
    if row.role:
        role = f'<span class="role{stable}">{escape(row.role)}</span>'
    if row.since_ms:
        how = "on trial since" if row.role and not stable else "promoted"
        since = f"{how} {_time(row.since_ms)}"
    if row.version != LADDER and row.by:
        since += f" by {escape(row.by)}"
    return (
        f'<tr><td title="{escape(row.version)}: {escape(row.reason)}"><div class="title">'
        f"{_swatch(row.version, versions)}{escape(row.name)}{role}</div>"
        f'<div class="meta">{since}</div></td>'
        f"{_error_cells(row.sums)}</tr>"
    )


def _error_cells(sums: Sums) -> str:
    """The cells below `_ERRORS`."""
    return (
        f'<td class="num">{compact(sums.rated)}</td>'
        f'<td class="num strong">{_number(sums.rmse)}</td>'
        f'<td class="num">{_number(sums.mae)}</td>'
        f'<td class="num">{_signed(sums)}</td>'
    )


def trial(snapshot: Snapshot) -> str:
    """The version on trial beside stable, over the same time; empty when there is none."""
    found, named = tried(snapshot), snapshot.registry.canary
    if found is None or named is None:
        return ""
    body = "".join(
        f'<tr><td><div class="title">{escape(name)}</div></td>{_error_cells(sums)}</tr>'
        for name, sums in (
            ("Stable", found.stable.sums),
            (f"{short(found.version)}, {named.role}", found.canary.sums),
        )
    )
    apart = "Too few ratings to tell them apart."
    if found.standard_errors is not None:
        number = f"{found.standard_errors:+.1f}".replace("-", "−")
        apart = f"MAE of the version on trial: {number} standard errors from stable's."
    return (
        f'<p class="sub">On trial, since {_time(found.start_ms)}</p>'
        f"<table><thead>{_ERRORS}</thead><tbody>{body}</tbody></table>"
        f'<p class="sub">{apart}</p>'
    )


def alerts(found: Iterable[Alert]) -> str:
    """Newest alerts first."""
    items = "".join(
        f'<li><span><span class="severity {alert.severity}">{alert.severity.capitalize()}</span> '
        f'<span class="muted">{escape(alert.rule)}, '
        f"{_time(round(alert.window_end.timestamp() * 1_000))}</span></span>"
        f"<span>{escape(alert.text)}</span></li>"
        for alert in list(found)[:4]
    )
    if not items:
        return '<p class="blank">No threshold has been crossed.</p>'
    return f'<ul class="list">{items}</ul>'


def bars(rows: Sequence[tuple[str, int]], titles: Mapping[str, str], nothing: str) -> str:
    """Names with their counts, the biggest first."""
    if not rows:
        return f'<p class="blank">{nothing}</p>'
    most = max(count for _, count in rows)
    items = "".join(
        f'<li><span class="name" title="{escape(name)}">{_name(titles.get(name) or name)}</span>'
        f'<span class="muted">{compact(count)}</span>'
        f'<span class="bar" style="width:{100 * count / most:.1f}%"></span></li>'
        for name, count in rows[:6]
    )
    return f'<ul class="bars">{items}</ul>'


def compact(number: float) -> str:
    """A number in at most four digits or so: 1.2k, 34.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            scaled = number / (1e3 if unit == "k" else size)
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"


_NONE = '<span class="muted">–</span>'
_ACTIONS = {
    "review": "review",
    "view": "view",
    "click": "click",
    "wishlist": "wish",
    "share": "share",
    "cart": "put in cart",
    "remove_from_cart": "taken from cart",
    "purchase": "purchase",
}


def _name(name: str) -> str:
    """A name from outside, whose script may run from right to left."""
    return f"<bdi>{escape(name)}</bdi>"


def _place(rating: float) -> float:
    """Per cent of the way from one star to five."""
    return 25 * (min(max(rating, 1.0), 5.0) - 1)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _signed(sums: Sums) -> str:
    """How far the mean predicted rating is from the mean true one."""
    if not sums.rated:
        return _NONE
    return f"{(sums.predicted - sums.rating) / sums.rated:+.2f}".replace("-", "−")


def _stars(value: float | None) -> str:
    return _NONE if value is None else f"{value:g} ★"


def _swatch(version: str, versions: Sequence[str]) -> str:
    if version not in versions:
        return ""
    return f'<span class="swatch" style="background:{version_color(version, versions)}"></span>'


def _milliseconds(value: float) -> str:
    if value < 1_000:
        return f"{value:.{0 if value >= 10 else 1}f} <small>ms</small>"
    return _seconds(value / 1_000)


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return (
            f"{seconds:.0f} <small>s</small>"
            if seconds >= 10
            else f"{seconds:.1f} <small>s</small>"
        )
    if seconds < 7_200:
        return f"{seconds / 60:.0f} <small>min</small>"
    return f"{seconds / 3_600:.0f} <small>h</small>"


def _time(milliseconds: int) -> str:
    """A time that `dashboard.js` tells in the reader's zone."""
    return f'<time data-ms="{milliseconds}"></time>'
