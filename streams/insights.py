"""Insights: score digests to sliding windows in the store, and to alerts.

A thin Faust app reads `score-digests`; all arithmetic is in `steps` and `alerts`. A digest is
acknowledged only when no later window needs it. So after a restart the open steps are read from
Kafka again, and windows written before are not written twice: each has its end as its id in the
store's stream. Digests come at least once and uncommitted; one that was counted is discarded.
"""

import asyncio
import tempfile
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import faust
import structlog
from confluent_kafka import Message, TopicPartition

from schemas.codec import decode, encode
from schemas.exceptions import ContractError, StarcastError, UnreachableError
from schemas.records import Alert, ScoreDigest
from schemas.topics import BY_NAME
from streams.alerts import alerts
from streams.clients import KafkaOptionError, reach, reader, topic_name
from streams.config import InsightsConfig, KafkaConfig, RedisConfig
from streams.dead_letters import UNREADABLE, dead_letter, headers_of
from streams.faust_app import broker_credentials, make_app, sparing_logs
from streams.metrics import Metrics
from streams.processor import Output
from streams.producer import Outgoing, play
from streams.steps import Steps, add, close, due, is_ahead, make_steps
from streams.store import STORE_ERRORS, connect
from streams.tail import read_topic
from streams.windows import WINDOW_FIELD, WINDOWS_KEY, Window, last_window

REACH_SECONDS = 3.0  # a broker that is down must not hold back the end
STOP_SECONDS = 6.0  # a Faust service that does not end is left to the end of its event loop
FIRST_PAUSE_SECONDS = 0.5  # a broker or store that is gone is asked again this soon,
LAST_PAUSE_SECONDS = 5.0  # and later this often
SETTLED_SECONDS = 60.0  # a run of this length was no failed start: pauses begin anew
QUIET_SECONDS = 3.0  # digests come each second; after this long there are none to catch up with
FIRST_SECONDS = 12.0  # so much longer for the first ones: a broker may have just come back
TICK_SECONDS = 0.25
_LOG = structlog.get_logger(__name__)


@dataclass
class Readiness:
    """Why insights does not work; None while it does, or stands by for another that does."""

    reason: str | None = "it has not begun"


def run_insights(
    kafka: KafkaConfig,
    redis: RedisConfig,
    insights: InsightsConfig,
    stop: threading.Event,
    metrics: Metrics,
    readiness: Readiness,
) -> None:
    """Write windows and alerts until `stop` is set; waits for broker, topics and store.

    Runs an event loop of its own in the calling thread and touches no signal handler. Raises
    KafkaOptionError or UnreachableError only for settings that no waiting mends.
    """
    metrics.dead_letters.labels("insights", "contract")  # from 0: Prometheus sees no first
    client = connect(redis)
    try:
        broker_credentials(kafka)
        with tempfile.TemporaryDirectory(prefix="starcast-insights-") as folder, sparing_logs():
            key = f"{redis.key_prefix}:{WINDOWS_KEY}"
            run = _Run(insights, client, key, readiness)
            try:
                asyncio.run(_supervise(kafka, run, stop, metrics, folder))
            finally:
                # Faust holds the app for good; sketches at Python's end are told as leaked.
                run.reset(owned=False)
    finally:
        client.close()


@dataclass
class _Run:
    """What insights holds in memory. `steps` is None until the store has told where we were."""

    config: InsightsConfig
    client: Any
    key: str
    readiness: Readiness = field(default_factory=Readiness)
    owned: bool = False
    steps: Steps | None = None
    firing: list[str] = field(default_factory=list[str])
    last_arrival: float = 0.0  # of a digest or of the partition, monotonic
    unwritten: deque[Window] = field(default_factory=deque[Window])
    pending: deque[tuple[int, Any]] = field(default_factory=deque[tuple[int, Any]])

    def reset(self, owned: bool) -> None:
        """Forget everything: the partition has come or gone."""
        self.owned = owned
        self.steps = None
        self.firing = []
        self.last_arrival = time.monotonic()
        self.unwritten.clear()
        self.pending.clear()


