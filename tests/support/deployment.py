"""`stagecast serve` in processes that are killed and started again, and their callers.

Each life is a process of its own, which is started by the command line, or forked, which costs a tenth, from one that
has already imported the program.
"""

import asyncio
import atexit
import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx2

from support.harness import PHOTO, Reader
from support.wire import JSON, Wire


def files_in(folder: Path) -> list[Path]:
    """All files in it and below, while others may come and go. The mark of an image folder does not count."""
    return [Path(path, name) for path, _, names in os.walk(folder) for name in names if name != ".stagecast"]


def free_port() -> int:
    """A port outside the ephemeral range, so that no other socket gets it while the service is down."""
    while True:
        port = random.randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


# --- processes that die -----------------------------------------------------------------------------------

#: Forks a life for each message, which brings the pipe that it writes to. It ends with its door, and all lives with it.
_FORK_SERVER: Final = """
import importlib, json, os, signal, socket, sys

def live(command, output):
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    os.write(1, b"pid %d\\n" % os.getpid())
    os.chdir(command["folder"])
    os.environ.update(command["environment"])
    if command["fresh"]:
        prelude = command["prelude"] + "\\nimport runpy; runpy.run_module('api', run_name='__main__')"
        program = ["-c", prelude] if command["prelude"] else ["-m", "api"]
        os.execv(sys.executable, [sys.executable, *program, *command["arguments"]])
    exec(command["prelude"], {})
    sys.exit(importlib.import_module("api.__main__").main(command["arguments"]))

def bring():
    for module in ("api.app", *command["imports"]):
        importlib.import_module(module)

door = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    text, outputs, _, _ = socket.recv_fds(door, 65536, 1)
    if not text:
        os.killpg(0, signal.SIGKILL)
    command = json.loads(text)
    if not command["fresh"]:
        bring()
    if os.fork() == 0:
        door.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            live(command, outputs[0])
        _, status = os.waitpid(pid, 0)
        os.write(outputs[0], b"\\nexit %d\\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(outputs[0])
    bring()
"""


