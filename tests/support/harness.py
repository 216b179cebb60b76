"""A real server on a free port, real clients, and the invariants that hold after every end-to-end test."""

import asyncio
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import httpx2
import socketio
import websockets

from adapters.images import composer
from adapters.outbound.calls import ssl_context
from adapters.serving.uvicorn_server import Server
from adapters.system import SystemEntropy, now
from api.app import create_service
from api.service import Service
from api.settings import Settings
from api.wiring import Parts, wire
from domain.events import Event, decode, encode, event_name, timestamp
from domain.ports.images import ImageStore
from domain.ports.log import Append, EventLog, History, Start
from domain.ports.storage import Storage
from domain.ports.system import Clock
from domain.rehydrate import request_of
from domain.requests import GenerationRequest
from support.asyncapi import check_ack, check_message
from support.builders import fold
from support.pictures import RED, solid

JSON = dict[str, Any]

#: In pixels: wider than every thumbnail, and in the shape of A4.
SHEET: Final = (700, 990)
TERMINAL: Final = ("generation_completed", "generation_failed")
#: Seconds after which what is waited for counts as hung.
TIMEOUT: Final = 30
#: Options of a bare WebSocket: its pings are Engine.IO's.
RAW_OPTIONS: Final[JSON] = {"compression": None, "ping_interval": None, "open_timeout": TIMEOUT}
#: Tall and thin, so that little of the sheet has to be drawn.
PHOTO: Final = solid(RED, (16, 400), "JPEG").data


@dataclass
class Phone:
    """One device of one user, with python-socketio's client, and everything it received."""

    url: str
    client: socketio.AsyncClient
    user: str = ""
    events: list[tuple[str, JSON]] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    notices: list[tuple[str, JSON]] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def take(self, name: str, *arguments: Any) -> None:
        check_message(name, arguments[0])
        async with self._changed:
            if name in ("authenticated", "authentication_required", "generation_removed", "queue_position"):
                self.notices.append((name, arguments[0]))
            else:
                data = dict(arguments[0])
                self.cursors.append(data.pop("cursor") if "cursor" in data else arguments[1])
                self.events.append((name, data))
            self._changed.notify_all()

    async def until(self, happened: Callable[[], bool]) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(happened), TIMEOUT)

    async def call(self, name: str, *arguments: Any) -> JSON:
        """Send an event and return its ack."""
        ack = await self.client.call(name, arguments if len(arguments) != 1 else arguments[0], timeout=TIMEOUT)
        assert isinstance(ack, dict)
        check_ack(name, ack)
        return ack

    async def authenticate(self, user: str, **rest: Any) -> JSON:
        ack = await self.call("authenticate", {"userId": user, **rest})
        assert ack["ok"] is True, ack
        self.user = user
        return ack

    def of(self, generation_id: str) -> list[JSON]:
        return [data for _, data in self.events if data["generationId"] == generation_id]

    def sequences(self, generation_id: str) -> list[int]:
        return [data["sequence"] for data in self.of(generation_id)]

    async def until_over(self, *generation_ids: str) -> None:
        """Wait for the terminal events of these generations."""
        await self.until(
            lambda: all(
                any(name in TERMINAL and data["generationId"] == each for name, data in self.events)
                for each in generation_ids
            )
        )


class Reader(ABC):
    """Reads what a user may see of a service, by HTTP."""

    @abstractmethod
    async def get_response(self, path: str, user: str) -> httpx2.Response:
        """The answer to GET."""

    async def get(self, path: str, user: str = "ada") -> JSON:
        answer = await self.get_response(path, user)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert isinstance(body, dict)
        return body

    async def events(self, generation_id: str, user: str = "ada") -> list[JSON]:
        """The history."""
        return [item["data"] for item in (await self.get(f"/generations/{generation_id}/events", user))["events"]]

    async def feed(self, user: str, cursor: str) -> list[JSON]:
        """All that has come after this cursor, which has to be usable."""
        events = list[JSON]()
        while True:
            page = await self.get(f"/events?after={cursor}&limit=1000", user)
            assert page["recovered"] is True, "a cursor was lost"
            if not page["events"]:
                return events
            events += [item["data"] for item in page["events"]]
            cursor = page["cursor"]


