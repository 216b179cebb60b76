"""Limits on open connections, in all and for each client address."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import islice
from typing import Any, Final

from adapters import DESCRIPTOR, TRANSPORT

logger = logging.getLogger(__name__)

#: The ASGI scope extension with `ConnectionTable.attribute` for the connection of a request.
ATTRIBUTE: Final = "stagecast.attribute"
#: How many connections of an address are examined to find an idle one.
_EXAMINED: Final = 64


class ConnectionTable:
    """Counts open transports by client address, and aborts those beyond the limits.

    Beyond the limit in all, the address with the most connections loses one: an idle one, else its newest, which may
    be the new connection itself. So no address can lock others out. A transport is idle if its protocol has a true
    attribute ``idle``. IPv6 clients are counted by their /64, the usual size of a subscriber's network.
    """

    def __init__(
        self,
        most: int | None = None,
        per_address: int | None = None,
        proxies: Collection[IPv4Network | IPv6Network] = (),
        descriptors: int | None = None,
    ) -> None:
        """`most`: in all. `per_address` applies to the clients behind `proxies`, not to those. ``None``: no limit.

        `descriptors`: how many the connections may use in all; one that uploads needs another for a temporary file,
        and one whose request another node answers, for the connection to that node.
        """
        self._most, self._per_address, self._descriptors = (
            math.inf if limit is None else limit for limit in (most, per_address, descriptors)
        )
        self._uploads: set[asyncio.Transport] = set()
        self._proxies = proxies
        #: By address: its transports, the oldest first.
        self._groups: dict[str, dict[asyncio.Transport, None]] = {}
        self._addresses: dict[asyncio.Transport, str] = {}

    def add(self, transport: asyncio.Transport, host: str) -> None:
        """Count a new transport. Beyond a limit, it or another one is aborted. `host` is empty if unknown."""
        address = self._addresses[transport] = _network(host)
        group = self._groups.setdefault(address, {})
        group[transport] = None
        if host and len(group) > self._per_address and not any(ip_address(host) in each for each in self._proxies):
            self._abort(transport, "the limit of connections per address is reached")
        self._make_room()

    def count_upload(self, transport: asyncio.Transport) -> None:
        """The body of a request on this transport is about to be read: count its temporary file."""
        if transport in self._addresses:
            self._uploads.add(transport)
            self._make_room()

    @contextmanager
    def descriptor(self, transport: asyncio.Transport) -> Iterator[None]:
        """Count another connection, which is opened for a request on this transport."""
        self.count_upload(transport)
        try:
            yield
        finally:
            self.end_upload(transport)

    def end_upload(self, transport: asyncio.Transport) -> None:
        """The request has been answered."""
        self._uploads.discard(transport)

    def attribute(self, transport: asyncio.Transport, host: str) -> bool:
        """Count this transport for another host: the client that a proxy names, or the proxy again.

        Returns: whether it is still open. It is aborted if that host has too many.
        """
        if self._addresses.get(transport, _network(host)) != _network(host):
            self.remove(transport)
            self.add(transport, host)
        return not transport.is_closing()

    def extensions(self, transport: asyncio.Transport) -> dict[str, Any]:
        """The extensions of the ASGI scopes of this transport's requests."""
        attribute, descriptor = partial(self.attribute, transport), partial(self.descriptor, transport)
        return {TRANSPORT: transport, ATTRIBUTE: attribute, DESCRIPTOR: descriptor}

    def remove(self, transport: asyncio.Transport) -> None:
        """Stop counting this transport, if it is counted."""
        self.end_upload(transport)
        address = self._addresses.pop(transport, None)
        if address is not None:
            del self._groups[address][transport]
            if not self._groups[address]:
                del self._groups[address]

    def _make_room(self) -> None:
        while len(self._addresses) > self._most or len(self._addresses) + len(self._uploads) > self._descriptors:
            self._abort(self._least_needed(), "the limit of all connections is reached")

    def _least_needed(self) -> asyncio.Transport:
        group = max(self._groups.values(), key=len)
        newest = next(reversed(group))
        for transport in list(islice(group, _EXAMINED)):
            if getattr(transport.get_protocol(), "idle", False):
                return transport
            group[transport] = group.pop(transport)  # To the end, so that others are examined next time.
        return newest

    def _abort(self, transport: asyncio.Transport, reason: str) -> None:
        logger.warning("a connection is closed: %s", reason)
        self.remove(transport)
        transport.abort()


class ClientLimit:
    """ASGI middleware that counts each connection for the client that a proxy in front names.

    It belongs inside the middleware that sets ``scope["client"]`` from a trusted proxy's headers. If the client has too
    many connections, this one is closed, and the request is not handled.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """Handle one request or connection."""
        attribute = scope.get("extensions", {}).get(ATTRIBUTE)
        if attribute is None or scope["client"] is None or attribute(scope["client"][0]):
            answer: Awaitable[None] = self._app(scope, receive, send)
            return answer
        return _disconnect(receive)


async def _disconnect(receive: Any) -> None:
    while not (await receive())["type"].endswith(".disconnect"):
        pass


@lru_cache(maxsize=4096)
def _network(host: str) -> str:
    """The key that a host is counted by."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or ip_address(int(address) >> 64 << 64)
    return str(address)
