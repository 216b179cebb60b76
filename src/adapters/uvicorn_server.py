"""uvicorn, with what it lacks: shutdown by the contract, transports that can be aborted, and corrections of HTTP."""

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import FrameType
from typing import Any, Final

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Response

from adapters.engineio_server import TRANSPORT

logger = logging.getLogger(__name__)

#: Called when the process is asked to leave; returns when it may. The event is set once there is no time left.
Leave = Callable[[asyncio.Event], Awaitable[None]]


#: What may wait to be written because the other side asked for it and does not read, in bytes.
_MAX_UNREAD: Final = 1_000_000
#: What the kernel takes of a WebSocket's frames beyond what it has on the way to the other side, in bytes.
_MAX_UNSENT: Final = 64 * 1024
#: Of how many frames one message may be made.
_MAX_FRAGMENTS: Final = 1_000


#: Of how many bytes the head of a request may be, and in how many seconds it has to be there.
_MAX_HEAD: Final = 128 * 1024
HEAD_PATIENCE = 20.0


#: Headers that announce a body.
_BODY: Final = (b"transfer-encoding", b"content-length")


def problem(status: HTTPStatus, detail: str) -> bytes:
    """What a request is answered that no application can be asked about (RFC 9457)."""
    content = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail, "code": "bad_request"}
    return json.dumps(content, separators=(",", ":")).encode()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, with limits on the size and the time of a request's head, and with two rules of RFC 9110 and 9112.

    An ``Upgrade`` header that is not a WebSocket handshake is ignored, and HTTP/1.0 gets no chunked framing.
    """

    _in_head = True
    _head = 0
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Called with a new connection."""
        # asyncio does this only where the listening socket was made with the protocol's number. Without it, what is
        # written in two pieces waits for the other side to acknowledge the first, which it delays by 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection has ended."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called with what is no HTTP."""
        body = problem(HTTPStatus.BAD_REQUEST, "The request is not valid HTTP.")
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\n"
        self.transport.write(f"{head.format(len(body))}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """Called with the first byte of a request."""
        self._in_head, self._head = True, 0
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called with the end of the head."""
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(HEAD_PATIENCE, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def data_received(self, data: bytes) -> None:
        """Called with what has come."""
        if self._in_head:
            self._head += len(data)
            if self._head > _MAX_HEAD:
                self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
                self.transport.close()
                return
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as stopped:
                    rest = rest[stopped.args[0] :]
                if self._is_websocket_handshake():
                    self.headers.append((b"upgrade", b"websocket"))
                    self.handle_websocket_upgrade()
                    return
                # A new parser: the present one takes nothing more after a request that ends the connection.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(self._head_without_upgrade())
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _should_upgrade(self) -> bool:
        """Called by uvicorn at each head that has an upgrade: `data_received` decides on it."""
        return True

    def _is_websocket_handshake(self) -> bool:
        """Take the ``Upgrade`` headers off the request, and tell whether it is a WebSocket handshake."""
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
        """The request's head for the parser, which stops at each upgrade and takes the body for another protocol."""
        if self.scope["method"] == "CONNECT":
            raise httptools.HttpParserError  # An upgrade whatever its headers, and this is no proxy.
        head = [f"{self.scope['method']} ".encode(), self.url, f" HTTP/{self.scope['http_version']}\r\n".encode()]
        for name, value in self.headers:
            head += [name, b": ", value, b"\r\n"]
        return b"".join([*head, b"\r\n"])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Called by uvicorn for each request."""
        super()._start_asgi_task(cycle, _without_chunks(app, cycle) if cycle.scope["http_version"] == "1.0" else app)


def _without_chunks(app: Any, cycle: RequestResponseCycle) -> Any:
    """The application for one HTTP/1.0 request: a response of unknown length ends with the connection."""
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
    """uvicorn's, which also hands its transport to the application, and has bounds where it has none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reject = self.conn.reject
        self.conn.reject = self._reject_with_problem  # type: ignore[method-assign]

    def _reject_with_problem(self, status: Any, text: str) -> Response:
        response = self._reject(status, text)
        response.body = problem(HTTPStatus(status), text.strip())
        for name, value in (("Content-Length", str(len(response.body))), ("Content-Type", "application/problem+json")):
            del response.headers[name]
            response.headers[name] = value
        return response

    def data_received(self, data: bytes) -> None:
        """Called with what has come. Who breaks the protocol, or floods it, is hung up on."""
        if self.transport.is_closing():
            return
        try:
            super().data_received(data)
        except Exception as error:
            logger.warning("a WebSocket was closed: %s", type(error).__name__)
            self.transport.abort()
            return
        unread = self.transport.get_write_buffer_size()
        # An opening handshake that cannot be read would stay without an answer.
        if self.conn.handshake_exc is not None or unread > _MAX_UNREAD or len(self.frames) > _MAX_FRAGMENTS:
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        """Called with a whole message."""
        if self.curr_msg_data_type == "text":
            b"".join(self.frames).decode()  # What is no text ends the connection, in `data_received`.
        super().send_receive_event_to_app()

    def handle_connect(self, event: Any) -> None:
        """Called with the client's opening handshake."""
        super().handle_connect(event)
        # The kernel would take megabytes for who does not read, and after that take nothing for many seconds from who
        # reads slowly: neither could be told from the other.
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            line = self.transport.get_extra_info("socket")
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT)
        if self.handshake_initiated and not self.handshake_complete:
            extensions: dict[str, Any] = dict(self.scope.get("extensions") or {})
            self.scope["extensions"] = extensions | {TRANSPORT: self.transport}

    async def send(self, message: Any) -> None:
        """Called by the application."""
        if self.handshake_complete and self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)
        # A handshake that is refused with a response is complete; uvicorn would log it as an error of the application.
        self.handshake_complete = self.handshake_complete or self.close_sent


class Server(uvicorn.Server):
    """SIGTERM lets the work be finished first; SIGINT and every second signal do not wait. Both exit with 0."""

    def __init__(self, app: Any, leave: Leave, ready: Callable[[], None], keep_alive: float = 80) -> None:
        """`ready` is called once connections are taken; `keep_alive` is how many seconds an idle one is kept."""
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # fractions of a second are fine
                ws=WebSocketProtocol,
                ws_max_size=64 * 1024,
                ws_per_message_deflate=False,
                ws_ping_interval=None,  # Engine.IO has pings of its own.
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # `api.proxies` handles them.
            )
        )
        self._leave = leave
        self._ready = ready
        self._hurry = asyncio.Event()
        self._leaving: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once by uvicorn, within the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and self._leaving is None:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler."""
        if self._loop is None:
            os._exit(0)  # Nothing has been begun.
        else:
            self._loop.call_soon_threadsafe(self.leave, sig == signal.SIGINT)

    def leave(self, now: bool = False) -> None:
        """Begin to leave; `now`, or asked a second time, without waiting for work."""
        if now or self._leaving is not None:
            self._hurry.set()
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._depart())

    async def _depart(self) -> None:
        try:
            await self._leave(self._hurry)
        finally:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is still open. Everything that had to be said has been said: nobody is waited for long."""
        ending = asyncio.create_task(self._end())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(0.15)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        # In turns, so that who was hung up on has heard of it, however late it is.
        await asyncio.sleep(0.15)
        for task in self.server_state.tasks:
            task.cancel()
