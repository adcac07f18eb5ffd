"""Processes of `starcast run` below another process, such as the demo's."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from starcast.settings import Settings, variables
from streams.embedded import HOST, Child, free_port, start_child

START_SECONDS = 90.0  # a worker imports torch and joins its group; on a busy machine that is slow
STOP_SECONDS = 12.0  # a worker ends within 10 s of SIGTERM
ANSWER_SECONDS = 10.0  # a worker that hangs must not hang who asks it


def start_worker(
    name: str,
    processors: Sequence[str],
    settings: Settings,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    start_seconds: float = START_SECONDS,
    stop_seconds: float = STOP_SECONDS,
) -> Child:
    """Start a process that runs processors, and wait until they have their partitions.

    Its address is where its metrics are; its log goes to the folder.
    """
    own = settings.model_copy(deep=True)
    own.web.metrics_host, own.web.metrics_port = HOST, free_port()
    address = f"{HOST}:{own.web.metrics_port}"
    return start_child(
        name,
        [sys.executable, "-m", "starcast", "run", *processors],
        address,
        folder,
        lambda: is_ready(address),
        start_seconds,
        stop_seconds,
        {**variables(own), **(environment or {})},
    )


def is_ready(address: str) -> bool:
    """Whether a worker has all its partitions."""
    try:
        with urlopen(f"http://{address}/ready", timeout=ANSWER_SECONDS) as answer:
            return answer.status == 200
    except OSError:
        return False


def read_metrics(address: str, *names: str) -> str:
    """A worker's metrics, or those of these names, as they are now, as Prometheus reads them."""
    query = urlencode({"name[]": names}, doseq=True)
    with urlopen(f"http://{address}/metrics?{query}", timeout=ANSWER_SECONDS) as answer:
        return answer.read().decode()
