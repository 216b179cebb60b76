"""Connection state recovery with the official client: every sentence that the contract has about it.

The log is written to by hand, so that each connection falls at a place that is known. Most tests end with
`Stage.complete`: one more event comes, and the client has been sent the whole feed, each event once and in order.
"""

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import jwt
import pytest
import pytest_asyncio
import websockets

from adapters.memory.log import MemoryLog
from adapters.realtime import engineio_socket, send_buffer
from adapters.system import now
from domain.errors import LogUnavailable
from domain.events import timestamp
from domain.feed import Cursor, Feed, feed_name
from domain.generation import Generation
from domain.ports import History
from support.builders import IN_MEMORY, Scribe, SteppableClock, body
from support.harness import HUNG, Running, flood, rest_of, running
from support.node import Browser, Browsers, browsers, needs_node

pytestmark = [needs_node, pytest.mark.asyncio(loop_scope="module")]

WAYS: Final = {"polling": ["polling"], "websocket": ["websocket"], "upgrade": ["polling", "websocket"]}
every_way = pytest.mark.parametrize("way", WAYS)
both_ways = pytest.mark.parametrize("way", ["polling", "websocket"])
#: Whether the server gets to know that a connection has fallen.
both_deaths = pytest.mark.parametrize("silently", [False, True], ids=["noticed", "unnoticed"])

#: For a client that waits until it is told to come back.
WAITS: Final[dict[str, Any]] = {"reconnection": False}
SECRET: Final = "a secret that is long enough for HS256"
_EVENT: Final = (b'42["continue",', b'42["generation_')

Told = list[tuple[str, dict[str, Any]]]
_Pump = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Line:
    """A TCP line to the server that falls where it is told to.

    `falls`: after how many events, each time counted anew; or ``"connect"``, when the server has answered the
    handshake and the client does not get to know. While it is `down`, nobody gets through. Where it falls
    `silently`, the server is not told.
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
class Stage:
    """A service whose log is written to by hand, and official clients of it."""

    service: Running
    browsers: Browsers
    scribe: Scribe
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

    async def feed(self, user: str) -> Told:
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
        last = await self.scribe.short(user)
        for client in clients:
            await client.until(lambda client=client: _has_ended(client, last))  # type: ignore[misc]
            assert client.events[skip:] == (await self.feed(user))[after:]

    async def pour(self, user: str, count: int, filler: int = 10) -> None:
        """One generation of so many events."""
        self.scribe.count += 1
        generation_id = f"edit_1_{self.scribe.count:016d}"
        async for _ in flood(self.service.service.log, user, generation_id, count, filler=filler):
            pass

    async def close(self) -> None:
        """Everybody goes, nothing is left, and what was sent is as it has to be everywhere."""
        everybody = await self.browsers.forget_all()
        while self._lines:
            await self._lines.pop().end()
        for left in list(self.service.service.sockets.eio.sockets.values()):
            left.abort()  # Those whose clients have gone without a word.
        await self.service.until_nobody_is_here()
        for browser in everybody:
            check(browser)


def check(browser: Browser) -> None:
    """Each event brings a cursor, which never goes back; nothing else ends in a string; nobody is sent away."""
    assert "io server disconnect" not in [line["reason"] for line in browser.on("disconnect")]
    for name, *rest in browser.notices:
        assert name in ("authenticated", "authentication_required", "authentication_expired")
        assert len(rest) == 1
        assert isinstance(rest[0], dict)
    newest = "", (0, 0)
    for line in browser.lines:
        anew = line["ack"].get("recovered") is not None if line["on"] == "ack" else not line.get("recovered", True)
        if anew:
            newest = "", (0, 0)
        if line["on"] == "event" and line["name"].startswith(("continue", "generation_")):
            _, cursor = line["args"]
            feed, live, _, seen = cursor.split(".")[:4]
            place = int(live), int(seen)
            if feed == newest[0]:
                assert place >= newest[1], "a cursor went back"
            newest = feed, place


def _has_ended(client: Browser, generation: Generation) -> bool:
    return any(
        name == "generation_failed" and data["generationId"] == generation.generation_id for name, data in client.events
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "sqlite"])
async def theatre(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    images: Path = tmp_path_factory.mktemp("images")
    with TemporaryDirectory(dir=IN_MEMORY) as folder:
        log = "memory://" if request.param == "memory" else f"sqlite:///{folder}/log.db"
        async with running(images, log=log) as service, AsyncExitStack() as listening, browsers() as everybody:
            stage = Stage(service, everybody, Scribe(service.service.log, SteppableClock(now())), listening)
            yield stage
            await stage.close()


@pytest_asyncio.fixture(loop_scope="module")
async def stage(theatre: Stage) -> AsyncIterator[Stage]:
    yield theatre
    await theatre.close()


@asynccontextmanager
async def other_stage(theatre: Stage, images: Path, overrides: Any = None, **settings: Any) -> AsyncIterator[Stage]:
    """The same clients, and another service."""
    async with running(images, overrides=overrides, **settings) as service:
        clock = (overrides or {}).get("clock") or SteppableClock(now())
        stage = Stage(service, theatre.browsers, Scribe(service.service.log, clock), theatre.listening)
        try:
            yield stage
        finally:
            await stage.close()


async def test_connect_carries_a_pid_and_every_event_its_cursor_and_nothing_else_ends_in_a_string(stage: Stage) -> None:
    user = stage.user()
    clients = [stage.open(user, way) for way in WAYS] + [stage.open(None, auth={"userId": user})]
    for client in clients:
        await client.connected()
        await stage.service.until(lambda: len(stage.service.service.hub.rooms.get(user, ())) == len(clients))
    await stage.scribe.whole(user)
    await stage.scribe.whole(user, "generate")
    for client in clients:
        nack = await client.call("subscribe_to_generation", {"generationId": "no"})
        assert nack["ok"] is False
        hello = await client.connected()
        assert hello["recovered"] is False
        assert isinstance(hello["pid"], str)
        assert len(hello["pid"]) >= 32
        assert hello["pid"] != hello["sid"]
    await stage.complete(user, *clients)
    due = [await stage.cursor(user, position) for position in range(1, 14)]
    for client in clients:
        assert [further for [further] in client.further] == due
    assert len({(await client.connected())["pid"] for client in clients}) == len(clients)


@every_way
@pytest.mark.parametrize("end", ["cut", "close"])
async def test_a_client_that_was_away_is_recovered_with_all_it_missed(stage: Stage, way: str, end: str) -> None:
    user = stage.user()
    client = stage.open(user, way, **WAITS)
    before = await client.ack()
    assert before["recovered"] is False
    if way == "upgrade":
        await client.until(lambda: bool(client.on("upgrade")))
    running = await stage.scribe.move(await stage.scribe.start(user), "composition")
    await client.until(lambda: len(client.events) == 2)
    client.do(end)
    await client.disconnected()
    await stage.scribe.finish(running)
    for kind in ("edit", "generate"):
        await stage.scribe.whole(user, kind)
    await stage.scribe.start(user)
    client.do("connect")
    again, first = await client.connected(2), await client.connected()
    assert again["recovered"] is True
    assert again["pid"] == first["pid"]
    assert again["sid"] != first["sid"]
    await stage.complete(user, client)
    assert client.notices == []
    assert len(client.on("ack")) == 1


@every_way
async def test_a_connection_that_fell_before_the_first_event_is_recovered(stage: Stage, way: str) -> None:
    user = stage.user()
    client = stage.open(user, way, **WAITS)
    await client.ack()
    client.do("cut")
    await client.disconnected()
    for _ in range(2):  # Also a second time, when nothing has happened since the first.
        client.do("connect")
        assert (await client.connected(len(client.on("connect")) + 1))["recovered"] is True
        client.do("cut")
        await client.disconnected(len(client.on("disconnect")) + 1)
    await stage.scribe.whole(user)
    client.do("connect")
    await stage.complete(user, client)


@every_way
@both_deaths
async def test_a_connection_may_fall_after_any_event_of_a_replay(
    stage: Stage, way: str, silently: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two generations run, interleaved; when the clients come back, one has ended and a third has come and gone."""
    monkeypatch.setattr(engineio_socket, "MAX_BATCH", 1)  # One event in each polling answer.
    user, scribe = stage.user(), stage.scribe
    one, two = await scribe.start(user), await scribe.start(user, "generate")
    for status, other in [("composition", "composition"), ("composition_completed", "composition_completed")]:
        one, two = await scribe.move(one, status), await scribe.move(two, other)
    one = await scribe.move(one, "openai_editing")
    replayed = len(await stage.feed(user))
    assert replayed == 7
    lines = [await stage.line(place) for place in range(replayed)]
    clients = []
    for line in lines:
        line.silently = silently
        clients.append(stage.open(user, way, line=line, **WAITS))
    for place, client in enumerate(clients):
        await client.disconnected()
        assert len(client.events) == place
    await scribe.finish(one)
    two = await scribe.move(two, "ai_generation")
    await scribe.whole(user)
    for client in clients:
        client.do("connect")
    for client in clients:
        assert (await client.connected(2))["recovered"] is True
    # Those that the server had not noticed have been replaced.
    await stage.service.until(lambda: len(stage.service.service.hub.rooms[user]) == len(clients))
    await scribe.finish(two)
    await stage.complete(user, *clients)


