"""Each response gets an id, which is in every log line about its request; refused requests are logged and counted."""

import logging
import re
from collections import Counter
from collections.abc import Callable
from random import getrandbits
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import CALLER
from api.logs import REQUEST_ID
from api.rest.problems import PROBLEM

logger = logging.getLogger(__name__)

_HEADER: Final = b"x-request-id"
_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
#: The messages that begin a response, the opening of a WebSocket among them.
_BEGINNINGS: Final = ("http.response.start", "websocket.accept", "websocket.http.response.start")
#: The answer to a probe, which refuses nothing. What is not ready is logged by the part that fails.
_NOT_READY: Final = ("/health/ready", 503)


class RequestLog:
    """Adds ``X-Request-Id`` to every response: the caller's if it is valid, else a new one."""

    def __init__(self, app: ASGIApp, template: Callable[[str], str], refused: Counter[str]) -> None:
        """`template`: the route of a path, without what it names. `refused` counts by code."""
        self._app = app
        self._template = template
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == _HEADER]
        valid = len(given) == 1 and _ID.fullmatch(given[0])
        request_id = given[0] if valid else b"%016x" % getrandbits(64)
        REQUEST_ID.set(request_id.decode())
        # Those of an earlier request on this connection.
        PROBLEM.set("")
        CALLER.set("")

        async def send_with_id(message: Message) -> None:
            if message["type"] in _BEGINNINGS:
                message["headers"] = [*message.get("headers", ()), (_HEADER, request_id)]
                self._log(scope, message.get("status", 101))
            await send(message)

        await self._app(scope, receive, send_with_id)

    def _log(self, scope: Scope, status: int) -> None:
        if status < 400 and not logger.isEnabledFor(logging.DEBUG):
            return
        route = self._template(scope["path"].removeprefix(scope.get("root_path", "")))
        code = ""
        if status >= 400 and (route, status) != _NOT_READY:
            code = PROBLEM.get() or "bad_request"
            self._refused[code] += 1
        level = logging.INFO if code else logging.DEBUG
        fields = {"method": scope.get("method", "GET"), "route": route, "status": status}
        fields |= {name: value for name, value in (("code", code), ("user", CALLER.get())) if value}
        extra = {"fields": fields, "repeat_key": (level, code, route)}
        logger.log(level, "request refused" if code else "request answered", extra=extra)
