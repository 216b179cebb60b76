"""uvicorn with graceful shutdown, access to transports, limits for slow or hostile clients, and corrections of HTTP."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import Any, Final

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Response

from adapters.realtime.engineio_socket import TRANSPORT
from adapters.serving.connection_table import ConnectionTable

logger = logging.getLogger(__name__)

#: Called when the process is asked to stop; returns when it may exit. It must not wait once the event is set.
Drain = Callable[[asyncio.Event], Awaitable[None]]

#: Bytes of a WebSocket's write buffer beyond which its client, which does not read, is disconnected.
_MAX_UNREAD: Final = 1_000_000
#: Bytes that the kernel buffers beyond those in flight (TCP_NOTSENT_LOWAT).
_MAX_UNSENT: Final = 64 * 1024
#: Frames of one WebSocket message.
_MAX_FRAGMENTS: Final = 1_000

#: Bytes of a request's head, and seconds in which it must arrive.
_MAX_HEAD: Final = 128 * 1024
HEADER_TIMEOUT = 20.0
#: Seconds for which the rest of a request is discarded after an early response. Closing at once would make the kernel
#: send RST, which destroys a response that the client has not read yet.
LINGER = 4.0
#: Seconds without progress after which a connection with unsent data is aborted.
SEND_TIMEOUT = 30.0
#: The kernel's queue of connections to accept, and how many asyncio accepts in a row: few, so that connections beyond
#: the limit are closed before descriptors run out.
_BACKLOG: Final = 2048
_ACCEPTED_AT_ONCE: Final = 8
#: The ASGI scope extension that `ClientLimit` calls with the client's address.
_ATTRIBUTE: Final = "stagecast.attribute"


#: Headers that announce a body.
_BODY: Final = (b"transfer-encoding", b"content-length")


def problem(status: HTTPStatus, detail: str) -> bytes:
    """The body (RFC 9457) of an error response that the server sends before the application sees the request."""
    content = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail, "code": "bad_request"}
    return json.dumps(content, separators=(",", ":")).encode()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with limits on the size and time of a request's head, and with rules of RFC 9110 and 9112.

    An ``Upgrade`` header that is not a WebSocket handshake is ignored, and HTTP/1.0 gets no chunked framing. A response
    sent before the whole request has arrived announces ``Connection: close``, and the rest of the request is discarded.
    """

    _in_head = True
    #: Bytes received since the last part of a message was complete: its head, a piece of its body, or its end.
    _unparsed = 0
    #: No further request is read: the last response is being sent.
    _lingering = False
    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, table: ConnectionTable, **rest: Any) -> None:
        super().__init__(**rest)
        self._table = table

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _host(self) -> str:
        return self.client[0] if self.client else ""

    def connection_made(self, transport: Any) -> None:
        """Called with a new connection."""
        sock = transport.get_extra_info("socket")
        # asyncio sets this only if the listening socket was created with proto=IPPROTO_TCP. Without it, the second of
        # two writes waits for the client's delayed acknowledgement of the first, 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Limit the kernel's unsent buffer: with megabytes in it, a stalled reader looks like a slow one.
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT)
        super().connection_made(transport)
        self._set_deadline(HEADER_TIMEOUT)
        self._table.add(transport, self._host)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection has ended."""
        self._table.remove(self.transport)
        self._cancel_deadline()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called with bytes that are not HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, "The request is not valid HTTP.")

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Send an error response without asking the application, and end the connection."""
        body = problem(status, detail)
        head = "HTTP/1.1 {} {}\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\nconnection: close\r\n"
        self.transport.write(f"{head.format(status.value, status.phrase, len(body))}\r\n".encode() + body)
        if self.idle:
            self._linger()
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Called with the first byte of a request, not with empty lines before it."""
        self._unset_keepalive_if_required()
        self._in_head = True
        self._set_deadline(HEADER_TIMEOUT)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called with the end of the head."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > _MAX_HEAD:
            raise httptools.HttpParserError  # Too much remains counted, so that this is answered with 431.
        self._in_head, self._unparsed = False, 0
        self._cancel_deadline()
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called with a header, and with a trailer after the body: trailers are dropped."""
        if self._in_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Called with a piece of the body."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called with the end of the request."""
        self._unparsed = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Called when the current response has been written."""
        self._table.end_upload(self.transport)
        if not self._lingering:
            super().on_response_complete()
            self._table.attribute(self.transport, self._host)
        else:
            self._linger()

    def _linger(self) -> None:
        """Send the buffered data and FIN, then discard input until the client closes, or for `LINGER` seconds."""
        self._lingering = True
        self.pipeline.clear()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        with contextlib.suppress(OSError):
            self.transport.write_eof()
        self._set_deadline(LINGER)

    def _set_deadline(self, seconds: float) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def data_received(self, data: bytes) -> None:
        """Called with received bytes."""
        if self._lingering and self.idle:
            return
        self._unparsed += len(data)
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as stopped:
                    rest = rest[stopped.args[0] :]
                if self._is_websocket_handshake():
                    self.headers.append((b"upgrade", b"websocket"))
                    self.handle_websocket_upgrade()
                    return
                # A new parser, as the old one takes nothing after a request with ``Connection: close``.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(self._head_without_upgrade())
            if self._unparsed > _MAX_HEAD:
                raise httptools.HttpParserError
        except httptools.HttpParserError:
            if self._unparsed > _MAX_HEAD:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request's headers are too large.")
            else:
                self.send_400_response("Invalid HTTP request received.")

    def _should_upgrade(self) -> bool:
        """Called by uvicorn for each head with an upgrade; `data_received` decides."""
        return True

    def _is_websocket_handshake(self) -> bool:
        """Remove the ``Upgrade`` headers, and return whether the request is a WebSocket handshake."""
        wanted = b",".join(value for name, value in self.headers if name == b"upgrade")
        self.headers[:] = [header for header in self.headers if header[0] != b"upgrade"]
        names = {name for name, value in self.headers if value != b"0" or name not in _BODY}
        return (
            (self.scope["method"], self.scope["http_version"]) == ("GET", "1.1")
            and b"websocket" in [token.strip() for token in wanted.lower().split(b",")]
            and b"sec-websocket-key" in names
            and names.isdisjoint(_BODY)
        )

    def _head_without_upgrade(self) -> bytes:
        """The request's head again: with an ``Upgrade`` in it the parser would not parse the body."""
        if self.scope["method"] == "CONNECT":
            raise httptools.HttpParserError  # The parser always takes it for an upgrade, and this is no proxy.
        head = [f"{self.scope['method']} ".encode(), self.url, f" HTTP/{self.scope['http_version']}\r\n".encode()]
        for name, value in self.headers:
            head += [name, b": ", value, b"\r\n"]
        return b"".join([*head, b"\r\n"])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Called by uvicorn for each request."""
        extensions: dict[str, Any] = {_ATTRIBUTE: partial(self._table.attribute, self.transport)}
        cycle.scope["extensions"] = extensions
        uploads = any(name in _BODY for name, _ in cycle.scope["headers"])

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def receive_counted() -> Any:
                # Only a body that is read needs a temporary file: a request that is refused first does not count.
                if uploads:
                    self._table.count_upload(self.transport)
                return await receive()

            async def send_early(message: Any) -> None:
                early = message["type"] == "http.response.start" and cycle.more_body
                if early:
                    cycle.keep_alive = False
                await send(message)
                if early:
                    # The header has been sent. Keep uvicorn from closing after the response, which would send RST.
                    self._lingering = cycle.keep_alive = True

            await app(scope, receive_counted, send_early)

        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(app, cycle)
        super()._start_asgi_task(cycle, answer)


def _without_chunks(app: Any, cycle: RequestResponseCycle) -> Any:
    """The application for one HTTP/1.0 request: closing the connection ends a response of unknown length."""
    cycle.waiting_for_100_continue = False
    sized = False

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def unchunked(message: Any) -> None:
            nonlocal sized
            if message["type"] == "http.response.start":
                sized = any(name.lower() == b"content-length" for name, _ in message["headers"])
                cycle.chunked_encoding = None if sized else False
            elif not sized:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, unchunked)

    return answer


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol, which also passes its transport to the application, and limits buffers and fragments."""

    def __init__(self, table: ConnectionTable, **rest: Any) -> None:
        super().__init__(**rest)
        self._table = table
        self._reject = self.conn.reject
        self.conn.reject = self._reject_with_problem  # type: ignore[method-assign]

    def _reject_with_problem(self, status: Any, text: str) -> Response:
        response = self._reject(status, text)
        response.body = problem(HTTPStatus(status), text.strip())
        for name, value in (("Content-Length", str(len(response.body))), ("Content-Type", "application/problem+json")):
            del response.headers[name]
            response.headers[name] = value
        return response

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection has ended."""
        self._table.remove(self.transport)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called with received bytes. Aborts the connection of a client that violates the protocol or floods it."""
        if self.transport.is_closing():
            return
        try:
            super().data_received(data)
        except Exception as error:
            logger.warning("a WebSocket was closed: %s", type(error).__name__)
            self.transport.abort()
            return
        unread = self.transport.get_write_buffer_size()
        # uvicorn would not answer an invalid opening handshake.
        if self.conn.handshake_exc is not None or unread > _MAX_UNREAD or len(self.frames) > _MAX_FRAGMENTS:
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        """Called with a whole message."""
        if self.curr_msg_data_type == "text":
            b"".join(self.frames).decode()  # `data_received` closes the connection if this fails.
        super().send_receive_event_to_app()

    def handle_connect(self, event: Any) -> None:
        """Called with the client's opening handshake."""
        super().handle_connect(event)
        if self.handshake_initiated and not self.handshake_complete:
            extensions: dict[str, Any] = dict(self.scope.get("extensions") or {})
            ours = {TRANSPORT: self.transport, _ATTRIBUTE: partial(self._table.attribute, self.transport)}
            self.scope["extensions"] = extensions | ours

    async def send(self, message: Any) -> None:
        """Called by the application."""
        if self.handshake_complete and self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)
        # A handshake rejected with a response is complete, or uvicorn would log an error of the application.
        self.handshake_complete = self.handshake_complete or self.close_sent


