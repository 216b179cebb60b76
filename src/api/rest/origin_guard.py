"""CORS for every response, and the refusal of foreign hosts and origins in open mode.

In open mode anybody on this machine may act for any user, but web pages must not be able to. Before a body is read, the
service refuses a Host that is not its own (DNS rebinding) and an Origin that is not allowed. Socket.IO, errors
and preflights pass through here too; no other layer sets CORS headers.
"""

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.loopback import HOST, is_loopback
from api.rest import headers
from api.rest.problems import problem

_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}

_METHODS: Final = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
_EXPOSED: Final = b"Location, Retry-After, X-Request-Id"
#: A header name. Not ``*``: without credentials, browsers would take it as a wildcard.
_HEADER: Final = re.compile(r"[!#$%&'+.^_`|~0-9a-z-]+", re.IGNORECASE)
#: Headers that only browsers, proxies and other nodes may set.
_DENIED: Final = re.compile(r"cookie|host|x-(forwarded|stagecast)-.*", re.IGNORECASE)


class OriginGuard:
    """Refuses foreign hosts and origins in open mode, and adds the CORS headers to every response."""

    def __init__(self, app: ASGIApp, *, open_mode: bool, origins: Iterable[str], hosts: Collection[str] | None) -> None:
        """Wrap `app`.

        Args:
            app: everything the service answers with.
            open_mode: refuse foreign hosts and origins, and allow loopback origins. Otherwise only preflights are
                refused: a page of another origin has no token, and cannot read a response without CORS headers.
            origins: allowed besides the same origin; lower case. ``*`` stands for one label of a host name, or for a
                part of one.
            hosts: allowed besides loopback names; lower case, without port. ``None`` allows all.
        """
        self._app = app
        self._open_mode = open_mode
        patterns = (re.escape(_without_default_port(origin)).replace(r"\*", "[a-z0-9_-]{1,63}") for origin in origins)
        self._origins = re.compile("|".join(patterns) or "(?!)")
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        origins = headers.values(scope, b"origin")
        allowed = not origins or self._origins_allowed(origins, scope)
        asks = bool(origins) and scope.get("method") == "OPTIONS"
        preflight = asks and bool(headers.values(scope, b"access-control-request-method"))
        answer = self._refusal(scope, allowed, preflight) or (_preflight(scope) if preflight else self._app)
        if scope["type"] == "websocket":
            await answer(scope, receive, send)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Without Starlette's classes, which take as long as the rest of this layer.
                vary = [value for name, value in message["headers"] if name == b"vary"]
                others = [header for header in message["headers"] if header[0] != b"vary"]
                message["headers"] = [*others, (b"vary", b", ".join([*vary, b"Origin"]))]
                if origins and allowed:
                    message["headers"] += [
                        (b"access-control-allow-origin", origins[0].encode("latin-1")),
                        (b"access-control-allow-credentials", b"true"),
                        (b"access-control-expose-headers", _EXPOSED),
                    ]
            await send(message)

        await answer(scope, receive, send_with_cors)

    def _refusal(self, scope: Scope, origin_allowed: bool, preflight: bool) -> Response | None:
        if self._open_mode and not self._host_allowed(scope):
            detail = "This host name is not allowed. Add it to STAGECAST_ALLOWED_HOSTS to allow it."
            return problem("host_not_allowed", detail)
        if (self._open_mode or preflight) and not origin_allowed:
            detail = "This origin is not allowed. Add it to STAGECAST_CORS_ORIGINS to allow it."
            return problem("origin_not_allowed", detail)
        return None

    def _host_allowed(self, scope: Scope) -> bool:
        if self._hosts is None:
            return True
        hosts = headers.values(scope, b"host")
        name = _name(hosts[0]) if len(hosts) == 1 else None
        return name is not None and (name in self._hosts or is_loopback(name))

    def _origins_allowed(self, origins: list[str], scope: Scope) -> bool:
        """Whether the request has one origin, which is allowed."""
        if len(origins) > 1:
            return False
        origin = _without_default_port(origins[0].lower())
        scheme, host = scope["scheme"].replace("ws", "http"), headers.value(scope, b"host").lower()
        same = _without_default_port(f"{scheme}://{host}")
        origin_scheme, _, host = origin.partition("://")
        name = _name(host) if origin_scheme in _DEFAULT_PORTS else None
        loopback = self._open_mode and name is not None and is_loopback(name)
        return loopback or origin == same or self._origins.fullmatch(origin) is not None


def _preflight(scope: Scope) -> Response:
    """The answer to a preflight of an allowed origin: what it requests is allowed, except the denied headers."""
    requested = ",".join(headers.values(scope, b"access-control-request-headers")).split(",")
    names = [name for each in requested if _HEADER.fullmatch(name := each.strip()) and not _DENIED.fullmatch(name)]
    allowed = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Allow-Headers": ", ".join(names)}
    return Response(headers={**allowed, "Access-Control-Max-Age": "600"})


def _without_default_port(origin: str) -> str:
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], ""))


@lru_cache(maxsize=4096)
def _name(host: str) -> str | None:
    """The host name in ``name:port``, lower case and without brackets; ``None`` if it is malformed."""
    match = HOST.fullmatch(host.lower())
    return match and (match[1] or match[2])
