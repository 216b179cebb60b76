"""An Engine.IO server over ASGI: reads the requests, and answers malformed ones by the protocol's specification.

python-engineio brings the packets, their encoding and the table of sessions.
"""

import logging
import urllib.parse
from typing import Any

import engineio
from engineio.packet import OPEN, Packet
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from adapters.realtime.engineio_socket import SEPARATOR, EngineSocket
from adapters.realtime.frames import frame, packet_in

logger = logging.getLogger(__name__)


class EngineServer(engineio.AsyncServer):  # type: ignore[misc]  # python-engineio has no types
    """The table of sessions, and the requests for them.

    Its handlers, set with ``on``, are called as ``connect(socket)``, ``await message(socket, data)`` and
    ``disconnect(socket)``.
    """

    sockets: dict[str, EngineSocket]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compressed = GZipMiddleware(self._respond, minimum_size=self.compression_threshold, compresslevel=6)

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or WebSocket. Whatever it sends, it is answered."""
        await self._compressed(scope, receive, send)

    async def check_progress(self) -> None:
        """Called every `send_buffer.PROGRESS_INTERVAL`: disconnect clients that have a backlog and read nothing."""
        for socket in list(self.sockets.values()):
            socket.check_progress()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._answer(scope, receive, send)
        except Exception as error:
            logger.warning("a Socket.IO request was refused: %s", type(error).__name__)
            response = _refusal()
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """The response; ``None``: this was a WebSocket, and it has ended."""
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        websocket = scope["type"] == "websocket"
        method = "GET" if websocket else scope["method"]
        new = "sid" not in query
        if query.get("transport") != ["websocket" if websocket else "polling"]:
            return _refusal(0, "Transport unknown")
        if "j" in query:  # JSONP, which no Engine.IO 4 client uses.
            return _refusal()
        if new and query.get("EIO") != ["4"]:
            return _refusal(5, "Unsupported protocol version")
        if method != "GET" and (new or method != "POST"):
            return _refusal(2, "Bad handshake method")
        socket = self._open(upgrades=not websocket) if new else self.sockets.get(query["sid"][0])
        if socket is None or socket.gone or not (new or socket.connected):
            return _refusal(1, "Session ID unknown")
        if websocket:
            await receive()  # The opening handshake.
            try:
                await socket.serve(scope, receive, send)
            finally:
                if new:
                    socket.close(abort=True)
            return None
        if socket.upgraded:
            return _refusal()
        if method == "POST":
            try:
                await socket.handle_post(Request(scope, receive))
            except Exception:
                socket.close()
                raise
            return _plain(b"ok")
        socket.connected = True
        frames = await socket.answer_poll()
        return _plain(SEPARATOR.encode().join(map(packet_in, frames))) if frames else _refusal()

    def _open(self, *, upgrades: bool) -> EngineSocket:
        socket = EngineSocket(self, self.generate_id())
        self.sockets[socket.sid] = socket
        opening = {
            "sid": socket.sid,
            "upgrades": ["websocket"] if upgrades else [],
            "pingTimeout": int(self.ping_timeout * 1000),
            "pingInterval": int(self.ping_interval * 1000),
            "maxPayload": self.max_http_buffer_size,
        }
        socket.buffer.put(frame(Packet(OPEN, opening).encode()))
        self.handlers["connect"](socket)
        socket.schedule_ping()
        return socket


def _plain(text: bytes) -> Response:
    return Response(text, headers={"Cache-Control": "no-store"}, media_type="text/plain")


def _refusal(code: int = 3, message: str = "Bad request") -> Response:
    """By the codes and messages of the reference implementation."""
    return JSONResponse({"code": code, "message": message}, 400)