@every_way
@both_deaths
async def test_a_connection_may_fall_again_and_again_while_events_come(stage: Stage, way: str, silently: bool) -> None:
    user = stage.user()
    falls: list[int | Literal["connect"]] = [0, 1, "connect", 0, 0, 17, "connect", "connect", 40, 5, 90]
    line = await stage.line(*falls)
    line.silently = silently
    client = stage.open(user, way, line=line)
    await client.ack()
    pouring = asyncio.create_task(stage.pour(user, 400, filler=300))
    await client.until(lambda: line.fallen == len(falls))
    line.down = True
    line.fall()
    fallen = len(client.on("disconnect"))
    await pouring
    await client.until(lambda: len(client.on("disconnect")) >= fallen)
    line.down = False
    await stage.complete(user, client)
    assert len(client.on("connect")) > 1
    assert {each["pid"] for each in client.on("connect")} == {(await client.connected())["pid"]}
    assert all(each["recovered"] for each in client.on("connect")[1:])


async def test_after_another_user_took_the_socket_over_it_is_theirs_that_is_recovered(stage: Stage) -> None:
    for way in WAYS:
        ada, bob = stage.user(), stage.user()
        adas = await stage.scribe.start(ada)
        client = stage.open(ada, way, **WAITS)
        await client.until(lambda client=client: len(client.events) == 1)  # type: ignore[misc]
        assert (await client.call("authenticate", {"userId": bob}))["userId"] == bob
        client.do("cut")  # Before bob's first event: the client says ada's offset.
        await client.disconnected()
        adas = await stage.scribe.finish(adas)
        await stage.scribe.whole(bob)
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
        await stage.scribe.short(ada)
        hers = (await stage.feed(ada))[:1]
        await stage.complete(bob, client, skip=1)
        assert client.events[:1] == hers
        assert (await client.call("authenticate", {"userId": bob}))["recovered"] is True


