"""``stagecast serve`` in a process of its own, and its clients."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
import socketio

from support.harness import JSON
from support.pictures import RED, solid

#: Seconds after which something counts as hanging.
TIMEOUT: Final = 60


@dataclass
class Process:
    """A running ``stagecast serve``."""

    process: asyncio.subprocess.Process
    line: str
    url: str

    async def start(self, http: httpx2.AsyncClient, **fields: str) -> httpx2.Response:
        files = [("images", ("a.jpg", solid(RED, kind="JPEG").data)), ("prompt", (None, b"a red hat"))]
        files += [(name, (None, value.encode())) for name, value in fields.items()]
        return await http.post(f"{self.url}/generations/edit", files=files, headers={"X-User-Id": "ada"})

    async def ended(self) -> tuple[int, str]:
        """Its exit code, and what it wrote to standard error."""
        _, errors = await asyncio.wait_for(self.process.communicate(), TIMEOUT)
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode()

    async def draining(self, http: httpx2.AsyncClient) -> httpx2.Response:
        """The answer of ``/health/ready`` once the service is not ready."""
        async with asyncio.timeout(TIMEOUT):
            while (ready := await http.get(f"{self.url}/health/ready")).status_code == 200:
                await asyncio.sleep(0.01)
        return ready


async def stagecast(*arguments: str, **variables: str) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "api",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment | variables,
    )


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, *flags: str, **variables: str) -> AsyncIterator[Process]:
    """Only its warnings are logged, unless the flags say otherwise."""
    own = ("--port", "0", "--images", str(tmp_path / "images"), "--log-level", "warning")
    process = await stagecast("serve", *own, *flags, **variables)
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), TIMEOUT)).decode()
        assert "http://localhost:" in line, (await process.communicate())[1].decode()
        port = int(line.split("http://localhost:")[1].split()[0])
        yield Process(process, line, f"http://127.0.0.1:{port}")
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def watching(url: str) -> AsyncIterator[list[dict[str, Any]]]:
    """The events of ada's feed, as a device gets them."""
    client = socketio.AsyncClient(reconnection=False, request_timeout=TIMEOUT)
    events: list[dict[str, Any]] = []
    client.on("*", lambda name, data, *_: events.append(data))
    await client.connect(url, auth={"userId": "ada", "recovery": False}, wait_timeout=TIMEOUT)
    try:
        yield events
    finally:
        await client.disconnect()


async def talk(port: int, talks: contextlib.AsyncExitStack) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection, closed in the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    talks.callback(writer.close)
    return reader, writer


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not holds():
            await asyncio.sleep(0.01)


async def last_of(events: list[JSON]) -> JSON:
    """The last event that a device received. What the service sent before it exited may still be in transit."""
    await until(lambda: bool(events) and events[-1].get("status") in ("completed", "failed"))
    return events[-1]


def patient() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(timeout=TIMEOUT)
