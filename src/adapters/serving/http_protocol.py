"""uvicorn's HTTP protocol with limits for slow or hostile clients, and corrections of HTTP."""

import asyncio
import contextlib
import json
import logging
import secrets
import socket
from collections.abc import Awaitable
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from adapters.serving.connection_table import ConnectionTable

logger = logging.getLogger(__name__)

#: Bytes that the kernel buffers beyond those in flight (TCP_NOTSENT_LOWAT).
_MAX_UNSENT: Final = 64 * 1024
#: Bytes of a request's head, and seconds in which it must arrive.
_MAX_HEAD: Final = 128 * 1024
HEADER_TIMEOUT = 20.0
#: Seconds for which the rest of a request is discarded after an early response. Closing at once would make the kernel
#: send RST, which destroys a response that the client has not read yet.
LINGER = 4.0

#: Headers that announce a body.
_BODY: Final = (b"transfer-encoding", b"content-length")


def problem(status: HTTPStatus, detail: str) -> tuple[dict[str, str], bytes]:
    """The headers and the body (RFC 9457) of an error response that is sent before the application sees the request."""
    content = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail, "code": "bad_request"}
    body = json.dumps(content, separators=(",", ":")).encode()
    request_id = secrets.token_hex(8)
    fields = {"status": status.value, "code": "bad_request", "requestId": request_id}
    logger.info("malformed request refused", extra={"fields": fields, "repeat_key": ("malformed", status)})
    headers = {"Content-Type": "application/problem+json", "Content-Length": str(len(body)), "X-Request-Id": request_id}
    return headers, body


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
        sock = transport.get_extra_info("socket")
        # asyncio sets this only if the listening socket was created with proto=IPPROTO_TCP. Without it, the second of
        # two writes waits for the client's delayed acknowledgement of the first, 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Limit the kernel's unsent buffer: with megabytes in it, a stalled reader looks like a slow one.
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT)
        super().connection_made(transport)
        self._extensions = self._table.extensions(transport)
        self._set_deadline(HEADER_TIMEOUT)
        self._table.add(transport, self._host)

    def connection_lost(self, exc: Exception | None) -> None:
        self._table.remove(self.transport)
        self._cancel_deadline()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called with bytes that are not HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, "The request is not valid HTTP.")

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Send an error response without asking the application, and end the connection."""
        headers, body = problem(status, detail)
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name.lower()}: {headers[name]}" for name in headers)]
        self.transport.write("\r\n".join([*lines, "connection: close", "", ""]).encode() + body)
        if self.idle:
            self._linger()
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Called with the first byte of a request, not with empty lines before it."""
        self._unset_keepalive_if_required()
        self._in_head = True
        self._cancel_deadline()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(map(len, chain.from_iterable(self.headers))) > _MAX_HEAD:
            raise httptools.HttpParserError  # Too much remains counted, so that this is answered with 431.
        self._in_head, self._unparsed = False, 0
        self._cancel_deadline()
        super().on_headers_complete()
        self.headers = []  # Trailers, which come after the body, are dropped.

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
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
            self._deadline = None

    def data_received(self, data: bytes) -> None:
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
                    self.scope["headers"] = [*self.scope["headers"], (b"upgrade", b"websocket")]
                    self.handle_websocket_upgrade()
                    return
                # A new parser, as the old one takes nothing after a request with ``Connection: close``.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(self._head_without_upgrade())
            if self._unparsed > _MAX_HEAD:
                raise httptools.HttpParserError
            if self._in_head and self._deadline is None:
                self._set_deadline(HEADER_TIMEOUT)
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
        headers = self.scope["headers"]
        wanted = b",".join(value for name, value in headers if name == b"upgrade")
        self.scope["headers"] = others = [header for header in headers if header[0] != b"upgrade"]
        names = {name for name, value in others if value != b"0" or name not in _BODY}
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
        request = b"%b %b HTTP/%b" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())
        return b"\r\n".join([request, *(name + b": " + value for name, value in self.scope["headers"]), b"\r\n"])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Called by uvicorn for each request."""
        cycle.scope["extensions"] = self._extensions
        super()._start_asgi_task(cycle, partial(self._answer, cycle, app))

    def _answer(self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """Call the ASGI application `app` for one request, with what uvicorn's `cycle` lacks."""
        old = scope["http_version"] == "1.0"
        unsized = False
        cycle.transport = response = _Response(self.transport)  # type: ignore[assignment]  # has all that it uses
        if old:
            cycle.waiting_for_100_continue = False

        async def receive_counted() -> Any:
            if not cycle.response_complete:
                # Only a body that is read needs a temporary file: a request that is refused first does not count.
                self._table.count_upload(self.transport)
            return await receive()

        async def send_corrected(message: Any) -> None:
            nonlocal unsized
            if message["type"] == "http.response.start":
                early = cycle.more_body
                if early:
                    cycle.keep_alive = False
                if old:
                    # The end of the connection ends a response of unknown length: there are no chunks.
                    unsized = not any(name.lower() == b"content-length" for name, _ in message["headers"])
                    cycle.chunked_encoding = False if unsized else None
                response.holds = scope["method"] != "HEAD"
                await send(message)
                if early:
                    # The header says close. Keep uvicorn from closing after the response, which would send RST.
                    self._lingering = cycle.keep_alive = True
                return
            if unsized:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        # A request without a body is complete by now.
        uploads = cycle.more_body or cycle.body
        answer: Awaitable[None] = app(scope, receive_counted if uploads else receive, send_corrected)
        return answer


class _Response:
    """The transport of one response, whose head is written together with the beginning of its body."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""
        #: Whether what is written next is kept until more is written.
        self.holds = False
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self.holds:
            self._held, self.holds = data, False
        else:
            # Not `writelines`: in Python 3.12 and 3.13, asyncio's pauses nobody, and never gets rid of empty data.
            self._transport.write(self._held + data)
            self._held = b""

    def close(self) -> None:
        if self._held:
            self.write(b"")
        self._transport.close()
