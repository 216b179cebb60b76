"""A TCP proxy that breaks connections on request and can rewrite HTTP requests."""

import asyncio
import contextlib
import random
import re
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Literal, NamedTuple

#: ``reset``: RST to both ends. ``close``: both ends are closed in order. ``half_open``: nothing passes any more, and
#: neither end is notified. ``stall``: the proxy stops reading, so that sent data piles up.
Kind = Literal["reset", "close", "half_open", "stall"]
#: Towards the server, or towards the client.
Way = Literal["up", "down"]

#: Gets the head of a request. Returns what the server gets, or None where the proxy refuses.
Rewrite = Callable[[str], str | None]


def reset(transport: asyncio.BaseTransport) -> None:
    """End a connection by RST."""
    assert isinstance(transport, asyncio.WriteTransport)
    if not transport.is_closing():
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class Fault(NamedTuple):
    """A fault of a connection after so many bytes in one direction."""

    kind: Kind
    way: Way = "down"
    after: int = 0


class _Line:
    """One client's connection, and the one to the server that goes with it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter, fault: Fault | None) -> None:
        self.ends = client, server
        self.fault = fault
        self.passed: dict[Way, int] = {"up": 0, "down": 0}
        self.deaf = False
        self.flows = asyncio.Event()
        self.flows.set()

    def strike(self, kind: Kind) -> None:
        match kind:
            case "reset":
                for end in self.ends:
                    reset(end.transport)
            case "close":
                for end in self.ends:
                    end.close()
            case "half_open":
                self.deaf = True
            case "stall":
                self.flows.clear()


class Proxy:
    """Forwards TCP to a server on this machine, and breaks connections on request.

    With `rewrite` it is a reverse proxy of one HTTP request per connection: `rewrite` returns the head to send to the
    server, or None where the request is answered with 502.
    """

    port: int

    def __init__(self, target: int, rewrite: Rewrite | None = None) -> None:
        self._target = target
        self._rewrite = rewrite
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: The faults of the next connections, one each.
        self.plan: deque[Fault] = deque()
        #: Seconds that what passes is held up, at random up to this.
        self.jitter = 0.0
        #: How many lines were struck so far.
        self.struck = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, target: int, *, listener: socket.socket | None = None, rewrite: Rewrite | None = None
    ) -> AsyncIterator["Proxy"]:
        """A proxy on this listener, or on a free port."""
        proxy = cls(target, rewrite)
        listener = listener or socket.create_server(("127.0.0.1", 0))
        server = await asyncio.start_server(proxy._accept, sock=listener, backlog=1024)
        proxy.port = server.sockets[0].getsockname()[1]
        try:
            yield proxy
        finally:
            server.close()
            for task in proxy._tasks:
                task.cancel()
            await asyncio.gather(*proxy._tasks, return_exceptions=True)
            for line in proxy._lines:
                line.strike("reset")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def strike(self, kind: Kind) -> None:
        """Break every line there is. Those that come later are whole."""
        for line in list(self._lines):
            self._strike(line, kind)

    def resume(self) -> None:
        """Let what is stalled flow on."""
        for line in self._lines:
            line.flows.set()

    def _strike(self, line: _Line, kind: Kind) -> None:
        self.struck += 1
        line.strike(kind)

    async def _accept(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        accepting = asyncio.current_task()
        assert accepting is not None
        self._tasks.add(accepting)
        fault = self.plan.popleft() if self.plan else None
        try:
            head = b"" if self._rewrite is None else await self._head(from_client, client)
            if head is None:
                return
            from_server, server = await asyncio.open_connection("127.0.0.1", self._target)
            line = _Line(client, server, fault)
            self._lines.add(line)
            server.write(head)
            try:
                await asyncio.gather(
                    self._pump(line, "up", from_client, server), self._pump(line, "down", from_server, client)
                )
            finally:
                self._lines.discard(line)
                line.strike("close")
        except OSError:
            reset(client.transport)
        except asyncio.CancelledError:
            reset(client.transport)
        finally:
            self._tasks.discard(accepting)

    async def _head(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> bytes | None:
        """The head to send to the server, or None after the request was refused or broke off."""
        assert self._rewrite is not None
        try:
            head = self._rewrite((await from_client.readuntil(b"\r\n\r\n")).decode("latin-1"))
        except asyncio.IncompleteReadError:
            head = None
        else:
            if head is None:
                client.write(b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        if head is None:
            client.close()
            return None
        return head.encode("latin-1")

    async def _pump(self, line: _Line, way: Way, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65_536):
                await line.flows.wait()
                if self.jitter:
                    await asyncio.sleep(random.uniform(0, self.jitter))
                fault, struck = line.fault, False
                if fault is not None and fault.way == way:
                    data = data[: fault.after - line.passed[way]]
                    struck = line.passed[way] + len(data) >= fault.after
                line.passed[way] += len(data)
                if not line.deaf:
                    target.write(data)
                    await target.drain()
                if fault is not None and struck:
                    line.fault = None
                    self._strike(line, fault.kind)
        if not line.deaf:
            target.close()


def forward(*, path: str = "", strip: bool = False, headers: Mapping[str, str] | None = None) -> Rewrite:
    """Forward what is below `path`, which may be stripped, with `headers` in place of the request's own."""

    def rewrite(head: str) -> str | None:
        method, target, _ = head.split(" ", 2)
        if not re.match(rf"{path}([/?]|$)", target):
            return None
        forwarded = target.removeprefix(path) if strip else target
        head = head.replace(f"{method} {target}", f"{method} {'' if forwarded[:1] == '/' else '/'}{forwarded}", 1)
        set_headers = dict(headers or {})
        if not re.search(r"^upgrade: websocket\r$", head, re.I | re.M):
            set_headers["Connection"] = "close"
        for name, value in set_headers.items():
            head = re.sub(rf"^{name}:.*\r\n", "", head, flags=re.I | re.M)
            head = head.removesuffix("\r\n") + f"{name}: {value}\r\n\r\n"
        return head

    return rewrite
