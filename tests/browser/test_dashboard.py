"""The dashboard in a real browser, fed through a real broker and a real store.

Digests and predictions are produced in the contract's encoding; catalog, insights and dashboard
are the processes that `starcast run` starts.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import Producer
from playwright.sync_api import Page, Request, expect

from model import registry
from schemas.codec import encode
from schemas.records import Behavior, Item, Kind, PredictedRating, Record, Review, Role, Source
from streams import embedded
from streams.admin import apply_topics
from streams.clients import client_config
from streams.config import KafkaConfig
from streams.embedded import HOST, Child, free_ports
from tests.digests import digest

ROOT = Path(__file__).parents[2]
PATIENCE_MS = 60_000
START_SECONDS = 180  # a busy machine takes long to import all that `starcast` stands on
STOP_SECONDS = 10
TITLE = "Strings <script>document.title = 'taken over'</script> & picks"
ESCAPED_TITLE = TITLE.replace("<", "&lt;").replace(">", "&gt;")  # as shops have them
LONG_TITLE = "A boom microphone stand with a title that is far too long for any phone " * 2
FIRST, SECOND = "20260101T000000-1a2b3c4d", "20260101T000100-9f8e7d6c"
SCREENSHOTS = os.environ.get("STARCAST_SCREENSHOTS")  # a folder, to look at the page


@dataclass
class Shop:
    """Servers and processes of one dashboard; each is started when a test says so."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    kafka: KafkaConfig
    store_port: int
    web_port: int
    children: list[Child] = field(default_factory=list[Child])
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    sent: int = 0

    @property
    def models(self) -> str:
        return str(self.folder / "models")

    def start_broker(self) -> Child:
        port = int(self.kafka.bootstrap_servers.rpartition(":")[2])
        return self._start(embedded.start_broker, port)

    def start_store(self) -> Child:
        return self._start(embedded.start_store, self.store_port)

    def _start(self, start: Callable[[Path], Child], port: int) -> Child:
        self.monkeypatch.setattr(embedded, "free_port", lambda: port)
        child = start(self.folder / f"server-{len(self.children)}")
        self.children.append(child)
        return child

    def run(self, *processors: str) -> subprocess.Popen[bytes]:
        settings = {
            "KAFKA__BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "KAFKA__PARTITIONS": str(self.kafka.partitions),
            "KAFKA__SESSION_TIMEOUT_MS": "2000",
            "KAFKA__EXACTLY_ONCE": "false",
            "REDIS__URL": f"redis://{HOST}:{self.store_port}/0",
            "MODELS__URL": self.models,
            "MODELS__ENCODER": "none",
            "WEB__PORT": str(self.web_port),
            "WEB__METRICS_PORT": "0",
            "INSIGHTS__STEP_SECONDS": "1",
            "INSIGHTS__WINDOW_SECONDS": "8",
            "INSIGHTS__GRACE_SECONDS": "1",
            "INSIGHTS__LEAST_RATED": "5",
            "INSIGHTS__HIGHEST_RMSE": "1.5",
        }
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
        environment |= {f"STARCAST_{name}": value for name, value in settings.items()}
        log = (self.folder / f"{'-'.join(processors)}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "starcast", "run", *processors],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=self.folder,
        )
        log.close()
        self.processes.append(process)
        return process

    def stop(self, *processes: subprocess.Popen[bytes]) -> None:
        """SIGTERM ends each in time, and well; one that hangs says where."""
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                assert process.wait(STOP_SECONDS) == 0
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)  # faulthandler tells the stacks
                process.wait()
                logs = [log.read_text() for log in self.folder.glob("*.log")]
                pytest.fail(f"did not end within {STOP_SECONDS} s\n" + "\n".join(logs))

    def wait_for_page(self) -> None:
        """Until the newest process, a dashboard, listens."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection((HOST, self.web_port), timeout=5).close()
                return
            except OSError:
                assert self.processes[-1].poll() is None, "the dashboard has ended"
                assert time.monotonic() < deadline, "the dashboard does not start"
                time.sleep(0.2)

    def produce(self, topic: str, *records: Record, key: str = "k") -> None:
        producer = Producer(client_config(self.kafka))
        for record in records:
            producer.produce(topic, encode(record), key)
        assert producer.flush(10) == 0

    def score(
        self,
        kind: Kind,
        count: int,
        error: float,
        version: str,
        truth: bool = True,
        role: Role = "stable",
    ) -> None:
        """What a worker sends for one second of predictions that are off by `error`."""
        self.sent += 1
        self.produce(
            "score-digests",
            digest(
                datetime.now(UTC),
                [(3.0 + error, 3.0 if truth else None)] * count,
                kind=kind,
                worker=f"{kind}-0",
                version=version,
                tier="item_state" if kind == "interaction" else None,
                lag=12,
                items={"i0": count, "i1": 1},
                latencies_ms=[5.0, 6.0, 50.0],
                name=f"{kind}-{self.sent}",
                role=role,
            ),
        )


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Shop]:
    broker, store, web = free_ports(3)
    kafka = KafkaConfig(bootstrap_servers=f"{HOST}:{broker}", partitions=1)
    shop = Shop(tmp_path, monkeypatch, kafka, store, web)
    try:
        yield shop
    finally:
        for process in shop.processes:
            process.kill()
            process.wait()
        for child in shop.children:
            child.stop()


@contextmanager
def only_ours(page: Page) -> Generator[None]:
    """No request of the page, its sockets among them, leaves the machine; no script fails."""
    asked: list[str] = []
    failures: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url)

    page.on("request", note)
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    yield
    strangers = [url for url in asked if not re.match(rf"(http|ws)://{HOST}:|data:|blob:", url)]
    assert not strangers
    assert any(url.startswith("ws://") for url in asked)
    assert not failures


def open_page(page: Page, shop: Shop) -> None:
    shop.wait_for_page()
    page.goto(f"http://{HOST}:{shop.web_port}/", timeout=PATIENCE_MS)


def shoot(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", full_page=True)


def sideways(page: Page) -> int:
    """By how many pixels the page can be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def review(number: int, rating: float) -> Review:
    now = datetime.now(UTC)
    return Review(
        event_id=f"e{number}", user_id="u1", item_id=f"i{number}", event_time=now, rating=rating
    )


