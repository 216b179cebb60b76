"""The cases of the durable log: lost replies, killed and stopped processes, full disks, clocks that jump.

They belong to the registry of `cases`. What is killed is `stagecast serve`: each life of it a process of its own, which
is started by the command line, or forked, which costs a tenth, from one that has already imported the program.
"""

import asyncio
import atexit
import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import httpx2
from PIL import Image

from adapters.system import SystemEntropy, now
from domain.errors import Conflict, LogUnavailable
from domain.events import Event
from domain.feed import Logged
from domain.generation import Generation
from domain.housekeeping import Housekeeping
from domain.orders import Order
from domain.ports import Append, EventLog, Start
from domain.queries import generation_of
from domain.recorder import Recorder
from domain.stages import FLOWS
from reliability.cases import Trial, case, files_in, free_port
from support.builders import EDIT, LOGS, Heard, facts_for, make_generation, make_order, statuses
from support.doubles import Hold, Passing, ScriptedEditor
from support.faults import JSON, Wire, hang_up, parse, together
from support.harness import PHOTO, Reader, running
from support.node import Browser, Browsers, browsers
from support.openai_server import KEY, OpenAIServer, completed, openai_server, partial, stream
from support.openai_server import picture as drawing
from support.pictures import GREEN, encoded, solid
from support.provider_faults import Answer, Origin, Request, listening, raw, then, whole

# --- processes that die -----------------------------------------------------------------------------------

#: Forks a life for each message, which brings the pipe that it writes to. It ends with its door, and all lives with it.
_NURSERY: Final = """
import importlib, json, os, signal, socket, sys

def live(wish, output):
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    os.write(1, b"pid %d\\n" % os.getpid())
    os.chdir(wish["folder"])
    os.environ.update(wish["environment"])
    if wish["fresh"]:
        os.execv(sys.executable, [sys.executable, "-m", "api", *wish["arguments"]])
    exec(wish["prelude"], {})
    sys.exit(importlib.import_module("api.__main__").main(wish["arguments"]))

def bring():
    for module in ("api.app", *wish["imports"]):
        importlib.import_module(module)

door = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    text, outputs, _, _ = socket.recv_fds(door, 65536, 1)
    if not text:
        os.killpg(0, signal.SIGKILL)
    wish = json.loads(text)
    if not wish["fresh"]:
        bring()
    if os.fork() == 0:
        door.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            live(wish, outputs[0])
        _, status = os.waitpid(pid, 0)
        os.write(outputs[0], b"\\nexit %d\\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(outputs[0])
    bring()
"""


