"""A TCP proxy between clients and servers: links that are cut, slow, or broken for one process.

A cut link keeps its connections open and lets nothing through, as a network does that drops
packets; what waits flows again when it heals, or is thrown away.
"""

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from streams.embedded import HOST, free_port

ANSWER_SECONDS = 60.0  # a proxy that cannot listen ends the run
_T = TypeVar("_T")


@dataclass(frozen=True)
class Rule:
    """What is wrong with a link; `pid`: for connections of one process alone."""

    server: str
    pid: int | None = None
    delay: float = 0.0  # seconds each way; 0: cut


class _Half(asyncio.Protocol):
    """One side of a connection: what it reads goes to its peer."""

    def __init__(self, pair: "_Pair") -> None:
        self.pair = pair
        self.transport: Any = None
        self.peer: _Half | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.pause_reading()
        self.pair.made(self)

    def data_received(self, data: bytes) -> None:
        peer = self.peer
        if peer is None or peer.transport is None:
            return
        delay = self.pair.delay
        if delay:
            asyncio.get_running_loop().call_later(delay, peer.write, data)
        else:
            peer.write(data)

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def pause_writing(self) -> None:
        if self.peer and self.peer.transport:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        self.pair.flow()

    def connection_lost(self, exc: Exception | None) -> None:
        self.pair.end()


class _Pair:
    """A client's connection and ours to the server behind it."""

    def __init__(self, proxy: "Proxy", server: str) -> None:
        self.proxy, self.server = proxy, server
        self.client, self.behind = _Half(self), _Half(self)
        self.client.peer, self.behind.peer = self.behind, self.client
        self.port = 0  # the client's
        self.rule: Rule | None = None
        self._reaching: Any = None  # kept, or it may be collected before it is done

    @property
    def delay(self) -> float:
        return self.rule.delay if self.rule else 0.0

    def made(self, half: _Half) -> None:
        if half is self.client:
            self.port = half.transport.get_extra_info("peername")[1]
            self.proxy.pairs.add(self)
            self._reaching = asyncio.ensure_future(self._reach())
        else:
            self.flow()

    async def _reach(self) -> None:
        loop = asyncio.get_running_loop()
        await self.proxy.learn(self.port)
        self.rule = self.proxy.rule_of(self)
        try:
            await loop.create_connection(lambda: self.behind, HOST, self.proxy.targets[self.server])
        except OSError:
            self.end()

    def flow(self) -> None:
        """Let data through, or hold it, as the rule says."""
        for half in (self.client, self.behind):
            if half.transport is None or half.transport.is_closing():
                continue
            cut = self.rule is not None and not self.rule.delay
            if cut or self.behind.transport is None:
                half.transport.pause_reading()
            else:
                half.transport.resume_reading()

    def end(self) -> None:
        self.proxy.pairs.discard(self)
        for half in (self.client, self.behind):
            if half.transport is not None:
                half.transport.abort()


class Proxy:
    """Proxies of many servers by name; a thread of its own moves the bytes."""

    def __init__(self) -> None:
        self.targets: dict[str, int] = {}  # the servers' own ports
        self.ports: dict[str, int] = {}  # ours
        self.pairs: set[_Pair] = set()
        self._rules: list[Rule] = []
        self._local: dict[int, set[int]] = {}  # ports of processes whose links are broken
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True).start()

    def add(self, server: str, target: int, port: int | None = None) -> int:
        """Listen in front of a server's port; where."""
        self.targets[server] = target
        self.ports[server] = port = port or free_port()
        loop = self._loop
        self._run(loop.create_server(lambda: _Pair(self, server).client, HOST, port))
        return port

    def break_(self, rule: Rule) -> None:
        """Cut or slow a link, until it heals."""
        mine = {} if rule.pid is None else {rule.pid: _local_ports(rule.pid)}

        def begin() -> None:
            self._local |= mine
            self._rules.append(rule)

        self._call(begin)

    def heal(self, rule: Rule, discard: bool = False) -> None:
        """End a rule, if it is there; with `discard`, what waits is lost, and connections close."""

        def end() -> None:
            if rule in self._rules:
                self._rules.remove(rule)
            if discard:
                for pair in [pair for pair in self.pairs if pair.rule == rule]:
                    pair.end()

        self._call(end)

    def rule_of(self, pair: _Pair) -> Rule | None:
        """The rule that a connection is under; a cut before a slow link."""
        for rule in sorted(self._rules, key=lambda rule: rule.delay):
            if rule.server == pair.server and (
                rule.pid is None or pair.port in self._local[rule.pid]
            ):
                return rule
        return None

    async def learn(self, port: int) -> None:
        """Find out whether a new connection is of a process whose links are broken."""
        loop = asyncio.get_running_loop()
        for pid in {rule.pid for rule in self._rules if rule.pid is not None}:
            if port in await loop.run_in_executor(None, _local_ports, pid):
                self._local[pid].add(port)

    def close(self) -> None:
        """End all connections."""

        def end() -> None:
            for pair in list(self.pairs):
                pair.end()
            self._loop.stop()

        self._loop.call_soon_threadsafe(end)

    def _call(self, change: Any) -> None:
        async def apply() -> None:
            change()
            for pair in list(self.pairs):
                pair.rule = self.rule_of(pair)
                pair.flow()

        self._run(apply())

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(ANSWER_SECONDS)


def _local_ports(pid: int) -> set[int]:
    try:
        return {
            each.laddr.port for each in psutil.Process(pid).net_connections("tcp") if each.laddr
        }
    except psutil.Error:
        return set()
