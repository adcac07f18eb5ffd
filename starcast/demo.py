"""`starcast demo`: the whole of Starcast on one machine, with nothing else installed.

The embedded broker and store and three worker processes are children of this one. A generated shop
(or a record file) is played into the topics; when enough is there, `starcast retrain` trains from
the archive and the workers take the new model up while events flow. Embedded mode is at-least-once
(`docs/decisions/0001-embedded-mode.md`).
"""

import itertools
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import orjson
from confluent_kafka import Message
from numpy.typing import NDArray
from pydantic import SecretStr
from rich.console import Console

from model import registry
from model.ladder import VERSION as LADDER
from schemas import archive
from schemas.exceptions import StarcastError
from schemas.files import read_values
from starcast.settings import Settings, variables
from starcast.shop import shop
from starcast.workers import STOP_SECONDS, read_metrics, start_worker
from streams.admin import apply_topics
from streams.embedded import Child, Endpoints, embedded, free_port, start_child
from streams.producer import CountingProducer, Outgoing, outgoing
from streams.tail import read_topic
from trainer.baselines import running_baselines

EVENTS = ("reviews", "behavior")
TRAIN_SHARE = 0.8  # of the events of a file are in when the model is trained
RATE = 600.0  # events a second of a played file: item states stay within a moment of their events
SEED = 7  # of the generated shop
SHOP_RATE = 40.0  # events a second of the generated shop, once its history is in
SHOP_HISTORY = 6_000  # events played fast at the start, so that there is something to learn from
SHOP_USERS, SHOP_ITEMS, SHOP_EVENTS = 600, 400, 200_000
RETRAIN_AFTER = 1_200  # events after which the demo trains a second time
DEMO_TEXTS = 600  # review texts that a training of the demo reads: 25 ms each on a core
PARTITIONS = 4
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of each process: there are several on few cores
STALL_SECONDS = 180.0  # without any progress for so long, what is missing is lost
SWAP_SECONDS = 60.0  # a promoted model is fetched, checked and warmed within this
POLL_SECONDS = 0.5
STOP_LOOK_SECONDS = 0.05  # between two looks at whether the demo stops, while a record is not due
TRAIN_SECONDS = 1_800.0  # a training that hangs must not keep the demo for ever


class DemoError(StarcastError):
    """A part of the demo ended or got stuck."""


@dataclass
class Summary:
    """What `--once` reports."""

    events: int = 0
    predictions: int = 0
    dead_letters: int = 0
    lost: int = 0
    duplicated: int = 0
    rmse: dict[str, float | None] = field(
        default_factory=lambda: {"model": None, "bias": None, "global": None}
    )
    model_versions: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """A running embedded Starcast."""

    settings: Settings
    folder: Path
    children: Sequence[Child]
    console: Console

    def check(self) -> None:
        """Raise `DemoError` when a child has ended."""
        for child in self.children:
            if not child.alive():
                raise DemoError(
                    f"{child.name} ended with code {child.process.returncode}; its log is "
                    f"{child.log}."
                )


def embedded_settings(settings: Settings, endpoints: Endpoints, folder: Path) -> Settings:
    """The settings of the demo's processes: those given, but for what leads out of the demo.

    The embedded store is no cluster, and the embedded broker has no groups by KIP-848. Processes
    read the shop's settings file too, so what is not to hold is set to another value, never left
    out.
    """
    own = settings.model_copy(deep=True)
    own.kafka.bootstrap_servers = endpoints.bootstrap_servers
    own.kafka.options["security.protocol"] = "PLAINTEXT"  # then no login or key is looked at
    own.kafka.exactly_once = False
    own.kafka.group_protocol = "classic"
    own.kafka.partitions = PARTITIONS
    own.kafka.replication = 1
    own.kafka.session_timeout_ms = 2_000  # Tansu lets members wait half of it
    own.redis.url, own.redis.cluster = SecretStr(endpoints.redis_url), False
    own.archive.url, own.archive.flush_seconds = str(folder / "archive"), 1.0
    # Item states are read once a batch, so small batches keep them fresh.
    own.scorer.batch_events, own.scorer.linger_ms = 64, 5
    own.models.url, own.models.threads = str(folder / "models"), 1
    own.web.port = own.web.port or free_port()  # any, but one that can be told
    own.trainer.threads = 1  # the workers need the other cores
    tracking = own.trainer.tracking
    tracking.folder, tracking.wandb_project, tracking.mlflow_uri = str(folder / "runs"), "", ""
    own.trainer.checkpoints = str(folder / "checkpoints")
    own.trainer.text.text_limit = DEMO_TEXTS
    own.trainer.text.method = "frozen"  # a minute, not a quarter of an hour
    return own