@functools.cache
def _nursery() -> socket.socket:
    """The door of the one that forks; it lives as long as this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own = ("STAGECAST_", "OPENAI_", "REPLICATE_")
    process = subprocess.Popen(
        [sys.executable, "-c", _NURSERY, str(theirs.fileno())],
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
    #: What a forked life does first.
    prelude: str = ""
    durable: bool = True
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
        log = f"sqlite:///{self.log}" if self.durable else "memory://"
        chosen = {"log": log, "local_seconds": 0, **own, **self.flags, **flags}
        arguments = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        wish = {
            "folder": str(self.folder),
            "environment": dict(self.environment),
            "imports": list(self.imports),
            "fresh": fresh,
            "prelude": self.prelude,
            "arguments": ["serve", *arguments],
        }
        life, reader = Life(), asyncio.StreamReader()
        output, theirs = os.pipe()
        socket.send_fds(_nursery(), [json.dumps(wish).encode()], [theirs])
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


class Caller(Reader):
    """Calls a service by HTTP, again and again until it answers, as its clients are told to."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        #: How many calls had no answer.
        self.unanswered = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator["Caller"]:
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
                    if answer.status_code != 503:
                        return answer
                self.unanswered += 1
                await asyncio.sleep(0.05)

    async def look(self, path: str, user: str) -> httpx2.Response:
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
async def _tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """A group that fails with the first failure itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def parts(prompt: str, *images: bytes, **fields: object) -> list[tuple[str, Any]]:
    """A form."""
    files: list[tuple[str, Any]] = [("images", (f"{n}.jpg", data, "image/jpeg")) for n, data in enumerate(images)]
    return files + [(name, (None, str(value))) for name, value in {"prompt": prompt, **fields}.items()]


# --- 3: lost replies --------------------------------------------------------------------------------------


class LosingReplies(Passing):
    """A line to the log on which half of all replies are lost, and then often somebody appends the next."""

    def __init__(self, log: EventLog, recorder: Recorder) -> None:
        super().__init__(log)
        self._others = recorder
        self._chance = random.Random(3)
        self._made: dict[int, Logged] = {}
        self._first: dict[int, asyncio.Task[Logged]] = {}
        self.lost = self.overtaken = self.appends = 0

    async def append(self, entry: Append) -> Logged:
        first = self._first.get(entry.event_id)
        if first is None:
            self._first[entry.event_id] = first = asyncio.create_task(self._append(entry))
            return await asyncio.shield(first)  # It arrives, also where nobody waits any more.
        await asyncio.wait([first])
        logged = await self.inner.append(entry)
        # Where it ends is the generation's, and may be known by now.
        assert self._made[entry.event_id][:-1] == logged[:-1], "another entry"
        return logged

    async def settled(self) -> None:
        """Wait until nothing is on the line."""
        await asyncio.wait(list(self._first.values()))

    async def _append(self, entry: Append) -> Logged:
        self.appends += 1
        logged = self._made[entry.event_id] = await self.inner.append(entry)
        if self._chance.random() < 0.5:
            return logged
        self.lost += 1
        if self._chance.random() < 0.5 and not entry.terminal:
            self.overtaken += 1
            history = await self.inner.generation(entry.generation_id)
            assert history is not None
            await _move_on(self._others, generation_of(history))
        raise LogUnavailable


async def _move_on(recorder: Recorder, generation: Generation) -> Generation:
    status = EDIT[EDIT.index(generation.status) + 1] if generation.sequence else EDIT[0]
    return await recorder.move(generation, status, facts_for("edit", status))


@case(
    3,
    "{generations} generations on each log over a line that loses half of the replies; each such append is tried "
    "again, often after somebody appended the next",
    "one entry, success, the next append works; each user is charged once",
    quick={"generations": 40},
    long={"generations": 2_000},
)
async def lost_replies(trial: Trial, generations: int) -> None:
    for name, open_log in LOGS.items():
        heard = Heard()
        async with open_log(clock=now, credits=generations) as log, log.follow(heard):
            line = LosingReplies(log, Recorder(log, now, SystemEntropy()))
            recorder = Recorder(line, now, SystemEntropy(), patience=60)
            conflicts = await together(functools.partial(_write, recorder, line), generations)
            for number in range(generations):
                assert statuses(await log.generation(_id(number))) == list(EDIT), "not each event once"
            assert await log.credit("ada") == 0
            ids = [entry.event_id for entry in heard.entries]
            assert len(ids) == len(set(ids)) == (await log.feed("ada", after=0, anchor=0, limit=0)).head
            # Who was overtaken finds out with the next append, and only then.
            assert sum(conflicts) == line.overtaken, "an append that was made was taken for somebody else's"
            assert line.overtaken > generations / 4
            trial.tell(f"{name}: replies lost", f"{line.lost} of {line.appends}, {line.overtaken} overtaken")
            trial.tell(f"{name}: entries", len(ids))


async def _write(recorder: Recorder, line: LosingReplies, number: int) -> int:
    """Write a generation to its end, going on from where others bring it. How often they were faster."""
    start = Start("edit", make_order().model_dump_json().encode(), f"key {number}", "same", 10**6)
    generation, conflicts = make_generation(generation_id=_id(number)), 0
    while not generation.finished:
        try:
            if generation.sequence:
                generation = await _move_on(recorder, generation)
            else:
                generation = await recorder.begin(generation, start)
        except Conflict:
            conflicts += 1
            generation = await _known(line, generation)
        except LogUnavailable:  # A start is not tried for long, and that was long for a machine that is slow.
            generation = await _known(line, generation)
            conflicts += generation.sequence > 1
    return conflicts


async def _known(line: LosingReplies, generation: Generation) -> Generation:
    """The generation as the log has it, if it has it, with all that is still on its way."""
    await line.settled()
    history = await line.inner.generation(generation.generation_id)
    return generation if history is None else generation_of(history)


def _id(number: int) -> str:
    return f"edit_1_{number:016d}"


# --- 4: kill -9 -------------------------------------------------------------------------------------------

_CREDITS: Final = 1_000_000
_ENDS: Final = ("completed", "failed")
#: The stages of the paid editor. The face swap is the free one.
_PAID: Final = ("openai_editing", "ai_generation")
#: What an external pipeline reports, one after the other.
_REPORTS: Final[Sequence[JSON]] = (
    {"status": "composition"},
    {"status": "composition_completed"},
    {"status": "ai_generation"},
    {"status": "ai_generation", "progress": 80, "message": "Nearly there."},
    {"status": "completed", "generatedImageUrl": "https://pictures.test/a.png"},
)


class Provider:
    """Draws for OpenAI, in its own time, and counts what each prompt has cost."""

    def __init__(self, server: OpenAIServer) -> None:
        self._server = server
        self._respond = server.origin.respond
        self._chance = random.Random(4)
        self._drawing = drawing("64x96")
        self.calls = Counter[str]()
        server.origin.respond = self

    def __call__(self, request: Request) -> Answer:
        self._respond(request)
        # What is not needed any more would fill the memory.
        self._server.origin.requests.clear()
        prompt = self._server.calls.pop().fields["prompt"]
        self.calls[prompt.rpartition("\n")[2]] += 1
        first, second = self._pause(), self._pause()
        return then(first, stream(partial(0, self._drawing)), second, raw(completed(self._drawing)))

    def _pause(self) -> Answer:
        seconds = self._chance.uniform(0, 0.25)

        async def pause(_: asyncio.StreamWriter) -> None:
            await asyncio.sleep(seconds)

        return pause


@dataclass
class Ordered:
    """A generation that somebody wants, and asks for until it is there."""

    key: str
    kind: str
    fields: JSON
    external: bool
    generation_id: str = ""

    async def start(self, caller: Caller, user: str) -> str:
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


class Phone:
    """A device on a bare socket that comes back whenever it is cut off."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.beginning = str(wire.notices[0][1]["cursor"])
        self.returns = 0

    @property
    def events(self) -> list[JSON]:
        return self.wire.events

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of what it was told, while it is kept."""
        async with asyncio.timeout(60):
            while True:
                wire = self.wire
                with contextlib.suppress(ConnectionResetError):
                    return await wire.until(holds)
                while self.wire is wire:
                    await asyncio.sleep(0.01)

    async def keep(self, port: int) -> None:
        """Come back for ever."""
        while True:
            await self.wire.gone.wait()
            await self.back(port)

    async def back(self, port: int) -> None:
        """Come back, once there is somebody, and go on from where it was."""
        while True:
            try:
                wire = await Wire.open(port, told=self.wire.told)
                await wire.connect(**self.wire.offset)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            assert not self.wire.sent_away, "a DISCONNECT was sent"
            assert wire.pid == self.wire.pid, "a session was lost"
            self.wire = wire
            self.returns += 1
            return


class Owner:
    """A user with two devices, who does all kinds of things at random until it is over."""

    def __init__(self, name: str, caller: Caller, phone: Phone, browser: Browser, face: str) -> None:
        self.name = name
        self.phone = phone
        self.browser = browser
        self.over = False
        #: By key, as are the grants.
        self.orders: dict[str, Ordered] = {}
        self.grants: dict[str, int] = {}
        #: Whose deletion was asked for, and how they had ended.
        self.deleted: dict[str, str] = {}
        #: What was answered to external pipelines.
        self.acknowledged: list[JSON] = []
        #: What it is at, and has to be there until that is done.
        self._busy: list[str] = []
        self._caller = caller
        self._face = face
        self._chance = random.Random(name)

    @property
    def started(self) -> set[str]:
        """What was answered with 202."""
        return {each.generation_id for each in self.orders.values() if each.generation_id}

    def ended(self) -> dict[str, str]:
        """How those ended of whose end both devices know."""
        both = [
            {event["generationId"]: event["status"] for event in events if event["status"] in _ENDS}
            for events in (self.phone.events, self.told)
        ]
        return {each: status for each, status in both[0].items() if each in both[1]}

    @property
    def told(self) -> list[JSON]:
        """What the official client was told."""
        return [event for _, event in self.browser.events]

    async def live(self, pause: float) -> None:
        deeds: Sequence[Callable[[], Awaitable[None]]] = (
            self._start,
            self._report,
            self._cancel,
            self._delete,
            self._grant,
        )
        while not self.over:
            await asyncio.sleep(self._chance.uniform(0, 2 * pause))
            [deed] = self._chance.choices(deeds, (60, 10, 8, 8, 10))
            await deed()

    async def _start(self) -> None:
        if len(self.started) - len(self.ended()) < 3:
            kind = self._chance.choice(("edit", "edit", "generate"))
            swap = kind == "edit" and self._chance.random() < 0.6
            await self._order(kind, {"imageUrls": json.dumps([self._face])} if swap else {}, external=False)

    async def _order(self, kind: str, fields: JSON, *, external: bool) -> str:
        order = Ordered(f"{self.name} {len(self.orders)}", kind, fields, external)
        self.orders[order.key] = order
        return await order.start(self._caller, self.name)

    async def _report(self) -> None:
        """Do the work of a generation, and report it; give up now and then."""
        generation_id = await self._order("generate", {}, external=True)
        path = f"/generations/{generation_id}/transitions"
        with self._at(generation_id):
            for sequence, report in enumerate(_REPORTS, 2):
                if self._chance.random() < 0.05:
                    report = {"status": "failed", "error": "It broke."}
                answer = await self._caller.ask("POST", path, self.name, json={**report, "sequence": sequence})
                assert answer.status_code == 200, answer.text
                self.acknowledged.append(answer.json())
                if report["status"] in _ENDS:
                    return

    async def _cancel(self) -> None:
        own = {each.generation_id for each in self.orders.values() if not each.external and each.generation_id}
        if left := sorted(own - set(self.ended())):
            generation_id = self._chance.choice(left)
            with self._at(generation_id):
                answer = await self._caller.ask("POST", f"/generations/{generation_id}/cancel", self.name)
                assert answer.json()["outcome"] in ("cancelled", "already_finished"), answer.text

    @contextmanager
    def _at(self, generation_id: str) -> Iterator[None]:
        self._busy.append(generation_id)
        try:
            yield
        finally:
            self._busy.remove(generation_id)

    async def _delete(self) -> None:
        # What is deleted before its answer has come would be started, or asked for, in vain.
        free = self.started - set(self.deleted) - set(self._busy)
        ended = {each: status for each, status in self.ended().items() if each in free}
        if ended:
            generation_id = self._chance.choice(sorted(ended))
            self.deleted[generation_id] = ended[generation_id]
            answer = await self._caller.ask("DELETE", f"/generations/{generation_id}", self.name)
            assert answer.status_code in (204, 404), answer.text  # 404: it was made, and its answer was lost.

    async def _grant(self) -> None:
        key = f"grant {len(self.grants)}"
        self.grants[key] = self._chance.randint(1, 9)
        path, amount = f"/users/{self.name}/credit", {"amount": self.grants[key]}
        answer = await self._caller.ask("POST", path, self.name, key=key, json=amount)
        assert answer.status_code == 200, answer.text


class Left(NamedTuple):
    """An unfinished generation that a killed process has left."""

    kind: str
    status: str
    sequence: int


class Coroner:
    """Looks at what each killed process has left on the disk: in a copy, so that the next one finds it as it was."""

    def __init__(self, deployment: Deployment, owners: Sequence[Owner], paid: Collection[str]) -> None:
        """`paid`: the stages whose provider is not free."""
        self._deployment = deployment
        self._owners = owners
        self._paid = paid
        self._looked_at = {owner.name: 0 for owner in owners}
        #: What was left at first, and has to be ended by the next process that gets ready.
        self._unfinished: dict[str, Left] = {}
        #: In which stages generations were when their process was killed.
        self.found = Counter[str]()
        self.interrupted = self.repeated = 0

    def look(self, *, resumed: bool) -> None:
        """`resumed`: the process had been ready, and so had taken up all that it had found."""
        with self._copy() as log:
            assert log.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert log.execute("PRAGMA foreign_key_check").fetchall() == []
            self._check_order(log)
            self._check_credit(log)
            for owner in self._owners:
                self._check_promises(log, owner)
            if resumed:
                self._check_resumed(log)
            self._unfinished = {
                generation_id: Left(kind, json.loads(event)["status"], sequence)
                for generation_id, kind, sequence, event in log.execute(_LAST_OF_UNFINISHED)
            }
        self.found.update(left.status for left in self._unfinished.values())

    @contextmanager
    def _copy(self) -> Iterator[sqlite3.Connection]:
        with TemporaryDirectory(dir=self._deployment.folder) as folder:
            for file in (self._deployment.log, self._deployment.log.with_name("log.db-wal")):
                if file.exists():
                    shutil.copy(file, folder)
            with contextlib.closing(sqlite3.connect(f"{folder}/log.db")) as log:
                yield log

    def _check_order(self, log: sqlite3.Connection) -> None:
        """I1, I2, and positions without a gap."""
        for question in _NEVER:
            assert log.execute(question).fetchall() == [], question

    def _check_credit(self, log: sqlite3.Connection) -> None:
        """I6, exactly, at whatever moment."""
        for user, credit, reserved, refunded, granted in log.execute(_BALANCES):
            assert credit == _CREDITS + granted - reserved + refunded, f"the balance of {user}"

    def _check_promises(self, log: sqlite3.Connection, owner: Owner) -> None:
        """What was answered, and what a device was told, is there, byte for byte."""
        rows = log.execute(_EVENTS, (owner.name,)).fetchall()
        events = {(generation_id, sequence): event for generation_id, sequence, event in rows}
        for generation_id in owner.started - set(owner.deleted):
            assert (generation_id, 1) in events, "a 202 without its event"
        for event in owner.acknowledged:
            kept = events.get((event["generationId"], event["sequence"]))
            assert json.loads(kept or "null") == event or event["generationId"] in owner.deleted, "a report was lost"
        told = owner.phone.wire.told[self._looked_at[owner.name] :]
        self._looked_at[owner.name] += len(told)
        for each in told:
            event = parse(each.text)[1]
            kept = events.get((event["generationId"], event["sequence"]))
            same = kept is not None and kept in each.text
            assert same or event["generationId"] in owner.deleted, "a device was told what is not in the log"

    def _check_resumed(self, log: sqlite3.Connection) -> None:
        """What may have been paid for was ended at once (I7) and refunded; nothing else was interrupted."""
        for generation_id, left in self._unfinished.items():
            row = log.execute(_EVENT, (generation_id, left.sequence + 1)).fetchone()
            following = None if row is None or row[0] is None else json.loads(row[0])
            if left.status in self._paid:
                if following is None:
                    assert any(generation_id in owner.deleted for owner in self._owners), "left as it was"
                    continue
                assert (following["status"], following["code"]) == ("failed", "interrupted"), following
                self.interrupted += 1
            elif following is not None:
                assert "interrupted" not in (following.get("code"), following.get("faceSwapError", {}).get("code"))
                self.repeated += FLOWS[left.kind][left.status].repeats  # type: ignore[index]


_LAST_OF_UNFINISHED: Final = """
    SELECT generation_id, kind, max(sequence), event FROM generations JOIN events ON generation = generations.id
    WHERE end_position IS NULL AND json_extract(order_json, '$.external') = 0 GROUP BY generations.id
