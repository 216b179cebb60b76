"""Official and bare clients on connections that break where a test says, and what each must have been sent."""

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import websockets

from adapters.system import now
from domain.feed import Cursor, feed_name
from domain.generation import Generation
from support.builders import EventWriter, SteppableClock, body
from support.harness import TIMEOUT, Running, flood, running
from support.node import Browser, Browsers

WAYS: Final = {"polling": ["polling"], "websocket": ["websocket"], "upgrade": ["polling", "websocket"]}

every_way = pytest.mark.parametrize("way", WAYS)

both_ways = pytest.mark.parametrize("way", ["polling", "websocket"])

#: Whether the server gets to know that a connection has fallen.
both_deaths = pytest.mark.parametrize("silently", [False, True], ids=["noticed", "unnoticed"])


#: For a client that reconnects only when the test asks for it.
WAITS: Final[dict[str, Any]] = {"reconnection": False}

SECRET: Final = "a secret that is long enough for HS256"

_EVENT: Final = (b'42["continue",', b'42["generation_')


ReceivedEvents = list[tuple[str, dict[str, Any]]]

_Pump = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Line:
    """A TCP proxy that breaks the connection at a given event.

    `falls`: after how many events, counted afresh each time; or ``"connect"``, when the server has answered the
    handshake and the client does not get to know. While it is `down`, nobody gets through. Where it falls
    `silently`, the server is not notified.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.falls: deque[int | Literal["connect"]] = deque()
        self.fallen = 0
        self.down = False
        self.silently = False
        #: Bytes per second towards the client.
        self.pace: float | None = None
        self._passed = 0
        self._pipes: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}
        self._ends: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Line"]:
        async with await asyncio.start_server(self._accept, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self

    async def end(self) -> None:
        """Nobody uses it any more. It still listens: somebody who comes while a listener closes would be left over."""
        self.down = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in self._ends:
            end.transport.abort()

    def fall(self) -> None:
        """All connections end: the client gets what has passed, the server notices or does not."""
        self.fallen += 1
        for client, server in self._pipes.items():
            client.close()
            if not self.silently:
                server.transport.abort()
        self._pipes.clear()

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._keep(asyncio.current_task())
        self._ends.append(client)
        if self.down:
            client.transport.abort()
            return
        line = socket.socket()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
        line.connect(("127.0.0.1", self.port))
        answers, server = await asyncio.open_connection(sock=line)
        self._pipes[client] = server
        self._ends.append(server)
        for pump, source, target in ((self._up, reader, server), (self._down, answers, client)):
            self._keep(asyncio.create_task(self._pump(pump, source, target, client)))

    def _keep(self, task: asyncio.Task[None] | None) -> None:
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self, pump: _Pump, source: asyncio.StreamReader, target: asyncio.StreamWriter, client: Any) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await pump(source, target)
        server = self._pipes.pop(client, None)
        if server is not None:
            client.close()
            server.close()

    async def _up(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            server.write(data)
            await server.drain()

    async def _down(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        framed = b" 101 " in head.split(b"\r\n", 1)[0]
        client.write(head)
        owed = 0
        while part := await (_frame(reader) if framed else reader.read(65536)):
            if client not in self._pipes or not self._passes(part):
                return
            client.write(part)
            await client.drain()
            owed += len(part)
            if self.pace is not None and owed > 32 * 1024:
                await asyncio.sleep(owed / self.pace)
                owed = 0

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


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """One WebSocket frame of a server."""
    head = await reader.readexactly(2)
    if head[1] in (126, 127):
        head += await reader.readexactly(2 if head[1] == 126 else 8)
    size = int.from_bytes(head[2:]) if len(head) > 2 else head[1]
    return head + await reader.readexactly(size)


@dataclass
class RecoveryHarness:
    """A service whose log is written to by hand, and official clients of it."""

    service: Running
    browsers: Browsers
    recorder: EventWriter
    listening: AsyncExitStack
    _lines: list[Line] = field(default_factory=list)
    _users: int = 0

    def user(self) -> str:
        """Somebody new."""
        self._users += 1
        return f"user-{self._users}"

    def open(self, user: str | None, way: str = "websocket", *, line: Line | None = None, **rest: Any) -> Browser:
        """A client like the seed's: it authenticates once, and not in its `connect` handler."""
        first = {"first": {"userId": user}} if user is not None else {}
        url = line.url if line is not None else self.service.url
        return self.browsers.open(url, transports=WAYS[way], **{**first, **rest})

    async def line(self, *falls: int | Literal["connect"]) -> Line:
        line = await self.listening.enter_async_context(Line(self.service.port).open())
        self._lines.append(line)
        line.falls.extend(falls)
        return line

    async def feed(self, user: str) -> ReceivedEvents:
        """Everything that has happened to this user, in order."""
        feed = await self.service.service.log.feed(user, after=0, anchor=0, limit=100_000)
        return [(entry.name, body(entry)) for entry in feed.entries if entry.event is not None]

    async def cursor(self, user: str, position: int) -> str:
        """The cursor behind the event at this position."""
        log = self.service.service.log
        entry = (await log.feed(user, after=position - 1, anchor=0, limit=1)).entries[0]
        return Cursor(position, entry.event_id, position).text(feed_name(log.epoch, user))

    async def complete(self, user: str, *clients: Browser, after: int = 0, skip: int = 0) -> None:
        """Wait for one more event; then each has been sent the feed behind position `after`, once and in order.

        `skip`: so many events that it was sent are not meant.
        """
        last = await self.recorder.start_and_fail(user)
        for client in clients:
            await client.until(lambda client=client: has_ended(client, last))  # type: ignore[misc]
            assert client.events[skip:] == (await self.feed(user))[after:]

    async def pour(self, user: str, count: int, filler: int = 10) -> None:
        """One generation of so many events."""
        self.recorder.count += 1
        generation_id = f"edit_1_{self.recorder.count:016d}"
        async for _ in flood(self.service.service.log, user, generation_id, count, filler=filler):
            pass

    async def close(self) -> None:
        """Everybody goes, nothing is left, and what was sent is as it has to be everywhere."""
        everybody = await self.browsers.forget_all()
        while self._lines:
            await self._lines.pop().end()
        for left in list(self.service.service.sockets.eio.sockets.values()):
            left.abort()  # Those whose clients have gone without a word.
        await self.service.until_all_disconnected()
        for browser in everybody:
            check(browser)


