"""What proxies in front of the service change: the client's address, scheme and host, and the path."""

import re
from collections.abc import Collection
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.loopback import HOST

#: An entry of X-Forwarded-For with a port or brackets.
_HOP: Final = re.compile(r"\[(.*)\](?::[0-9]+)?|([^:]*):[0-9]+")
#: Entries of a header that are looked at, from the right: more proxies than anybody has.
_MAX_HOPS: Final = 32
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
        self._peer = lru_cache(maxsize=4096)(self._resolve)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or connection."""
        host, port = scope.get("client") or ("", 0)  # None for a Unix socket.
        peer, trusted = self._peer(host)
        if peer:
            scope["client"] = (peer, port)
            if trusted:
                self._apply(scope)
        if scope["type"] in ("http", "websocket"):
            scope["root_path"] = self._prefix
            if scope["path"] == self._prefix:
                scope["path"] += "/"
            elif not scope["path"].startswith(f"{self._prefix}/"):
                scope["path"] = self._prefix + scope["path"]
                if scope.get("raw_path"):
                    scope["raw_path"] = self._prefix.encode() + scope["raw_path"]
        await self._app(scope, receive, send)

    def _resolve(self, host: str) -> tuple[str, bool]:
        """The canonical form of a peer's address, empty if it is none, and whether it is a trusted proxy's."""
        address = _address(host)
        return ("", False) if address is None else (str(address), self._trusts(address))

    def _trusts(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._trusted)

    def _apply(self, scope: Scope) -> None:
        """Each proxy has appended what it saw: the client is the rightmost address that is no trusted proxy's."""
        headers = Headers(scope=scope)
        hops = 1
        for hops, hop in enumerate(reversed(_values(headers, "x-forwarded-for")), 1):  # noqa: B007 - used below
            address = _address(hop)
            if address is None:
                break
            scope["client"] = (str(address), 0)
            if not self._trusts(address):
                break

        def seen(name: str) -> str:
            """What the proxy nearest to the client says; the only value if there is one for all proxies."""
            values = _values(headers, name)
            return values[-min(hops, len(values))].lower() if values else ""

        proto = seen("x-forwarded-proto")
        if proto in ("http", "https", "ws", "wss"):
            secure = "s" if proto in ("https", "wss") else ""
            scope["scheme"] = ("ws" if scope["type"] == "websocket" else "http") + secure
        hosts = headers.getlist("host")
        host = seen("x-forwarded-host")
        if not HOST.fullmatch(host):
            host = hosts[0].lower() if len(hosts) == 1 else ""
        match = HOST.fullmatch(host)
        if match is None:
            return
        port = seen("x-forwarded-port")
        if match[3] is None and _PORT.fullmatch(port):
            host = f"{host}:{port}"
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [*others, (b"host", host.encode())]


def _values(headers: Headers, name: str) -> list[str]:
    """The last values of a list header, in order."""
    values = ",".join(headers.getlist(name)).rsplit(",", _MAX_HOPS)[-_MAX_HOPS:]
    return [value for part in values if (value := part.strip())]


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The IP address in an entry of X-Forwarded-For, without port and zone; ``None`` if it has none."""
    match = _HOP.fullmatch(text)
    try:
        address = ip_address((match[match.lastindex or 0] if match else text).partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