def put_in_cart(number: int) -> Behavior:
    now = datetime.now(UTC)
    return Behavior(
        event_id=f"e{number}", user_id="u1", item_id=f"i{number}", event_time=now, action="cart"
    )


def prediction(kind: Kind, topic: str, offset: int, item: str, rating: float) -> PredictedRating:
    now = datetime.now(UTC)
    return PredictedRating(
        event_id="e",
        user_id="u1",
        item_id=item,
        event_time=now,
        predicted_at=now,
        kind=kind,
        rating=rating,
        distribution=[0.1, 0.1, 0.2, 0.3, 0.3],
        interval=[rating - 0.8, min(rating + 0.8, 5.0)],
        tier="item_state" if kind == "interaction" else None,
        model_version="ladder",
        source=Source(topic=topic, partition=0, offset=offset),
        seq=offset if kind == "interaction" else None,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_nothing_to_a_model_swap_and_a_store_that_restarts(page: Page, shop: Shop) -> None:
    expect.set_options(timeout=PATIENCE_MS)
    page.set_viewport_size({"width": 1440, "height": 900})
    wait, notes, tiles = page.locator(".wait"), page.locator(".notes"), page.locator(".tiles")
    swaps = page.locator(".chart text", has_text="▾ 1a2b3c4d")
    with only_ours(page):
        # Nothing is there but the dashboard: it says what it waits for, one thing after another.
        dashboard = shop.run("dashboard")
        open_page(page, shop)
        expect(wait).to_contain_text("Waiting for Kafka")
        expect(wait).to_contain_text(shop.kafka.bootstrap_servers)
        shop.start_broker()
        expect(wait).to_contain_text("Waiting for the store")
        store = shop.start_store()
        expect(wait).to_contain_text("Waiting for topics")
        apply_topics(shop.kafka)
        expect(wait).to_contain_text("Waiting for events")
        shoot(page, "empty")

        others = shop.run("catalog", "insights")
        now = datetime.now(UTC)
        shop.produce("items", Item(item_id="i0", event_time=now, title=ESCAPED_TITLE), key="i0")
        shop.produce("items", Item(item_id="i1", event_time=now, title=LONG_TITLE), key="i1")
        shop.produce("reviews", review(0, 5.0), review(2, 2.0))
        shop.produce("behavior", put_in_cart(1))
        expect(wait).to_contain_text("Waiting for predictions")
        expect(wait).to_contain_text("events are in Kafka, but none has been scored")
        shop.produce(
            "predicted-ratings",
            prediction("interaction", "reviews", 0, "i0", 4.25),
            prediction("interaction", "behavior", 0, "i1", 3.5),
            prediction("review", "reviews", 1, "i2", 2.5),
        )
        expect(wait).to_contain_text("Waiting for insights")

        # Newest predictions: with title, with the rating that came, each kind by itself.
        rows = page.locator(".predictions tbody tr")
        expect(rows).to_have_count(2)
        strings = rows.filter(has_text="Strings")
        expect(strings).to_contain_text(TITLE)
        expect(strings).to_contain_text("4.25")
        expect(strings).to_contain_text("5 ★")
        expect(rows.filter(has_text="boom microphone")).to_contain_text("put in cart by u1")
        assert page.title() == "Starcast"

        # Predictions without ratings: charts of flow, and a word on what is missing.
        shop.score("interaction", 20, 0.5, "ladder", truth=False)
        expect(wait).to_be_hidden()
        expect(notes).to_contain_text("No ratings yet")
        expect(notes).to_contain_text("No model yet")
        expect(page.get_by_role("img", name=re.compile("waiting, over time"))).to_be_visible()
        expect(page.get_by_role("img", name="Error by tier")).to_be_hidden()
        expect(page.get_by_role("img", name="Distribution of predicted stars")).to_be_visible()

        # Ratings: errors, of either kind apart.
        for _ in range(3):
            shop.score("interaction", 10, 2.0, "ladder")
            shop.score("review", 10, 0.25, "ladder")
            time.sleep(1)
        expect(notes).not_to_contain_text("No ratings yet")
        expect(tiles).to_contain_text("2.00 stars")
        expect(tiles).to_contain_text("5.00 against 3.00")
        expect(page.get_by_role("img", name="Error by tier")).to_be_visible()
        models = page.locator(".card", has_text="Model versions").locator("tbody tr")
        expect(models).to_contain_text(["cold start"])
        expect(models).to_contain_text(["2.00"])
        page.get_by_role("button", name="Review texts").click()
        expect(models).to_contain_text(["0.25"])
        expect(rows).to_have_count(1)
        expect(rows).to_contain_text("2.50")
        page.get_by_role("button", name="Requests").click()
        expect(page.get_by_text("Rankings are not rated").first).to_be_visible()
        page.get_by_role("button", name="Interactions").click()
        expect(page.locator(".card", has_text="Alerts")).to_contain_text("RMSE 2.00 over")

        # A model comes into service; its swap is marked on the charts.
        expect(swaps).to_have_count(0)
        registry.promote(shop.models, FIRST, "ab", by="trainer", reason="the first bundle")
        for _ in range(3):
            shop.score("interaction", 10, 0.5, FIRST)
            time.sleep(1)
        expect(swaps).to_have_count(3)
        expect(notes).not_to_contain_text("No model yet")
        expect(tiles).to_contain_text("1a2b3c4d")
        expect(models.filter(has_text="1a2b3c4d")).to_contain_text("in service")
        expect(models.filter(has_text="1a2b3c4d")).to_contain_text("0.50")
        shoot(page, "swap")

        # Another is tried as a shadow: it stands beside stable, and in no total.
        registry.set_canary(shop.models, SECOND, "cd", 0, by="trainer", reason="is it better?")
        for _ in range(3):
            shop.score("interaction", 10, 0.5, FIRST)
            shop.score("interaction", 10, 0.75, SECOND, role="shadow")
            time.sleep(1)
        expect(models.filter(has_text="9f8e7d6c, shadow")).to_contain_text("0.75")
        expect(models.filter(has_text="Stable")).to_contain_text("0.50")
        expect(page.get_by_text("On trial, since")).to_be_visible()
        expect(swaps).to_have_count(3)
        shoot(page, "trial")

        # At phone width nothing is cut off or scrolls sideways, in either theme.
        page.set_viewport_size({"width": 390, "height": 844})
        expect(swaps.first).to_be_visible()
        assert sideways(page) <= 0
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        page.get_by_role("button", name="Light or dark").click()
        page.wait_for_function(f"{background} !== '{light}'")
        assert sideways(page) <= 0
        shoot(page, "phone")
        page.reload()
        page.wait_for_function(f"{background} !== '{light}'")
        page.set_viewport_size({"width": 1440, "height": 900})

        # The store goes and comes back, empty: what was seen stays, and new windows follow.
        store.stop()
        expect(notes).to_contain_text("Waiting for the store")
        expect(page.locator(".chip.down")).to_have_text("Store: silent")
        expect(swaps).to_have_count(3)
        assert page.request.get(f"http://{HOST}:{shop.web_port}/ready").status == 503
        shop.start_store()
        expect(notes).not_to_contain_text("Waiting for the store")
        for _ in range(3):
            shop.score("interaction", 77, 0.5, FIRST)
            time.sleep(1)
        expect(tiles).to_contain_text("77")
        shoot(page, "after-restart")

    told = page.request.get(f"http://{HOST}:{shop.web_port}/api/summary").json()
    assert told["waiting_for"] == []
    assert told["stable"]["version"] == FIRST
    assert told["kinds"]["interaction"]["models"][FIRST]["sums"]["rmse"] == pytest.approx(0.5)
    windows = page.request.get(f"http://{HOST}:{shop.web_port}/api/windows?since=0").json()
    last = windows[-1]["end_ms"]
    later = page.request.get(f"http://{HOST}:{shop.web_port}/api/windows?since={last}").json()
    assert windows
    assert all(window["end_ms"] > last for window in later)
    metrics = page.request.get(f"http://{HOST}:{shop.web_port}/metrics").text()
    assert "process_resident_memory_bytes" in metrics
    assert page.request.get(f"http://{HOST}:{shop.web_port}/ready").ok
    assert page.request.get(f"http://{HOST}:{shop.web_port}/health").ok
    assert page.request.get(f"http://localhost:{shop.web_port}/health").ok
    for path in ("/", "/api/summary", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
        url, foreign = f"http://{HOST}:{shop.web_port}{path}", {"Host": "elsewhere.example"}
        assert page.request.get(url, headers=foreign).status == 400
    shop.stop(dashboard, others)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_page_finds_its_dashboard_again(page: Page, shop: Shop) -> None:
    expect.set_options(timeout=PATIENCE_MS)
    first = shop.run("dashboard")
    open_page(page, shop)
    expect(page.locator(".wait")).to_contain_text("Waiting for Kafka")
    assert page.locator("main").count() == 1  # a screen reader jumps to it
    shop.stop(first)
    shop.start_broker()
    shop.run("dashboard")
    shop.wait_for_page()
    # The page reconnects by itself and shows what the new process sees.
    expect(page.locator(".wait")).to_contain_text("Waiting for the store")
