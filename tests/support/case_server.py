"""The service in a process of its own, so that its memory and CPU time are measured apart from its clients'.

Clients use its real doors. What only the inside knows, or can do, is asked for in lines of JSON on the process's
stdin, each with a `ref`, and answered on its stdout. The process hosts one service at a time, any number in turn.
"""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import httpx2
import socketio

from adapters.realtime import send_buffer
from adapters.serving.uvicorn_server import Server
from adapters.system import now
from adapters.tokens.jwt_tokens import SecretKey, Tokens
from api import logs
from api.app import create_service
from api.service import Service
from api.settings import load_settings
from support.harness import PHOTO, Phone, Reader, Running, flood, wired
from support.processes import allow_sockets
from support.wire import JSON, Wire

#: Seconds between two looks at the clock of the event loop.
_LOOK: Final = 0.02

# --- outside: the process, and the service in it ----------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What the process says of itself and of its service."""

    #: kB of memory: now, and at most since it was last measured reset.
    rss: int
    peak: int
    #: Seconds of CPU time so far.
    cpu: float
    #: Seconds by which the event loop was late, at most since it was last measured reset.
    lag: float
    #: How many transports there are, and how many devices are attached.
    sockets: int
    devices: int
    #: Whether every table of sockets, sids and rooms is empty.
    idle: bool