@contextmanager
def cluster(settings: Settings, console: Console, dashboard: bool) -> Generator[Cluster]:
    """Broker, store and workers in a folder of their own, which is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="starcast-demo-"))
    with ExitStack() as stack:
        with console.status("starting the embedded broker and store"):
            endpoints = stack.enter_context(embedded(folder))
        own = embedded_settings(settings, endpoints, folder)
        apply_topics(own.kafka)
        groups: list[tuple[str, ...]] = [
            ("scorer", "items", "catalog", "answers"),
            ("texts", "archiver"),
        ]
        if dashboard:
            groups.append(("insights", "dashboard"))
        children: list[Child] = []
        with console.status("starting the workers"):
            for group in groups:
                children.append(start_worker("-".join(group), group, own, folder, ONE_THREAD))
                stack.callback(children[-1].stop)
        yield Cluster(own, folder, children, console)
    shutil.rmtree(folder, ignore_errors=True)


def run_demo(settings: Settings, console: Console, stop: threading.Event, seed: int) -> None:
    """Play the generated shop, train, retrain once, and serve the dashboard until `stop`."""
    with cluster(settings, console, dashboard=True) as running:
        web = running.settings.web
        console.print(f"dashboard: http://{web.host}:{web.port}")
        console.print(f"logs: {running.folder}")
        player = _ShopPlayer(running, seed, stop)
        player.start()
        player.wait_until(SHOP_HISTORY)
        for number, wanted in enumerate((SHOP_HISTORY, SHOP_HISTORY + RETRAIN_AFTER), 1):
            player.wait_until(wanted)
            if stop.is_set():
                break
            console.print(f"training model {number} from the archive while events flow")
            _await_archived(running, stop)
            version = _train(running, stop)
            console.print(
                f"model {version} is in service" if version else "the gate kept the running model"
            )
        if not stop.is_set():
            console.print("Ctrl-C ends the demo and every child")
        while not stop.wait(POLL_SECONDS):
            running.check()
        player.join()


def run_once(
    settings: Settings, console: Console, stop: threading.Event, events: Path, rate: float
) -> Summary:
    """Play a record file, train once when 80% of its events are in, and count what came back."""
    started = time.monotonic()
    records = [Outgoing(each.topic, each.key, each.value) for each in read_values(events)]
    places = [at for at, each in enumerate(records) if each.topic in EVENTS]
    cut = places[int(len(places) * TRAIN_SHARE)] if places else len(records)
    with cluster(settings, console, dashboard=False) as running:
        sender = CountingProducer(running.settings.kafka)
        with (
            console.status("playing events") as status,
            closing(_Follower(running, stop)) as follower,
        ):
            _play(records[:cut], sender, rate, stop)
            follower.wait_for(sum(at < cut for at in places), status.update)
            _await_archived(running, stop)
            status.update("training")
            version = _train(running, stop)
            console.print(f"model in service: {version or LADDER}")
            status.update("playing the rest")
            _play(records[cut:], sender, rate, stop)
            follower.wait_for(len(places), status.update)
        answers = list(_answers(read_topic(running.settings.kafka, "predicted-ratings")))
        letters = list(_letters(read_topic(running.settings.kafka, "dead-letters")))
        summary = _summarise(records, places, cut, answers, letters)
    summary.seconds = round(time.monotonic() - started, 1)
    return summary


# -- children ------------------------------------------------------------------------------------


def _train(running: Cluster, stop: threading.Event) -> str | None:
    """Run `starcast retrain`; the version that serves now, if a new one was promoted."""
    url = running.settings.models.url
    before = registry.read(url).stable
    child = start_child(
        "retrain",
        [sys.executable, "-m", "starcast", "retrain"],
        "",
        running.folder,
        lambda: True,
        stop_timeout=STOP_SECONDS,
        environment={**variables(running.settings), **ONE_THREAD, "STARCAST_LOG__FORMAT": "text"},
    )
    running.console.print(f"training says how far it is in {child.log}", soft_wrap=True)
    with child:
        deadline = time.monotonic() + TRAIN_SECONDS
        while child.alive() and not stop.wait(POLL_SECONDS):
            running.check()
            if time.monotonic() > deadline:
                raise DemoError(f"Training took over {TRAIN_SECONDS:.0f} s; log: {child.log}.")
    said = child.log.read_text(errors="replace").strip()
    running.console.print(said, markup=False, soft_wrap=True)
    after = registry.read(url).stable
    if after is None or after == before:
        return None
    _await_swap(running, after.version, stop)
    return after.version


def _await_swap(running: Cluster, version: str, stop: threading.Event) -> None:
    wanted = f'starcast_model_info{{version="{version}"}} 1.0'
    deadline = time.monotonic() + SWAP_SECONDS
    while not stop.wait(POLL_SECONDS):
        running.check()
        if wanted in read_metrics(running.children[0].address):
            return
        if time.monotonic() > deadline:
            raise DemoError(
                f"The scorer did not take model {version} up within {SWAP_SECONDS:.0f} s; its log "
                f"is {running.children[0].log}."
            )


# -- playing -------------------------------------------------------------------------------------


class _ShopPlayer:
    """Plays the generated shop in a thread: its history fast, then at a shop's pace."""

    def __init__(self, running: Cluster, seed: int, stop: threading.Event) -> None:
        self._running = running
        self._stop = stop
        self._seed = seed
        self._played = 0
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._play, name="shop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join(STOP_SECONDS)

    def wait_until(self, events: int) -> None:
        """Until so many events are played, or the demo stops."""
        while self._played < events and not self._stop.wait(POLL_SECONDS):
            self._running.check()
            if self._failure is not None:
                raise self._failure

    def _play(self) -> None:
        try:
            sender = CountingProducer(self._running.settings.kafka)
            records = outgoing(
                shop(self._seed, SHOP_USERS, SHOP_ITEMS, SHOP_EVENTS, datetime.now(UTC))
            )
            due = time.monotonic()
            for record in records:
                if self._stop.is_set() or not sender.send(record, self._stop):
                    break
                if record.topic not in EVENTS:
                    continue
                self._played += 1
                due += 1 / (RATE if self._played < SHOP_HISTORY else SHOP_RATE)
                _wait_until(due, sender, self._stop)
            sender.finish()
        except StarcastError as error:
            self._failure = error


