"""The official JavaScript client in Node. Without Node, tests that need it are skipped with a reason."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from support.asyncapi import check_message
from support.harness import JSON

TESTS: Final = Path(__file__).parent.parent / "javascript"
ROOT: Final = TESTS.parent.parent

_CLIENT: Final = ROOT / "src" / "api" / "web" / "static" / "vendor" / "socket.io.min.js"

#: In CI nothing is skipped: a missing program fails the test.
_CI: Final = "CI" in os.environ

needs_node: Final = pytest.mark.skipif(
    not _CI and (shutil.which("node") is None or not (ROOT / "node_modules" / "jsdom").is_dir()),
    reason="needs Node and the official socket.io-client: install Node and npm, then `make test`",
)

needs_client: Final = pytest.mark.skipif(
    not _CI and not _CLIENT.is_file(), reason="needs the official socket.io-client: install npm, then `make test`"
)


@dataclass
class Script:
    """A running program that prints lines of JSON."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def listen(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            async with self._changed:
                self.lines.append(json.loads(line))
                self._changed.notify_all()

    async def until(self, happened: Callable[[], bool]) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(happened), 40)

    def named(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    @property
    def data(self) -> list[dict[str, Any]]:
        """The data of the seed's four events, in order."""
        return [line["data"] for line in self.lines if "data" in line]


@asynccontextmanager
async def seed(url: str, user: int) -> AsyncIterator[Script]:
    """The seed's JavaScript, unchanged except for the address of the server."""
    snippet = (TESTS / "seed.mjs").read_text()
    assert snippet.count('"http://localhost:3000"') == 1
    process = await asyncio.create_subprocess_exec(
        "node",
        "--import",
        str(TESTS / "seed_prelude.mjs"),
        "--input-type=module",
        "--eval",
        snippet.replace("http://localhost:3000", url),
        cwd=ROOT,
        env={**os.environ, "SEED_USER": str(user)},
        stdout=asyncio.subprocess.PIPE,
    )
    script = Script()
    assert process.stdout is not None
    listening = asyncio.create_task(script.listen(process.stdout))
    try:
        yield script
    finally:
        process.kill()
        await process.wait()
        await listening


@dataclass
class Browser:
    """One socket of the official client, driven and reported by `recovery.mjs`."""

    id: str
    _send: Callable[[dict[str, Any]], None]
    lines: list[dict[str, Any]] = field(default_factory=list)
    #: The events of generations: name and data.
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    #: The further arguments of each of them, after its data.
    further: list[list[Any]] = field(default_factory=list)
    #: All other events: name and arguments.
    notices: list[list[Any]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _refs: int = 0

    def on_line(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if line["on"] == "event":
            name = line["name"]
            check_message(name, line["args"][0])
            if name == "continue" or (name.startswith("generation_") and name != "generation_removed"):
                self.events.append((line["name"], line["args"][0]))
                self.further.append(line["args"][1:])
            else:
                self.notices.append([line["name"], *line["args"]])
        self._changed.set()

    async def until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(40):
            while not happened():
                self._changed.clear()
                await self._changed.wait()

    def do(self, command: str, **rest: Any) -> None:
        """Send a command to `recovery.mjs`."""
        self._send({"do": command, "id": self.id, **rest})

    async def call(self, name: str, *args: Any) -> dict[str, Any]:
        """Send an event and return its ack."""
        self._refs += 1
        ref = self._refs
        self.do("emit", ref=ref, name=name, args=args)
        return await self.ack(ref)

    def on(self, kind: str) -> list[dict[str, Any]]:
        """The lines of this kind: ``connect``, ``disconnect``, ``ack`` …"""
        return [line for line in self.lines if line["on"] == kind]

    async def ack(self, ref: str | int = "first", count: int = 1) -> dict[str, Any]:
        """The `count`-th ack with this ref. ``first`` and ``always`` are the payloads given to `Browsers.open`."""
        line = await self._line(lambda: [line for line in self.on("ack") if line["ref"] == ref], count)
        return dict(line["ack"])

    async def connected(self, count: int = 1) -> dict[str, Any]:
        """The `count`-th connect."""
        return await self._line(lambda: self.on("connect"), count)

    async def disconnected(self, count: int = 1) -> str:
        """The reason of the `count`-th disconnect."""
        line = await self._line(lambda: self.on("disconnect"), count)
        return str(line["reason"])

    async def _line(self, lines: Callable[[], list[dict[str, Any]]], count: int) -> dict[str, Any]:
        await self.until(lambda: len(lines()) >= count)
        return lines()[count - 1]


class Browsers:
    """Any number of sockets in one Node process."""

    def __init__(self, stdin: asyncio.StreamWriter) -> None:
        self._stdin = stdin
        self._opened = 0
        #: The open sockets by id.
        self.open_browsers: dict[str, Browser] = {}

    def open(self, url: str, *, first: Any = None, always: Any = None, **options: Any) -> Browser:
        """Open a socket that authenticates with `first` once, as the seed does, or with `always` on each connect."""
        self._opened += 1
        browser = Browser(f"{self._opened}", self._send)
        self.open_browsers[browser.id] = browser
        browser.do("open", url=url, options=options, first=first, always=always)
        return browser

    def _send(self, command: dict[str, Any]) -> None:
        self._stdin.write(json.dumps(command).encode() + b"\n")

    async def listen(self, stream: asyncio.StreamReader) -> None:
        async for text in stream:
            line = json.loads(text)
            if line["id"] in self.open_browsers:
                self.open_browsers[line["id"]].on_line(line)

    async def forget_all(self) -> list[Browser]:
        """Disconnect all sockets, and return them."""
        browsers = list(self.open_browsers.values())
        self.open_browsers.clear()
        for browser in browsers:
            browser.do("forget")
        await self._stdin.drain()
        return browsers


@asynccontextmanager
async def browsers() -> AsyncIterator[Browsers]:
    """The official client in a Node process, driven by the test."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(TESTS / "recovery.mjs"),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**20,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    sockets = Browsers(process.stdin)
    listening = asyncio.create_task(sockets.listen(process.stdout))
    try:
        yield sockets
    finally:
        process.kill()
        await process.wait()
        await listening


async def node_test(*names: str, services: JSON, **environment: str) -> None:
    """Run these files with Node's test runner, and fail with its report."""
    process = await asyncio.create_subprocess_exec(
        "node",
        "--test",
        "--test-reporter=tap",
        "--test-concurrency=2",
        *(str(TESTS / name) for name in names),
        cwd=ROOT,
        env={**os.environ, "STAGECAST_SERVICES": json.dumps(services), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 100)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    report = output.decode()
    counts = dict(line[2:].split(" ") for line in report.splitlines() if line.startswith("# ") and line.count(" ") == 2)
    assert process.returncode == 0, report
    assert int(counts["pass"]) == int(counts["tests"]) > 0, report
