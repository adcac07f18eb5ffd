"""The dashboard: a live page, health, readiness, metrics and a small JSON API on one port.

NiceGUI serves the page and its charts (ECharts) from its own wheel: the page needs no network. A
browser's page looks at the newest snapshot (`dashboard_data.py`) each second and redraws what has
changed. NiceGUI keeps its state in globals, so a process runs one dashboard.
"""

import socket
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, cast

import structlog
import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from nicegui import ui
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.middleware.trustedhost import TrustedHostMiddleware

from schemas.records import Kind
from streams import dashboard_charts as charts
from streams import dashboard_html as html
from streams.config import KafkaConfig, RedisConfig, WebConfig
from streams.dashboard_data import Feed, Snapshot, follow, now_ms
from streams.dashboard_view import (
    in_range,
    last_busy,
    silent,
    summary,
    swaps,
    together,
    totals,
)
from streams.dashboard_view import versions as all_versions
from streams.health import PortError, readiness
from streams.metrics import Metrics
from streams.windows import Scored, Window

LOOK_SECONDS = 1.0  # a browser's page is brought up to date this often
CLOSE_SECONDS = 2  # a browser that holds its connection must not hold the process's end
STOP_SECONDS = 6.0
RECONNECT_SECONDS = 10.0  # a phone that slept this long finds its page again
OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")

RANGES: dict[str, tuple[str, int | None]] = {
    "5m": ("5 min", 300_000),
    "15m": ("15 min", 900_000),
    "1h": ("1 hour", 3_600_000),
    "all": ("All", None),
}
MEASURES = {"rmse": "RMSE", "mae": "MAE"}
ABOUT_KINDS: dict[Kind, str] = {
    "interaction": "Predicted before the shopper's own rating or words are seen.",
    "review": "Stars read from the review's own words: an easier question, kept apart.",
    "request": "Items ranked for a shopper on request; no rating follows from these.",
}

UNRATED: dict[Kind, str] = {
    "interaction": "No rated review in this range yet: errors show once one has been scored.",
    "review": "No text of a rated review in this range yet.",
    "request": "Rankings are not rated, so there is no error to show.",
}

_LOG = structlog.get_logger(__name__)


def run_dashboard(
    kafka: KafkaConfig,
    redis: RedisConfig,
    web: WebConfig,
    models_url: str,
    stop: threading.Event,
    metrics: Metrics,
) -> None:
    """Serve the dashboard until `stop` is set; no server has to be up for that.

    Raises PortError when the address cannot be listened on, UnreachableError for a store URL that
    is none.
    """
    listening = _listen(web)
    # NiceGUI looks for its server among all objects and touches deprecated ones, torch's for one.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"nicegui\.ui_run_with")
    with listening, follow(kafka, redis, models_url, stop) as feed:
        app = make_app(feed, kafka, web, metrics)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            ws_ping_interval=20,
        )
        server = uvicorn.Server(config)
        # In a thread of its own uvicorn leaves the process's signal handlers alone.
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listening]}, name="dashboard-web", daemon=True
        )
        thread.start()
        port = int(listening.getsockname()[1])
        _LOG.info("dashboard", url=f"http://{web.host}:{port}/")
        while not stop.wait(0.2) and thread.is_alive():
            pass
        server.should_exit = True
        thread.join(STOP_SECONDS)


