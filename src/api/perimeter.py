"""The outermost layer: CORS for everything, and who may not come in at all.

In open mode anybody on this machine may act for any user; a web page anywhere must not. So, before a body is
read, a Host that is not ours is refused (a name that an attacker has pointed at this machine), and so is an Origin
that is not allowed. Socket.IO, errors and preflights pass through here too, and nothing behind it speaks of CORS.
"""

import re
from collections.abc import Collection
from functools import partial
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.loopback import is_loopback
from api.problems import problem

_HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]*)?")

_SCHEMES: Final = {"ws": "http", "wss": "https"}


class Perimeter:
    """Let in, in open mode, what comes by our name and from an allowed origin; answer CORS for all of it."""

    def __init__(
        self, app: ASGIApp, *, open_mode: bool, origins: Collection[str], hosts: Collection[str] | None
    ) -> None:
        """Wrap `app`.

        Args:
            app: everything the service answers with.
            open_mode: refuse foreign hosts and origins, and allow loopback origins. Without it nobody is
                refused here: a page elsewhere has no token, and without CORS cannot read an answer.
            origins: allowed besides the same origin; lower case.
            hosts: allowed besides loopback names; lower case, without port. ``None`` allows every one.
        """
        self._app = app
        self._open_mode = open_mode
        self._origins = origins
        self._hosts = hosts
        cors = partial(
            CORSMiddleware,
            app,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "Content-Type", "Idempotency-Key", "X-User-Id"),
            expose_headers=("Location", "Retry-After"),
        )
        self._friends = cors(allow_origin_regex=".*")
        self._strangers = cors()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin_allowed = self._origin_allowed(scope["scheme"], headers)
        refusal = self._refusal(headers, origin_allowed)
        if scope["type"] == "websocket":
            if refusal is None:
                await self._app(scope, receive, send)
            elif "websocket.http.response" in scope.get("extensions", {}):
                await refusal(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        cors = self._friends if origin_allowed else self._strangers
        if refusal is None:
            await cors(scope, receive, send)
        else:
            await refusal(scope, receive, partial(cors.send, send=send, request_headers=headers))

    def _refusal(self, headers: Headers, origin_allowed: bool) -> Response | None:
        if not self._open_mode:
            return None
        if not self._host_allowed(headers):
            return problem("host_not_allowed", "The service does not answer to this host name.")
        if not origin_allowed:
            return problem("origin_not_allowed", "The service does not answer to this origin.")
        return None

    def _host_allowed(self, headers: Headers) -> bool:
        if self._hosts is None:
            return True
        hosts = headers.getlist("host")
        name = _name(hosts[0]) if len(hosts) == 1 else None
        return name is not None and (is_loopback(name) or name in self._hosts)

    def _origin_allowed(self, scheme: str, headers: Headers) -> bool:
        """Whether the request names no origin (it is not a browser's, or needs no permission) or an allowed one."""
        origins = [origin.lower() for origin in headers.getlist("origin")]
        if not origins:
            return True
        if len(origins) > 1:
            return False
        same = f"{_SCHEMES.get(scheme, scheme)}://{headers.get('host', '').lower()}"
        origin_scheme, _, host = origins[0].partition("://")
        name = _name(host)
        web = origin_scheme in ("http", "https") and name is not None
        loopback = self._open_mode and web and is_loopback(name or "")
        return loopback or origins[0] == same or origins[0] in self._origins


def _name(host: str) -> str | None:
    """The host name in ``name:port``, lower case and without brackets; ``None`` where it is none."""
    match = _HOST.fullmatch(host.lower())
    return match and (match[1] or match[2])