"""
_EVENTS: Final = """
    SELECT generation_id, sequence, event FROM events
    JOIN generations ON generations.id = generation JOIN users ON users.id = events.user
    WHERE user_id = ? AND event IS NOT NULL
"""
_EVENT: Final = """
    SELECT event FROM events JOIN generations ON generations.id = generation WHERE generation_id = ? AND sequence = ?
"""
_BALANCES: Final = """
    SELECT user_id, credit,
        (SELECT count(*) FROM generations WHERE user = users.id AND reserved),
        (SELECT count(*) FROM events WHERE user = users.id AND name = 'generation_failed'),
        (SELECT coalesce(sum(amount), 0) FROM grants WHERE user = users.id)
    FROM users
"""
_NEVER: Final = (
    "SELECT generation FROM events GROUP BY generation HAVING min(sequence) <> 1 OR max(sequence) <> count(*)",
    "SELECT users.id FROM users JOIN events ON user = users.id GROUP BY users.id"
    " HAVING max(position) <> count(*) OR max(position) <> head",
    """SELECT generations.id FROM generations JOIN events ON generation = generations.id GROUP BY generations.id HAVING
        sum(name IN ('generation_completed', 'generation_failed')) <> (end_position IS NOT NULL)
        OR coalesce(end_position, max(position)) <> max(position)""",
)


@case(
    4,
    "{kills} times kill -9 of the service at random moments, one in {fresh} started by the command line, while {users} "
    "users with two devices each start, report, cancel, delete and are granted credit",
    "after each: every 202 and every event told is in the log, balances hold, what was left is resumed or interrupted; "
    "in the end: devices equal the log, one call per paid stage, no stray image",
    quick={"kills": 20, "fresh": 20, "users": 3, "alive": 0.5},
    long={"kills": 500, "fresh": 10, "users": 5, "alive": 1.0},
)
async def killed_at_random(trial: Trial, kills: int, fresh: int, users: int, alive: float) -> None:
    chance = random.Random(4)
    async with openai_server() as server, listening(_face()) as faces, browsers() as everybody:
        deployment = Deployment(
            trial.folder / "killed",
            {
                "credits": _CREDITS,
                "editor": "openai",
                "local_seconds": 0.2,
                "max_running": 3,
                "fetch_allow": "127.0.0.0/8",
            },
            {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.base_url},
            ["openai"],
        )
        provider, starts, unready = Provider(server), list[float](), 0
        async with Caller.open(deployment.url) as caller, _tasks() as group:
            async with deployment.serving(fresh=True) as life:
                names = [f"user-{number}" for number in range(users)]
                owners = [await _owner(name, deployment, caller, everybody, faces.address) for name in names]
                coroner = Coroner(deployment, owners, _PAID)
                keeping = [group.create_task(owner.phone.keep(deployment.port)) for owner in owners]
                living = [group.create_task(owner.live(0.05)) for owner in owners for _ in range(2)]
                await asyncio.sleep(chance.uniform(0, alive))
            coroner.look(resumed=True)
            _check_words(life.logged, deployment)
            for number in range(1, kills):
                began = time.monotonic()
                async with deployment.life(fresh=number % fresh == 0) as life:
                    if chance.random() < 0.8:
                        await life.ready()
                        starts.append(time.monotonic() - began)
                        if chance.random() < 0.5:
                            await _told(owners, chance.choice((_PAID, ("face_swap",))), alive)
                    await asyncio.sleep(chance.uniform(0, 0.15))
                unready += not life.was_ready
                coroner.look(resumed=life.was_ready)
                _check_words(life.logged, deployment)
            for owner in owners:
                owner.over = True
            async with deployment.serving() as life:
                began = time.monotonic()
                async with asyncio.timeout(100):
                    await asyncio.gather(*living)
                    for owner in owners:
                        while await caller.generations(owner.name, status="active"):
                            await asyncio.sleep(0.02)
                trial.at_most("all had ended after", time.monotonic() - began, 30, "s", time=True)
                life.send(signal.SIGTERM)
                assert await life.ended() == 0
            coroner.look(resumed=True)
            _check_words(life.logged, deployment)
            trial.tell("images left by the killed", len(deployment.pictures))
            async with deployment.serving() as life:
                for owner in owners:
                    await _check_owner(owner, caller, provider.calls, deployment)
                await _check_pictures(deployment, owners, caller)
                for each in keeping:
                    each.cancel()
                life.send(signal.SIGTERM)
                assert await life.ended() == 0
        await everybody.forget_all()
        await hang_up([owner.phone.wire for owner in owners])
    trial.tell("kills", f"{kills}, {unready} of them before it was ready")
    trial.tell("a start took", f"{statistics.median(starts):.2f} s, at most {max(starts):.2f}")
    trial.tell("generations", sum(len(owner.started) for owner in owners))
    trial.tell("in stages when killed", ", ".join(f"{name} {count}" for name, count in coroner.found.most_common()))
    trial.tell("interrupted, and refunded", coroner.interrupted)
    trial.tell("free face swaps made again", coroner.repeated)
    trial.tell("events told to the devices", sum(len(owner.told) + len(owner.phone.events) for owner in owners))
    trial.tell("returns, all recovered", sum(owner.phone.returns + len(_returns(owner.browser)) for owner in owners))
    trial.tell("calls without an answer, made again", caller.unanswered)
    trial.tell("provider calls, at most one each", provider.calls.total())


def _face() -> Origin:
    """Gives a face to whoever asks, not at once."""
    data, chance = solid(GREEN).data, random.Random(4)

    async def pause(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(chance.uniform(0, 0.1))

    return Origin(lambda _: then(pause, whole(data, media_type="image/png")))


async def _owner(name: str, deployment: Deployment, caller: Caller, everybody: Browsers, face: str) -> Owner:
    wire = await Wire.open(deployment.port)
    await wire.connect(userId=name)
    browser = everybody.open(deployment.url, first={"userId": name})  # Like the seed's: it authenticates once.
    assert (await browser.ack())["ok"] is True
    return Owner(name, caller, Phone(wire), browser, f"{face}/face.png")


async def _told(owners: Sequence[Owner], stages: Collection[str], seconds: float) -> None:
    """Wait until somebody is told that one of these stages has begun, or for so long."""
    lists = [(owner.phone.wire.told, len(owner.phone.wire.told)) for owner in owners]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not any(parse(each.text)[1]["status"] in stages for told, seen in lists for each in told[seen:]):
                await asyncio.sleep(0.01)


def _returns(browser: Browser) -> list[bool]:
    """Of each connection but the first, whether it was recovered."""
    return [line["recovered"] for line in browser.on("connect")[1:]]


def _check_words(lines: Sequence[str], deployment: Deployment) -> None:
    """I9, of what was logged."""
    words = ("Traceback", "ERROR", KEY, str(deployment.folder))
    assert not any(word in line for line in lines for word in words), "\n".join(lines)


async def _check_owner(owner: Owner, caller: Caller, calls: Mapping[str, int], deployment: Deployment) -> None:
    """I1 to I7 for a user, by HTTP and by what the devices were told."""
    name, gone = owner.name, set(owner.deleted)
    feed = await caller.feed(name, owner.phone.beginning)
    # Of what is deleted both knew the end before.
    await owner.phone.until(lambda: len(_but(owner.phone.events, gone)) >= len(feed))
    await owner.browser.until(lambda: len(_but(owner.told, gone)) >= len(feed))
    assert all(_returns(owner.browser)), "the official client was not recovered"
    assert _but(owner.phone.events, gone) == feed, "a device was told otherwise"
    assert owner.told == owner.phone.events
    snapshots = {each["generationId"]: each for each in await caller.generations(name)}
    assert set(snapshots) == owner.started - gone, "not what was answered with 202"
    kept = Counter(owner.deleted.values())["completed"]
    for order in owner.orders.values():
        if order.generation_id in gone:
            continue
        history = [event for event in feed if event["generationId"] == order.generation_id]
        assert await caller.events(order.generation_id, name) == history
        assert [event["sequence"] for event in history] == list(range(1, len(history) + 1))
        assert [event["status"] in _ENDS for event in history] == [False] * (len(history) - 1) + [True]
        progress = [event["progress"] for event in history]
        assert progress == sorted(progress)
        flow = FLOWS["edit" if order.kind == "edit" else "generate"]
        entered = [event["status"] for event in history if event["message"] == flow[event["status"]].message]
        assert len(entered) == len(set(entered)), "a stage was entered twice"
        assert history[-1].get("faceSwapError", {}).get("code") != "interrupted", "free work was not repeated"
        assert _fold(order, name, history) == {**snapshots[order.generation_id], "expiresAt": None}
        kept += history[-1]["status"] == "completed"
        stages = {event["status"] for event in history}
        paid = stages & {"openai_editing", "ai_generation"} and not order.external
        assert calls.get(order.key, 0) <= bool(paid), "paid for twice"
        if stages & {"openai_editing_completed", "completed"} and not order.external:
            assert calls[order.key] == 1
        assert await order.start(caller, name) == order.generation_id
    assert (await caller.get("/me", name))["credit"] == _CREDITS + sum(owner.grants.values()) - kept
    assert len(await caller.generations(name)) == len(snapshots)
    await _check_cursors(owner, caller)


def _but(events: Iterable[JSON], gone: Collection[str]) -> list[JSON]:
    return [event for event in events if event["generationId"] not in gone]


def _fold(order: Ordered, user: str, history: Sequence[JSON]) -> JSON:
    wish = Order(prompt=order.key, face_swap="imageUrls" in order.fields)
    events = [Event.model_validate(event) for event in history]
    kind = history[0]["kind"]
    whole = Generation.fold(order.generation_id, kind, user, wish, events)
    return {**whole.snapshot().model_dump(by_alias=True, exclude_none=True), "expiresAt": None}


async def _check_cursors(owner: Owner, caller: Caller) -> None:
    """The cursors of all lives are good, but where a deletion took an end away that they had yet to be told of."""
    events, wire = owner.phone.events, owner.phone.wire
    for place in random.Random(owner.name).sample(range(1, len(events) + 1), min(20, len(events))):
        begun = {event["generationId"] for event in events[:place] if event["status"] not in _ENDS}
        ended = {event["generationId"] for event in events[:place] if event["status"] in _ENDS}
        if not (begun - ended) & set(owner.deleted):
            rest = await caller.feed(owner.name, wire.cursor_after(place))
            assert rest == _but(events[place:], owner.deleted)


async def _check_pictures(deployment: Deployment, owners: Sequence[Owner], caller: Caller) -> None:
    """Every picture that an event names is there, and no other."""
    own, named = f"http://localhost:{deployment.port}/images/", set[str]()
    for owner in owners:
        for event in await caller.feed(owner.name, owner.phone.beginning):
            urls = [value for key, value in event.items() if key.endswith("Url")]
            named |= {url.removeprefix(own) for url in urls if url.startswith(own)}
    for name in named:
        assert (await caller.ask("GET", f"/images/{name}", "demo")).status_code == 200
    assert deployment.pictures == named, "stray images"


# --- 5: SIGTERM -------------------------------------------------------------------------------------------


class Stop(NamedTuple):
    """How a service is stopped in the middle of something."""

    #: What is going on.
    scene: "Callable[[Stopped], Awaitable[None]]"
    signals: Sequence[signal.Signals] = (signal.SIGTERM,)
    drain: float = 25
    local_seconds: float = 60
    #: Whether it waits for its work until the drain is over.
    waits: bool = False


class Stopped:
    """A service that is about to be stopped, and who uses it."""

    def __init__(self, deployment: Deployment, caller: Caller, phone: Phone) -> None:
        self.deployment = deployment
        self.caller = caller
        self.phone = phone
        self.stack = contextlib.AsyncExitStack()
        #: Who has stopped reading, and how much there is to read.
        self.stalled: tuple[Wire, int] | None = None
        #: What waits, and what is worked on.
        self.waiting = self.running = ""

    async def idle(self) -> None:
        """A socket that says nothing, and one that does not even authenticate."""
        wire = await Wire.open(self.deployment.port)
        self.stack.push_async_callback(hang_up, [wire])

    async def stall(self) -> None:
        """A reader that has stopped reading in the middle of far more than fits into the line."""
        wire = await Wire.open(self.deployment.port, narrow=True)
        self.stack.push_async_callback(hang_up, [wire])
        await wire.connect(userId="hog")
        wire.transport.pause_reading()
        urls = {f"{name}Url": f"https://pictures.test/{'x' * 1_900}" for name in ("composition", "preview")}
        reports: list[JSON] = [{"status": "composition"}, {"status": "composition_completed", **urls}]
        reports += [{"status": "ai_generation", "progress": progress} for progress in range(60, 100)]
        reports += [{"status": "completed"}]  # Else it would be waited for.
        for number in range(2):
            order = Ordered(f"{number}", "generate", {"metadata": json.dumps({"x": "x" * 1_900})}, external=True)
            path = f"/generations/{await order.start(self.caller, 'hog')}/transitions"
            for report in reports:
                answer = await self.caller.ask("POST", path, "hog", json=report)
                assert answer.status_code == 200, answer.text
        self.stalled = wire, 2 * (1 + len(reports))

    async def upload(self) -> None:
        """An upload of which no more comes, and a long poll."""
        await self._say(
            b"POST /generations/edit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        opening = await self.caller.once("GET", "/socket.io/?EIO=4&transport=polling", "ada")
        sid = json.loads(opening.text[1:])["sid"]
        await self._say(
            f"GET /socket.io/?EIO=4&transport=polling&sid={sid} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )

    async def _say(self, data: bytes) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.deployment.port)
        self.stack.callback(writer.close)  # The writer is kept: with it the connection would go.
        writer.write(data)

    async def work(self) -> None:
        """One generation is with the offline editor, and another waits."""
        self.running = await Ordered("running", "edit", {}, external=False).start(self.caller, "ada")
        await self.phone.wire.until(lambda: self.phone.events[-1:] != [] and self.phone.events[-1]["progress"] >= 60)
        self.waiting = await Ordered("waiting", "edit", {}, external=False).start(self.caller, "ada")
        await self.phone.wire.until(lambda: any(each["generationId"] == self.waiting for each in self.phone.events))

    async def everything(self) -> None:
        for scene in (self.idle, self.stall, self.upload, self.work):
            await scene()

    async def check(self) -> None:
        """Afterwards: what was left was told to have ended, or is taken up by the next life of the service."""
        assert not self.phone.wire.sent_away
        if self.stalled is not None:
            wire, events = self.stalled
            wire.transport.resume_reading()
            await wire.until_gone()
            assert len(wire.told) < events, "it was not stalled"
        if not self.running:
            return
        if self.deployment.durable:
            assert not {event["status"] for event in self.phone.events} & set(_ENDS), "not left as it was"
            async with self.deployment.serving() as life:
                await self.phone.back(self.deployment.port)
                await self.phone.wire.until(lambda: len(self._ends()) == 2)
                # The offline editor's work is free, and so it is done again.
                assert set(self._ends().values()) == {("completed", None)}
                assert await self.caller.feed("ada", self.phone.beginning) == self.phone.events
                assert (await self.caller.get("/me", "ada"))["credit"] == 98
                await hang_up([self.phone.wire])
                life.send(signal.SIGTERM)
                assert await life.ended() == 0
        else:
            assert set(self._ends().values()) == {("failed", "interrupted")}
            assert self.phone.events[-1]["credit"] == 100

    def _ends(self) -> dict[str, tuple[str, str | None]]:
        return {
            event["generationId"]: (event["status"], event.get("code"))
            for event in self.phone.events
            if event["status"] in _ENDS
        }


_STOPS: Final[Mapping[str, Stop]] = {
    "idle sockets": Stop(Stopped.idle),
    "a stalled reader": Stop(Stopped.stall),
    "a slow upload, a long poll": Stop(Stopped.upload),
    "running work": Stop(Stopped.work, drain=0.5, waits=True),
    "all of it": Stop(Stopped.everything, drain=0.5, waits=True),
    "a second signal": Stop(Stopped.work, (signal.SIGTERM, signal.SIGTERM)),
    "SIGINT": Stop(Stopped.work, (signal.SIGINT,)),
}
#: What is a part of all of it.
_PARTS: Final = ("a stalled reader", "a slow upload, a long poll", "running work")


@case(
    5,
    "SIGTERM with idle sockets, a stalled reader, a slow upload, a running generation; a second signal; SIGINT; on "
    "each log {rounds} times",
    "exit 0 within the drain + 1 s; in memory: interrupted, and told; in a file: left, and taken up by the next start",
    quick={"rounds": 1, "at_once": 4, "apart": False},
    long={"rounds": 5, "at_once": 1, "apart": True},
)
async def stopped(trial: Trial, rounds: int, at_once: int, apart: bool) -> None:
    stops = {name: each for name, each in _STOPS.items() if apart or name not in _PARTS}
    tries = [(name, durable) for name in stops for durable in (False, True) for _ in range(rounds)]
    took, turns = dict[int, float](), asyncio.Semaphore(at_once)

    async def stop(number: int) -> None:
        name, durable = tries[number]
        async with turns:
            took[number] = await _stop(Deployment(trial.folder / f"stop-{number}", durable=durable), stops[name])

    async with _tasks() as group:
        for number in range(len(tries)):
            group.create_task(stop(number))
    for name, each in stops.items():
        worst = max(took[number] for number, each in enumerate(tries) if each[0] == name)
        trial.at_most(f"{name}: gone after", worst, each.drain * each.waits + 1, "s", time=True)


async def _stop(deployment: Deployment, stop: Stop) -> float:
    """After how many seconds it was gone."""
    flags = {"drain": stop.drain, "local_seconds": stop.local_seconds, "max_running": 1}
    async with Caller.open(deployment.url) as caller, deployment.serving(**flags) as life:
        wire = await Wire.open(deployment.port)
        await wire.connect(userId="ada")
        here = Stopped(deployment, caller, Phone(wire))
        async with here.stack:
            await stop.scene(here)
            for number in stop.signals:
                began = time.monotonic()
                life.send(number)
                await asyncio.sleep(0.1)
            assert await life.ended(stop.drain * stop.waits + 30) == 0
            took = time.monotonic() - began
            assert life.logged == []
            await wire.until_gone()
            await here.check()
    return took


# --- 22: the disk is full; the clock jumps ----------------------------------------------------------------


@case(
    22,
    "{rounds} times no room for pictures, no room for the log, and a clock that jumps an hour forth and back twice, in "
    "the middle of generations",
    "503, nothing half-made; what runs fails with storage_failed, or waits and goes on; well again when there is room; "
    "order, sessions and retention unaffected by the clock",
    quick={"rounds": 1},
    long={"rounds": 10},
)
async def no_room_and_wrong_time(trial: Trial, rounds: int) -> None:
    for number in range(rounds):
        async with _tasks() as group:
            pictures = Deployment(trial.folder / f"pictures-{number}", prelude=SCRATCH_IS_NO_FILE)
            group.create_task(_no_room_for_pictures(trial, pictures))
            group.create_task(_no_room_for_the_log(trial, Deployment(trial.folder / f"log-{number}")))
            for name in LOGS:
                folder = trial.folder / f"clock-{name}-{number}"
                folder.mkdir()
                log = "memory://" if name == "memory" else f"sqlite:///{folder}/log.db"
                group.create_task(_the_clock_jumps(trial, folder / "images", log))


#: The limit counts files without a name, in memory, too. A full disk does not.
SCRATCH_IS_NO_FILE: Final = "import io, adapters.images.codec as codec; codec.scratch = io.BytesIO"


@contextmanager
def no_room(life: Life, size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes, as if the disk were full."""
    pid = life.pid.result()
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def _refused(answer: httpx2.Response, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, code), answer.text
    assert "retry-after" in answer.headers