class HostProcess:
    """A process that hosts a service. `start` it once; what it logs is kept."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._answers: dict[int, asyncio.Future[JSON]] = {}
        self._refs = 0
        #: What the service has logged.
        self.logged: list[str] = []
        self._listening = [asyncio.create_task(self._listen()), asyncio.create_task(self._overhear())]

    @classmethod
    @asynccontextmanager
    async def start(cls) -> AsyncIterator["HostProcess"]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
        process = cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "support.case_server",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                limit=2**26,
            )
        )
        try:
            yield process
        finally:
            await process.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, do: str, **rest: Any) -> JSON:
        """Have the process do something, and return what it answers. Raises AssertionError where it fails."""
        assert not self._listening[0].done(), "the service's process has ended"
        self._refs += 1
        answer: asyncio.Future[JSON] = asyncio.get_running_loop().create_future()
        self._answers[self._refs] = answer
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ref": self._refs, "do": do, **rest}).encode() + b"\n")
        return await answer

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal that it does not survive, and return its exit code."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        code = await self._process.wait()
        await asyncio.gather(*self._listening)
        return code

    @asynccontextmanager
    async def serve(
        self, images: Path, *, inside: JSON | None = None, **settings: Any
    ) -> AsyncIterator["ServedService"]:
        """A service in this process, with its images in this folder. It is stopped at once in the end.

        `inside` is what is no setting: `auth_timeout` and `ping` (two numbers), all in seconds.
        """
        chosen = {"images": str(images), "local_seconds": 0, **settings}
        port = (await self.ask("serve", settings=chosen, inside=inside or {}))["port"]
        secret = settings.get("jwt_secret")
        headers = {} if secret is None else {"Authorization": f"Bearer {_token(secret, 'operator', service=True)}"}
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as http:
            try:
                yield ServedService(self, port, http, images, secret)
            finally:
                if self._process.returncode is None:
                    await self.ask("stop")

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            answer = json.loads(line)
            future = self._answers.pop(answer.pop("ref"))
            if future.done():
                continue  # Its caller has stopped waiting.
            if "failed" in answer:
                future.set_exception(AssertionError(answer["failed"]))
            else:
                future.set_result(answer)
        for future in self._answers.values():
            if not future.done():
                future.set_exception(AssertionError("the service's process has ended"))

    async def _overhear(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self.logged.append(line.decode())


@dataclass
class ServedService(Reader):
    """A service in another process."""

    process: HostProcess
    port: int
    http: httpx2.AsyncClient
    images: Path
    secret: str | None = None
    #: Whose generations were begun here, by id.
    owners: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def token(self, user: str, seconds: float) -> str:
        """One that this service takes for so long."""
        assert self.secret is not None
        return _token(self.secret, user, seconds=seconds)

    async def wire(self, user: str, *, port: int | None = None, narrow: bool = False, **auth: Any) -> Wire:
        """A bare socket of this user, authenticated in the handshake."""
        wire = await Wire.open(port or self.port, narrow=narrow)
        await wire.connect(userId=user, **auth)
        return wire

    async def reconnect(self, wire: Wire, *, narrow: bool = False) -> Wire:
        """The socket that the official client opens in place of this one: it takes up the session."""
        other = await Wire.open(self.port, received=wire.received, narrow=narrow)
        await other.connect(**wire.offset)
        assert other.pid == wire.pid, "not recovered"
        other.user = wire.user
        return other

    async def flood(
        self, user: str, count: int, *, filler: int = 10, rate: float | None = None
    ) -> tuple[str, list[int]]:
        """Append a generation of so many events, `rate` of them a second or as fast as it goes.

        Return its id and when each append began, by `time.monotonic_ns`.
        """
        generation_id = f"edit_1_{len(self.owners):016d}"
        self.owners[generation_id] = user
        sent = {"user": user, "generation": generation_id, "count": count, "filler": filler, "rate": rate}
        return generation_id, (await self.process.ask("flood", **sent))["began"]

    async def start(self, user: str, kind: str = "edit") -> str:
        """Start a real generation over HTTP."""
        parts: list[tuple[str, Any]] = [("images", ("a.jpg", PHOTO, "image/jpeg")), ("prompt", (None, "a red hat"))]
        answer = await self.http.post(f"/generations/{kind}", files=parts, headers={"X-User-Id": user})
        assert answer.status_code == 202, answer.text
        generation_id = str(answer.json()["generationId"])
        self.owners[generation_id] = user
        return generation_id

    async def get_response(self, path: str, user: str) -> httpx2.Response:
        return await self.http.get(path, headers={"X-User-Id": user})

    async def figures(self, *, reset: bool = False) -> Figures:
        """See `Figures`. `reset`: garbage is collected first, and the maxima are reset."""
        return Figures(**await self.process.ask("figures", reset=reset))

    async def sids(self) -> set[str]:
        """The ids of the transports."""
        return set((await self.process.ask("sids"))["sids"])

    async def until(self, holds: Callable[[Figures], bool], seconds: float = 60) -> Figures:
        """Wait for a condition on the service's internal state, which has no notification."""
        async with asyncio.timeout(seconds):
            while not holds(figures := await self.figures()):
                await asyncio.sleep(0.02)
            return figures

    async def stall(self, seconds: float = send_buffer.STALL_TIMEOUT) -> None:
        """From now on, who takes nothing for so long is cut; by default, as long as the service has by itself."""
        await self.process.ask("stall", seconds=seconds)

    async def until_idle(self) -> None:
        """Wait until no generation waits or is worked on."""
        await self.process.ask("until_idle")

    async def check(self, *users: str) -> None:
        """I1 to I3, I6 and I8, by the one function that all tests use, inside. No client may be left."""
        await self.process.ask("check", users=users)


def _token(secret: str, user: str, *, seconds: float = 3_600, service: bool = False) -> str:
    return Tokens(SecretKey(secret.encode()), clock=now).issue(user, service=service, ttl=timedelta(seconds=seconds))


# --- inside ------------------------------------------------------------------------------------------------