def _play(
    records: Sequence[Outgoing], sender: CountingProducer, rate: float, stop: threading.Event
) -> None:
    due = time.monotonic()
    for record in records:
        if stop.is_set() or not sender.send(record, stop):
            break
        due += 1 / rate
        _wait_until(due, sender, stop)
    report = sender.finish()
    if report.failed:
        raise DemoError(f"The broker refused records: {dict(report.failed)}.")


def _wait_until(due: float, sender: CountingProducer, stop: threading.Event) -> None:
    """Until the clock says so or the demo stops; what was sent is seen to meanwhile."""
    while (wait := due - time.monotonic()) > 0 and not stop.is_set():
        sender.wait(min(wait, STOP_LOOK_SECONDS))


# -- reading back --------------------------------------------------------------------------------


Place = tuple[str, int, int]  # topic, partition, offset


@dataclass(frozen=True)
class _Answer:
    """One `interaction` read back from predicted-ratings."""

    place: Place
    event_id: str
    rating: float
    version: str


def _messages(batches: Iterator[list[Message]]) -> Iterator[Message]:
    return itertools.chain.from_iterable(batches)


def _answers(batches: Iterator[list[Message]]) -> Iterator[_Answer]:
    for message in _messages(batches):
        record = orjson.loads(message.value() or b"")
        if record["kind"] == "interaction":
            source = record["source"]
            yield _Answer(
                (source["topic"], source["partition"], source["offset"]),
                record["event_id"],
                record["rating"],
                record["model_version"],
            )


def _letters(batches: Iterator[list[Message]]) -> Iterator[Place]:
    """Where the record of each dead letter came from: of an event, or of an item or a user."""
    for message in _messages(batches):
        source = orjson.loads(message.value() or b"")["source"]
        yield source["topic"], source["partition"], source["offset"]