async def _phone(port: int, user: str = "ada") -> Phone:
    wire = await Wire.open(port)
    await wire.connect(userId=user)
    return Phone(wire)


async def _until_ended(phone: Phone, generation_id: str) -> JSON:
    def ends() -> list[JSON]:
        return [each for each in phone.events if each["generationId"] == generation_id and each["status"] in _ENDS]

    await phone.wire.until(lambda: bool(ends()))
    return ends()[0]


def _noise() -> bytes:
    """A photo of less than a megabyte of which everything that is made is larger."""
    size = (1_600, 1_200)
    return encoded(Image.frombytes("RGB", size, random.Random(22).randbytes(3 * size[0] * size[1])), "JPEG", quality=40)


async def _no_room_for_pictures(trial: Trial, deployment: Deployment) -> None:
    photo, gate = _noise(), asyncio.Event()

    async def wait(_: asyncio.StreamWriter) -> None:
        await gate.wait()

    faces = Origin(lambda _: then(wait, whole(solid(GREEN).data, media_type="image/png")))
    async with (
        listening(faces),
        Caller.open(deployment.url) as caller,
        deployment.serving(fetch_allow="127.0.0.0/8") as life,
    ):
        phone = await _phone(deployment.port)
        form = parts("x", photo)
        slow = parts("x", photo, imageUrls=f"{faces.address}/face.png", faceSwap="false")
        running = (await caller.ask("POST", "/generations/edit", "ada", files=slow)).json()["generationId"]
        await phone.wire.until(lambda: phone.events[-1:] != [] and phone.events[-1]["status"] == "composition")
        before = deployment.pictures
        with no_room(life, 1_000_000):
            for _ in range(2):
                _refused(await caller.once("POST", "/generations/edit", "ada", key="k", files=form), "storage_failed")
            assert deployment.pictures == before, "something was left of what was refused"
            assert len(await caller.generations("ada")) == 1
            assert (await caller.get("/me", "ada"))["credit"] == 99
            gate.set()
            end = await _until_ended(phone, running)
            assert (end["code"], end["failedStage"], end["credit"]) == ("storage_failed", "composition", 100)
            # There is still room for small ones.
            small = (await caller.ask("POST", "/generations/edit", "ada", files=parts("x", PHOTO))).json()
            assert (await _until_ended(phone, small["generationId"]))["status"] == "completed"
        again = (await caller.ask("POST", "/generations/edit", "ada", key="k", files=form)).json()["generationId"]
        assert (await _until_ended(phone, again))["status"] == "completed"
        await _all_is_well(deployment, caller, phone, life, spent=2)
        trial.tell("no room for pictures", "2 starts refused, 1 failed and was refunded, then 1 completed")


