"""python-socketio's server, without the entry points that it leaves open to clients.

Everything that arrives here is untrusted. So this class reads the packets, keeps the table of sessions and calls the
handlers itself:

- only the declared events reach a handler; ``connect`` and ``disconnect`` sent as ordinary events do not;
- each event is acknowledged if an ack was requested, whatever its arguments are and whatever the handler does;
- binary packets, packets out of turn, and malformed ones close the transport;
- a transport that has not authenticated in time is closed, also if it never sent CONNECT;
- DISCONNECT is never sent, because official clients do not reconnect after it: the transport is closed instead;
- rooms belong to `domain.delivery.Hub`: the library's `emit`, whose empty room means everybody, is not available.
"""

import asyncio
import logging
from collections.abc import Awaitable, Collection
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import socketio
from socketio import packet as wire
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters.realtime.connection import Answer, Connection, Handlers
from adapters.realtime.engineio_server import EngineServer
from adapters.realtime.engineio_socket import EngineSocket
from adapters.realtime.frames import message, parse
from adapters.realtime.peers import Peers
from domain.errors import LogUnavailable, Refusal
from domain.identity import KeysUnavailable
from domain.ports.system import Clock

logger = logging.getLogger(__name__)

#: Seconds in which a transport must authenticate.
AUTH_TIMEOUT: Final = 15.0
#: Transports that may be unauthenticated at once; beyond that the oldest is closed. Polling ones cost no connection.
MAX_UNAUTHENTICATED: int = 10_000


@dataclass(eq=False, slots=True)
class _Session:
    """The Socket.IO state of one transport."""

    socket: EngineSocket
    #: Between CONNECT and DISCONNECT.
    connection: Connection | None = None
    #: Until the client must authenticate, or until its token expires.
    deadline: asyncio.TimerHandle | None = None

    def send(self, packet: wire.Packet) -> None:
        self.socket.buffer.put(message(packet))