@dataclass
class _Host:
    """The process's own side."""

    lag: float = 0.0
    running: Running | None = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def here(self) -> Running:
        assert self.running is not None, "nothing is served"
        return self.running

    async def serve(self, settings: JSON, inside: JSON) -> JSON:
        await self.stall()
        listener = socket.create_server(("127.0.0.1", settings.get("port", 0)), backlog=2_048)
        port = listener.getsockname()[1]
        replaced = {name: inside[name] for name in ("auth_timeout",) if name in inside}
        service, app = create_service(await wired(load_settings({**settings, "port": port}), **replaced))
        if "ping" in inside:
            service.sockets.eio.ping_interval, service.sockets.eio.ping_timeout = inside["ping"]
        ready = asyncio.Event()
        server = Server(app, service.shutdown, ready.set)
        serving = asyncio.create_task(server.serve([listener]))
        self.stack.push_async_callback(self._stop, server, serving, listener)
        await asyncio.wait({serving, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        # By a signal, not by `stop`, the service leaves for good.
        serving.add_done_callback(lambda _: sys.exit(0) if self.running is not None else None)
        headers = _operator(service)
        http = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers)
        await self.stack.enter_async_context(http)
        self.running = Running(f"http://127.0.0.1:{port}", port, service, server, http)
        return {"port": port}

    async def stop(self) -> JSON:
        self.running = None
        await self.stack.aclose()
        return {}

    async def _stop(self, server: Server, serving: asyncio.Task[None], listener: socket.socket) -> None:
        server.begin_shutdown(now=True)
        await serving
        listener.close()

    async def flood(self, user: str, generation: str, count: int, filler: int, rate: float | None) -> JSON:
        loop, began = asyncio.get_running_loop(), list[int]()
        start = loop.time()
        pouring = flood(self.here.service.log, user, generation, count, filler=filler)
        for number in range(count):
            if rate is not None:
                await asyncio.sleep(start + number / rate - loop.time())
            began.append(time.monotonic_ns())
            await anext(pouring)
        return {"began": began}

    async def figures(self, reset: bool) -> JSON:
        if reset:
            gc.collect()
            await asyncio.sleep(2 * _LOOK)  # That was no fault of the service.
            self.lag = 0.0
        rss, peak = _memory(reset)
        sockets, rooms = self.here.service.sockets, self.here.service.hub.rooms
        return {
            "rss": rss,
            "peak": peak,
            "cpu": time.process_time(),
            "lag": self.lag,
            "sockets": len(sockets.eio.sockets),
            "devices": sum(map(len, rooms.values())),
            "idle": sockets.idle and not rooms,
        }

    async def sids(self) -> JSON:
        return {"sids": list(self.here.service.sockets.eio.sockets)}

    async def stall(self, seconds: float = send_buffer.STALL_TIMEOUT) -> JSON:
        send_buffer.STALL_TIMEOUT = seconds
        return {}

    async def until_idle(self) -> JSON:
        await self.here.service.leases.drain()
        return {}

    async def check(self, users: list[str]) -> JSON:
        nobody = socketio.AsyncClient()
        self.here.phones = [Phone(self.here.url, nobody, user) for user in users]
        await self.here.check_invariants()
        return {}

    async def watch(self) -> None:
        """Note how late the event loop is."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LOOK
            await asyncio.sleep(_LOOK)
            self.lag = max(self.lag, loop.time() - due)


def _memory(reset: bool) -> list[int]:
    """Resident kB: now, and at most since it was last asked for reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return [int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "VmHWM")]


def _operator(service: Service) -> dict[str, str]:
    secret = service.settings.jwt_secret
    if secret is None:
        return {}
    return {"Authorization": f"Bearer {_token(secret.get_secret_value(), 'operator', service=True)}"}


async def _answer(ref: int, doing: Awaitable[JSON]) -> None:
    try:
        answer = await doing
    except Exception as error:
        answer = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps({"ref": ref, **answer}), flush=True)


async def _host() -> None:
    allow_sockets(None)
    logs.configure()
    host, tasks = _Host(), set[asyncio.Task[None]]()
    watching = asyncio.create_task(host.watch())
    reader = asyncio.StreamReader(limit=2**26)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        command = json.loads(line)
        ref, do = command.pop("ref"), command.pop("do")
        task = asyncio.create_task(_answer(ref, getattr(host, do)(**command)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    watching.cancel()


if __name__ == "__main__":
    asyncio.run(_host())