async def _no_room_for_the_log(trial: Trial, deployment: Deployment) -> None:
    async with Caller.open(deployment.url) as caller, deployment.serving(local_seconds=0.5) as life:
        with contextlib.closing(sqlite3.connect(f"{deployment.log.as_uri()}?mode=ro", uri=True)) as stranger:
            # Somebody who reads keeps the write-ahead log from being emptied: pictures are smaller than it.
            stranger.execute("BEGIN")
            stranger.execute("SELECT count(*) FROM events").fetchall()
            phone = await _phone(deployment.port)
            filler = {"metadata": json.dumps({"x": "x" * 1_900})}
            external = [
                await Ordered(f"{number}", "generate", filler, external=True).start(caller, "pat")
                for number in range(12)
            ]
            running = await Ordered("running", "edit", {}, external=False).start(caller, "ada")
            await phone.wire.until(lambda: phone.events[-1:] != [] and phone.events[-1]["progress"] >= 60)
            wal = deployment.log.with_name("log.db-wal").stat().st_size
            assert wal > 300_000
            began = time.monotonic()
            with no_room(life, wal):
                calls = _writes(caller, external[0])
                for answer in await asyncio.gather(*(call() for call in calls)):
                    _refused(answer, "log_unavailable")
                trial.tell("no room for the log", f"{len(calls)} calls refused after {time.monotonic() - began:.1f} s")
                with contextlib.suppress(ConnectionResetError):
                    await _phone(deployment.port)
                    raise AssertionError("a session that could not be kept was promised")
                # What was appended when there was still room is told, and nothing else.
                kept = await caller.feed("ada", phone.beginning)
                await phone.wire.until(lambda: len(phone.events) >= len(kept))
                assert phone.events == kept
                assert not phone.wire.gone.is_set()
                assert [each["generationId"] for each in await caller.generations("ada")] == [running]
                assert (await caller.get("/me", "ada"))["credit"] == 99
            stranger.rollback()
        end = await _until_ended(phone, running)
        assert end["status"] == "completed", "what had been made was lost"
        for answer in [await call() for call in calls]:
            assert answer.status_code in (200, 202), answer.text
        [started] = [each["generationId"] for each in await caller.generations("ada") if each["kind"] == "generate"]
        assert (await _until_ended(phone, started))["status"] == "completed"
        assert [each["status"] for each in await caller.events(external[0], "pat")] == ["started", "composition"]
        assert (await caller.get("/me", "pat"))["credit"] == 100 - 12 - 1 + 5
        await _all_is_well(deployment, caller, phone, life, spent=2)