class ClientLimit:
    """ASGI middleware that counts each connection for the client that a proxy in front names.

    It belongs inside the middleware that sets ``scope["client"]`` from a trusted proxy's headers. If the client has too
    many connections, this one is closed, and the request is not handled.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request or connection."""
        attribute = scope.get("extensions", {}).get(_ATTRIBUTE)
        if attribute is None or scope["client"] is None or attribute(scope["client"][0]):
            await self._app(scope, receive, send)
            return
        while not (await receive())["type"].endswith(".disconnect"):
            pass


class Server(uvicorn.Server):
    """On SIGTERM it finishes work before it exits; on SIGINT or a second signal it does not wait. Both exit with 0."""

    def __init__(
        self,
        app: Any,
        drain: Drain,
        ready: Callable[[], None],
        keep_alive: float = 80,
        table: ConnectionTable | None = None,
    ) -> None:
        """`ready` is called once connections are accepted; `keep_alive`: seconds that an idle one is kept.

        `table` limits the number of connections; ``None``: no limit.
        """
        table = table or ConnectionTable()
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(HttpProtocol, table),  # type: ignore[arg-type]  # any factory is fine
                timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # fractions of a second are fine
                ws=partial(WebSocketProtocol, table),  # type: ignore[arg-type]
                backlog=_ACCEPTED_AT_ONCE,
                ws_max_size=64 * 1024,
                ws_per_message_deflate=False,
                ws_ping_interval=None,  # Engine.IO has pings of its own.
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # `api.rest.proxies` handles them.
            )
        )
        self._drain = drain
        self._ready = ready
        self._force = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: By connection with unsent data: how many bytes, and for how many seconds that has not changed.
        self._unsent: dict[Any, tuple[int, float]] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once by uvicorn, within the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_BACKLOG)  # Not uvicorn's `backlog`: asyncio also accepts that many in a row.
        if self.started and self._draining is None:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if counter % 5 == 0:
            self._check_progress(0.5)
        return await super().on_tick(counter)

    def _check_progress(self, seconds: float) -> None:
        """Called every `seconds`. Counts ticks, not wall time, as a paused process sends nothing."""
        unsent: dict[Any, tuple[int, float]] = {}
        for connection in self.server_state.connections:
            size = connection.transport.get_write_buffer_size()
            if size:
                before, stalled_for = self._unsent.get(connection, (0, 0.0))
                unsent[connection] = size, stalled_for + seconds if size == before else 0.0
                if unsent[connection][1] >= SEND_TIMEOUT:
                    connection.transport.abort()
        self._unsent = unsent

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler."""
        if self._loop is None:
            os._exit(0)  # Nothing has started yet.
        else:
            self._loop.call_soon_threadsafe(self.begin_shutdown, sig == signal.SIGINT)

    def begin_shutdown(self, now: bool = False) -> None:
        """Start to shut down; with `now`, or when called again, without waiting for work."""
        if now or self._draining is not None:
            self._force.set()
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain(self._force)
        finally:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close open connections, and abort those that do not close within 0.15 seconds."""
        abort = asyncio.create_task(self._abort_remaining())
        try:
            await super().shutdown(sockets)
        finally:
            abort.cancel()

    async def _abort_remaining(self) -> None:
        await asyncio.sleep(0.15)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        # Only then cancel tasks, so that those of aborted connections see the disconnect first.
        await asyncio.sleep(0.15)
        for task in self.server_state.tasks:
            task.cancel()