class _Follower:
    """Follows answers and dead letters in threads, to know how far the scorer is."""

    def __init__(self, running: Cluster, stop: threading.Event) -> None:
        self._running = running
        self._stop = stop
        self._done = threading.Event()
        self._done_with: set[Place] = set()
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._follow_answers, self._follow_letters)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads, before the broker ends."""
        self._done.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def wait_for(self, events: int, tell: Callable[[str], None]) -> None:
        """Until as many events are answered or dead, or nothing has moved for a long time."""
        best, deadline = -1, time.monotonic() + STALL_SECONDS
        while not self._stop.wait(POLL_SECONDS):
            self._running.check()
            done = len(self._done_with)
            tell(f"scored {done} of {events}")
            if done >= events:
                return
            if done > best:
                best, deadline = done, time.monotonic() + STALL_SECONDS
            elif time.monotonic() > deadline:
                return

    def _read(self, topic: str) -> Iterator[list[Message]]:
        return read_topic(self._running.settings.kafka, topic, follow=True, stop=self._done)

    def _follow_answers(self) -> None:
        for answer in _answers(self._read("predicted-ratings")):
            self._done_with.add(answer.place)

    def _follow_letters(self) -> None:
        for place in _letters(self._read("dead-letters")):
            if place[0] in EVENTS:
                self._done_with.add(place)


def _await_archived(running: Cluster, stop: threading.Event) -> None:
    """Until the archive holds all that the trainer reads."""
    deadline = time.monotonic() + STALL_SECONDS
    for topic in ("journal", "reviews", "behavior", "items", "users"):
        ends: dict[int, int] = {}
        for message in _messages(read_topic(running.settings.kafka, topic, stop=stop)):
            ends[message.partition() or 0] = (message.offset() or 0) + 1
        while not stop.is_set():
            running.check()
            reached = archive.positions(running.settings.archive.url, topic)
            if all(reached.get(each, 0) >= end for each, end in ends.items()):
                break
            if time.monotonic() > deadline:
                raise DemoError(
                    f"The archiver is stuck: {topic} stands at {reached}, its topic at {ends}; its "
                    f"log is {running.children[1].log}."
                )
            stop.wait(POLL_SECONDS)


def _summarise(
    records: Sequence[Outgoing],
    places: Sequence[int],
    cut: int,
    answers: Sequence[_Answer],
    letters: Sequence[Place],
) -> Summary:
    counts = Counter(answer.place for answer in answers)
    dead = {place for place in letters if place[0] in EVENTS}
    versions = list(dict.fromkeys(answer.version for answer in answers))
    summary = Summary(
        events=len(places),
        predictions=len(answers),
        dead_letters=len(letters),
        lost=max(len(places) - len(counts.keys() | dead), 0),
        duplicated=sum(count - 1 for count in counts.values()),
        model_versions=versions,
    )
    rated, later = _rated(records, cut)
    # The first counts: one that is sent again knows its own rating.
    live = {answer.event_id: answer.rating for answer in reversed(answers)}
    known = np.array([event in live for event, _, _, _ in rated], bool)
    test = later & known
    if test.any():
        rating = np.array([stars for _, _, _, stars in rated])
        model = np.array([live.get(event, np.nan) for event, _, _, _ in rated])
        bias, mean = running_baselines(
            [user for _, user, _, _ in rated], [item for _, _, item, _ in rated], rating
        )
        summary.rmse = {
            name: round(float(np.sqrt(np.mean((predicted[test] - rating[test]) ** 2))), 6)
            for name, predicted in (("model", model), ("bias", bias), ("global", mean))
        }
    return summary


def _rated(
    records: Sequence[Outgoing], cut: int
) -> tuple[list[tuple[str, str, str, float]], NDArray[np.bool_]]:
    """Event id, user, item and stars of each rated review, and whether it came after the cut.

    A review that is there again is left out.
    """
    rated: list[tuple[str, str, str, float]] = []
    later: list[bool] = []
    seen: set[str] = set()
    for at, record in enumerate(records):
        if record.topic == "reviews" and record.value is not None:
            try:
                value = orjson.loads(record.value)
                row = (value["event_id"], value["user_id"], value["item_id"], value["rating"])
            except (orjson.JSONDecodeError, KeyError, TypeError):
                continue
            if isinstance(row[3], int | float) and row[0] not in seen:
                seen.add(row[0])
                rated.append(row)
                later.append(at >= cut)
    return rated, np.array(later, bool)