async def _supervise(
    kafka: KafkaConfig, run: _Run, stop: threading.Event, metrics: Metrics, folder: str
) -> None:
    """Keep an app running; a new one after a failure, with longer and longer pauses."""
    pause = FIRST_PAUSE_SECONDS
    unreadable, letters = False, set[int]()
    while not stop.is_set():
        started = time.monotonic()
        try:
            await asyncio.to_thread(_find_topics, kafka)
            if unreadable:
                await asyncio.to_thread(_step_over, kafka, metrics, letters)
                unreadable = False
            await _serve(_insights_app(kafka, run, metrics, folder), stop)
        except KafkaOptionError:
            raise
        except StarcastError as error:
            run.readiness.reason = str(error)
            _LOG.warning("insights waits", reason=str(error))
        except UnicodeDecodeError:  # aiokafka's, which reads no header whose name is not UTF-8
            unreadable = True
            run.readiness.reason = "a digest's headers cannot be read"
        except Exception as error:  # noqa: BLE001  aiokafka's and Faust's failures have no base
            run.readiness.reason = f"{type(error).__name__}: {error}"
            _LOG.warning("insights starts again", reason=run.readiness.reason)
        if time.monotonic() - started > SETTLED_SECONDS:
            pause = FIRST_PAUSE_SECONDS
        await _sleep(pause, stop)
        pause = min(pause * 2, LAST_PAUSE_SECONDS)


def _find_topics(kafka: KafkaConfig) -> None:
    """Raise UnreachableError unless the broker answers and has our topics."""
    topics = reach(kafka, REACH_SECONDS).list_topics(timeout=REACH_SECONDS).topics
    wanted = [topic_name(kafka, name) for name in ("score-digests", "alerts", "dead-letters")]
    missing = [name for name in wanted if name not in topics]
    if missing:
        raise UnreachableError(
            f"Kafka at {kafka.bootstrap_servers} has no topic {', '.join(missing)}. Make them "
            "with `starcast topics apply`; insights goes on when they are there."
        )


def _step_over(kafka: KafkaConfig, metrics: Metrics, letters: set[int]) -> None:
    """Make a dead letter of the next digest whose headers cannot be read, and go on behind it.

    Windows that are open lack the digests before it, which were read and are not read again.
    `letters` are offsets after those that have one: Kafka may refuse the commit after it, as while
    another is in the group.
    """
    place = TopicPartition(topic_name(kafka, "score-digests"), 0)
    group_id = f"{kafka.group_id}-insights"
    with reader(kafka, group_id=group_id, isolation_level="read_uncommitted") as consumer:
        (place,) = consumer.committed([place], REACH_SECONDS)
        start = {0: place.offset} if place.offset >= 0 else "beginning"
        for message in chain.from_iterable(read_topic(kafka, "score-digests", start=start)):
            headers = headers_of(message)
            if headers == [UNREADABLE]:
                place.offset = (message.offset() or 0) + 1
                if place.offset not in letters:
                    letter = dead_letter(
                        message, "score-digests", "insights", "not read", headers=headers
                    )
                    sent = play([Outgoing(letter.topic, letter.key, letter.value)], kafka)
                    if sent.failed:
                        raise UnreachableError(
                            f"Kafka took no dead letter: {'; '.join(sent.failed)}."
                        )
                    letters.add(place.offset)
                    metrics.dead_letters.labels("insights", "contract").inc()
                consumer.commit(offsets=[place], asynchronous=False)
                return


async def _serve(app: faust.App, stop: threading.Event) -> None:
    """Run the app until `stop`, or until it fails: then raise what it failed of."""
    service = cast(Any, app)
    try:
        await service.start()
        while not stop.is_set() and not service.crashed:
            await _sleep(TICK_SECONDS, stop)
        if service.crashed:
            raise service.crash_reason or RuntimeError("Faust stopped without a reason")
    finally:
        _, left = await asyncio.wait([asyncio.create_task(service.stop())], timeout=STOP_SECONDS)
        if left:
            _LOG.warning("insights left Faust behind", seconds=STOP_SECONDS)


