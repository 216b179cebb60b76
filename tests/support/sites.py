"""Web servers on loopback addresses, whose every byte a test decides."""

import asyncio
import contextlib
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from support.pictures import RED, solid

#: Where the sites are. Linux has a whole network of loopback addresses; elsewhere there is one of each version.
SITE: Final = ip_address("127.0.0.2" if sys.platform == "linux" else "::1")

NOBODY: Final = ip_address("127.0.0.3" if sys.platform == "linux" else "::1")

PUBLIC: Final = ip_address("93.184.216.34")


PNG: Final = solid(RED).data

OK: Final = b"HTTP/1.1 200 OK\r\n"


Page = bytes | Callable[[asyncio.StreamWriter], Awaitable[object]]


def page(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    declared = len(body) if length is None else length
    head = [f"HTTP/1.1 {status}", f"Content-Length: {declared}", *headers, "", ""]
    return "\r\n".join(head).encode() + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return page(b"", f"Location: {to}", "Set-Cookie: tracked=yes; Path=/", status=status)


@dataclass
class Site:
    """A web server whose every byte a test decides."""

    port: int = 0
    pages: dict[str, Page] = field(default_factory=dict)
    #: The head of each request, as it came.
    requests: list[str] = field(default_factory=list)
    connections: int = 0
    #: The other side has closed the connection.
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str = "/a.png", host: str = "pictures.test", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.requests.append(head)
            answer = self.pages[head.split(" ")[1]]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        writer.close()
        with contextlib.suppress(OSError):
            await reader.read()
        self.left.set()


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    host: str,
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """A listener whose connections all end with it."""
    tasks: set[asyncio.Task[None]] = set()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(served, host, port, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
