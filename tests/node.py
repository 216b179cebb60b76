"""The official JavaScript client, through Node; tests that need it are skipped, loudly, where it is not."""

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

TESTS: Final = Path(__file__).parent
ROOT: Final = TESTS.parent

_CLIENT: Final = ROOT / "src" / "api" / "static" / "vendor" / "socket.io.min.js"

#: In CI nothing is skipped: what is missing there is a failure.
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
        """What came with the seed's four events, in order."""
        return [line["data"] for line in self.lines if "data" in line]


@asynccontextmanager
async def seed(url: str, user: int) -> AsyncIterator[Script]:
    """The seed's own JavaScript, not a character of it changed but for the address of the server."""
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
    """One socket of the official client, as `recovery.mjs` tells of it."""

    id: str
    _tell: Callable[[dict[str, Any]], None]
    lines: list[dict[str, Any]] = field(default_factory=list)
    #: The events of generations: name and data.
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    #: What each of them carried behind its data.
    further: list[list[Any]] = field(default_factory=list)
    #: Every other event, whole.
    notices: list[list[Any]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _refs: int = 0

    def hear(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if line["on"] == "event":
            if line["name"] == "continue" or line["name"].startswith("generation_"):
                self.events.append((line["name"], line["args"][0]))
                self.further.append(line["args"][1:])
            else:
                self.notices.append([line["name"], *line["args"]])
        self._news.set()

    async def until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(40):
            while not happened():
                self._news.clear()
                await self._news.wait()

    def do(self, command: str, **rest: Any) -> None:
        """Say this to the program: see its commands."""
        self._tell({"do": command, "id": self.id, **rest})

    async def call(self, name: str, *args: Any) -> dict[str, Any]:
        """Send an event and return its ack."""
        self._refs += 1
        ref = self._refs
        self.do("emit", ref=ref, name=name, args=args)
        return await self.ack(ref)

    def on(self, kind: str) -> list[dict[str, Any]]:
        """What has been told of this kind: ``connect``, ``disconnect``, ``ack`` …"""
        return [line for line in self.lines if line["on"] == kind]

    async def ack(self, ref: str | int = "first", count: int = 1) -> dict[str, Any]:
        """The `count`-th ack of what was sent with this ref: ``first`` and ``always`` are sent of themselves."""
        line = await self._line(lambda: [line for line in self.on("ack") if line["ref"] == ref], count)
        return dict(line["ack"])

    async def connected(self, count: int = 1) -> dict[str, Any]:
        """How it was the `count`-th time that it connected."""
        return await self._line(lambda: self.on("connect"), count)

    async def disconnected(self, count: int = 1) -> str:
        """The reason of the `count`-th time that it was disconnected."""
        line = await self._line(lambda: self.on("disconnect"), count)
        return str(line["reason"])

    async def _line(self, lines: Callable[[], list[dict[str, Any]]], count: int) -> dict[str, Any]:
        await self.until(lambda: len(lines()) >= count)
        return lines()[count - 1]


class Browsers:
    """Any number of sockets in one Node."""

    def __init__(self, stdin: asyncio.StreamWriter) -> None:
        self._stdin = stdin
        self._opened = 0
        #: Those that are listened to.
        self.everybody: dict[str, Browser] = {}

    def open(self, url: str, *, first: Any = None, always: Any = None, **options: Any) -> Browser:
        """A socket like the seed's, which sends `first` once; or one that sends `always` with each connection."""
        self._opened += 1
        browser = Browser(f"{self._opened}", self._tell)
        self.everybody[browser.id] = browser
        browser.do("open", url=url, options=options, first=first, always=always)
        return browser

    def _tell(self, command: dict[str, Any]) -> None:
        self._stdin.write(json.dumps(command).encode() + b"\n")

    async def listen(self, stream: asyncio.StreamReader) -> None:
        async for text in stream:
            line = json.loads(text)
            if line["id"] in self.everybody:
                self.everybody[line["id"]].hear(line)

    async def forget_all(self) -> list[Browser]:
        """Close every socket for good, and return all that there were."""
        everybody = list(self.everybody.values())
        self.everybody.clear()
        for browser in everybody:
            browser.do("forget")
        await self._stdin.drain()
        return everybody


@asynccontextmanager
async def browsers() -> AsyncIterator[Browsers]:
    """The official client, which does what the test says."""
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
    everybody = Browsers(process.stdin)
    listening = asyncio.create_task(everybody.listen(process.stdout))
    try:
        yield everybody
    finally:
        process.kill()
        await process.wait()
        await listening