async def test_a_user_who_comes_back_to_the_same_socket_is_recovered_after_it(stage: Stage) -> None:
    ada, bob = stage.user(), stage.user()
    client = stage.open(ada, **WAITS)
    await client.ack()
    await stage.scribe.whole(ada)
    await client.until(lambda: len(client.events) == 6)
    await client.call("authenticate", {"userId": bob})
    await stage.scribe.whole(ada)
    await client.call("authenticate", {"userId": ada})
    client.do("cut")  # What it says last of ada lies before the time of bob, which it has left out.
    await client.disconnected()
    await stage.scribe.whole(ada)
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await stage.complete(ada, client, after=12, skip=6)


async def test_a_socket_that_is_taken_over_without_recovery_cannot_be_taken_up_as_the_former_user(stage: Stage) -> None:
    ada, bob = stage.user(), stage.user()
    hers = await stage.scribe.start(ada)
    client = stage.open(ada, **WAITS)
    await client.until(lambda: len(client.events) == 1)
    pid = (await client.connected())["pid"]
    await client.call("authenticate", {"userId": bob, "recovery": False})
    client.do("cut")
    await client.disconnected()
    await stage.scribe.finish(hers)
    connection = await stage.service.raw()
    await connection.send("40" + json.dumps({"pid": pid}))
    hello = json.loads(str(await connection.recv())[2:])
    await connection.close()
    assert hello["pid"] != pid


@both_ways
async def test_a_disconnect_of_the_client_ends_the_pid_and_its_offset_is_the_next_cursor(
    stage: Stage, way: str
) -> None:
    user = stage.user()
    client = stage.open(user, way)
    await client.ack()
    running = await stage.scribe.move(await stage.scribe.start(user), "composition")
    await client.until(lambda: len(client.events) == 2)
    client.do("disconnect")
    assert await client.disconnected() == "io client disconnect"
    running = await stage.scribe.finish(running)
    client.do("connect")
    again = await client.connected(2)
    assert again["recovered"] is False
    assert again["pid"] != (await client.connected())["pid"]
    sessions, ended = stage.service.service.sessions, (await client.connected())["pid"]
    async with asyncio.timeout(HUNG):
        while await sessions.load(ended, at=now()) is not None:  # It counts as ended before it is written down.
            await asyncio.sleep(0.01)
    ack = await client.call("authenticate", {"userId": user})
    assert ack["recovered"] is True
    await client.until(lambda: len(client.events) == 6)
    client.do("cut")  # And the new pid begins there.
    assert (await client.connected(3))["recovered"] is True
    await stage.complete(user, client)


async def test_an_offset_that_is_not_the_users_or_comes_with_a_cursor_does_not_count(stage: Stage) -> None:
    ada, bob = stage.user(), stage.user()
    first, second = stage.open(ada), stage.open(ada)
    await first.ack()
    await second.ack()
    await stage.scribe.whole(ada)
    for client in (first, second):
        await client.until(lambda client=client: len(client.events) == 6)  # type: ignore[misc]
        client.do("disconnect")
        await client.disconnected()
        client.do("connect")
        await client.connected(2)
    ack = await first.call("authenticate", {"userId": bob})
    assert ack["recovered"] is False
    await stage.complete(bob, first, skip=6)
    # A cursor that is given counts, also where it is older, and where it is none.
    third = await stage.cursor(ada, 3)
    ack = await second.call("authenticate", {"userId": ada, "cursor": third})
    assert (ack["recovered"], ack["cursor"]) == (True, third)
    await stage.complete(ada, second, after=3, skip=6)
    second.do("disconnect")
    await second.disconnected(2)
    second.do("connect")
    await second.connected(3)
    assert (await second.call("authenticate", {"userId": ada, "cursor": ""}))["recovered"] is False


async def test_a_disconnect_has_ended_the_pid_before_the_packet_behind_it_asks_for_it(stage: Stage) -> None:
    user = stage.user()
    async with wire(stage, userId=user) as client:
        again = json.dumps({"pid": client.pid})
        await asyncio.gather(client.connection.send("41"), client.connection.send("40" + again))
        assert (await client.next("40"))["pid"] != client.pid
    http, path = stage.service.http, "/socket.io/?EIO=4&transport=polling"
    path += f"&sid={json.loads((await http.get(path)).text[1:])['sid']}"
    await http.post(path, content=f'40{{"userId":"{user}"}}')
    pid = json.loads((await http.get(path)).text.split("\x1e")[0][2:])["pid"]
    await http.post(path, content="41\x1e40" + json.dumps({"pid": pid}))
    answer = (await http.get(path)).text.split("\x1e")
    assert next(json.loads(each[2:]) for each in answer if each.startswith("40"))["pid"] != pid


@every_way
async def test_a_client_whose_handshake_names_its_user_is_told_so_first_and_nothing_is_doubled(
    stage: Stage, way: str
) -> None:
    user = stage.user()
    running = await stage.scribe.move(await stage.scribe.start(user), "composition")
    old = await stage.cursor(user, 1)
    clients = [stage.open(None, way, auth={"userId": user, **given}, **WAITS) for given in ({}, {"cursor": old})]
    for client, missed in zip(clients, (2, 1), strict=True):
        await client.until(lambda client=client, missed=missed: len(client.events) == missed)  # type: ignore[misc]
        client.do("cut")
        await client.disconnected()
    await stage.scribe.finish(running)
    for client in clients:  # The known pid counts before the cursor, which is still the old one.
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
    for client, began, recovered in zip(clients, (0, 1), (False, True), strict=True):
        await stage.complete(user, client, after=began)
        order = [line.get("name", line["on"]) for line in client.lines if line["on"] in ("connect", "event")]
        places = [place for place, name in enumerate(order) if name == "connect"]
        assert [order[place + 1] for place in places] == ["authenticated"] * 2
        assert [(each[0], each[1]["userId"], each[1]["recovered"]) for each in client.notices] == [
            ("authenticated", user, recovered),
            ("authenticated", user, True),
        ]


