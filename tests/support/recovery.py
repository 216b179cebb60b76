"""Official and bare clients on connections that break where a test says, and what each must have been sent."""

import asyncio
import json
from collections.abc import AsyncIterator
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
from support.proxy import EventProxy

WAYS: Final = {"polling": ["polling"], "websocket": ["websocket"], "upgrade": ["polling", "websocket"]}

every_way = pytest.mark.parametrize("way", WAYS)

both_ways = pytest.mark.parametrize("way", ["polling", "websocket"])

#: Whether the server gets to know that a connection has fallen.
both_deaths = pytest.mark.parametrize("silently", [False, True], ids=["noticed", "unnoticed"])


#: For a client that reconnects only when the test asks for it.
WAITS: Final[dict[str, Any]] = {"reconnection": False}

SECRET: Final = "a secret that is long enough for HS256"

ReceivedEvents = list[tuple[str, dict[str, Any]]]


@dataclass
class RecoveryHarness:
    """A service whose log is written to by hand, and official clients of it."""

    service: Running
    browsers: Browsers
    recorder: EventWriter
    listening: AsyncExitStack
    _lines: list[EventProxy] = field(default_factory=list)
    _users: int = 0

    def user(self) -> str:
        """The id of a new user."""
        self._users += 1
        return f"user-{self._users}"

    def open(self, user: str | None, way: str = "websocket", *, line: EventProxy | None = None, **rest: Any) -> Browser:
        """A client like the seed's: it authenticates once, and not in its `connect` handler."""
        first = {"first": {"userId": user}} if user is not None else {}
        url = line.url if line is not None else self.service.url
        return self.browsers.open(url, transports=WAYS[way], **{**first, **rest})

    async def line(self, *falls: int | Literal["connect"]) -> EventProxy:
        line = await self.listening.enter_async_context(EventProxy.open(self.service.port))
        self._lines.append(line)
        line.falls.extend(falls)
        return line

    async def feed(self, user: str) -> ReceivedEvents:
        """Everything that has happened to this user, in order."""
        feed = await self.service.service.log.feed(user, after=0, anchor=0, limit=100_000)
        return [(entry.name, body(entry)) for entry in feed.entries if entry.event is not None]

    async def cursor(self, user: str, position: int) -> str:
        """The cursor after the event at this position."""
        log = self.service.service.log
        entry = (await log.feed(user, after=position - 1, anchor=0, limit=1)).entries[0]
        return Cursor(position, entry.event_id, position).text(feed_name(log.epoch, user))

    async def complete(self, user: str, *clients: Browser, after: int = 0, skip: int = 0) -> None:
        """Wait for one more event; then each has been sent the feed after position `after`, once and in order.

        `skip`: how many of the client's first events are not compared.
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
        """Disconnect all clients, wait until nothing is left, and check what each was sent."""
        everybody = await self.browsers.forget_all()
        while self._lines:
            await self._lines.pop().end()
        for left in list(self.service.service.sockets.eio.sockets.values()):
            left.abort()  # Those whose clients have vanished.
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
        is_new = line["ack"].get("recovered") is not None if line["on"] == "ack" else not line.get("recovered", True)
        if is_new:
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
    """A bare WebSocket, which can send what no official client sends."""

    connection: websockets.ClientConnection
    #: The service's answer to CONNECT.
    hello: dict[str, Any]

    @property
    def pid(self) -> str | None:
        return self.hello.get("pid")

    async def authenticate(self, **said: Any) -> dict[str, Any]:
        await self.connection.send("420" + json.dumps(["authenticate", said]))
        return dict((await self.next("430"))[0])

    async def next(self, prefix: str = "42") -> Any:
        """The next frame that begins like this, without it. Others are skipped."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                frame = str(await self.connection.recv())
                if frame.startswith(prefix):
                    return json.loads(frame[len(prefix) :])

    async def events(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """The next `count` events."""
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
