"""A worker as a process that obeys the harness: it dies, sleeps or loses its clock on command.

`streams.run` runs unchanged. Named points are reached by way of subclasses of the Kafka clients and
two wrapped functions, put in place here alone: outside the harness they cost nothing.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal
from unittest.mock import patch

import confluent_kafka
import structlog
from pydantic import SecretStr

import streams.catalog
import streams.items
import streams.scorer
from schemas.exceptions import StarcastError
from starcast.log import LogConfig, configure
from starcast.settings import Settings
from streams import loop as loops
from streams import ownership
from streams import sender as senders
from streams import store as stores
from streams.run import run_processors
from tests.faults.protections import SWITCHES

Point = Literal[
    "polled",  # messages are here, the group's generation is not read yet
    "scoring",  # states are read, nothing is predicted
    "noted",  # offsets are in an open transaction, the batch is being worked on
    "sent",  # outputs are sent, the commit is not
    "committing",  # the commit is about to be asked for
    "committed",  # it was answered; states are not written
    "writing",  # some chunks of a batch's states are written, the header is not
    "claimed",  # a new owner has read the header; nothing is recovered
]
CHUNK = 8  # keys in a guarded write here, so that a batch has many,
ROUND_TRIP = 3  # and round trips end in the middle of a partition's
SENT_SECONDS = 5.0  # for outputs that a worker has queued to be with the brokers


@dataclass(frozen=True)
class Order:
    """What a worker is to do when `processor` reaches `point`."""

    processor: str
    point: Point
    action: Literal["kill", "kill_in", "sleep", "stop"]
    seconds: float = 0.0


class Points:
    """Orders by processor and point; each is carried out once."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._orders: dict[tuple[str, str], Order] = {}

    def listen(self, stop: threading.Event) -> None:
        """Take orders until the harness is gone."""
        clock = time.time
        while True:
            try:
                order = self._control.recv()
            except (EOFError, OSError):
                os._exit(1)
            if isinstance(order, Order):
                self._orders[order.processor, order.point] = order
            elif isinstance(order, float):  # what this process takes for the time of day
                time.time = lambda ahead=order: clock() + ahead
            else:
                self._orders.clear()

    def awaits(self, point: Point) -> bool:
        """Whether this thread is to do anything at a point."""
        return bool(self._orders) and (_processor(), point) in self._orders

    def reach(self, point: Point) -> None:
        """What a processor's thread, or that of its commits, does at a point: mostly nothing."""
        if not self._orders:
            return
        order = self._orders.pop((_processor(), point), None)
        if order is None:
            return
        self._control.send(order)
        if order.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif order.action == "kill_in":
            threading.Timer(order.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif order.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(order.seconds)


def _processor() -> str:
    return threading.current_thread().name.partition(loops.COMMITS)[0]


def _chunks_before_header(calls: Sequence[stores.Call]) -> int:
    """How many calls end with the first chunk of states whose header is still to come."""
    for number, call in enumerate(calls, 1):
        if call.function == "starcast_write" and call.arguments[2] == b"":
            return number
    return 0


def install(points: Points) -> None:
    """Put the points in place."""

    class PointedConsumer(confluent_kafka.Consumer):
        def consumer_group_metadata(self, *arguments: Any) -> Any:
            points.reach("polled")
            return super().consumer_group_metadata(*arguments)

    class PointedProducer(confluent_kafka.Producer):
        def send_offsets_to_transaction(self, *arguments: Any, **named: Any) -> Any:
            done = super().send_offsets_to_transaction(*arguments, **named)
            points.reach("noted")
            return done

        def commit_transaction(self, *arguments: Any, **named: Any) -> Any:
            if points.awaits("sent"):
                self.flush(SENT_SECONDS)
            points.reach("sent")
            points.reach("committing")
            done = super().commit_transaction(*arguments, **named)
            points.reach("committed")
            return done

    round_trip = stores.Store._round_trip

    def pointed_trip(self: Any, calls: Sequence[stores.Call], parts: stores.Keys = ()) -> list[Any]:
        done: list[Any] = []
        if points.awaits("writing") and (several := _chunks_before_header(calls)):
            done = round_trip(self, calls[:several])
            points.reach("writing")
        done += round_trip(self, calls[len(done) :], parts)
        if calls and calls[-1].function == "starcast_claim":
            points.reach("claimed")
        return done

    def pointed(run: Callable[..., Any]) -> Callable[..., Any]:
        def reaching(*arguments: Any) -> Any:
            points.reach("scoring")
            return run(*arguments)

        return reaching

    ownership.Consumer = PointedConsumer  # pyright: ignore[reportPrivateImportUsage]
    senders.Producer = PointedProducer  # pyright: ignore[reportPrivateImportUsage]
    stores.Store._round_trip = pointed_trip
    stores.WRITE_KEYS = CHUNK
    stores.CALLS_AT_ONCE = ROUND_TRIP
    streams.catalog.Catalog.batch_size = CHUNK - 1  # what it describes at once is one write
    streams.scorer.run_batch = pointed(streams.scorer.run_batch)
    streams.items.apply_items = pointed(streams.items.apply_items)


def work(
    names: Sequence[str],
    settings: Settings,
    store_url: str,
    log: str,
    control: Connection,
    switched_off: Sequence[str] = (),
) -> None:
    """Run processors in this process until SIGTERM; `switched_off` are protections."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    structlog.reset_defaults()
    configure(LogConfig(level="info", format="text"))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the harness
    faulthandler.register(signal.SIGUSR1)  # the harness asks a stuck worker where it is
    settings.redis.url = SecretStr(store_url)
    points = Points(control)
    install(points)
    for name in switched_off:
        SWITCHES[name]()
    threading.Thread(target=points.listen, args=(stop,), name="orders", daemon=True).start()
    with patch("gc.freeze"):  # a fork shares its memory as it is
        try:
            run_processors(names, settings, stop)
        except StarcastError as error:
            structlog.get_logger().error("ended", error=type(error).__name__, reason=str(error))
            control.send(f"{type(error).__name__}: {error}")  # its log may be on a full disk
            os._exit(1)
        except BaseException:
            control.send(traceback.format_exc())
            raise
    os._exit(0)