@every_way
@pytest.mark.parametrize("given", ["nothing", "its newest cursor", "no cursor"])
async def test_a_connect_handler_that_authenticates_again_gets_a_fresh_ack_and_nothing_again(
    stage: Stage, way: str, given: str
) -> None:
    user = stage.user()
    running = await stage.scribe.start(user)
    extra = {"nothing": {}, "its newest cursor": {"cursor": await stage.cursor(user, 1)}, "no cursor": {"cursor": ""}}
    client = stage.open(None, way, always={"userId": user, **extra[given]}, **WAITS)
    ack = await client.ack("always")
    assert ack["recovered"] is (given == "its newest cursor")
    running = await stage.scribe.move(running, "composition")
    began = 1 if given == "its newest cursor" else 0
    await client.until(lambda: len(client.events) == 2 - began)
    client.do("cut")
    await client.disconnected()
    await stage.scribe.finish(running)
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    ack = await client.ack("always", 2)
    assert (ack["ok"], ack["recovered"], ack["userId"]) == (True, True, user)
    assert ack["generations"][0]["status"] == "completed"
    await stage.complete(user, client, after=began)


@dataclass
class Wire:
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
        async with asyncio.timeout(HUNG):
            while True:
                frame = str(await self.connection.recv())
                if frame.startswith(prefix):
                    return json.loads(frame[len(prefix) :])

    async def events(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """So many events, which are the next."""
        return [(name, data) for name, data, _ in [await self.next() for _ in range(count)]]


@asynccontextmanager
async def wire(stage: Stage, **auth: Any) -> AsyncIterator[Wire]:
    connection = await stage.service.raw()
    try:
        await connection.send("40" + (json.dumps(auth) if auth else ""))
        frame = str(await connection.recv())
        assert frame.startswith("40{"), frame
        yield Wire(connection, json.loads(frame[2:]))
    finally:
        connection.transport.abort()


async def session(stage: Stage, user: str, **said: Any) -> str:
    """The pid of a socket that has authenticated like this, and is gone."""
    async with wire(stage) as first:
        assert (await first.authenticate(userId=user, **said))["ok"] is True
        assert first.pid is not None
        return first.pid


@pytest.mark.parametrize("pid", ["x", "", "x" * 60_000])
async def test_an_unknown_pid_is_unusable_and_the_offset_is_the_next_cursor(stage: Stage, pid: Any) -> None:
    await _offset_counts_after(stage, pid)


@pytest.mark.parametrize("pid", [7, [], {"a": 1}, True])
async def test_a_pid_of_the_wrong_type_is_unusable_and_the_offset_is_the_next_cursor(stage: Stage, pid: Any) -> None:
    await _offset_counts_after(stage, pid)


async def _offset_counts_after(stage: Stage, pid: Any) -> None:
    user = stage.user()
    await stage.scribe.whole(user)
    offset = await stage.cursor(user, 2)
    async with wire(stage, pid=pid, offset=offset) as client:
        assert client.pid is not None
        assert client.pid != pid
        await client.connection.send("421" + json.dumps(["subscribe_to_generation", {"generationId": "x"}]))
        assert (await client.next("431"))[0]["code"] == "unauthenticated"
        # One that fails changes nothing: the offset still counts.
        assert (await client.authenticate(userId=""))["code"] == "bad_request"
        ack = await client.authenticate(userId=user)
        assert (ack["recovered"], ack["cursor"]) == (True, offset)
        assert await client.events(4) == (await stage.feed(user))[2:]
    async with wire(stage, pid=pid, offset=offset, userId=user) as client:
        name, hello = await client.next()
        assert (name, hello["recovered"], hello["cursor"]) == ("authenticated", True, offset)
        assert await client.events(4) == (await stage.feed(user))[2:]


async def test_a_pid_is_unusable_where_the_handshake_names_another_user(stage: Stage) -> None:
    ada, bob = stage.user(), stage.user()
    await stage.scribe.whole(ada)
    running = await stage.scribe.start(bob)
    pid = await session(stage, ada)
    async with wire(stage, pid=pid, offset=await stage.cursor(ada, 6), userId=bob) as client:
        assert client.pid != pid
        name, hello = await client.next()
        assert (name, hello["userId"], hello["recovered"]) == ("authenticated", bob, False)
        await stage.scribe.whole(ada)
        await stage.scribe.finish(running)
        assert await client.events(6) == await stage.feed(bob)


@pytest.mark.parametrize("offset", ["", "x", 7, None, True, [], {}, "another's", "of another log", "older", "left out"])
async def test_an_offset_that_is_none_of_the_sessions_counts_as_its_base(stage: Stage, offset: Any) -> None:
    user, other = stage.user(), stage.user()
    await stage.scribe.whole(user)
    await stage.scribe.whole(other)
    base = await stage.cursor(user, 3)
    pid = await session(stage, user, cursor=base)
    real = {
        "another's": await stage.cursor(other, 5),
        "of another log": base.replace(base[0], "0" if base[0] == "1" else "1", 1),
        "older": await stage.cursor(user, 1),
    }
    given = {} if offset == "left out" else {"offset": real.get(offset, offset) if isinstance(offset, str) else offset}
    async with wire(stage, pid=pid, **given) as client:
        assert client.pid == pid
        assert await client.events(3) == (await stage.feed(user))[3:]


@pytest.mark.parametrize("fault", ["an id that never was", "a place that is not yet", "a generation deleted since"])
async def test_an_offset_that_is_unusable_otherwise_makes_the_pid_so(stage: Stage, fault: str) -> None:
    user = stage.user()
    pid = await session(stage, user)
    generation = await stage.scribe.whole(user)
    feed, live, event_id, seen = (await stage.cursor(user, 4)).split(".")[:4]
    offset = {
        "an id that never was": f"{feed}.{live}.{int(event_id, 16) ^ 1:x}.{seen}",
        "a place that is not yet": f"{feed}.99.{event_id}.99",
    }.get(fault, f"{feed}.{live}.{event_id}.{seen}")
    if fault == "a generation deleted since":
        await stage.service.service.log.remove(generation.generation_id, retention=False)
    async with wire(stage, pid=pid, offset=offset) as client:
        assert client.pid != pid
        ack = await client.authenticate(userId=user)
        assert ack["recovered"] is False
        await stage.scribe.whole(user)
        assert await client.events(6) == (await stage.feed(user))[-6:]


@both_ways
async def test_an_offset_behind_retention_is_not_recovered_and_says_so(stage: Stage, way: str) -> None:
    user, log = stage.user(), stage.service.service.log
    client = stage.open(user, way, **WAITS)
    await client.ack()
    running = await stage.scribe.start(user)
    await client.until(lambda: len(client.events) == 1)
    client.do("cut")
    await client.disconnected()
    gone = await stage.scribe.whole(user)
    assert await log.remove(gone.generation_id, retention=True)
    running = await stage.scribe.move(running, "composition")
    client.do("connect")
    again = await client.connected(2)
    assert again["recovered"] is False
    assert again["pid"] != (await client.connected())["pid"]
    ack = await client.call("authenticate", {"userId": user})
    assert ack["recovered"] is False
    assert [(each["generationId"], each["sequence"]) for each in ack["generations"]] == [(running.generation_id, 2)]
    await stage.scribe.finish(running)
    # What still ran is sent anew, and then what comes.
    await stage.complete(user, client, skip=1)


async def test_a_generation_that_had_ended_and_was_purged_takes_no_offset_away(stage: Stage) -> None:
    user, log = stage.user(), stage.service.service.log
    client = stage.open(user, **WAITS)
    await client.ack()
    gone = await stage.scribe.whole(user)
    await stage.scribe.start(user)
    await client.until(lambda: len(client.events) == 7)
    client.do("cut")
    await client.disconnected()
    assert await log.remove(gone.generation_id, retention=True)
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await stage.complete(user, client, skip=6)


async def test_a_pid_taken_up_again_closes_the_older_socket(stage: Stage) -> None:
    for way in WAYS:
        user = stage.user()
        client = stage.open(user, way, **WAITS)
        pid = (await client.connected())["pid"]
        await client.ack()
        if way == "upgrade":
            await client.until(lambda client=client: bool(client.on("upgrade")))  # type: ignore[misc]
        await stage.scribe.whole(user)
        await client.until(lambda client=client: len(client.events) == 6)  # type: ignore[misc]
        async with wire(stage, pid=pid, offset=client.further[3][0]) as newer:
            assert newer.pid == pid
            assert await newer.events(2) == (await stage.feed(user))[4:]
            assert "transport" in await client.disconnected()
            await stage.scribe.short(user)
            assert await newer.events(2) == (await stage.feed(user))[6:]
            assert len(client.events) == 6
            assert len(stage.service.service.hub.rooms[user]) == 1
            client.do("connect")  # And that one has it back in the same way.
            assert (await client.connected(2))["recovered"] is True
            assert not [frame for frame in await rest_of(newer.connection) if frame.startswith("41")]
        await stage.complete(user, client)


async def test_the_devices_of_a_user_are_recovered_each_for_itself(stage: Stage) -> None:
    user = stage.user()
    phone, laptop = stage.open(user, **WAITS), stage.open(user, "polling", **WAITS)
    await phone.ack()
    await laptop.ack()
    running = await stage.scribe.start(user)
    await phone.until(lambda: len(phone.events) == 1)
    phone.do("cut")
    await phone.disconnected()
    running = await stage.scribe.move(running, "composition")
    await laptop.until(lambda: len(laptop.events) == 2)
    laptop.do("cut")
    await laptop.disconnected()
    await stage.scribe.finish(running)
    for client in (laptop, phone):
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
    await stage.complete(user, phone, laptop)


@both_ways
async def test_a_failed_authenticate_changes_nothing_of_what_is_recovered(stage: Stage, way: str) -> None:
    user = stage.user()
    client = stage.open(user, way, **WAITS)
    await client.ack()
    assert (await client.call("authenticate", {"userId": ""}))["ok"] is False
    client.do("cut")
    await client.disconnected()
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await stage.complete(user, client)


class SilentLog(MemoryLog):
    """One that does not answer these questions."""

    silent: tuple[str, ...] = ()

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        if "generations" in self.silent:
            raise LogUnavailable
        return await super().generations(user_id, active=active, before=before, limit=limit)

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        if "feed" in self.silent:
            raise LogUnavailable
        return await super().feed(user_id, after=after, anchor=anchor, limit=limit)


@both_ways
async def test_while_the_log_does_not_answer_a_client_comes_back_until_it_is_recovered(
    theatre: Stage, tmp_path: Path, way: str
) -> None:
    log = SilentLog(epoch="e1", credits=100, clock=now)
    async with other_stage(theatre, tmp_path, {"log": log}) as stage:
        client = stage.open("eve", way)
        await client.ack()
        await stage.scribe.start("eve")
        await client.until(lambda: len(client.events) == 1)
        log.silent = ("feed",)
        client.do("cut")
        await client.disconnected(3)
        assert len(client.on("connect")) == 1
        await stage.scribe.whole("eve")
        log.silent = ()
        assert (await client.connected(2))["recovered"] is True
        await stage.complete("eve", client)
        # Over polling the client tells of each try that came to nothing; a refusal would have a code.
        assert not any("data" in each for each in client.on("refused"))


async def test_an_authenticate_that_the_log_did_not_answer_leaves_the_pid_where_it_was(
    theatre: Stage, tmp_path: Path
) -> None:
    log = SilentLog(epoch="e1", credits=100, clock=now)
    async with other_stage(theatre, tmp_path, {"log": log}) as stage:
        client = stage.open("eve", **WAITS)
        await client.ack()
        log.silent = ("generations",)
        assert (await client.call("authenticate", {"userId": "bob"}))["code"] == "unavailable"
        log.silent = ()
        client.do("cut")
        await client.disconnected()
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
        assert list(stage.service.service.hub.rooms) == ["eve"]


@pytest.mark.parametrize("where", ["handshake", "authenticate"])
async def test_a_client_of_one_argument_gets_one_with_the_cursor_in_it_and_goes_on_from_there(
    stage: Stage, where: str
) -> None:
    user, told = stage.user(), list[dict[str, Any]]()
    news = asyncio.Event()

    def one_argument(data: dict[str, Any]) -> None:
        told.append(data)
        news.set()

    def listen(client: Any) -> None:
        for name in ("generation_started", "continue", "generation_completed"):
            client.on(name, one_argument)

    async def until(count: int) -> None:
        async with asyncio.timeout(HUNG):
            while len(told) < count:
                news.clear()
                await news.wait()

    handshake = {"recovery": False} if where == "handshake" else {"x": 1}
    said = {"recovery": False} if where == "authenticate" else {}
    async with stage.service.phone(**handshake) as phone:
        listen(phone.client)
        assert (await phone.authenticate(user, **said))["recovered"] is False
        running = await stage.scribe.move(await stage.scribe.start(user), "composition")
        await until(2)
    assert [data["cursor"] for data in told] == [await stage.cursor(user, 1), await stage.cursor(user, 2)]
    await stage.scribe.finish(running)
    async with stage.service.phone(**handshake) as phone:
        listen(phone.client)
        ack = await phone.authenticate(user, cursor=told[-1]["cursor"], **said)
        assert ack["recovered"] is True
        await until(6)
        await stage.scribe.whole(user)
        await until(12)
    events = [{key: value for key, value in data.items() if key != "cursor"} for data in told]
    assert events == [data for _, data in await stage.feed(user)]


async def test_a_client_without_recovery_has_no_usable_pid(stage: Stage) -> None:
    user = stage.user()
    async with wire(stage, recovery=False) as client:
        assert client.pid is None
    async with wire(stage, recovery=False, userId=user) as client:
        assert client.pid is None
        assert (await client.next())[0] == "authenticated"
    pid = await session(stage, user, recovery=False)
    async with wire(stage, pid=pid) as client:
        assert client.pid != pid
    pid = await session(stage, user)
    async with wire(stage, recovery=False, pid=pid) as client:
        assert client.pid is None


@both_ways
async def test_a_replay_that_was_asked_for_is_not_resumed_and_takes_no_cursor_back(
    stage: Stage, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engineio_socket, "MAX_BATCH", 1)
    user = stage.user()
    old = await stage.scribe.whole(user)
    line = await stage.line()
    client = stage.open(user, way, line=line, **WAITS)
    await client.ack()
    running = await stage.scribe.start(user)
    await client.until(lambda: len(client.events) == 1)
    line.falls.append(3)
    client.do("emit", ref="never", name="subscribe_to_generation", args=[{"generationId": old.generation_id}])
    await client.disconnected()
    assert [data["sequence"] for _, data in client.events] == [1, 1, 2, 3]
    await stage.scribe.move(running, "composition")
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await client.until(lambda: len(client.events) == 5)
    assert client.events[4][1]["generationId"] == running.generation_id
    again = await client.call("subscribe_to_generation", {"generationId": old.generation_id})
    assert again["ok"] is True  # It was before the cursor, and so counts as sent.
    await client.call("subscribe_to_generation", {"generationId": old.generation_id, "after": 3})
    await client.until(lambda: len(client.events) == 8)
    assert [data["sequence"] for _, data in client.events[5:]] == [4, 5, 6]
    # Each replayed event carried the place that the feed had been shown up to.
    place = await stage.cursor(user, 7)
    assert [further for [further] in client.further[:4]] == [place] * 4
    assert [further for [further] in client.further[5:]] == [await stage.cursor(user, 8)] * 3
    await stage.complete(user, client, after=8, skip=8)


async def test_replays_that_are_asked_for_while_events_come_take_no_cursor_back(stage: Stage) -> None:
    user = stage.user()
    old = [await stage.scribe.whole(user) for _ in range(5)]
    line = await stage.line(30, 60, 20, 200)
    client = stage.open(user, line=line)
    await client.ack()
    pouring = asyncio.create_task(stage.pour(user, 400))
    asked = 0
    while not pouring.done():
        client.do("emit", ref="any", name="subscribe_to_generation", args=[
            {"generationId": old[asked % 5].generation_id, "after": asked % 6}
        ])  # fmt: skip
        asked += 1
        await asyncio.sleep(0.002)
    await pouring
    last = await stage.scribe.short(user)
    await client.until(lambda: _has_ended(client, last))
    names = {each.generation_id for each in old}
    by_itself = [event for event in client.events if event[1]["generationId"] not in names]
    assert by_itself == (await stage.feed(user))[30:]
    assert all(each["recovered"] for each in client.on("connect")[1:])


def token(clock: SteppableClock, user: str, minutes: float) -> str:
    return jwt.encode({"sub": user, "exp": clock().timestamp() + minutes * 60}, SECRET, "HS256")


@pytest.fixture
def clock() -> SteppableClock:
    return SteppableClock(now())


@asynccontextmanager
async def keyed(theatre: Stage, images: Path, clock: SteppableClock) -> AsyncIterator[Stage]:
    async with other_stage(theatre, images, {"clock": clock}, jwt_secret=SECRET) as stage:
        yield stage
        stage.service.phones.clear()
        stage.service.server.begin_shutdown(now=True)  # HTTP is not asked without a token what holds.
        await stage.service.until(lambda: stage.service.server.should_exit)


async def test_with_a_key_a_pid_is_good_until_its_token_ends(
    theatre: Stage, tmp_path: Path, clock: SteppableClock
) -> None:
    async with keyed(theatre, tmp_path, clock) as stage:
        clients = [
            stage.open(None, first={"token": token(clock, "eve", 60)}, **WAITS),
            stage.open(None, "polling", first={"token": token(clock, "eve", 60)}, **WAITS),
            stage.open(None, auth={"token": token(clock, "eve", 600), "cursor": ""}, **WAITS),
        ]
        for client in clients:
            await client.connected()
        await stage.service.until(lambda: len(stage.service.service.hub.rooms.get("eve", ())) == 3)
        # The last of them shows a token in each handshake; the second extends its own.
        running = await stage.scribe.start("eve")
        ack = await clients[1].call("authenticate", {"token": token(clock, "eve", 120)})
        assert (ack["ok"], ack["recovered"]) == (True, False)
        assert ack["expiresAt"] == timestamp(clock() + timedelta(minutes=120))
        for client in clients:
            await client.until(lambda client=client: len(client.events) == 1)  # type: ignore[misc]
            client.do("cut")
            await client.disconnected()
        clock.step(59 * 60)
        await stage.scribe.move(running, "composition")
        for client in clients:
            client.do("connect")
            assert (await client.connected(2))["recovered"] is True
            await client.until(lambda client=client: len(client.events) == 2)  # type: ignore[misc]
            client.do("cut")
            await client.disconnected(2)
        clock.step(60)
        await stage.scribe.whole("eve")
        for client, good in zip(clients, (False, True, True), strict=True):
            client.do("connect")
            assert (await client.connected(3))["recovered"] is good
        # It proves again who it is, and has missed nothing.
        assert (await clients[0].call("authenticate", {"userId": "eve"}))["code"] == "unauthenticated"
        ack = await clients[0].call("authenticate", {"token": token(clock, "eve", 60)})
        assert ack["recovered"] is True
        await stage.complete("eve", *clients)


@both_ways
async def test_a_socket_closed_at_the_end_of_its_token_is_told_and_goes_on_with_a_fresh_one(
    theatre: Stage, tmp_path: Path, clock: SteppableClock, way: str
) -> None:
    async with keyed(theatre, tmp_path, clock) as stage:
        await stage.scribe.start("eve")
        client = stage.open(None, way, first={"token": token(clock, "eve", 1 / 60)}, **WAITS)
        await client.ack()
        assert await client.disconnected() == "transport close"
        assert client.notices == [["authentication_expired", {"code": "token_expired"}]]
        clock.step(1)
        await stage.scribe.whole("eve")
        client.do("connect")
        assert (await client.connected(2))["recovered"] is False
        ack = await client.call("authenticate", {"token": token(clock, "eve", 60)})
        assert ack["recovered"] is True
        await stage.complete("eve", client)


async def test_a_handshake_whose_token_names_another_user_does_not_take_the_pid_up(
    theatre: Stage, tmp_path: Path, clock: SteppableClock
) -> None:
    async with keyed(theatre, tmp_path, clock) as stage:
        pid = await session(stage, "eve", token=token(clock, "eve", 60))
        async with wire(stage, pid=pid, token=token(clock, "bob", 60)) as client:
            assert client.pid != pid
            assert (await client.next())[1]["userId"] == "bob"
        for given in ({"userId": "bob"}, {"userId": ""}, {"userId": "bob", "token": token(clock, "eve", 60)}):
            async with wire(stage, pid=pid, **given) as client:
                assert client.pid != pid
        async with wire(stage, pid=pid, token=token(clock, "eve", 30)) as client:
            assert client.pid == pid
            name, hello = await client.next()
            assert (name, hello["userId"], hello["recovered"]) == ("authenticated", "eve", True)
            assert hello["expiresAt"] == timestamp(clock() + timedelta(minutes=30))


async def test_a_session_is_kept_while_it_is_connected_and_for_retention_after_that(
    theatre: Stage, tmp_path: Path, clock: SteppableClock
) -> None:
    async with other_stage(theatre, tmp_path, {"clock": clock}, retention=1) as stage:
        sessions = stage.service.service.sessions
        client = stage.open("eve", **WAITS)
        await client.ack()
        pid = (await client.connected())["pid"]
        touch, touched = sessions.touch, list[Any]()

        async def told(pids: Any, *, at: Any) -> None:
            await touch(pids, at=at)
            touched.append((set(pids), at))

        sessions.touch = told  # type: ignore[method-assign]
        await stage.scribe.start("eve")
        for _ in range(3):  # The house is kept ten times in a retention.
            clock.step(0.9)
            await stage.service.until(lambda: ({pid}, clock()) in touched)
        clock.step(0.5)
        client.do("cut")
        await client.disconnected()
        await stage.service.until(lambda: ({pid}, clock()) in touched and stage.service.service.sockets.idle)
        clock.step(0.9)
        await stage.scribe.start("eve")
        client.do("connect")
        assert (await client.connected(2))["recovered"] is True
        await client.until(lambda: len(client.events) == 2)
        client.do("cut")
        await client.disconnected(2)
        await stage.service.until(lambda: stage.service.service.sockets.idle)
        clock.step(1)
        client.do("connect")
        assert (await client.connected(3))["recovered"] is False
        # Its generations still run, so its offset is still good: nothing was lost.
        assert (await client.call("authenticate", {"userId": "eve"}))["recovered"] is True
        await stage.complete("eve", client)


@both_ways
async def test_after_a_restart_with_a_log_in_memory_nothing_is_recovered_and_events_flow_on(
    theatre: Stage, tmp_path: Path, way: str
) -> None:
    line = await theatre.line()
    async with other_stage(theatre, tmp_path / "one") as stage:
        line.port = stage.service.port
        client = stage.open(None, way, line=line, always={"userId": "eve"})
        await client.ack("always")
        await stage.scribe.whole("eve")
        await client.until(lambda: len(client.events) == 6)
        cursor = client.further[-1][0]
        pid = (await client.connected())["pid"]
        line.down = True
        line.fall()
        del stage.browsers.open_browsers[client.id]  # Whom the end of this stage does not send away.
    async with other_stage(theatre, tmp_path / "two") as stage:
        stage.browsers.open_browsers[client.id] = client
        await stage.scribe.start("eve")
        count = len(client.on("connect"))
        line.port, line.down = stage.service.port, False
        again = await client.connected(count + 1)
        assert again["recovered"] is False
        assert again["pid"] != pid
        ack = await client.ack("always", len(client.on("connect")))
        assert ack["recovered"] is False
        await stage.complete("eve", client, skip=6)
        async with wire(stage) as other:
            assert (await other.authenticate(userId="eve", cursor=cursor))["recovered"] is False


async def test_a_slow_reader_recovers_thousands_of_events_and_is_never_cut_while_it_moves(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 3.0)
    # Each takes a log in a file long to write; read they are by pages, which does not change with their number.
    count = 1_500 if stage.service.service.log.durable else 5_000
    user = stage.user()
    line = await stage.line()
    client = stage.open(user, line=line, **WAITS)
    await client.ack()
    line.fall()
    await client.disconnected()
    await stage.pour(user, count, filler=300)
    line.pace = count * 150
    began = asyncio.get_running_loop().time()
    client.do("connect")
    assert (await client.connected(2))["recovered"] is True
    await stage.complete(user, client)
    assert asyncio.get_running_loop().time() - began > 3
    assert len(client.on("disconnect")) == 1


async def test_a_reader_that_stops_is_closed_and_recovers_later(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_buffer, "STALL_TIMEOUT", 0.5)
    user = stage.user()
    client = stage.open(user)
    await client.ack()
    server = stage.service.service.sockets
    client.do("pause")
    await client.until(lambda: bool(client.on("paused")))
    await stage.pour(user, 1_500, filler=1_900)
    await stage.service.until(lambda: user not in stage.service.service.hub.rooms)
    monkeypatch.undo()
    assert server.pids == set()
    client.do("resume")
    assert (await client.connected(2))["recovered"] is True
    await stage.complete(user, client)


async def test_of_many_that_take_up_one_pid_at_once_one_stays(stage: Stage) -> None:
    user = stage.user()
    pid = await session(stage, user)
    await stage.scribe.whole(user)
    connections = await asyncio.gather(*(stage.service.raw() for _ in range(8)))
    await asyncio.gather(*(each.send("40" + json.dumps({"pid": pid})) for each in connections))
    server, rooms = stage.service.service.sockets, stage.service.service.hub.rooms
    await stage.service.until(lambda: len(rooms.get(user, ())) == len(server.connections) == 1)
    await stage.scribe.short(user)
    assert list(server.pids) == [pid]
    for each in connections:
        each.transport.abort()


async def test_who_has_been_recovered_is_not_asked_to_authenticate(
    theatre: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with other_stage(theatre, tmp_path) as stage:
        client = stage.open("eve")
        await client.ack()
        # It comes back by itself, and tries again where a slow machine is not in time.
        monkeypatch.setattr(stage.service.service.sockets, "_auth_timeout", 0.3)
        client.do("cut")
        assert (await client.connected(2))["recovered"] is True
        await asyncio.sleep(0.6)  # Longer than the patience: what is awaited is that nothing happens.
        assert len(client.on("disconnect")) == 1
        await stage.complete("eve", client)


@pytest.mark.parametrize("back", ["by a user who comes back", "by a cursor that is given"])
async def test_what_a_session_begins_anew_is_recovered_although_the_client_still_says_an_offset_from_before(
    stage: Stage, back: str
) -> None:
    """The connection falls before the first event of a replay of what the client had once been sent."""
    ada, bob = stage.user(), stage.user()
    line = await stage.line()
    client = stage.open(ada, line=line, **WAITS)
    await client.ack()
    await stage.scribe.move(await stage.scribe.start(ada), "composition", "composition_completed")
    await client.until(lambda: len(client.events) == 3)
    if back == "by a user who comes back":
        await client.call("authenticate", {"userId": bob})
        line.falls.append(0)
        client.do("emit", ref="again", name="authenticate", args=[{"userId": ada}])
    else:
        client.do("disconnect")
        await client.disconnected()
        client.do("connect")
        await client.connected(2)
        line.falls.append(0)
        cursor = (await client.ack())["cursor"]
        client.do("emit", ref="again", name="authenticate", args=[{"userId": ada, "cursor": cursor}])
    fallen = len(client.on("disconnect"))
    connected = len(client.on("connect"))
    await client.ack("again")
    await client.disconnected(fallen + 1)
    client.do("connect")
    assert (await client.connected(connected + 1))["recovered"] is True
    await stage.complete(ada, client, skip=3)
