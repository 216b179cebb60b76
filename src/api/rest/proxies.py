"""What proxies in front of the service change: the client's address, scheme and host, and the path."""

import re
from collections.abc import Awaitable, Collection
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from api.loopback import HOST
from api.rest import headers

#: An entry of X-Forwarded-For with a port or brackets.
_HOP: Final = re.compile(r"\[(.*)\](?::[0-9]+)?|([^:]*):[0-9]+")
_PORT: Final = re.compile(r"[0-9]{1,5}")


class ForwardedHeaders:
    """Takes client, scheme and host from `X-Forwarded-*`, if the peer is a trusted proxy, and undoes a stripped prefix.

    Layers behind it read ``scope["client"]``, ``scope["scheme"]`` and the Host header. The client's address is in
    canonical form: an IPv4-mapped address is IPv4. Every path is served with and without the prefix: behind this layer
    it has the prefix, as ASGI's ``root_path``.
    """

    def __init__(self, app: ASGIApp, trusted: Collection[IPv4Network | IPv6Network], prefix: str = "") -> None:
        """`trusted`: networks of proxies that set or remove each of these headers.

        `prefix` is empty or begins with a slash, without one at its end.
        """
        self._prefix = prefix
        self._app = app
        self._trusted = trusted
        self._resolve_peer = lru_cache(maxsize=4096)(self._resolve)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Handle one request or connection."""
        if scope["type"] != "lifespan":
            host, port = scope.get("client") or ("", 0)  # None for a Unix socket.
            peer, trusted = self._resolve_peer(host)
            if peer:
                scope["client"] = (peer, port)
            if trusted:
                self._apply(scope)
            scope["root_path"] = self._prefix
            if scope["path"] == self._prefix:
                scope["path"] += "/"
            elif not scope["path"].startswith(f"{self._prefix}/"):
                scope["path"] = self._prefix + scope["path"]
        return self._app(scope, receive, send)

    def _resolve(self, entry: str) -> tuple[str, bool]:
        """The IP address in an entry of X-Forwarded-For, canonical, or ``""``; and whether it is a trusted proxy's."""
        match = _HOP.fullmatch(entry)
        try:
            address = ip_address((match[match.lastindex or 0] if match else entry).partition("%")[0])
        except ValueError:
            return "", False
        address = getattr(address, "ipv4_mapped", None) or address
        return str(address), any(address in network for network in self._trusted)

    def _apply(self, scope: Scope) -> None:
        """Each proxy has appended what it saw: the client is the rightmost address that is no trusted proxy's."""
        proxies = 0
        for hop in reversed(_elements(scope, b"x-forwarded-for")):
            address, trusted = self._resolve(hop)
            if address:
                scope["client"] = (address, 0)
            if not trusted:
                break
            proxies += 1

        def seen(name: bytes) -> str:
            """What the proxy nearest to the client says; the only value if there is one for all proxies."""
            values = _elements(scope, name)
            return values[-min(proxies + 1, len(values))].lower() if values else ""

        if seen(b"x-forwarded-proto") in ("https", "wss"):
            scope["scheme"] = "wss" if scope["type"] == "websocket" else "https"
        own = ",".join(headers.values(scope, b"host")).lower()
        host = HOST.fullmatch(seen(b"x-forwarded-host")) or HOST.fullmatch(own)
        if host is not None:
            port = seen(b"x-forwarded-port")
            name = f"{host[0]}:{port}" if host[3] is None and _PORT.fullmatch(port) else host[0]
            others = [header for header in scope["headers"] if header[0] != b"host"]
            scope["headers"] = [*others, (b"host", name.encode())]


def _elements(scope: Scope, name: bytes) -> list[str]:
    """The elements of a list header, in order."""
    return [value for part in ",".join(headers.values(scope, name)).split(",") if (value := part.strip())]
