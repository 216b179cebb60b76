"""HTTP byte by byte: bare connections, and our server around any application."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from adapters.serving.uvicorn_server import Server
from support.harness import TIMEOUT, Running

LAST = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def exchange(service: Running, *pieces: bytes) -> bytes:
    """Send these pieces, each once the one before has been taken, and return all that is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    async with asyncio.timeout(TIMEOUT):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)
        answer = await reader.read()
        writer.close()
        return answer


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3})", answer)]


async def stream(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers in two pieces of no announced length."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"one ", "more_body": True})
    await send({"type": "http.response.body", "body": b"two"})


@contextlib.asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[int]:
    """The port of our server with this application."""

    async def leave(force: asyncio.Event) -> None:
        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(app, leave, lambda: None, **options)
        server.config.lifespan = "off"
        running = asyncio.create_task(server.serve([listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await running


@dataclass
class Client:
    """A connection that keeps sending a byte at intervals, whatever the answer."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def until_closed(self, trickle: bytes, pause: float = 0.05) -> bytes:
        """All that was answered, once nothing more can be sent."""
        answer = b""
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(ConnectionError):
                while True:
                    with contextlib.suppress(TimeoutError):
                        answer += await asyncio.wait_for(self.reader.read(1 << 16), 0.001)
                    self.writer.write(trickle)
                    await self.writer.drain()
                    await asyncio.sleep(pause)
        return answer
