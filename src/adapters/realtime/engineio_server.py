"""An Engine.IO server over ASGI: reads the requests, and answers malformed ones by the protocol's specification.

python-engineio brings the packets, their encoding and the table of sessions.
"""

import asyncio
import contextlib
import logging
import urllib.parse
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import engineio
from engineio.packet import OPEN, Packet
from starlette.datastructures import Headers
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters import DESCRIPTOR
from adapters.realtime.engineio_socket import SEPARATOR, EngineSocket, accept, close
from adapters.realtime.frames import frame, packet_in
from adapters.realtime.peers import FORWARDED, WEBSOCKET, Peers, Unreachable

logger = logging.getLogger(__name__)

#: Answers a request; ``None``: it was a WebSocket, and has ended.
_Answer = Callable[[Scope, Receive, Send], Awaitable[Response | None]]


class EngineServer(engineio.AsyncServer):  # type: ignore[misc]  # python-engineio has no types
    """The table of sessions, and the requests for them.

    Its handlers, set with ``on``, are called as ``connect(socket)``, ``await message(socket, data)`` and
    ``disconnect(socket)``.
    """

    sockets: dict[str, EngineSocket]
    #: The other nodes, if this service has any.
    peers: Peers | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: How many clients were disconnected because they did not read.
        self.slow_readers = 0
        #: Handles one request or WebSocket: whatever it sends, it is answered.
        self.app = GZipMiddleware(
            partial(self._respond, self._answer), minimum_size=self.compression_threshold, compresslevel=6
        )

    def for_nodes(self, app: ASGIApp) -> ASGIApp:
        """The ASGI application that answers what other nodes pass on, and everything else by `app`."""
        peers = self.peers
        if peers is None:
            return app

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            asked = peers.forwarded(scope) if scope["type"] in ("http", "websocket") else None
            if asked is None:
                await app(scope, receive, send)
            else:
                await self._respond(partial(self._for_session, *asked, forwarded=True), scope, receive, send)

        return answer

    def generate_id(self) -> str:
        """A new session id. It begins with the node's if there may be others."""
        own: str = super().generate_id()
        return own if self.peers is None else f"{self.peers.nodes.id}-{own}"

    async def check_progress(self) -> None:
        """Called every `send_buffer.PROGRESS_INTERVAL`: disconnect clients that have a backlog and read nothing."""
        self.slow_readers += sum(socket.check_progress() for socket in list(self.sockets.values()))

    async def _respond(self, answer: _Answer, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await answer(scope, receive, send)
        except Exception as error:
            logger.warning("a Socket.IO request was refused: %s", type(error).__name__)
            response = _refusal()
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        method = WEBSOCKET if scope["type"] == "websocket" else scope["method"]
        new = "sid" not in query
        if query.get("transport") != ["websocket" if method == WEBSOCKET else "polling"]:
            return _refusal(0, "Transport unknown")
        if "j" in query:  # JSONP, which no Engine.IO 4 client uses.
            return _refusal()
        if new and query.get("EIO") != ["4"]:
            return _refusal(5, "Unsupported protocol version")
        if method not in ("GET", WEBSOCKET) and (new or method != "POST"):
            return _refusal(2, "Bad handshake method")
        if not new:
            tag = query.get("t", [""])[0]
            return await self._for_session(method, query["sid"][0], tag, scope, receive, send)
        socket = self._open(upgrades=method != WEBSOCKET)
        if method != WEBSOCKET:
            return await _poll(socket)
        await receive()  # The opening handshake.
        try:
            await socket.serve(scope, receive, send)
        finally:
            socket.close(abort=True)
        return None

    async def _for_session(
        self, method: str, sid: str, tag: str, scope: Scope, receive: Receive, send: Send, *, forwarded: bool = False
    ) -> Response | None:
        """The response to a request for a session that exists. `forwarded`: by another node.

        `tag`: a balancer that repeats a poll repeats it.
        """
        socket = self.sockets.get(sid)
        if socket is None and self.peers is not None and not forwarded and FORWARDED not in Headers(scope=scope):
            return await self._pass_on(self.peers, method, sid, tag, scope, receive, send)
        if socket is None or socket.gone or not socket.connected:
            return _unknown()
        if method == WEBSOCKET:
            await receive()
            await socket.serve(scope, receive, send, forwarded=forwarded)
            return None
        if socket.upgraded:
            return _refusal()
        if method == "GET":
            return await _poll(socket, tag if self.peers is not None else "")
        try:
            await socket.handle_post(await self._body(scope, receive))
        except Exception:
            socket.close()
            raise
        return _plain(b"ok")

    async def _pass_on(
        self, peers: Peers, method: str, sid: str, tag: str, scope: Scope, receive: Receive, send: Send
    ) -> Response | None:
        """The response of the node that the session's id names."""
        connection = scope.get("extensions", {}).get(DESCRIPTOR, contextlib.nullcontext)
        try:
            if method != WEBSOCKET:
                body = await self._body(scope, receive)
                with connection():
                    status, answer = await peers.ask(method, sid, tag, body)
                return _plain(answer) if status == 200 else Response(answer, 400, media_type="application/json")
            await receive()
            with connection():
                held = await peers.relay(sid, partial(accept, scope, send), receive, send)
        except (Unreachable, asyncio.CancelledError):  # Cancelled: this node shuts down.
            return _unknown()
        if held is None:
            await close(scope, send)
        else:
            await self._add(sid).take_over(held, scope, receive, send)
        return None

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a polling request, or the first bytes of it, which are too many."""
        body = b""
        async for chunk in Request(scope, receive).stream():
            body += chunk
            if len(body) > self.max_http_buffer_size:
                break
        return body[: self.max_http_buffer_size + 1]

    def _open(self, *, upgrades: bool) -> EngineSocket:
        socket = self._add(self.generate_id())
        if upgrades and self.peers is not None and self.peers.nodes.others:
            socket.hold_back()
        opening = {
            "sid": socket.sid,
            "upgrades": ["websocket"] if upgrades else [],
            "pingTimeout": int(self.ping_timeout * 1000),
            "pingInterval": int(self.ping_interval * 1000),
            "maxPayload": self.max_http_buffer_size,
        }
        socket.buffer.put(frame(Packet(OPEN, opening).encode().encode()))
        return socket

    def _add(self, sid: str) -> EngineSocket:
        socket = self.sockets[sid] = EngineSocket(self, sid)
        self.handlers["connect"](socket)
        socket.schedule_ping()
        return socket


async def _poll(socket: EngineSocket, tag: str = "") -> Response:
    socket.connected = True
    frames = await socket.answer_poll(tag)
    return _plain(SEPARATOR.encode().join(map(packet_in, frames))) if frames else _refusal()


def _plain(text: bytes) -> Response:
    return Response(text, headers={"Cache-Control": "no-store"}, media_type="text/plain")


def _refusal(code: int = 3, message: str = "Bad request") -> Response:
    """By the codes and messages of the reference implementation."""
    return JSONResponse({"code": code, "message": message}, 400)


def _unknown() -> Response:
    """After this answer clients open a new session."""
    return _refusal(1, "Session ID unknown")
