"""Event streams: the response that is one, and the table of those that are open."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any, Final

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.sse.blocks import COMMENT, RETRY, block
from api.wiring import PROGRESS_INTERVAL, TRANSPORT, BoundedSendBuffer
from domain.delivery import Hub
from domain.device import Device
from domain.identity import Identity
from domain.ports.system import Clock

#: Of every response of the streaming routes, also of one that refuses.
HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx passes each event on at once.
    "Vary": "Accept",
}
_RAW_HEADERS: Final = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
#: Calls of `check_progress` between two comments: 15 seconds.
_COMMENT_EVERY: Final = round(15 / PROGRESS_INTERVAL)
#: Milliseconds after which the kernel gives up a client that acknowledges nothing, not even a comment.
_USER_TIMEOUT: Final = 20_000
#: Blocks that are written at once.
_MAX_BATCH: Final = 16
#: The key of the stream in the scope of its request.
_STREAM: Final = "stagecast.stream"
#: Makes the device that fills a buffer.
Join = Callable[[BoundedSendBuffer[bytes]], Device[bytes]]


class EventStreams:
    """The open streams of this node."""

    def __init__(self, hub: Hub, clock: Clock) -> None:
        self.hub = hub
        self.clock = clock
        self.open: set[EventStream] = set()
        #: How many clients were disconnected because they did not read.
        self.slow_readers = 0

    async def response(self, identity: Identity, join: Join) -> Response:
        """The stream of the device that `join` makes; one that ends at once if the user has too many."""
        return EventStream(self, identity, join) if await self.hub.admit(identity.user_id) else try_again()

    async def check_progress(self) -> None:
        """Called every `PROGRESS_INTERVAL`: send comments, and disconnect clients that read nothing."""
        self.slow_readers += sum(stream.check_progress() for stream in list(self.open))

    def close_all(self) -> None:
        """End every stream; what is queued is still sent."""
        for stream in self.open:
            stream.buffer.close()


class EventStream(Response):
    """One stream: it ends when its buffer is closed, its token expires, or its client leaves."""

    def __init__(self, streams: EventStreams, identity: Identity, join: Join) -> None:
        self.buffer = BoundedSendBuffer[bytes](len, self._abort)
        self.buffer.put(RETRY)
        self._streams = streams
        self._expires_at = identity.expires_at
        self._device = join(self.buffer)
        self._transport: asyncio.Transport | None = None
        #: Calls of `check_progress`.
        self._checks = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Begin the stream; `StreamLayer` continues it."""
        self._transport = scope.get("extensions", {}).get(TRANSPORT)
        _limit_silence(self._transport)
        await send({"type": "http.response.start", "status": 200, "headers": _RAW_HEADERS})
        scope[_STREAM] = self

    async def run(self, receive: Receive, send: Send) -> None:
        """Send what comes until the stream ends."""
        self._device.start()
        self._streams.open.add(self)
        expiry = None
        if self._expires_at is not None:
            seconds = (self._expires_at - self._streams.clock()).total_seconds()
            expiry = asyncio.get_running_loop().call_later(seconds, self._expire)
        writer = asyncio.create_task(self._write(send))
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            if expiry is not None:
                expiry.cancel()
            self._streams.open.discard(self)
            self._device.close()
            self.buffer.close()
            writer.cancel()

    def check_progress(self) -> bool:
        """See `EventStreams.check_progress`."""
        self._checks += 1
        if self._checks % _COMMENT_EVERY == 0 and not len(self.buffer):
            self.buffer.put(COMMENT)
        return self.buffer.check_progress(0 if self._transport is None else self._transport.get_write_buffer_size())

    async def _write(self, send: Send) -> None:
        with contextlib.suppress(OSError):
            while blocks := await self.buffer.take(_MAX_BATCH):
                await send({"type": "http.response.body", "body": b"".join(blocks), "more_body": True})
            await send({"type": "http.response.body"})

    def _expire(self) -> None:
        self._device.close()
        self.buffer.close(block("authentication_expired", b'{"code":"token_expired"}'))

    def _abort(self) -> None:
        self.buffer.close()
        self.buffer.clear()
        if self._transport is not None:
            self._transport.abort()


class StreamLayer:
    """An ASGI layer that runs a stream after the application has returned, which frees a third of its memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        answered = {**scope}
        await self._app(answered, receive, send)
        stream: EventStream | None = answered.get(_STREAM)
        del answered  # A stream, which may run for hours, does not need the request.
        if stream is not None:
            await stream.run(receive, send)


def try_again() -> Response:
    """An empty stream: an EventSource reconnects after it, and never after another status than 200."""
    return Response(RETRY, headers=HEADERS)


def _limit_silence(transport: Any) -> None:
    """Let the kernel end the connection of a client that has vanished; Socket.IO has pings for that."""
    if transport is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        with contextlib.suppress(OSError):  # A Unix socket has no such option.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT)
