import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
from confluent_kafka import KafkaError

from schemas.exceptions import StarcastError, UnreachableError
from starcast.settings import Settings
from streams import clients
from streams import run as running
from streams.config import KafkaConfig
from streams.run import PROCESSORS, _run_threads, run_processors, worker_slot
from tests.shops import until
from tests.unit.streams.scripted_kafka import failure


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_workers_of_a_host_have_numbers_of_their_own() -> None:
    kafka = KafkaConfig(topic_prefix="eu.")
    with ExitStack() as stack:
        taken = [stack.enter_context(worker_slot(kafka, "scorer")) for _ in range(3)]
        assert taken == [0, 1, 2]
        assert stack.enter_context(worker_slot(kafka, "items")) == 0
        other = kafka.model_copy(update={"group_id": "team/other"})
        assert stack.enter_context(worker_slot(other, "scorer")) == 0
    with worker_slot(kafka, "scorer") as slot:
        assert slot == 0


def test_the_lowest_free_number_is_taken_again() -> None:
    kafka = KafkaConfig()
    first, second = ExitStack(), ExitStack()
    assert first.enter_context(worker_slot(kafka, "scorer")) == 0
    assert second.enter_context(worker_slot(kafka, "scorer")) == 1
    first.close()
    with worker_slot(kafka, "scorer") as slot:
        assert slot == 0
    second.close()


HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_worker_gives_its_number_back(tmp_path: Path) -> None:
    with worker_slot(KafkaConfig(), "scorer"):
        (file,) = tmp_path.rglob("*.lock")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with worker_slot(KafkaConfig(), "scorer") as slot:
            assert slot == 1
        process.kill()
        process.wait()
    with worker_slot(KafkaConfig(), "scorer") as slot:
        assert slot == 0


FULL = """
import resource
from streams.config import KafkaConfig
from streams.run import worker_slot

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # writes fail as on a full disk
with worker_slot(KafkaConfig(), "scorer"):
    pass
"""


def test_a_full_disk_is_told() -> None:
    ended = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].startswith("schemas.exceptions.StarcastError: This worker")


def test_a_folder_of_locks_that_another_user_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks may be links to files of ours, which would be emptied."""
    precious = tmp_path / "precious"
    precious.write_text("models")
    other = os.getuid() + 1
    folder = tmp_path / f"starcast-{other}"
    folder.mkdir()
    (folder / "starcast-scorer-0.lock").symlink_to(precious)
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(StarcastError, match="another user's"), worker_slot(KafkaConfig(), "scorer"):
        pass
    assert precious.read_text() == "models"


def test_no_number_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SLOTS", 1)
    with (
        worker_slot(KafkaConfig(), "scorer"),
        pytest.raises(StarcastError, match="1 workers of scorer run on this host"),
        worker_slot(KafkaConfig(), "scorer"),
    ):
        pass


def test_processors_are_known_by_name() -> None:
    with pytest.raises(StarcastError, match=r"no processor scorers, faust\. Choose from scorer, "):
        run_processors(["items", "scorers", "faust"], Settings(), threading.Event())
    assert len(PROCESSORS) == 8
    with pytest.raises(StarcastError, match=r"scorer is named twice.*as many processes"):
        run_processors(["scorer", "items", "scorer"], Settings(), threading.Event())


def test_a_broker_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "REACH_SECONDS", 0.3)
    settings = Settings(kafka=KafkaConfig(bootstrap_servers="127.0.0.1:1"))
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1.*STARCAST_KAFKA__BOOTSTRAP"):
        run_processors(["items"], settings, threading.Event())


def test_kafka_is_asked_about_one_topic_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All topics of a large cluster would be megabytes, each few seconds, from each worker."""
    asked: list[str] = []
    gone = [True]

    class Asker:
        def poll(self, _: float) -> None:
            """Nothing is told."""

        def list_topics(self, topic: str, _: float) -> None:
            asked.append(topic)
            if gone[0]:
                raise failure(KafkaError._TIMED_OUT)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(running, "ASK_SECONDS", 0.01)
    monkeypatch.setattr(running, "reader", lambda *_, **__: nullcontext(Asker()))
    stop = threading.Event()
    why_not = running._watched(KafkaConfig(topic_prefix="eu."), stop)
    until(lambda: "Kafka does not answer" in (why_not() or ""))
    gone[0] = False
    until(lambda: why_not() is None)
    stop.set()
    until(lambda: "kafka-watch" not in {thread.name for thread in threading.enumerate()})
    assert set(asked) == {"eu.model-updates"}


LIGHT = """
import sys
from contextlib import ExitStack, nullcontext

from model.state import LAYOUT_HASH
from starcast.settings import Settings
from streams import dashboard, insights, run
from streams.metrics import make_metrics
from streams.store import Store

settings, metrics = Settings(), make_metrics()
with ExitStack() as stack:
    store = Store(settings.redis, LAYOUT_HASH, settings.kafka.partitions)
    models = run._loaded(settings.models, store, metrics, stack)
    shared = run._Shared(settings, store, models, metrics)
    for name in ("items", "catalog", "archiver"):
        print(run._make(name, shared, 0).name)
    print("torch" in sys.modules)
"""


def test_who_predicts_nothing_does_without_torch() -> None:
    """Half a gigabyte of each process, and seconds of its start."""
    command = [sys.executable, "-c", LIGHT]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert told == ["items", "catalog", "archiver", "False"]


def run_tasks(**tasks: Callable[[threading.Event], None]) -> tuple[list[BaseException], float]:
    """What failed, and how long it took."""
    stop = threading.Event()
    bound = {name: (lambda task=task: task(stop)) for name, task in tasks.items()}
    started = time.monotonic()
    failures = _run_threads(bound, stop)
    return failures, time.monotonic() - started


def test_what_was_loaded_is_collected_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and others list what is left of them then, on stderr."""
    stop = threading.Event()
    monkeypatch.setattr("streams.dashboard.run_dashboard", lambda *_: stop.set())
    run_processors(["dashboard"], Settings(), stop)
    assert gc.get_freeze_count() == 0


def test_one_processor_that_fails_ends_the_others() -> None:
    ended: list[str] = []

    def works(stop: threading.Event) -> None:
        stop.wait()
        ended.append("works")

    def fails(_: threading.Event) -> None:
        raise StarcastError("out of luck")

    failures, _ = run_tasks(works=works, fails=fails)
    assert [str(each) for each in failures] == ["out of luck"]
    assert ended == ["works"]


def test_processors_that_hang_do_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "STOP_SECONDS", 0.2)
    released = threading.Event()

    def hangs(_: threading.Event) -> None:
        released.wait()

    def stops(stop: threading.Event) -> None:
        stop.set()

    failures, seconds = run_tasks(a=hangs, b=hangs, c=hangs, d=stops)
    released.set()
    said = [str(each).split(" did not end")[0] for each in failures]
    assert said == ["The a", "The b", "The c"]
    assert seconds < 0.5  # together, not one after the other
