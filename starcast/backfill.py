"""A shop's history into states and archive, before it goes live.

History takes the way of every event: it is played into the topics as fast as Kafka takes it, and
the processors make states, journal and archive of it. So a state that comes from history is the
same as one that was built live, and is recovered and verified in the same way. What the scorer
predicts meanwhile is history too: start those who read predictions after the backfill.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from schemas import archive
from schemas.exceptions import StarcastError
from schemas.files import read_values
from schemas.topics import BY_NAME
from starcast.settings import Settings
from streams.admin import apply_topics, committed
from streams.clients import group_name
from streams.producer import Outgoing, Sent, play
from streams.run import run_processors
from streams.tail import read_topic

# In the order in which work flows: when one has read all its topics, those of the next are whole.
STAGES: Mapping[str, tuple[str, ...]] = {
    "catalog": ("items", "users"),
    "texts": ("items", "reviews"),
    "scorer": ("reviews", "behavior", "text-features"),
    "items": ("item-updates",),
}
ARCHIVER = "archiver"
# Workers tell how they do for as long as they run: of that there is always some to be archived.
ARCHIVED = tuple(topic for topic in BY_NAME if topic != "score-digests")
LOOK_SECONDS = 1.0  # between two looks at what is left


class BackfillError(StarcastError):
    """A history that did not get in whole."""


def backfill(
    settings: Settings,
    files: Sequence[Path],
    stop: threading.Event,
    on_sent: Callable[[Sent], None] = lambda sent: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    skip: int = 0,
) -> Sent:
    """Plays record files, one after the other, and returns when states and archive hold them.

    `skip` records at their beginning are left out: an earlier call has sent them. `on_sent` is told
    of records that went out, `on_stage` which processor is waited for. `stop` ends it early. Raises
    what `apply_topics`, `play` and `run_processors` raise, and BackfillError when a record was
    refused.
    """
    apply_topics(settings.kafka)
    # Its port may be that of a worker of this host, as where a shop begins anew beside itself.
    settings = settings.model_copy(
        update={"web": settings.web.model_copy(update={"metrics_port": 0})}
    )
    done = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            run_processors([*STAGES, ARCHIVER], settings, done)
        except BaseException as problem:  # noqa: BLE001  raised again in the caller's thread
            failures.append(problem)
            done.set()

    worker = threading.Thread(target=work, name="backfill")
    worker.start()
    try:
        records = islice(_records(files, done), skip, None)
        sent = play(records, settings.kafka, stop=stop, on_progress=on_sent)
        if sent.failed:
            raise BackfillError(
                f"Kafka refused {sent.failed.total()} records: {dict(sent.failed)}. All others are "
                "in, and played again they would count twice. To go on without those, add --skip "
                f"{skip + sent.sent.total()} to the command; or mend what is wrong and play all "
                "into new names (docs/operate.md, Begin anew)."
            )
        for stage in (*STAGES, ARCHIVER):
            on_stage(stage)
            while not (stop.is_set() or done.is_set()) and _has_work(settings, stage):
                done.wait(LOOK_SECONDS)
    finally:
        done.set()
        worker.join()
    if failures:
        raise failures[0]
    return sent


def _records(files: Sequence[Path], done: threading.Event) -> Iterator[Outgoing]:
    """The records of files, until the processors have ended: nobody takes what comes then."""
    for file in files:
        for each in read_values(file):
            if done.is_set():
                return
            yield Outgoing(each.topic, each.key, each.value)


def _has_work(settings: Settings, stage: str) -> bool:
    """Whether there are records that a processor has not done with."""
    if stage == ARCHIVER:
        options = settings.archive.storage_options
        places = {
            topic: archive.positions(settings.archive.url, topic, options) for topic in ARCHIVED
        }
    else:
        found = committed(settings.kafka, group_name(settings.kafka, stage))
        places = {topic: found.get(topic, {}) for topic in STAGES[stage]}
    return any(
        bool(batch)
        for topic, positions in places.items()
        for batch in read_topic(settings.kafka, topic, start=positions)
    )