class SocketServer(socketio.AsyncServer):  # type: ignore[misc]  # python-socketio has no types
    """See the module."""

    eio: EngineServer

    def __init__(
        self, handlers: Handlers, clock: Clock, auth_timeout: float = AUTH_TIMEOUT, peers: Peers | None = None
    ) -> None:
        """`peers`: the other nodes, if this service has any."""
        # The libraries log what clients sent, tracebacks included: their loggers are silenced.
        silent = logging.getLogger(f"{__name__}.library")
        silent.setLevel(logging.CRITICAL + 1)
        super().__init__(
            async_mode="asgi",
            async_handlers=False,
            cors_allowed_origins=[],
            max_http_buffer_size=64 * 1024,
            logger=silent,
            engineio_logger=silent,
        )
        self.eio.peers = peers
        self.eio.on("connect", self._on_open)
        self.eio.on("message", self._on_message)
        self.eio.on("disconnect", self._on_close)
        self._handlers, self._events = handlers, handlers.events
        self._clock = clock
        self._auth_timeout = auth_timeout
        self.sessions: dict[EngineSocket, _Session] = {}
        #: Connections by the pid with which their clients may reconnect.
        self._by_pid: dict[str, Connection] = {}
        #: The sessions that are not authenticated, the oldest first.
        self._unauthenticated: dict[_Session, None] = {}
        #: Running calls of `Handlers.on_disconnect`.
        self._tasks: set[asyncio.Task[None]] = set()

    def app(self, other: ASGIApp, path: str) -> ASGIApp:
        """The ASGI application that serves this server under `path`, and everything else from `other`."""
        beginning = f"{path}/"

        def answer(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            own = scope["type"] != "lifespan" and f"{scope['path']}/".startswith(beginning)
            return (self.eio.app if own else other)(scope, receive, send)

        return answer

    def close_all(self) -> None:
        """Close every transport; what is queued is still sent."""
        for socket in list(self.sessions):
            socket.close()

    @property
    def pids(self) -> Collection[str]:
        """The pids that are in use."""
        return self._by_pid.keys()

    def close(self, pid: str) -> None:
        """Close the socket of this pid, if it is on this node: its client has resumed the session elsewhere."""
        if (connection := self._by_pid.get(pid)) is not None:
            connection.socket.abort()

    @property
    def idle(self) -> bool:
        """Whether every table is empty, and no disconnect is being handled."""
        return not (self.eio.sockets or self.sessions or self._by_pid or self._unauthenticated or self._tasks)

    async def _unavailable(self, *args: Any, **kwargs: Any) -> NoReturn:
        """The hub has the rooms and sends. Here, an empty room would mean everybody, and a late join would leak one."""
        raise NotImplementedError

    emit = enter_room = _unavailable

    def _engineio_server_class(self) -> type[EngineServer]:
        return EngineServer

    def _on_open(self, socket: EngineSocket) -> None:
        self.sessions[socket] = _Session(socket)
        self._require_authentication(self.sessions[socket])

    def _on_close(self, socket: EngineSocket) -> None:
        session = self.sessions.pop(socket)
        self._remove(session)
        self._cancel_deadline(session)

    async def _on_message(self, socket: EngineSocket, data: Any) -> None:
        try:
            await self._handle(self.sessions[socket], parse(data))
        except Exception as error:
            logger.warning("a socket was closed: %s", type(error).__name__)
            socket.abort()

    async def _handle(self, session: _Session, packet: wire.Packet) -> None:
        default_namespace = packet.namespace in (None, "/")
        match packet.packet_type, session.connection:
            case wire.CONNECT, None if default_namespace:
                await self._connect(session, packet.data)
            case wire.CONNECT, _ if not default_namespace:
                invalid = {"message": "Invalid namespace"}
                session.send(wire.Packet(wire.CONNECT_ERROR, data=invalid, namespace=packet.namespace))
            case wire.EVENT, Connection() as connection if default_namespace:
                await self._call(session, connection, packet)
            case wire.DISCONNECT, Connection() as connection if default_namespace:
                if session.deadline is None or connection.identity:
                    self._require_authentication(session)
                self._remove(session, permanent=True)
            case wire.ACK, _ if default_namespace:
                pass  # The server never requests one.
            case _:
                raise ValueError

    async def _connect(self, session: _Session, auth: Any) -> None:
        connection = Connection(self.eio.generate_id(), session.socket)
        try:
            welcome, then = await self._handlers.on_connect(connection, auth)
        except (LogUnavailable, KeysUnavailable):
            raise  # Nothing is wrong with this client. It should come back, so its transport is closed.
        except Refusal as refusal:
            refused = {"message": str(refusal), "data": {"code": refusal.code}}
            session.send(wire.Packet(wire.CONNECT_ERROR, data=refused))
            return
        if connection.socket.gone:
            return  # The handler has made no device then.
        session.connection = connection
        ids = {"sid": connection.sid}
        if connection.pid is not None:
            ids["pid"] = connection.pid
            older = self._by_pid.get(connection.pid)
            self._by_pid[connection.pid] = connection
            if older is not None:
                older.socket.abort()
        session.send(wire.Packet(wire.CONNECT, data=ids))
        if welcome:
            connection.emit("authenticated", welcome)
        then()
        self._set_expiry(session, connection)
        if connection.identity is None and session.deadline is None:
            # The deadline passed while the handler ran.
            self._expired(session, "authentication_required", "unauthenticated")

    async def _call(self, session: _Session, connection: Connection, packet: wire.Packet) -> None:
        match packet.data:
            case [str(name), *arguments]:
                ack, then = await self._answer(connection, name, arguments)
            case _:
                raise ValueError
        if packet.id is not None:
            session.send(wire.Packet(wire.ACK, data=[dict(ack)], id=packet.id))
        then()
        self._set_expiry(session, connection)

    async def _answer(self, connection: Connection, name: str, arguments: list[Any]) -> Answer:
        handler = self._events.get(name)
        if handler is None:
            return _nack("bad_request", "There is no such event.")
        if len(arguments) != 1:
            return _nack("bad_request", "This event takes exactly one argument, an object.")
        try:
            return await handler(connection, arguments[0])
        except LogUnavailable as refusal:
            return _nack("unavailable", str(refusal))
        except Refusal as refusal:
            return _nack(refusal.code, str(refusal))
        except Exception as error:
            logger.error("the handler of %s failed: %s", name, type(error).__name__)
            return _nack("unavailable", "That did not work. Please try again.")

    def _remove(self, session: _Session, *, permanent: bool = False) -> None:
        connection, session.connection = session.connection, None
        if connection is None:
            return
        if connection.device is not None:
            connection.device.close()
        if connection.pid is not None and self._by_pid.get(connection.pid) is connection:
            del self._by_pid[connection.pid]
            task = asyncio.create_task(self._handlers.on_disconnect(connection, permanent))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _require_authentication(self, session: _Session) -> None:
        self._set_deadline(session, self._auth_timeout, "authentication_required", "unauthenticated")
        self._unauthenticated[session] = None
        if len(self._unauthenticated) > MAX_UNAUTHENTICATED:
            logger.warning("a socket is closed: the limit of unauthenticated sockets is reached")
            oldest = next(iter(self._unauthenticated))
            self._cancel_deadline(oldest)
            oldest.socket.abort()

    def _set_expiry(self, session: _Session, connection: Connection) -> None:
        """Once a connection is authenticated, its deadline is the expiry of its token, if there is one."""
        if connection.identity is None:
            return
        self._cancel_deadline(session)
        if connection.identity.expires_at is not None:
            seconds = (connection.identity.expires_at - self._clock()).total_seconds()
            self._set_deadline(session, seconds, "authentication_expired", "token_expired")

    def _set_deadline(self, session: _Session, seconds: float, notice: str, code: str) -> None:
        self._cancel_deadline(session)
        if not session.socket.gone:
            loop = asyncio.get_running_loop()
            session.deadline = loop.call_later(seconds, self._expired, session, notice, code)

    def _cancel_deadline(self, session: _Session) -> None:
        self._unauthenticated.pop(session, None)
        if session.deadline is not None:
            session.deadline.cancel()
            session.deadline = None

    def _expired(self, session: _Session, notice: str, code: str) -> None:
        self._cancel_deadline(session)
        if session.connection is not None:
            if session.connection.device is not None:
                session.connection.device.close()
            session.connection.emit(notice, {"code": code})
        session.socket.finish()


def _nack(code: str, message: str) -> Answer:
    return {"ok": False, "code": code, "message": message}, lambda: None
