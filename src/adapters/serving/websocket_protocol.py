"""uvicorn's WebSocket protocol with limits for hostile clients, and with its transport for the application."""

import logging
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Response

from adapters import WRITE_FRAME
from adapters.serving.connection_table import ConnectionTable
from adapters.serving.http_protocol import problem

logger = logging.getLogger(__name__)

#: Bytes of a WebSocket's write buffer beyond which its client, which does not read, is disconnected.
_MAX_UNREAD: Final = 1_000_000
#: Frames of one WebSocket message.
_MAX_FRAGMENTS: Final = 1_000


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol, which also passes its transport to the application, and limits buffers and fragments."""

    def __init__(self, table: ConnectionTable, **rest: Any) -> None:
        super().__init__(**rest)
        self._table = table
        self._reject = self.conn.reject
        self.conn.reject = self._reject_with_problem  # type: ignore[method-assign]

    def _reject_with_problem(self, status: Any, text: str) -> Response:
        response = self._reject(status, text)
        headers, response.body = problem(HTTPStatus(status), text.strip())
        del response.headers["Content-Length"], response.headers["Content-Type"]
        response.headers.update(headers)
        return response

    def connection_lost(self, exc: Exception | None) -> None:
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
        if self.curr_msg_data_type == "text":
            b"".join(self.frames).decode()  # `data_received` closes the connection if this fails.
        super().send_receive_event_to_app()

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if self.handshake_initiated and not self.handshake_complete:
            extensions: dict[str, Any] = dict(self.scope.get("extensions") or {})
            if not self.conn.extensions:  # Compressed frames differ from one WebSocket to another.
                extensions[WRITE_FRAME] = self._write_frame
            self.scope["extensions"] = extensions | self._table.extensions(self.transport)

    def _write_frame(self, frame: bytes) -> bool:
        """Write a finished frame past `send`. False: not now, as the client has not read the last ones, or has left."""
        if not self.writable.is_set() or self.transport.is_closing():
            return False
        self.transport.write(frame)
        return True

    async def send(self, message: Any) -> None:
        if self.handshake_complete and self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)
        # A handshake rejected with a response is complete, or uvicorn would log an error of the application.
        self.handshake_complete = self.handshake_complete or self.close_sent
