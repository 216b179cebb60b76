"""Downloads pictures from user-supplied URLs, with protection against server-side request forgery (SSRF).

Uses no proxy, cookie, credential or environment variable. Every hop opens a new connection to an address that was
checked, and closes it.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import KW_ONLY, dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from threading import Thread
from typing import Final

import httpcore2
import httpx2

from adapters.outbound.calls import TooLarge, bounded, compressions, ssl_context
from domain.errors import Failure, ImageRefusal
from domain.ports.images import ImageIntake, Picture

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
Stream = httpcore2.AsyncNetworkStream
#: Returns all addresses of a host name. Raises `OSError` if there are none.
Resolver = Callable[[str], Awaitable[Sequence[IPAddress]]]

MAX_BYTES: Final = 10 * 1024 * 1024
_MAX_REDIRECTS: Final = 3
_MAX_ADDRESSES_TRIED: Final = 3

#: In bytes. They limit the work of the HTTP parser, which is written in Python: a response in very many tiny chunks
#: would block the event loop for seconds.
_READ_SIZE: Final = 8 * 1024
_MAX_HEAD: Final = 32 * 1024
_MAX_FRAMING: Final = 1024 * 1024
_MIN_AVERAGE_CHUNK: Final = 512

_HEADERS: Final = [
    (b"User-Agent", b"stagecast-image-fetcher"),
    (b"Accept", b"image/png, image/jpeg, image/webp"),
    (b"Accept-Encoding", b"identity"),
    (b"Connection", b"close"),
]

#: Letters, digits, hyphens and underscores; no numeric last label, as in ``0x7f.1``, which resolvers read as IPv4.
_NAME: Final = re.compile(r"(?!.{254})([a-z0-9_-]{1,63}\.)*(?!([0-9]+|0x[0-9a-f]*)$)[a-z0-9_-]{1,63}")

_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
#: Networks that `is_global` lets through in some version of Python.
_NOT_PUBLIC: Final[Sequence[IPNetwork]] = [
    ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments; a cloud's metadata at .192
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16",  # a cloud's own services
        "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation
    )
]


def is_public(address: IPAddress) -> bool:
    """Whether this is the address of a host on the public internet.

    IPv6 must be global unicast without an embedded IPv4 address (NAT64, 6to4, Teredo).
    """
    if isinstance(address, IPv6Address) and (address.scope_id or address not in _GLOBAL_UNICAST):
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


async def system_resolver(host: str) -> Sequence[IPAddress]:
    """Resolve with `getaddrinfo`, in a new thread, so that slow name servers do not exhaust a shared pool."""
    answer: Future[Sequence[IPAddress]] = Future()
    answer.set_running_or_notify_cancel()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answer.set_result([ip_address(address[0]) for *_, address in found])
        except Exception as error:
            answer.set_exception(error)

    Thread(target=ask, name="resolver", daemon=True).start()
    return await asyncio.wrap_future(answer)


@dataclass(repr=False, eq=False)
class UrlFetcher:
    """`domain.ports.images.ImageFetcher` for http and https, from public addresses and those in `allow`.

    The caller limits how many fetches run at once: a queue in here would let slow sites delay fast ones.
    """

    intake: ImageIntake
    _: KW_ONLY
    allow: Sequence[IPNetwork] = ()
    #: URLs of the service's own pictures, whose address may not be public. `fetch` reads them from these files.
    files: Mapping[str, Path] = field(default_factory=dict)
    resolve: Resolver = system_resolver
    trust: ssl.SSLContext = field(default_factory=ssl_context)
    #: Seconds for all hops together.
    deadline: float = 20
    #: Seconds for each lookup, connect and handshake.
    connect_timeout: float = 5

    async def fetch(self, url: str) -> Picture:
        file = self.files.get(url)
        data = await (asyncio.to_thread(file.read_bytes) if file else self.download(url))
        try:
            return await self.intake.admit(data)
        except ImageRefusal as refusal:
            raise _failure(f"it leads to no image that can be used. {refusal}") from None

    async def download(self, url: str, limit: int = MAX_BYTES) -> bytes:
        """The body at this URL, of any type, up to `limit` bytes. Raises `Failure`, like `fetch`."""
        try:
            async with asyncio.timeout(self.deadline):
                return await self._download(url, limit)
        except (TimeoutError, httpcore2.TimeoutException):
            raise _failure("it took too long.", retryable=True) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            if isinstance(error.args[0] if error.args else None, ssl.SSLCertVerificationError):
                raise _failure("its site has no valid certificate.") from None
            raise _failure("its site could not be reached, or broke off.", retryable=True) from None

    async def _download(self, text: str, limit: int) -> bytes:
        url = _parsed(text)
        for _ in range(1 + _MAX_REDIRECTS):
            answer = await self._get(url, limit)
            if isinstance(answer, bytes):
                return answer
            if (url.scheme, answer.scheme) == ("https", "http"):
                raise _failure("it redirects from https to http.")
            url = answer
        raise _failure("it redirects too often.")

    async def _get(self, url: httpx2.URL, limit: int) -> bytes | httpx2.URL:
        """The body, or the URL of a redirect."""
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        request = httpcore2.Request("GET", target, headers=[(b"Host", url.netloc), *_HEADERS])
        connection = await self._connect(url)
        try:
            if url.scheme == "https":
                connection = await connection.start_tls(self.trust, url.raw_host.decode(), self.connect_timeout)
            stream = _LimitedStream(connection)
            response = await httpcore2.AsyncHTTP11Connection(target.origin, stream).handle_async_request(request)
            headers = httpx2.Headers(response.headers)
            if response.status in (301, 302, 303, 307, 308) and "location" in headers:
                return _parsed(headers["location"], url)
            stream.remaining = limit + _MAX_FRAMING
            return await _body(response, headers, limit)
        finally:
            await connection.aclose()

    async def _connect(self, url: httpx2.URL) -> Stream:
        """Connect to the very address that was resolved and checked (no DNS rebinding)."""
        async with asyncio.timeout(self.connect_timeout):
            addresses = await self._addresses(url.raw_host.decode())
        if not addresses or not all(map(self._may_connect, addresses)):
            # The same message for both, so that it does not reveal which internal names exist.
            raise _failure("its address does not exist or is not allowed.")
        port = url.port or (443 if url.scheme == "https" else 80)
        failed: Exception = httpcore2.ConnectError()
        for address in addresses[:_MAX_ADDRESSES_TRIED]:
            try:
                return await httpcore2.AnyIOBackend().connect_tcp(str(address), port, self.connect_timeout)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed

    async def _addresses(self, host: str) -> Sequence[IPAddress]:
        with suppress(ValueError):
            return [ip_address(host)]
        if not _NAME.fullmatch(host):
            return []
        try:
            return await self.resolve(host)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise
            return []

    def _may_connect(self, address: IPAddress) -> bool:
        scoped = isinstance(address, IPv6Address) and address.scope_id is not None
        return is_public(address) or (not scoped and any(address in network for network in self.allow))


async def _body(response: httpcore2.Response, headers: httpx2.Headers, limit: int) -> bytes:
    if response.status in (404, 410):
        raise _failure(f"there is nothing there ({response.status}).")
    if response.status != 200:
        again = response.status in (408, 425, 429) or response.status >= 500
        raise _failure(f"its site answered with status {response.status}.", retryable=again)
    if compressions(headers.get_list("content-encoding")):
        raise _failure("its site sends it compressed, which was not asked for.")
    chunks: list[bytes] = []
    try:
        if int(headers.get("content-length", 0)) > limit:
            raise TooLarge("")
        async with aclosing(bounded(response.aiter_stream(), limit)) as body:
            async for chunk in body:
                chunks.append(chunk)
                if len(chunks) > limit // _MIN_AVERAGE_CHUNK:
                    raise httpcore2.RemoteProtocolError
    except TooLarge:
        raise _failure(f"it is larger than {limit // 2**20} MB.") from None
    return b"".join(chunks)


@dataclass
class _LimitedStream(Stream):
    """A connection of which at most `remaining` bytes are read, `_READ_SIZE` at a time."""

    stream: Stream
    remaining: int = _MAX_HEAD

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 (not ours)
        data = await self.stream.read(min(max_bytes, _READ_SIZE), timeout)
        self.remaining -= len(data)
        if self.remaining < 0:
            raise httpcore2.RemoteProtocolError
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 (not ours)
        await self.stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self.stream.aclose()


def _parsed(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    try:
        url = base.join(text) if base else httpx2.URL(text)
        if url.raw_host.endswith(b"."):
            url = url.copy_with(host=url.raw_host[:-1].decode())
    except (httpx2.InvalidURL, ValueError):
        raise _failure("it is not a valid URL.") from None
    if url.scheme not in ("http", "https") or not url.raw_host or url.userinfo:
        raise _failure("it must be a plain http or https URL without a user name.")
    # Ports below 1024 belong to other protocols, such as mail and SSH.
    if url.port not in (None, 80, 443) and not 1024 <= (url.port or 0) <= 65535:
        raise _failure("its port is not allowed.")
    return url


def _failure(reason: str, *, retryable: bool = False) -> Failure:
    return Failure("image_fetch_failed", f"One of the image URLs could not be fetched: {reason}", retryable=retryable)
