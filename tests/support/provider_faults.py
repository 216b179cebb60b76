"""A web server on a free port with programmable responses, down to single bytes, for faults of providers."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

MEGABYTE: Final = 1024 * 1024

#: Writes a response, or does something else with the connection.
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Request(NamedTuple):
    """A request; header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Origin:
    """Sends what `respond` returns for a request. Each connection serves one request."""

    respond: Callable[[Request], Answer]
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    #: Set by the first request.
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when a client has closed its connection, after a complete response or not.
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            request = await _read(reader)
            self.requests.append(request)
            self.reached.set()
            answering = asyncio.create_task(_answer(self.respond(request), writer))
            try:
                # Clients send nothing more, so this returns when the connection is closed.
                await reader.read()
            finally:
                self.left.set()
                answering.cancel()
                await asyncio.wait([answering])


async def _read(reader: asyncio.StreamReader) -> Request:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = lines[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    if headers.get("transfer-encoding") == "chunked":
        body = bytearray()
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return Request(method, target, headers, bytes(body))
    return Request(method, target, headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def _answer(answer: Answer, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        await answer(writer)
        if not writer.transport.is_closing():
            writer.write_eof()


@asynccontextmanager
async def listening(origin: Origin, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[Origin]:
    """The running server. Its connections are closed at the end."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await origin.serve(reader, writer)
        except asyncio.CancelledError:
            pass  # asyncio would complain of it.
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, host, port, limit=MEGABYTE)
    origin.port = server.sockets[0].getsockname()[1]
    try:
        yield origin
    finally:
        server.close()
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def closed_port() -> Iterator[int]:
    """A port without a listener, reserved so that only the test can listen there."""
    with socket.socket() as held:
        # A listener on this port must set it too.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


# --- answers ---------------------------------------------------------------------------------------------


def head(status: int = 200, media_type: str = "application/json", length: int | None = None, **headers: str) -> bytes:
    """The head of a response; without a length, its body ends with the connection."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Type: {media_type}", "Connection: close"]
    lines += [f"Content-Length: {length}"] * (length is not None)
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(body: bytes, status: int = 200, media_type: str = "application/json", **headers: str) -> Answer:
    return raw(head(status, media_type, len(body), **headers) + body)


def as_json(value: object, status: int = 200, **headers: str) -> Answer:
    return whole(json.dumps(value).encode(), status, **headers)


def raw(*parts: bytes) -> Answer:
    """Send exactly these bytes, each part after the previous one was sent."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return answer


def then(*answers: Answer) -> Answer:
    """Send these in turn on the same connection."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        for each in answers:
            await each(writer)

    return answer


async def hang(writer: asyncio.StreamWriter) -> None:
    """Send nothing more."""
    await asyncio.Event().wait()


async def reset(writer: asyncio.StreamWriter) -> None:
    """Reset the connection, after sending what was written before."""
    await asyncio.sleep(0.01)
    writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def drip(drop: bytes, pause: float = 0.01) -> Answer:
    """Send the same few bytes repeatedly, endlessly."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


class Flood:
    """Sends this many megabytes, as fast as the client reads; `taken` counts them."""

    def __init__(self, megabytes: int, start: bytes = b"", filler: bytes = b"A") -> None:
        self._megabytes = megabytes
        self._start = start
        self._filler = filler * MEGABYTE
        self.taken = 0

    async def __call__(self, writer: asyncio.StreamWriter) -> None:
        writer.write(self._start)
        for _ in range(self._megabytes):
            writer.write(self._filler)
            await writer.drain()
            self.taken += 1


def in_turn(answers: Iterable[Answer]) -> Callable[[], Answer]:
    """Each response once, then the last one repeatedly."""
    left = list(answers)
    return lambda: left.pop(0) if len(left) > 1 else left[0]