@functools.cache
def _fork_server() -> socket.socket:
    """The door of the one that forks; it lives as long as this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own = ("STAGECAST_", "OPENAI_", "REPLICATE_")
    process = subprocess.Popen(
        [sys.executable, "-c", _FORK_SERVER, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={name: value for name, value in os.environ.items() if not name.startswith(own)},
        start_new_session=True,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


class Life:
    """One process of ``stagecast serve``."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.pid: asyncio.Future[int] = loop.create_future()
        self._code: asyncio.Future[int] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        #: What it has printed and logged.
        self.lines: list[str] = []

    async def listen(self, reader: asyncio.StreamReader) -> None:
        async for line in reader:
            text = line.decode().rstrip("\n")
            word, _, number = text.partition(" ")
            if not self.pid.done():
                assert word == "pid"
                self.pid.set_result(int(number))
            elif word == "exit":
                self._code.set_result(int(number))
            elif text:
                self.lines.append(text)
            if "Stagecast is ready on " in text:
                self._ready.set_result(None)

    async def ready(self) -> None:
        """Wait until it takes connections."""
        first: set[asyncio.Future[Any]] = {self._ready, self._code}
        await asyncio.wait(first, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert self._ready.done(), self.lines

    @property
    def was_ready(self) -> bool:
        return self._ready.done()

    def send(self, number: signal.Signals) -> None:
        if not self._code.done():
            with contextlib.suppress(ProcessLookupError):  # It has gone, and we have yet to read of it.
                os.kill(self.pid.result(), number)

    async def ended(self, seconds: float = 60) -> int:
        """Its exit code, once it is gone."""
        async with asyncio.timeout(seconds):
            return await asyncio.shield(self._code)

    @property
    def logged(self) -> list[str]:
        """All but the line that says that it is ready."""
        return [line for line in self.lines if not line.startswith("Stagecast is ready on ")]


@dataclass
class Deployment:
    """Where a service lives, from one life to the next: its folder, its port, its settings."""

    folder: Path
    flags: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    #: What a forked life finds already imported, besides the service.
    imports: Sequence[str] = ()
    #: What each life does first.
    prelude: str = ""
    durable: bool = True
    #: The log of several nodes, instead of a file of its own.
    shared_log: str | None = None
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "log.db"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def pictures(self) -> set[str]:
        """The names of all files in the folder of images."""
        return {each.name for each in files_in(self.images)}

    @asynccontextmanager
    async def life(self, *, fresh: bool = False, **flags: object) -> AsyncIterator[Life]:
        """The service, perhaps not ready yet. `fresh`: by the command line. Killed in the end, if it still lives."""
        own = {"port": self.port, "images": self.images, "editor": "local", "face_swap": "local"}
        log = self.shared_log or (f"sqlite:///{self.log}" if self.durable else "memory://")
        chosen = {"log": log, "local_seconds": 0, **own, **self.flags, **flags}
        arguments = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = {
            "folder": str(self.folder),
            # Lives are checked for warnings.
            "environment": {"STAGECAST_LOG_LEVEL": "warning", **self.environment},
            "imports": list(self.imports),
            "fresh": fresh,
            "prelude": self.prelude,
            "arguments": ["serve", *arguments],
        }
        life, reader = Life(), asyncio.StreamReader()
        output, theirs = os.pipe()
        socket.send_fds(_fork_server(), [json.dumps(command).encode()], [theirs])
        os.close(theirs)
        file = os.fdopen(output, "rb", 0)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
        listening = asyncio.create_task(life.listen(reader))
        try:
            async with asyncio.timeout(60):
                await asyncio.shield(life.pid)
            yield life
        finally:
            if life.pid.done():
                life.send(signal.SIGKILL)
            await asyncio.wait([listening])
            transport.close()

    @asynccontextmanager
    async def serving(self, **rest: Any) -> AsyncIterator[Life]:
        """The service, ready."""
        async with self.life(**rest) as life:
            await life.ready()
            yield life


class RetryingClient(Reader):
    """Calls a service by HTTP, and retries until it answers, as the docs advise clients."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        #: How many calls had no answer.
        self.unanswered = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator["RetryingClient"]:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
            yield cls(http)

    async def once(self, method: str, path: str, user: str, *, key: str | None = None, **rest: Any) -> httpx2.Response:
        headers = {"X-User-Id": user} | ({"Idempotency-Key": key} if key else {})
        return await self._http.request(method, path, headers=headers, **rest)

    async def ask(self, method: str, path: str, user: str, **rest: Any) -> httpx2.Response:
        """The answer, unless it is that the service cannot answer now."""
        async with asyncio.timeout(300):
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    answer = await self.once(method, path, user, **rest)
                    if answer.status_code not in (502, 503, 504):  # 502 and 504 are a balancer's.
                        return answer
                self.unanswered += 1
                await asyncio.sleep(0.05)

    async def get_response(self, path: str, user: str) -> httpx2.Response:
        return await self.ask("GET", path, user)

    async def generations(self, user: str, **which: str) -> list[JSON]:
        """All of this user's; `which`: those with this status."""
        found, before = list[JSON](), dict[str, str]()
        while True:
            answer = await self.ask("GET", "/generations", user, params={"limit": "100", **which, **before})
            page = answer.json()
            found += page["generations"]
            if "next" not in page:
                return found
            before = {"before": page["next"]}


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A group that fails with the first failure itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def pictures_of(events: Sequence[JSON], base: str) -> set[str]:
    """The names of the pictures that are stored after these events: those that they show, and the inputs of generations
    that did not end while they waited. `base`: how the URLs of stored pictures begin.
    """
    lost = {event["generationId"] for event in events if event.get("failedStage") == "started"}
    urls = [value for event in events for key, value in event.items() if key.endswith("Url")]
    for event in events:
        if event["generationId"] not in lost:
            urls += event.get("input", {}).get("images", [])
    return {url.removeprefix(base) for url in urls if url.startswith(base)}


def parts(prompt: str, *images: bytes, **fields: object) -> list[tuple[str, Any]]:
    """A form."""
    files: list[tuple[str, Any]] = [("images", (f"{n}.jpg", data, "image/jpeg")) for n, data in enumerate(images)]
    return files + [(name, (None, str(value))) for name, value in {"prompt": prompt, **fields}.items()]


ENDS: Final = ("completed", "failed")


@dataclass
class RequestedGeneration:
    """A generation whose start is retried until it is accepted."""

    key: str
    kind: str
    fields: JSON
    external: bool
    generation_id: str = ""

    async def start(self, caller: RetryingClient, user: str) -> str:
        """Its id, once the service has answered."""
        path = f"/generations/{self.kind}" + ("?runner=external" if self.external else "")
        form = parts(self.key, *([] if self.external else [PHOTO]), **self.fields)
        answer = await caller.ask("POST", path, user, key=self.key, files=form)
        assert answer.status_code == 202, answer.text
        generation_id = str(answer.json()["generationId"])
        assert answer.headers["location"] == f"/generations/{generation_id}"
        assert self.generation_id in ("", generation_id), "another generation for the same key"
        self.generation_id = generation_id
        return generation_id


class ReconnectingDevice:
    """A device on a bare socket that comes back whenever it is cut off."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.beginning = str(wire.notices[0][1]["cursor"])
        self.returns = 0

    @property
    def events(self) -> list[JSON]:
        return self.wire.events

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a condition on the received events, across reconnects."""
        async with asyncio.timeout(60):
            while True:
                wire = self.wire
                with contextlib.suppress(ConnectionResetError):
                    return await wire.until(holds)
                while self.wire is wire:
                    await asyncio.sleep(0.01)

    async def keep(self, *ports: int) -> None:
        """Reconnect until cancelled, to any of these ports."""
        while True:
            await self.wire.gone.wait()
            await self.back(*ports)

    async def back(self, *ports: int) -> None:
        """Reconnect, once a server listens, and continue from its cursor."""
        while True:
            wire = None
            try:
                async with asyncio.timeout(5):
                    wire = await Wire.open(random.choice(ports), received=self.wire.received)
                    await wire.connect(**self.wire.offset)
            except OSError:
                if wire is not None:
                    wire.abort()
                await asyncio.sleep(0.02)
                continue
            assert not self.wire.disconnected_by_server, "a DISCONNECT was sent"
            assert wire.pid == self.wire.pid, "a session was lost"
            self.wire = wire
            self.returns += 1
            return