def _listen(web: WebConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in web.host else socket.AF_INET
    try:
        return socket.create_server((web.host, web.port), family=family)
    except (OSError, OverflowError) as error:
        raise PortError(
            f"The dashboard cannot listen on {web.host}:{web.port}: {error}. Set "
            "STARCAST_WEB__PORT to another port, or to 0 for any free one."
        ) from error


def allowed_hosts(web: WebConfig) -> list[str]:
    """Names by which the page may be asked for.

    A page elsewhere whose name is made to lead to this machine (DNS rebinding) would read ours in
    the browser of whoever looks at it; but it asks by its own name.
    """
    named = [name for name in web.hosts.split(",") if name]
    to_itself = web.host in ("localhost", "::1") or web.host.startswith("127.")
    if not named and not to_itself:
        return ["*"]
    return [*named, *OWN_NAMES]


def make_app(feed: Feed, kafka: KafkaConfig, web: WebConfig, metrics: Metrics) -> FastAPI:
    """The page and what stands beside it."""
    app = FastAPI(title="Starcast dashboard", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(web), www_redirect=False)

    @app.get("/health")
    def health() -> dict[str, bool]:  # pyright: ignore[reportUnusedFunction]
        return {"alive": True}

    @app.get("/ready")
    def is_ready() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        snapshot = feed.snapshot
        ready, report = readiness(
            {
                "kafka": lambda: None if snapshot.broker.up else snapshot.broker.reason or "asking",
                "store": lambda: None if snapshot.store.up else snapshot.store.reason or "asking",
            }
        )
        return JSONResponse(report, status_code=200 if ready else 503)

    @app.get("/metrics")
    def prometheus() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/api/summary")
    def api_summary() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        return summary(feed.snapshot, kafka, now_ms())

    @app.get("/api/windows")
    def api_windows(since: int = 0) -> list[dict[str, Any]]:  # pyright: ignore[reportUnusedFunction]
        windows = [window for window in feed.snapshot.windows if window.end_ms > since]
        return [window.model_dump(mode="json") for window in windows]

    @ui.page("/")
    def page() -> None:  # pyright: ignore[reportUnusedFunction]
        view = _Page(feed, kafka)
        ui.timer(LOOK_SECONDS, view.look)

    ui.run_with(
        app,
        title="Starcast",
        favicon=f"data:image/svg+xml,{_favicon()}",
        dark=None,
        language="en-US",
        tailwind=False,
        reconnect_timeout=RECONNECT_SECONDS,
        show_welcome_message=False,
    )
    return app


class _Page:
    """One browser's page: its elements, its choices, and what they show now."""

    def __init__(self, feed: Feed, kafka: KafkaConfig) -> None:
        self._feed = feed
        self._kafka = kafka
        self._kind: Kind = "interaction"
        self._range = "15m"
        self._measure = "rmse"
        self._drawn: tuple[Any, ...] = ()
        ui.add_head_html(f"<style>{_resource('dashboard.css')}</style>")
        ui.add_head_html(f"<script>{_resource('dashboard.js')}</script>")
        with _block("div", "shell"):
            self._build_top()
            self._wait = _text("section", "wait")
            self._notes = _text("section", "notes")
            with _block("div") as self._main:  # NiceGUI's page is the landmark "main"
                self._numbers = _text("section", "tiles")
                self._build_flow()
                self._build_quality()
                self._build_predictions()
            self._build_foot()
        self.look()

    def look(self) -> None:
        """Bring the page up to date with the newest snapshot."""
        snapshot, now = self._feed.snapshot, now_ms()
        waiting = html.waiting(snapshot, self._kafka)
        _show(self._chips, html.chips(snapshot, now))
        _show(self._wait, waiting)
        _set_hidden(self._wait, not waiting)
        _set_hidden(self._main, not (snapshot.windows or snapshot.predictions))
        _show(self._notes, html.notes(snapshot, self._kafka, now))
        known = all_versions(snapshot)
        _show(self._predictions, html.predictions(snapshot.predictions, self._kind, known))
        _show(self._alerts, html.alerts(snapshot.alerts))
        # What follows costs more and changes only with a window, a swap or a choice.
        last = snapshot.windows[-1].end_ms if snapshot.windows else 0
        choices = self._kind, self._range, self._measure
        quiet = silent(snapshot, now)
        drawn = (last, quiet, snapshot.registry, len(snapshot.titles), *choices)
        if drawn != self._drawn:
            self._drawn = drawn
            windows = in_range(snapshot.windows, RANGES[self._range][1])
            found = totals(windows, self._kind)
            interactions = found
            if self._kind != "interaction":
                interactions = totals(windows, "interaction")
            everything = together(interactions.values()).sums
            _show(self._numbers, html.tiles(snapshot, everything, now))
            _show(self._models, html.models(snapshot, found, known))
            _show(self._trial, html.trial(snapshot))
            self._draw(snapshot, windows, found, known)

    def _draw(
        self,
        snapshot: Snapshot,
        windows: Sequence[Window],
        found: Mapping[str, Scored],
        known: Sequence[str],
    ) -> None:
        marks = swaps(snapshot)
        scored = together(found.values())
        unrated = UNRATED[self._kind]
        self._flow.draw(charts.flow(windows, marks) if windows else None)
        self._stars.draw(charts.stars(scored) if scored.sums.count else None)
        if scored.sums.rated:
            self._against.draw(charts.against(windows, self._kind, marks))
            self._error.draw(charts.error(windows, self._kind, marks, known, self._measure))
            tiers = charts.tiers(scored, self._measure) if scored.tiers else None
            self._tiers.draw(tiers, "What a text says needs no other facts: there are no tiers.")
        else:
            for chart in (self._against, self._error, self._tiers):
                chart.draw(None, unrated)
        _show(self._about, ABOUT_KINDS[self._kind])
        last = last_busy(windows)
        items = last.top_items if last else []
        _show(self._items, html.bars(items, snapshot.titles, "No items in this range."))

    def _build_top(self) -> None:
        with _block("header", "top"):
            _text(
                "div",
                "brand",
                f"{html.STAR}<div><h1>Starcast</h1><p>What shoppers will rate, predicted while "
                "it happens</p></div>",
            )
            self._chips = _text("div", "chips")
            self._chips.props('role="status" aria-label="Servers"')
            with _block("div", "tools"):
                names = {name: text for name, (text, _) in RANGES.items()}
                _segments("Time range", names, self._range, self._choose_range)
                button = _block("button", "theme").props('type="button" aria-label="Light or dark"')
                button.on("click", js_handler="() => starcastToggleTheme()")
                with button:
                    _text("span", "", html.THEME_ICON)

    def _build_flow(self) -> None:
        with _block("section", "grid"), _block("div", "card span-12"):
            _title("Flow", "Predictions made and events that wait; dotted lines mark model swaps.")
            self._flow = _Chart("Predictions a second and events waiting, over time", 306)

    def _build_quality(self) -> None:
        with _block("section", "head"):
            _text("h2", "", "How good the predictions are")
            self._about = _text("p", "")
            _segments("What was predicted", charts.KINDS, self._kind, self._choose_kind)
            _segments("Measure of error", MEASURES, self._measure, self._choose_measure)
        with _block("section", "grid"):
            with _block("div", "card span-7"):
                _title("Predicted against true", "Mean stars of the same events, sliding window.")
                self._against = _Chart("Mean predicted and true rating over time", 260)
            with _block("div", "card span-5"):
                _title(
                    "Error by model version", "In stars, a line for each version, sliding window."
                )
                self._error = _Chart("Error of each model version over time", 260)
            with _block("div", "card span-4"):
                _title("Predicted stars", "Share of predictions, rounded to whole stars.")
                self._stars = _Chart("Distribution of predicted stars", 190)
            with _block("div", "card span-4"):
                _title("Error by what was known", "Fewest facts first; ratings in grey.")
                self._tiers = _Chart("Error by tier", 190)
            with _block("div", "card span-4 wide"):
                _title("Model versions", "On what each predicted in this range.")
                self._models = _text("div", "")
                self._trial = _text("div", "")

    def _build_predictions(self) -> None:
        with _block("section", "grid"):
            with _block("div", "card span-8 predictions"):
                key = (
                    '<span class="scale key"><span class="dot"></span>predicted</span>'
                    '<span class="scale key"><span class="interval"></span>80% interval</span>'
                    '<span class="scale key"><span class="truth"></span>true</span>'
                )
                _title("Newest predictions", key)
                self._predictions = _text("div", "")
            with _block("div", "span-4 stack"):
                with _block("div", "card"):
                    _title("Alerts", "Thresholds that were crossed, newest first.")
                    self._alerts = _text("div", "")
                with _block("div", "card"):
                    _title("Most seen items", "In the newest window with interactions.")
                    self._items = _text("div", "")

    def _build_foot(self) -> None:
        _text(
            "footer",
            "foot",
            '<span>Starcast</span><a href="/api/summary">Summary as JSON</a>'
            '<a href="/api/windows">Windows as JSON</a><a href="/metrics">Metrics</a>'
            '<a href="/ready">Readiness</a>',
        )

    def _choose_range(self, name: str) -> None:
        self._range = name
        self.look()

    def _choose_kind(self, name: str) -> None:
        self._kind = cast(Kind, name)
        self.look()

    def _choose_measure(self, name: str) -> None:
        self._measure = name
        self.look()


class _Chart:
    """A chart, or in its place what it waits for."""

    def __init__(self, label: str, height: int) -> None:
        self._chart = ui.echart({}, renderer="svg").classes("chart")
        self._chart.style(f"height:{height}px").props(f'role="img" aria-label="{label}"')
        self._blank = _text("p", "blank").style(f"min-height:{height - 20}px")
        self.draw(None)

    def draw(self, options: Mapping[str, Any] | None, nothing: str = "Nothing yet.") -> None:
        """Draw the chart; without options say why there is none."""
        _show(self._blank, nothing)
        _set_hidden(self._chart, options is None)
        _set_hidden(self._blank, options is not None)
        if options is not None:
            current = cast(dict[str, Any], self._chart.options)
            current.clear()
            current.update(options)
            self._chart.update()


def _block(tag: str, classes: str = "") -> ui.element:
    return ui.element(tag).classes(classes)


def _text(tag: str, classes: str, content: str = "") -> ui.html:
    return ui.html(content, sanitize=False, tag=tag).classes(classes)


def _title(title: str, sub: str) -> None:
    _text("h3", "", title)
    _text("p", "sub", sub)


def _segments(
    label: str, names: Mapping[Any, str], chosen: str, choose: Callable[[str], None]
) -> None:
    """Buttons side by side of which one is pressed."""
    buttons: dict[str, ui.element] = {}

    def press(name: str) -> None:
        for each, button in buttons.items():
            button.props(f'aria-pressed="{str(each == name).lower()}"')
        choose(name)

    with _block("div", "segments").props(f'role="group" aria-label="{label}"'):
        for name, text in names.items():
            button = buttons[name] = _block("button").props(
                f'type="button" aria-pressed="{str(name == chosen).lower()}"'
            )
            button.on("click", partial(press, name))
            with button:
                _text("span", "", text)


def _show(element: ui.html, content: str) -> None:
    if element.content != content:
        element.set_content(content)


def _set_hidden(element: ui.element, hidden: bool) -> None:
    element.classes(**{"add" if hidden else "remove": "hidden"})


def _resource(name: str) -> str:
    return files("streams").joinpath(name).read_text()


def _favicon() -> str:
    star = html.STAR.replace("var(--predicted)", "%230072b2").replace("var(--true)", "%23d55e00")
    return star.replace("<svg", "<svg xmlns='http://www.w3.org/2000/svg'").replace('"', "'")
