"""Who is connected, by address, and how many may be."""

import asyncio
import logging
from collections.abc import Collection
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import islice
from typing import Final

logger = logging.getLogger(__name__)

#: Connections of one address that are examined, to find one that is idle.
_EXAMINED: Final = 64


class ConnectionTable:
    """Counts open transports by the address of their client, and aborts those beyond the limits.

    Where the limit of all is reached, a new connection takes the place of one of the address that has most: of an idle
    one, else of the newest. If the new one comes from that address itself and none is idle, it is refused. So nobody
    can keep other addresses out. A transport is idle if its protocol has a true attribute ``idle``. An IPv6 client
    counts by its /64, which one subscriber usually has for himself.
    """

    def __init__(
        self,
        most: int | None = None,
        per_address: int | None = None,
        proxies: Collection[IPv4Network | IPv6Network] = (),
    ) -> None:
        """`most`: in all. `per_address` does not hold for `proxies`, but for the clients they name. ``None``: any."""
        self._most = most
        self._per_address = per_address
        self._proxies = proxies
        #: By address: its transports, the oldest first.
        self._groups: dict[str, dict[asyncio.Transport, None]] = {}
        self._addresses: dict[asyncio.Transport, str] = {}

    def add(self, transport: asyncio.Transport, host: str) -> None:
        """Count a new transport. It, or another, is aborted if that is one too many. `host` is empty if unknown."""
        self._place(transport, host)
        if self._most is not None and len(self._addresses) > self._most:
            self._abort(self._least_needed(), "the limit of all connections is reached")

    def attribute(self, transport: asyncio.Transport, host: str) -> bool:
        """Count this transport as one of another host: of the client that a proxy names, or again of the proxy.

        Returns: whether it is still open, and not one too many.
        """
        if self._addresses.get(transport, _network(host)) != _network(host):
            self.remove(transport)
            self._place(transport, host)
        return not transport.is_closing()

    def remove(self, transport: asyncio.Transport) -> None:
        """Count this transport no more, if it is counted."""
        address = self._addresses.pop(transport, None)
        if address is not None:
            del self._groups[address][transport]
            if not self._groups[address]:
                del self._groups[address]

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
            group[transport] = group.pop(transport)  # To the end: others are examined next time.
        return newest

    def _is_proxy(self, host: str) -> bool:
        return any(ip_address(host) in network for network in self._proxies)

    def _abort(self, transport: asyncio.Transport, reason: str) -> None:
        logger.warning("a connection is closed: %s", reason)
        self.remove(transport)
        transport.abort()


@lru_cache(maxsize=4096)
def _network(host: str) -> str:
    """What a host is counted by."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or ip_address(int(address) >> 64 << 64)
    return str(address)
