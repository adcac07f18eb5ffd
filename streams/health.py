"""Health, readiness and Prometheus metrics of a process, over HTTP from a thread of their own.

The thread answers even when a processor is busy, so `/health` says that the process lives and
`/ready` asks the processors' own checks.
"""

import json
import socket
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from schemas.exceptions import StarcastError

REQUEST_SECONDS = 10.0  # a client that connects and says nothing would hold a thread for ever
STOP_SECONDS = 2.0  # a scrape that hangs would hold the process's end

Check = Callable[[], str | None]  # None when ready, else the reason why not


class PortError(StarcastError):
    """A port cannot be listened on."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, as balancers do that look whether a port is open, is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve_health(
    host: str, port: int, registry: CollectorRegistry, checks: Mapping[str, Check]
) -> Generator[int]:
    """Serve `/health`, `/ready` and `/metrics` while the block runs; yields the port.

    `/metrics?name[]=NAME` tells of that metric alone. Port 0 takes a free one. Raises PortError
    when the address cannot be listened on.
    """

    def answer(path: str, query: str) -> tuple[HTTPStatus, str, bytes]:
        if path == "/health":
            return HTTPStatus.OK, "application/json", b'{"alive": true}'
        if path == "/ready":
            ready, report = readiness(checks)
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            return status, "application/json", json.dumps(report).encode()
        if path == "/metrics":
            names = parse_qs(query).get("name[]")
            told: Any = registry.restricted_registry(names) if names else registry
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(told)
        return HTTPStatus.NOT_FOUND, "text/plain", b"/health, /ready and /metrics are here\n"

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            status, content_type, body = answer(path, query)
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are no news."""

    try:
        server = _Server(host, port, Handler)
    except (OSError, OverflowError) as error:
        raise PortError(
            f"Health and metrics cannot listen on {host}:{port}: {error}. Set "
            "STARCAST_WEB__METRICS_PORT to another port, or to 0 for none."
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(STOP_SECONDS)


def readiness(checks: Mapping[str, Check]) -> tuple[bool, dict[str, Any]]:
    """Whether all checks pass, and each one's answer; a check that raises does not pass."""
    reasons = {name: _reason(check) for name, check in checks.items()}
    ready = not any(reasons.values())
    report = {
        name: {"ready": False, "reason": reason} if reason else {"ready": True}
        for name, reason in reasons.items()
    }
    return ready, {"ready": ready, "checks": report}


def _reason(check: Check) -> str | None:
    try:
        return check()
    except Exception as error:  # noqa: BLE001  a check with a bug is not ready
        return f"{type(error).__name__}: {error}"