def _writes(caller: Caller, external: str) -> list[Callable[[], Awaitable[httpx2.Response]]]:
    """Calls that the log has to keep, each of them to be made again in the same way."""
    transitions = f"/generations/{external}/transitions"
    return [
        lambda: caller.once("POST", "/generations/generate", "ada", key="k", files=parts("x", PHOTO)),
        lambda: caller.once("POST", "/generations/edit?runner=external", "pat", key="k", files=parts("x")),
        lambda: caller.once("POST", transitions, "pat", json={"status": "composition", "sequence": 2}),
        lambda: caller.once("POST", "/users/pat/credit", "pat", key="k", json={"amount": 5}),
    ]


async def _all_is_well(deployment: Deployment, caller: Caller, phone: Phone, life: Life, *, spent: int) -> None:
    """Afterwards: the devices, the log, the balance and the folder agree. Nothing was swept."""
    feed = await caller.feed("ada", phone.beginning)
    assert phone.events == feed
    assert (await caller.get("/me", "ada"))["credit"] == 100 - spent
    await hang_up([phone.wire])
    life.send(signal.SIGTERM)
    assert await life.ended() == 0  # Until then pictures that are not needed any more are being removed.
    names = {value.rpartition("/")[2] for event in feed for key, value in event.items() if key.endswith("Url")}
    assert deployment.pictures == names, "stray images"
    assert not any(word in line for line in life.logged for word in ("Traceback", str(deployment.folder)))


