"""Web servers on loopback addresses that send the bytes that a test provides."""

import asyncio
import contextlib
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Final

import pytest

from adapters.images.intake import PillowIntake
from adapters.outbound.url_fetcher import IPAddress, IPNetwork, Resolver, UrlFetcher
from domain.errors import Failure
from domain.ports.images import ImageFetcher, ImageIntake
from support.pictures import RED, THREADS, solid

#: The address of the sites. Linux has a whole network of loopback addresses, other systems one per IP version.
SITE: Final = ip_address("127.0.0.2" if sys.platform == "linux" else "::1")

UNUSED_ADDRESS: Final = ip_address("127.0.0.3" if sys.platform == "linux" else "::1")

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
    """A web server that sends the bytes that a test provides."""

    port: int = 0
    pages: dict[str, Page] = field(default_factory=dict)
    #: The raw head of each request.
    requests: list[str] = field(default_factory=list)
    connections: int = 0
    #: Set when the client has closed the connection.
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
    """A listener; yields its port. Its connections are closed at the end."""
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


@dataclass
class Canary:
    """A listener that must get no connection."""

    port: int
    visits: list[object] = field(default_factory=list)


class FakeResolver:
    """A resolver with a list of answers per name, one per query; the last one repeats."""

    def __init__(self, answers: dict[str, list[list[IPAddress]]] | None = None) -> None:
        self.answers = answers or {}
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[IPAddress]:
        self.asked.append(host)
        answers = self.answers.get(host)
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return answers.pop(0) if len(answers) > 1 else answers[0]


INTAKE: Final = PillowIntake(THREADS)

#: Without certificate authorities, because loading them is slow.
NO_TRUSTED_CAS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def fetcher_with(
    resolve: Resolver,
    *,
    intake: ImageIntake = INTAKE,
    allow: Sequence[IPNetwork] = (ip_network(SITE),),
    trust: ssl.SSLContext = NO_TRUSTED_CAS,
    deadline: float = 60,
    connect_timeout: float = 30,
) -> UrlFetcher:
    return UrlFetcher(
        intake, allow=allow, resolve=resolve, trust=trust, deadline=deadline, connect_timeout=connect_timeout
    )


async def refused(fetcher: ImageFetcher, url: str) -> Failure:
    """The failure of a fetch. Checks that its sentence has the documented form, without internal details."""
    with pytest.raises(Failure) as caught:
        await fetcher.fetch(url)
    failure = caught.value
    assert failure.code == "image_fetch_failed"
    prefix, _, reason = failure.sentence.partition(": ")
    assert prefix == "One of the image URLs could not be fetched"
    assert re.fullmatch(r"[a-z][A-Za-z ,]+( \(?[0-9]{3}\)?| 10 MB)?\.( [A-Z][A-Za-z0-9 ,:]+\.)?", reason), reason
    assert failure.__cause__ is None
    assert failure.__suppress_context__ or failure.__context__ is None
    return failure


FORBIDDEN: Final = "its address does not exist or is not allowed."

BROKEN: Final = "its site could not be reached, or broke off."


#: Spellings of loopback addresses, and invalid hosts.
LOOPBACK: Final = f"""
127.0.0.1 127.1 127.0.1 127.000.000.001 127.0.0.1. 127.0.0.1.. 2130706433 017700000001 0x7f000001 0x7f.1
0x7f.0.0.0x1 0X7F.1 0177.0.0.1 00000177.1 0 0.0.0.0 0x １２７.０.０.１ 127。0。0。1 ①②⑦.⓪.⓪.① 127．0．0．1
%31%32%37.0.0.1 127.0.0.1%00.pictures.test 127.0.0.1%2f.pictures.test
[::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::127.0.0.1] [2002:7f00:1::]
[::1%25lo] [::1%lo] [fe80::1%251] [::1 ::1 [127.0.0.1] [v1.a]
localhost LOCALHOST localhost. LocalHost.LocalDomain ⓛⓞⓒⓐⓛⓗⓞⓢⓣ loopback.pictures.test
a@127.0.0.1 pictures.test@127.0.0.1 pictures.test:80@127.0.0.1 127.0.0.1\\@pictures.test pictures.test\\@127.0.0.1
. .. - a..b xn--a.test {"a" * 64}.test {"a." * 127}test
"""


def canary_names() -> FakeResolver:
    """A resolver that accepts every spelling of loopback that a C library accepts."""
    loopback = [ip_address("127.0.0.1")]
    names = FakeResolver(
        {name: [loopback] for name in ("localhost", "localhost.localdomain", "loopback.pictures.test")}
    )
    for text in LOOPBACK.split():
        with contextlib.suppress(OSError, UnicodeError):
            names.answers[text.lower()] = [[ip_address(socket.inet_ntoa(socket.inet_aton(text)))]]
    return names