def check(browser: Browser) -> None:
    """Each event has a cursor that never goes back; nothing else ends in a string; no client was sent a DISCONNECT."""
    assert "io server disconnect" not in [line["reason"] for line in browser.on("disconnect")]
    for name, *rest in browser.notices:
        assert name in (
            "authenticated",
            "authentication_required",
            "authentication_expired",
            "generation_removed",
            "queue_position",
        )
        assert len(rest) == 1
        assert isinstance(rest[0], dict)
    newest = "", (0, 0)
    for line in browser.lines:
        anew = line["ack"].get("recovered") is not None if line["on"] == "ack" else not line.get("recovered", True)
        if anew:
            newest = "", (0, 0)
        if line["on"] == "event" and len(line["args"]) == 2:
            _, cursor = line["args"]
            feed, live, _, seen = cursor.split(".")[:4]
            place = int(live), int(seen)
            if feed == newest[0]:
                assert place >= newest[1], "a cursor went back"
            newest = feed, place


def has_ended(client: Browser, generation: Generation) -> bool:
    return any(
        name == "generation_failed" and data["generationId"] == generation.generation_id for name, data in client.events
    )


@asynccontextmanager
async def other_service(
    shared_harness: RecoveryHarness, images: Path, overrides: Any = None, **settings: Any
) -> AsyncIterator[RecoveryHarness]:
    """The same clients, and another service."""
    async with running(images, overrides=overrides, **settings) as service:
        clock = (overrides or {}).get("clock") or SteppableClock(now())
        harness = RecoveryHarness(
            service, shared_harness.browsers, EventWriter(service.service.log, clock), shared_harness.listening
        )
        try:
            yield harness
        finally:
            await harness.close()


@dataclass
class RawClient:
    """A bare WebSocket: what no official client would say can be said by it."""

    connection: websockets.ClientConnection
    #: What the service said to CONNECT.
    hello: dict[str, Any]

    @property
    def pid(self) -> str | None:
        return self.hello.get("pid")

    async def authenticate(self, **said: Any) -> dict[str, Any]:
        await self.connection.send("420" + json.dumps(["authenticate", said]))
        return dict((await self.next("430"))[0])

    async def next(self, prefix: str = "42") -> Any:
        """The next frame that begins like this, without it. Others are not looked at."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                frame = str(await self.connection.recv())
                if frame.startswith(prefix):
                    return json.loads(frame[len(prefix) :])

    async def events(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """So many events, which are the next."""
        return [(name, data) for name, data, _ in [await self.next() for _ in range(count)]]


@asynccontextmanager
async def wire(harness: RecoveryHarness, **auth: Any) -> AsyncIterator[RawClient]:
    connection = await harness.service.raw()
    try:
        await connection.send("40" + (json.dumps(auth) if auth else ""))
        frame = str(await connection.recv())
        assert frame.startswith("40{"), frame
        yield RawClient(connection, json.loads(frame[2:]))
    finally:
        connection.transport.abort()


async def session(harness: RecoveryHarness, user: str, **said: Any) -> str:
    """The pid of a socket that has authenticated like this, and is gone."""
    async with wire(harness) as first:
        assert (await first.authenticate(userId=user, **said))["ok"] is True
        assert first.pid is not None
        return first.pid