class JumpingClock:
    """`domain.ports.Clock`: the right time, but for what it has jumped."""

    def __init__(self) -> None:
        self.jumped = timedelta()

    def __call__(self) -> datetime:
        return now() + self.jumped

    def jump(self, hours: int) -> None:
        self.jumped += timedelta(hours=hours)


async def _the_clock_jumps(trial: Trial, images: Path, log: str) -> None:
    clock, hold = JumpingClock(), Hold()
    overrides = {"clock": clock, "editor": ScriptedEditor(hold)}
    async with running(images, log=log, overrides=overrides) as service:
        phone = await _phone(service.port)
        ids = [await service.start()]
        await hold.reached.wait()
        for hours in (1, -1, -1, 1):
            clock.jump(hours)
            ids.append(await service.start())
            # In mid-generation, and with a session from before the jump.
            phone.wire.abort()
            await phone.wire.until_gone()
            await phone.back(service.port)
            key = {"Idempotency-Key": "k"}
            granted = await service.http.post("/users/pat/credit", headers=key, json={"amount": 5})
            assert granted.json()["credit"] == 105, "granted twice"
            hold.let_go.set()
            for generation_id in ids:
                assert (await _until_ended(phone, generation_id))["status"] == "completed"
            keeper = Housekeeping(service.service.log, service.service.images)
            assert await keeper.purge(ended_before=clock() - timedelta(days=1)) == 0
        page = await service.get(f"/events?after={phone.beginning}&limit=1000")
        assert (page["recovered"], [each["data"] for each in page["events"]]) == (True, phone.events)
        listed = (await service.get("/generations"))["generations"]
        assert [each["generationId"] for each in listed] == ids[::-1], "not in the order of their starts"
        times = [event["occurredAt"] for event in phone.events]
        assert times != sorted(times), "the clock did not go back"
        trial.tell("events over four jumps, in order", len(times))
        await hang_up([phone.wire])
