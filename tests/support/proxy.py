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
from typing import Final, Literal, NamedTuple, Self

#: ``reset``: RST to both ends. ``close``: both ends are closed in order. ``half_open``: nothing passes any more, and
#: neither end is notified. ``stall``: the proxy stops reading, so that sent data piles up. ``cut``: the client's end is
#: closed, and the server's is reset. ``vanish``: the client's end is closed, and the server is not notified.
Kind = Literal["reset", "close", "half_open", "stall", "cut", "vanish"]
#: Towards the server, or towards the client.
Way = Literal["up", "down"]

#: How the frames of events begin.
_EVENT: Final = (b'42["continue",', b'42["generation_')

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
            case "cut" | "vanish":
                self.deaf = True
                self.ends[0].close()
                if kind == "cut":
                    self.ends[1].transport.abort()


class Proxy:
    """Forwards TCP to a server on this machine, and breaks connections on request.

    With `rewrite` it is a reverse proxy of one HTTP request per connection: `rewrite` returns the head to send to the
    server, or None where the request is answered with 502.
    """

    port: int

    def __init__(self, target: int, rewrite: Rewrite | None = None) -> None:
        #: The port of the server.
        self.target = target
        self._rewrite = rewrite
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: The faults of the next connections, one each.
        self.plan: deque[Fault] = deque()
        #: Seconds that what passes is held up, at random up to this.
        self.jitter = 0.0
        #: How many lines were struck so far.
        self.struck = 0
        #: Whether connections are refused.
        self.down = False
        #: Bytes of the receive buffer towards the server; ``None``: the system's default.
        self.receive_buffer: int | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, target: int, *, listener: socket.socket | None = None, rewrite: Rewrite | None = None
    ) -> AsyncIterator[Self]:
        """A proxy on this listener, or on a free port."""
        proxy = cls(target, rewrite)
        listener = listener or socket.create_server(("127.0.0.1", 0))
        server = await asyncio.start_server(proxy._accept, sock=listener, backlog=1024)
        proxy.port = server.sockets[0].getsockname()[1]
        try:
            yield proxy
        finally:
            server.close()
            await proxy.end()

    async def end(self) -> None:
        """End all connections, and refuse those that come while the listener closes."""
        self.down = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for line in self._lines:
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
            if self.down:
                reset(client.transport)
                return
            head = b"" if self._rewrite is None else await self._head(from_client, client)
            if head is None:
                return
            from_server, server = await asyncio.open_connection(sock=await self._connect())
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

    async def _connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        if self.receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.target))
        except BaseException:
            connection.close()
            raise
        return connection

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


class EventProxy(Proxy):
    """Breaks the connections at a given event.

    `falls`: after how many events, counted afresh each time; or ``"connect"``, when the server has answered the
    handshake and the client has not received the answer. With `silently`, the server is not notified.
    """

    def __init__(self, target: int, rewrite: Rewrite | None = None) -> None:
        super().__init__(target, rewrite)
        self.receive_buffer = 32 * 1024
        self.falls: deque[int | Literal["connect"]] = deque()
        self.fallen = 0
        self.silently = False
        #: Bytes per second towards the client.
        self.pace: float | None = None
        self._passed = 0

    def fall(self) -> None:
        """Break all connections: the client gets what has passed."""
        self.fallen += 1
        self.strike("vanish" if self.silently else "cut")

    async def _pump(self, line: _Line, way: Way, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        if way == "up":
            await super()._pump(line, way, source, target)
            return
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await source.readuntil(b"\r\n\r\n")
            framed = b" 101 " in head.split(b"\r\n", 1)[0]
            target.write(head)
            sent = 0
            while part := await (_frame(source) if framed else source.read(65_536)):
                if line.deaf or not self._passes(part):
                    continue
                target.write(part)
                await target.drain()
                sent += len(part)
                if self.pace is not None and sent > 32 * 1024:
                    await asyncio.sleep(sent / self.pace)
                    sent = 0
        if not line.deaf:
            target.close()

    def _passes(self, part: bytes) -> bool:
        if not self.falls:
            return True
        if self.falls[0] == "connect":
            falls = b'40{"sid"' in part
        else:
            self._passed += sum(part.count(mark) for mark in _EVENT)
            falls = self._passed > self.falls[0]
        if falls:
            self.falls.popleft()
            self._passed = 0
            self.fall()
        return not falls


class UpgradeProxy(Proxy):
    """Breaks the client's first upgrade to a WebSocket at the worst moment.

    The WebSocket opens once `begun` is set. It is closed after the server's answer to the probe. Until `failed` is set,
    what the server answers to polling requests meanwhile waits.
    """

    def __init__(self, target: int, rewrite: Rewrite | None = None) -> None:
        super().__init__(target, rewrite)
        self.begun, self.failed = asyncio.Event(), asyncio.Event()

    async def _pump(self, line: _Line, way: Way, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65_536):
                if way == "up" and b"transport=websocket" in data:
                    await self.begun.wait()
                if way == "down" and self.begun.is_set() and data.startswith(b"HTTP/1.1 200"):
                    await self.failed.wait()
                target.write(data)
                if b"3probe" in data and not self.failed.is_set():
                    break
        target.close()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """One WebSocket frame of a server."""
    head = await reader.readexactly(2)
    if head[1] in (126, 127):
        head += await reader.readexactly(2 if head[1] == 126 else 8)
    size = int.from_bytes(head[2:]) if len(head) > 2 else head[1]
    return head + await reader.readexactly(size)


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