async def _sleep(seconds: float, stop: threading.Event) -> None:
    deadline = time.monotonic() + seconds
    while not stop.is_set() and time.monotonic() < deadline:
        await asyncio.sleep(min(TICK_SECONDS, seconds))


def _insights_app(kafka: KafkaConfig, run: _Run, metrics: Metrics, folder: str) -> faust.App:
    """The app with its one agent, its clock, and what a partition's coming and going does."""
    app = cast(Any, make_app(kafka, folder))
    digests = topic_name(kafka, "score-digests")
    topics = {name: app.topic(topic_name(kafka, name)) for name in ("alerts", "dead-letters")}

    async def send(output: Output) -> None:
        await (await topics[output.topic].send(key=output.key, value=output.value))

    @app.agent(app.topic(digests), name="score-digests")
    async def count(stream: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        async for event in stream.noack().events():
            while run.steps is None:
                await asyncio.sleep(TICK_SECONDS)
            run.last_arrival = time.monotonic()
            metrics.events.labels("insights", "digest").inc()
            place, letter = _count(run.steps, event.message, metrics)
            if letter is not None:
                await send(letter)
            run.pending.append((place, event))

    @app.task  # no timer: it warns of each turn that takes longer, as while the store is gone
    async def turn() -> None:  # pyright: ignore[reportUnusedFunction]
        while not app.should_stop:
            await asyncio.sleep(TICK_SECONDS)
            if run.owned:
                await _turn(run, metrics, send)

    @app.on_partitions_assigned.connect
    async def assigned(sender: Any, partitions: Any, **_: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        metrics.rebalances.labels("insights").inc()
        run.reset(owned=any(partition.topic == digests for partition in partitions))
        run.readiness.reason = "it reads where it was" if run.owned else None

    @app.on_partitions_revoked.connect
    async def revoked(sender: Any, partitions: Any, **_: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        run.reset(owned=False)
        run.readiness.reason = "it waits for its group"

    run.reset(owned=False)
    run.readiness.reason = "it waits for its group"
    app.finalize()
    return app


def _count(steps: Steps, message: Any, metrics: Metrics) -> tuple[int, Output | None]:
    """Count one digest: the step that it belongs to, or 0 and a dead letter."""
    read = decode(
        BY_NAME["score-digests"],
        [message.value],
        [(message.partition, message.offset)],
        message.topic,
    )
    problem, wrong_field = "", None
    if read.rejections:
        problem, wrong_field = read.rejections[0].reason, read.rejections[0].field
    else:
        try:
            outcome, place = add(
                steps, cast(ScoreDigest, read.records[0]), round(time.time() * 1_000)
            )
        except ContractError as error:
            problem = str(error)
        else:
            if outcome == "duplicate":
                metrics.duplicates.labels("insights").inc()
            elif outcome == "late":
                metrics.events.labels("insights", "late").inc()
            return place, None
    metrics.dead_letters.labels("insights", "contract").inc()
    source = cast(Message, _Source(message))
    return 0, dead_letter(source, "score-digests", "insights", problem, wrong_field)


@dataclass(frozen=True)
class _Source:
    """aiokafka's message with the accessors of confluent-kafka's."""

    message: Any

    def key(self) -> bytes | None:
        return self.message.key

    def value(self) -> bytes | None:
        return self.message.value

    def headers(self) -> list[tuple[str, bytes | None]]:
        headers: Any = self.message.headers or ()
        return list(headers.items() if hasattr(headers, "items") else headers)

    def partition(self) -> int:
        return self.message.partition

    def offset(self) -> int:
        return self.message.offset


async def _turn(run: _Run, metrics: Metrics, send: Callable[[Output], Awaitable[None]]) -> None:
    """Take up where the store says that we were, or close, tell and write what is due."""
    if (steps := run.steps) is None:
        await _resume(run)
        return
    if is_ahead(steps, round(time.time() * 1_000)):
        await _begin_anew(run, steps)
        return
    for alert in _close_due(run, steps):
        await send(Output("alerts", alert.rule.encode(), encode(alert)))
    await _write(run, metrics)
    _acknowledge(run, steps)


async def _resume(run: _Run) -> None:
    """Take up where the last window in the store ends; try again later if it does not answer."""
    try:
        last = await asyncio.to_thread(last_window, run.client, run.key)
    except STORE_ERRORS as error:
        await _wait_for_store(run, error)
        return
    run.readiness.reason = None
    run.firing = last.firing if last else []
    run.steps = make_steps(run.config, last.end_ms if last else None, last.trial if last else None)
    run.last_arrival = time.monotonic() + FIRST_SECONDS


async def _begin_anew(run: _Run, steps: Steps) -> None:
    """Delete the windows, since a clock was put back: the store takes none that ends before them.

    A trial goes on; digests that waited for windows to come are acknowledged with the next.
    """
    try:
        await asyncio.to_thread(run.client.delete, run.key)
    except STORE_ERRORS as error:
        await _wait_for_store(run, error)
        return
    _LOG.warning("windows begin anew: the clock is behind their end", end_ms=steps.closed)
    if run.steps is steps:  # else the partition went meanwhile
        run.steps = make_steps(run.config, trial=steps.trial)
        run.unwritten.clear()
        run.pending = deque((0, event) for _, event in run.pending)


async def _wait_for_store(run: _Run, error: Exception) -> None:
    before = run.readiness.reason
    run.readiness.reason = f"the store does not answer: {error}"
    if run.readiness.reason != before:  # a long outage is told once
        _LOG.warning("insights waits for the store", reason=str(error))
    await asyncio.sleep(FIRST_PAUSE_SECONDS)


def _close_due(run: _Run, steps: Steps) -> list[Alert]:
    """Close the steps that are over; their windows wait in `unwritten`."""
    raised: list[Alert] = []
    quiet = time.monotonic() - run.last_arrival > QUIET_SECONDS
    for end in due(steps, round(time.time() * 1_000), quiet):
        window = close(steps, end, run.config)
        if window is not None:
            raised += alerts(window, run.firing, run.config)
            run.firing = window.firing
            run.unwritten.append(window)
    while len(run.unwritten) > run.config.keep_windows:
        run.unwritten.popleft()  # the store would not keep it either
    return raised


async def _write(run: _Run, metrics: Metrics) -> None:
    """Write the windows that wait, oldest first, as far as the store takes them."""
    while run.unwritten:
        window = run.unwritten[0]
        fields = {WINDOW_FIELD: window.model_dump_json(exclude_none=True).encode()}
        try:
            await asyncio.to_thread(
                run.client.xadd,
                run.key,
                fields,
                id=f"{window.end_ms}-0",
                maxlen=run.config.keep_windows,
                approximate=False,
            )
            metrics.state_writes.labels("insights", "written").inc()
        except STORE_ERRORS as error:
            if "equal or smaller" not in str(error):
                metrics.state_writes.labels("insights", "failed").inc()
                await _wait_for_store(run, error)
                return
            # A newer window is there: another process has taken over, or a clock is a bit behind.
            metrics.state_writes.labels("insights", "fenced").inc()
            _LOG.warning("the store has a newer window", end_ms=window.end_ms)
        run.readiness.reason = None
        if run.unwritten and run.unwritten[0] is window:  # else the partition went meanwhile
            run.unwritten.popleft()


def _acknowledge(run: _Run, steps: Steps) -> None:
    """Acknowledge, in their order, the digests that no window needs which waits or is to come."""
    if steps.closed is None:
        return
    last = steps.closed + steps.step_ms - steps.window_ms
    if run.unwritten:
        last = min(last, run.unwritten[0].start_ms)
    while run.pending and run.pending[0][0] <= last:
        run.pending.popleft()[1].ack()
