"""Cases 28 to 30: early answers, half-sent uploads, and too many connections."""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx2

from reliability.cases import SECRET, Trial, case
from support.deployment import Deployment
from support.harness import PHOTO
from support.processes import allow_sockets, together

_HEAD: Final = b"POST /generations/edit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n"
_FORM: Final = b"Content-Type: multipart/form-data; boundary=x\r\n"
_FILE: Final = b'\r\n--x\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n'


def _deployment(
    folder: Path, descriptors: int, constants: Mapping[str, float], *, open_mode: bool = False, **flags: object
) -> Deployment:
    """A service with so many descriptors, whose constants, by module and name, are these."""
    limit = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))"
    modules = sorted({name.rpartition(".")[0] for name in constants})
    lines = ["import resource", *(f"import {name}" for name in modules), limit]
    lines += [f"{name} = {value}" for name, value in constants.items()]
    environment = {} if open_mode else {"STAGECAST_JWT_SECRET": SECRET}
    return Deployment(folder, flags, environment, prelude="\n".join(lines), durable=False)


class _Line:
    """A connection, and what has come of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.answer = b""

    @classmethod
    async def open(cls, port: int, said: bytes, address: str = "127.0.0.1") -> "_Line":
        line = cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0)))
        line.writer.write(said)
        return line

    async def until_answered(self) -> None:
        """Read what is answered, and the end."""
        with contextlib.suppress(ConnectionError):
            self.answer += await self.reader.read()

    async def until_closed(self, trickle: bytes, pause: float) -> float:
        """Go on sending this until it fails, and return after how many seconds it does, once it was answered."""
        reading, answered = asyncio.create_task(self.until_answered()), time.monotonic()
        with contextlib.suppress(ConnectionError):
            while True:
                if not reading.done():
                    answered = time.monotonic()
                self.writer.write(trickle)
                await self.writer.drain()
                await asyncio.sleep(pause)
        await reading
        self.writer.transport.abort()
        return time.monotonic() - answered


class _Health:
    """Asks a service whether it is alive, again and again, on connections of its own."""

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self.answers = list[float]()
        self.failures = 0
        self._port, self._address = port, address
        self._asking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "_Health":
        self._asking = asyncio.create_task(self._ask())
        return self

    async def __aexit__(self, *_: Any) -> None:
        assert self._asking is not None
        self._asking.cancel()
        await asyncio.wait([self._asking])

    async def _ask(self) -> None:
        said = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        while True:
            began = time.monotonic()
            line = await _Line.open(self._port, said, self._address)
            try:
                await line.until_answered()
            finally:
                line.writer.transport.abort()
            self.failures += b"HTTP/1.1 200" not in line.answer
            self.answers.append((time.monotonic() - began) * 1_000)
            await asyncio.sleep(0.02)

    def report(self, trial: Trial) -> None:
        trial.report("health answers", len(self.answers))
        trial.report("slowest of them", max(self.answers), "ms")
        trial.at_most("health unanswered", self.failures, 0)


def _check(lines: Sequence[str]) -> None:
    for line in lines:
        assert not any(word in line for word in ("Traceback", "ERROR", SECRET)), line


def _spooled(pid: int) -> float:
    """How many MB of temporary files this process has open."""
    size = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(each.readlink()).endswith("(deleted)"):
                size += each.stat().st_size
    return size / 1e6


@case(
    28,
    "{connections} clients at once get 401 and go on sending a byte now and then, {rounds} times, with 256 descriptors",
    "each reads its answer, and is closed within 5 s of it; health answers throughout; a line per 10 s is logged",
    quick={"connections": 100, "rounds": 1, "linger": 0.5},
    long={"connections": 190, "rounds": 10, "linger": 4.0},
)
async def early_answers(trial: Trial, connections: int, rounds: int, linger: float) -> None:
    allow_sockets(2 * connections)
    deployment = _deployment(trial.folder / "service", 256, {"adapters.serving.http_protocol.LINGER": linger})
    stays, answered = list[float](), 0
    async with deployment.serving() as life:
        began = time.monotonic()
        async with _Health(deployment.port) as health:

            async def one(number: int) -> None:
                nonlocal answered
                line = await _Line.open(deployment.port, _HEAD + _FORM + b"\r\n" + b"x" * 100)
                stays.append(await line.until_closed(b"x", 0.05))
                answered += line.answer.startswith(b"HTTP/1.1 401") and b"unauthenticated" in line.answer

            for _ in range(rounds):
                await together(one, connections, at_once=connections)
        health.report(trial)
        trial.at_most("answers that were lost", rounds * connections - answered, 0)
        trial.at_most("longest stay after the answer", max(stays), 5, "s", time=True)
        _check(life.logged)
        trial.at_most("lines logged", len(life.logged), 2 + (time.monotonic() - began) / 10)


@case(
    29,
    "{uploads} uploads stop after 4 MB, and as many go on with 500 bytes a second, while others upload and are served",
    "each gets 408 after 20 s, and nothing of it is left then; whole uploads are accepted",
    quick={"uploads": 4, "window": 1.0},
    long={"uploads": 60, "window": 20.0},
)
async def half_sent_uploads(trial: Trial, uploads: int, window: float) -> None:
    allow_sockets(3 * uploads)
    constants = {"api.rest.bodies.BODY_WINDOW": window, "adapters.serving.http_protocol.LINGER": 0.2}
    deployment = _deployment(trial.folder / "service", 1_000, constants, open_mode=True, credits="off")
    file, answers, most, accepted = _FILE + PHOTO + b"x" * 4_000_000, list[float](), 0.0, 0
    async with deployment.serving() as life, _Health(deployment.port) as health:
        pid = life.pid.result()

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, _spooled(pid))
                await asyncio.sleep(0.05)

        async def one(number: int) -> None:
            line = await _Line.open(deployment.port, _HEAD + _FORM + b"\r\n" + file)
            await line.writer.drain()
            began = time.monotonic()
            if number % 2:
                await line.until_answered()
            else:
                await line.until_closed(b"x" * 50, 0.1)
            answers.append(time.monotonic() - began)
            assert b"request_timeout" in line.answer
            line.writer.transport.abort()

        async def others() -> None:
            nonlocal accepted
            parts: list[tuple[str, Any]] = [("images", ("a.jpg", PHOTO, "image/jpeg")), ("prompt", (None, "a red hat"))]
            async with httpx2.AsyncClient(base_url=deployment.url, timeout=60) as http:
                for number in range(5):
                    answer = await http.post("/generations/edit", files=parts, headers={"X-User-Id": f"{number}"})
                    accepted += answer.status_code == 202

        watching = asyncio.create_task(watch())
        await asyncio.gather(together(one, 2 * uploads, at_once=2 * uploads), others())
        watching.cancel()
        await asyncio.wait([watching])
        assert watching.cancelled()
        health.report(trial)
        trial.report("spooled at most", most, "MB")
        trial.at_most("spooled afterwards", _spooled(pid), 0, "MB")
        trial.at_most("longest until closed", max(answers), window * 1.5, "s", time=True)
        trial.at_most("whole uploads refused", 5 - accepted, 0)
        _check(life.logged)


@case(
    30,
    "one address opens {flood} connections, silent, in use and by polling, where {most} are allowed in all and "
    "{each} per address; {others} other addresses call, also behind a proxy",
    "all others are served, the limits hold, a line per 10 s is logged",
    quick={"flood": 200, "most": 100, "each": 60, "others": 60},
    long={"flood": 5_000, "most": 500, "each": 400, "others": 200},
)
async def too_many_connections(trial: Trial, flood: int, most: int, each: int, others: int) -> None:
    allow_sockets(flood + 2 * others)
    limits = {"max_connections": most, "max_connections_per_address": each, "trusted_proxies": "127.0.0.9/32"}
    deployment = _deployment(trial.folder / "service", most + 100, {}, open_mode=True, **limits)
    async with deployment.serving() as life:
        began, lines = time.monotonic(), list[_Line]()
        get = b"GET /%b HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
        opening = get % (b"socket.io/?EIO=4&transport=polling", b"")

        async def crowd(number: int) -> None:
            said = (b"", opening, _HEAD + _FORM + b"\r\n" + _FILE)[number % 3]
            with contextlib.suppress(ConnectionError):
                lines.append(await _Line.open(deployment.port, said, "127.0.0.2"))

        async with _Health(deployment.port, "127.0.0.3") as health:
            await together(crowd, flood, at_once=50)
            served, held = 0, list[_Line]()
            for number in range(others):
                proxied = number % 2
                header = b"X-Forwarded-For: 192.0.2.%d\r\n" % number if proxied else b""
                address = "127.0.0.9" if proxied else f"127.0.1.{number}"
                line = await _Line.open(deployment.port, get % (b"stages", header), address)
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    async with asyncio.timeout(10):
                        served += (await line.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                held.append(line)
            there = sum(not line.reader.at_eof() and line.reader.exception() is None for line in lines)
        health.report(trial)
        trial.at_most("others not served", others - served, 0)
        trial.at_most("connections of the crowd", there, each)
        _check(life.logged)
        trial.at_most("lines logged", len(life.logged), 5 + 3 * (time.monotonic() - began) / 10)
        for line in (*lines, *held):
            line.writer.transport.abort()