@dataclass
class Running(Reader):
    """A service behind a real server."""

    url: str
    port: int
    service: Service
    server: Server
    http: httpx2.AsyncClient
    phones: list[Phone] = field(default_factory=list)

    @asynccontextmanager
    async def phone(
        self, user: str | None = None, *, transports: Sequence[str] = (), **auth: Any
    ) -> AsyncIterator[Phone]:
        """A device; with `user`, one that has authenticated by event."""
        client = socketio.AsyncClient(reconnection=False, request_timeout=TIMEOUT)
        phone = Phone(self.url, client)
        client.on("*", phone.take)
        await client.connect(self.url, auth=auth or None, transports=list(transports) or None, wait_timeout=TIMEOUT)
        self.phones.append(phone)
        try:
            if user is not None:
                await phone.authenticate(user)
            yield phone
        finally:
            await client.disconnect()

    async def start(self, user: str = "ada", kind: str = "edit", *, images: int = 1, **fields: Any) -> str:
        """Start a generation and return its id."""
        answer = await self.post(user, kind, images=images, **fields)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["generationId"])

    async def post(
        self, user: str, kind: str, *, images: int = 1, key: str | None = None, **fields: Any
    ) -> httpx2.Response:
        parts: list[tuple[str, Any]] = [("images", (f"{n}.jpg", PHOTO, "image/jpeg")) for n in range(images)]
        parts += [(name, (None, str(value))) for name, value in {"prompt": "a red hat", **fields}.items()]
        headers = {"X-User-Id": user} | ({"Idempotency-Key": key} if key else {})
        return await self.http.post(f"/generations/{kind}", files=parts, headers=headers)

    async def get_response(self, path: str, user: str) -> httpx2.Response:
        return await self.http.get(path, headers={"X-User-Id": user})

    async def raw(self, query: str = "") -> websockets.ClientConnection:
        """A bare WebSocket that speaks Engine.IO itself. The OPEN packet has been read."""
        connection = await websockets.connect(
            f"ws://127.0.0.1:{self.port}/socket.io/?EIO=4&transport=websocket{query}", **RAW_OPTIONS
        )
        assert str(await connection.recv()).startswith("0{")
        return connection

    async def until(self, holds: Callable[[], bool], seconds: float = TIMEOUT) -> None:
        """Wait for a condition on the service's internal state, which has no notification."""
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.01)

    async def until_stored(self, user_id: str, size: int) -> None:
        """Wait until so many bytes of images are counted for this user."""
        async with asyncio.timeout(TIMEOUT):
            while await self.service.images.quotas.stored(user_id) != size:
                await asyncio.sleep(0.01)

    async def until_all_disconnected(self) -> None:
        """Wait until no socket and no stream is left, nor anything kept for one.

        Whose program was killed while it polled is missed only by two pings, which takes 47 seconds.
        """
        await self.until(
            lambda: self.service.sockets.idle and not (self.service.hub.rooms or self.service.streams.open), 60
        )

    async def _moment(self, user: str) -> tuple[list[tuple[JSON, list[JSON], History]], int | None]:
        """The user's generations by HTTP, with their events and log entries, and the balance: a consistent snapshot."""
        log = self.service.log
        while True:
            head = (await log.feed(user, after=0, anchor=0, limit=0)).head
            generations = []
            for snapshot in (await self.get("/generations?limit=100", user))["generations"]:
                generation_id = snapshot["generationId"]
                answer = await self.get_response(f"/generations/{generation_id}/events", user)
                history = await log.generation(generation_id)
                if history is None:  # Retention has removed it since it was listed.
                    assert generation_id not in (await self.get_response("/generations?limit=100", user)).text
                    continue
                assert answer.status_code == 200, answer.text
                generations.append((snapshot, [item["data"] for item in answer.json()["events"]], history))
            balance = (await self.get("/me", user)).get("credit")
            if head == (await log.feed(user, after=0, anchor=0, limit=0)).head:
                return generations, balance

    async def check_invariants(self) -> None:
        """I1 to I6 and I8 of the reliability promises: of what is in the log, and of what each device was sent."""
        histories = {}
        for user in {phone.user for phone in self.phones if phone.user} | {"ada"}:
            generations, balance = await self._moment(user)
            spent = 0
            for snapshot, events, history in generations:
                generation_id = snapshot["generationId"]
                histories[generation_id] = user, events
                assert [event["sequence"] for event in events] == list(range(1, len(events) + 1)), "I1"
                ends = [event["status"] in ("completed", "failed") for event in events]
                assert not any(ends[:-1]), "I2"
                every = [decode(entry.event) for entry in history.events if entry.event is not None]
                whole = fold(generation_id, history.kind, user, request_of(history), every)
                folded = whole.snapshot().model_dump(by_alias=True, exclude_none=True)
                for key in ("expiresAt", "queuePosition"):
                    snapshot.pop(key, None)
                assert folded == snapshot, "I3"
                spent += events[-1]["status"] != "failed"
            if generations and self.service.settings.credits is not None:
                assert balance == self.service.settings.credits - spent, "I6"
        for phone in self.phones:
            for generation_id in {data["generationId"] for _, data in phone.events}:
                if generation_id not in histories:
                    continue  # Deleted since.
                user, events = histories[generation_id]
                assert user == phone.user, "I5"
                got = phone.of(generation_id)
                first = got[0]["sequence"] - 1
                assert got == events[first : first + len(got)], "I4"
        await self.until_all_disconnected()


