"""Request bodies, read within limits. Routes read them once the caller is known."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.rest import headers
from api.rest.problems import problem
from domain.timeouts import within

Model = TypeVar("Model", bound=BaseModel)

#: The codes of the problems of every route that reads a body.
PROBLEMS: Final = ("bad_request", "request_timeout", "content_too_large", "invalid_request")

_MAX_JSON: Final = 64 * 1024
#: The slowest body: bytes per second over any window of so many seconds, and seconds until it is complete.
_MIN_RATE: Final = 1_000
BODY_WINDOW = 20.0
BODY_TIMEOUT = 900.0
#: A request has a body only if it has one of these.
_BODY_HEADERS: Final = frozenset({b"content-length", b"transfer-encoding"})


async def read_body(request: Request, size: int, sentence: str) -> AsyncIterator[bytes]:
    """The body in pieces, of at most `size` bytes, declared or not: else 413 with this sentence."""
    declared = headers.value(request.scope, b"content-length")
    if declared.isdigit() and int(declared) > size:
        raise HTTPException(413, sentence)
    received = 0
    async for body in request.stream():
        received += len(body)
        if received > size:
            raise HTTPException(413, sentence)
        yield body


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as this model. FastAPI would read it, however large, before it knows the caller.

    Raises:
        RequestValidationError: it is not valid.
        HTTPException: 413.
    """
    body = [each async for each in read_body(request, _MAX_JSON, "The request may have 64 kB at most.")]
    try:
        return model.model_validate_json(b"".join(body), by_alias=True, by_name=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The ``requestBody`` in OpenAPI."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # These are parts of responses too, and so components.
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class BodyTimeout:
    """An ASGI layer that answers ``408 request_timeout`` to a body that is too slow.

    The application sees a disconnect. Only the time in which it waits for the body counts, and a response that has
    started is not ended.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Handle one request or connection."""
        has_body = scope["type"] == "http" and not _BODY_HEADERS.isdisjoint(dict(scope["headers"]))
        return (self._with_body if has_body else self._app)(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive)

        async def send_unless_late(message: Message) -> None:
            body.answered = True
            if not body.late:
                await send(message)

        await self._app(scope, body.receive, send_unless_late)
        if body.late:
            detail = "The body was sent too slowly: it needs 1 kB/s at least, and 15 minutes at most."
            await problem("request_timeout", detail)(scope, receive, send)


class _Body:
    """The body of one request, and how fast it arrives."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._now = asyncio.get_running_loop().time
        self._waited = 0.0
        self._received = 0
        #: Seconds waited and bytes received at points, a second or more apart, since which too little has arrived.
        self._marks = deque([(0.0, 0)])
        self._whole = False
        self._ends = self._now() + BODY_TIMEOUT
        #: Whether a response has started, and whether the body was too slow before that.
        self.answered = self.late = False

    async def receive(self) -> Message:
        """Wait for the next part."""
        began = self._now()
        try:
            message = await within(self._limit(began), self._receive())
        except TimeoutError:
            if self.answered:
                return await self._receive()
            self.late = True
        if self.late:
            return {"type": "http.disconnect"}
        self._waited += self._now() - began
        self._received += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        while self._marks and self._received - self._marks[0][1] >= _MIN_RATE * BODY_WINDOW:
            self._marks.popleft()
        if not self._marks or self._waited - self._marks[-1][0] >= 1:
            self._marks.append((self._waited, self._received))
        return message

    def _limit(self, now: float) -> float | None:
        """The seconds in which the next part must arrive, if there is a limit."""
        if self._whole or self.answered:
            return None
        return min(self._ends - now, self._marks[0][0] + BODY_WINDOW - self._waited)
