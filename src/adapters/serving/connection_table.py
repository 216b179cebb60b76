"""Limits on open connections, in all and for each client address."""

import asyncio
import logging
from collections.abc import Collection
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import islice
from typing import Final

logger = logging.getLogger(__name__)

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

        `descriptors`: how many the connections may use in all; one that uploads needs another for a temporary file.
        """
        self._most = most
        self._descriptors = descriptors
        self._uploads: set[asyncio.Transport] = set()
        self._per_address = per_address
        self._proxies = proxies
        #: By address: its transports, the oldest first.
        self._groups: dict[str, dict[asyncio.Transport, None]] = {}
        self._addresses: dict[asyncio.Transport, str] = {}

    def add(self, transport: asyncio.Transport, host: str) -> None:
        """Count a new transport. Beyond a limit, it or another one is aborted. `host` is empty if unknown."""
        self._place(transport, host)
        self._make_room()

    def count_upload(self, transport: asyncio.Transport) -> None:
        """A request with a body has begun on this transport."""
        if transport in self._addresses:
            self._uploads.add(transport)
            self._make_room()

    def end_upload(self, transport: asyncio.Transport) -> None:
        """The request has been answered."""
        self._uploads.discard(transport)

    def attribute(self, transport: asyncio.Transport, host: str) -> bool:
        """Count this transport for another host: the client that a proxy names, or the proxy again.

        Returns: whether it is still open. It is aborted if that host has too many.
        """
        if self._addresses.get(transport, _network(host)) != _network(host):
            self._unplace(transport)
            self._place(transport, host)
        return not transport.is_closing()

    def remove(self, transport: asyncio.Transport) -> None:
        """Stop counting this transport, if it is counted."""
        self._uploads.discard(transport)
        self._unplace(transport)

    def _unplace(self, transport: asyncio.Transport) -> None:
        address = self._addresses.pop(transport, None)
        if address is not None:
            del self._groups[address][transport]
            if not self._groups[address]:
                del self._groups[address]

    def _make_room(self) -> None:
        while self._addresses and (
            (self._most is not None and len(self._addresses) > self._most)
            or (self._descriptors is not None and len(self._addresses) + len(self._uploads) > self._descriptors)
        ):
            self._abort(self._least_needed(), "the limit of all connections is reached")

    def _place(self, transport: asyncio.Transport, host: str) -> None:
        address = self._addresses[transport] = _network(host)
        group = self._groups.setdefault(address, {})
        group[transport] = None
        limited = self._per_address is not None and host and not self._is_proxy(host)
        if limited and len(group) > (self._per_address or 0):
            self._abort(transport, "the limit of connections per address is reached")

    def _least_needed(self) -> asyncio.Transport:
        group = max(self._groups.values(), key=len)
        newest = next(reversed(group))
        for transport in list(islice(group, _EXAMINED)):
            if getattr(transport.get_protocol(), "idle", False):
                return transport
            group[transport] = group.pop(transport)  # To the end, so that others are examined next time.
        return newest

    def _is_proxy(self, host: str) -> bool:
        return any(ip_address(host) in network for network in self._proxies)

    def _abort(self, transport: asyncio.Transport, reason: str) -> None:
        logger.warning("a connection is closed: %s", reason)
        self.remove(transport)
        transport.abort()


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
