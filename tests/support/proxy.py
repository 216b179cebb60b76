"""A reverse proxy, as small as it can be: it forwards what is below one path, and may strip that path."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def proxy(
    listener: socket.socket, port: int, *, path: str = "", strip: bool = False, headers: Mapping[str, str] | None = None
) -> AsyncIterator[None]:
    """Forward to `port` what is below `path`, one request per connection, with `headers` in place of its own."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, target, _ = head.split(" ", 2)
            if not re.match(rf"{path}([/?]|$)", target):
                writer.write(b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                writer.close()
                return
            forwarded = target.removeprefix(path) if strip else target
            head = head.replace(f"{method} {target}", f"{method} {'' if forwarded[:1] == '/' else '/'}{forwarded}", 1)
            set_headers = dict(headers or {})
            if not re.search(r"^upgrade: websocket\r$", head, re.I | re.M):
                set_headers["Connection"] = "close"
            for name, value in set_headers.items():
                head = re.sub(rf"^{name}:.*\r\n", "", head, flags=re.I | re.M)
                head = head.removesuffix("\r\n") + f"{name}: {value}\r\n\r\n"
            upstream, out = await asyncio.open_connection("127.0.0.1", port)
            out.write(head.encode("latin-1"))
            request = asyncio.create_task(_pipe(reader, out))
            await _pipe(upstream, writer)
            await request
        writer.close()

    async with await asyncio.start_server(serve, sock=listener):
        yield