async def wired(
    settings: Settings,
    *,
    clock: Clock = now,
    images: ImageStore | None = None,
    storage: Storage | None = None,
    **replaced: Any,
) -> Parts:
    """The parts of a service, some of them replaced by name."""
    parts = await wire(settings, clock=clock, images=images, storage=storage)
    for name, part in replaced.items():
        assert hasattr(parts, name), name
        setattr(parts, name, part)
    return parts


@asynccontextmanager
async def running(images: Path | str, *, overrides: JSON | None = None, **settings: Any) -> AsyncIterator[Running]:
    """A service that is checked, once its clients are gone, and then stopped.

    Its sheets are small: to compose and encode one of the real size takes a tenth of a second.
    """
    small = patch.multiple(composer, SHEET=SHEET, MARGIN=27, GUTTER=14)
    with small, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        offline = {"editor": "local", "face_swap": "local", "local_seconds": 0, "max_lag_ms": "off"}
        chosen = {**offline, "images": images, "port": port, **settings}
        service, app = create_service(await wired(Settings(_env_file=None, **chosen), **(overrides or {})))
        ready = asyncio.Event()
        server = Server(app, service.shutdown, ready.set)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            await asyncio.wait({serving, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            url = f"http://127.0.0.1:{port}"
            # What is idle is let go long before the server does so, which would fall together with a request.
            limits = httpx2.Limits(keepalive_expiry=1)
            async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, verify=ssl_context()) as http:
                service_running = Running(url, port, service, server, http)
                yield service_running
                if not server.should_exit:
                    await service_running.check_invariants()
        finally:
            server.begin_shutdown(now=True)
            await serving


async def flood(
    log: EventLog, user: str, generation_id: str, count: int, *, filler: int = 1900, letter: str = "x"
) -> AsyncIterator[None]:
    """A generation of so many events, each with that many letters and a little more; after each, others get their
    turn.
    """
    # External, or a service that has the time would take it for abandoned and work on it.
    order = GenerationRequest(prompt="x", metadata={"filler": letter * filler}, external=True)
    entropy = SystemEntropy()
    for sequence in range(1, count + 1):
        end = sequence == count
        status = "started" if sequence == 1 else "completed" if end else "openai_editing"
        event = Event(
            generation_id=generation_id,
            kind="edit",
            sequence=sequence,
            status=status,
            message="x",
            progress=0 if sequence == 1 else 100 if end else 60,
            occurred_at=timestamp(now()),
            metadata=order.metadata,
        )
        start = Start("edit", order.model_dump_json().encode(), None, "", 100) if sequence == 1 else None
        credit = {"started": -1, "completed": 0}.get(status)
        place = user, generation_id, sequence, entropy.event_id()
        await log.append(Append(*place, encode(event), event_name(status), now(), credit, end, start))
        await asyncio.sleep(0)
        yield


async def frames_until_close(connection: websockets.ClientConnection) -> list[str]:
    """Every frame until the other side closes, which it has to do soon."""
    frames: list[str] = []
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                frames.append(str(await connection.recv()))
            except websockets.ConnectionClosed:
                return frames


async def stalled_device(service: Running) -> websockets.ClientConnection:
    """The only device of ada, which has stopped reading."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
    line.connect(("127.0.0.1", service.port))
    address = f"ws://127.0.0.1:{service.port}/socket.io/?EIO=4&transport=websocket"
    connection = await websockets.connect(address, sock=line, **RAW_OPTIONS)
    assert str(await connection.recv()).startswith("0{")
    await connection.send('40{"userId":"ada"}')
    assert str(await connection.recv()).startswith("40")
    connection.transport.pause_reading()
    return connection
