"""python-socketio's server, without the entry points that it leaves open to clients.

Everything that arrives here is untrusted. So this class reads the packets, keeps the table of connections and calls
the handlers itself:

- only the declared events reach a handler; ``connect`` and ``disconnect`` sent as ordinary events do not;
- events of one socket are handled one after the other, and each is acknowledged if an ack was requested, whatever its
  arguments are and whatever the handler does;
- binary packets, packets out of turn, and malformed ones close the transport;
- a transport that has not authenticated in time is closed, also if it never sent CONNECT;
- DISCONNECT is never sent, because official clients do not reconnect after it: the transport is closed instead;
- rooms belong to `domain.delivery.Hub`: the library's `emit`, whose empty room means everybody, is not available.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, Final, NoReturn

import socketio
from socketio import packet as wire
from starlette.types import ASGIApp

from adapters.realtime.connection import Answer, Connection, Handler
from adapters.realtime.engineio_server import EngineServer
from adapters.realtime.socketio_frames import frame, parse
from domain.errors import LogUnavailable, Refusal
from domain.identity import KeysUnavailable
from domain.ports.system import Clock

logger = logging.getLogger(__name__)

#: Seconds in which a transport must authenticate.
AUTH_TIMEOUT: Final = 15.0
#: Transports that may be unauthenticated at once; beyond that the oldest is closed. Polling ones cost no connection.
MAX_UNAUTHENTICATED: int = 10_000


class SocketServer(socketio.AsyncServer):  # type: ignore[misc]  # python-socketio has no types
    """See the module."""

    eio: EngineServer

    def __init__(
        self,
        *,
        on_connect: Handler,
        handlers: Mapping[str, Handler],
        on_disconnect: Callable[[Connection, bool], Coroutine[Any, Any, None]],
        clock: Clock,
        auth_timeout: float = AUTH_TIMEOUT,
    ) -> None:
        """`on_disconnect` gets each connection with a pid that ends, and whether its client sent DISCONNECT."""
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
        self.eio.on("connect", self._on_open)
        self.eio.on("message", self._on_message)
        self.eio.on("disconnect", self._on_close)
        self._on_connect = on_connect
        self._handlers = handlers
        self._on_disconnect = on_disconnect
        self._clock = clock
        self._auth_timeout = auth_timeout
        #: Connections by the pid with which their clients may reconnect.
        self._by_pid: dict[str, Connection] = {}
        #: Connections by Engine.IO sid.
        self.connections: dict[str, Connection] = {}
        #: One per transport: two polling requests may arrive at once.
        self._locks: dict[str, asyncio.Lock] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        #: The Engine.IO sessions that are not authenticated, the oldest first.
        self._unauthenticated: dict[str, None] = {}
        #: Running calls of `on_disconnect`.
        self._tasks: set[asyncio.Task[None]] = set()

    def app(self, other: ASGIApp, path: str) -> ASGIApp:
        """The ASGI application that serves this server under `path`, and everything else from `other`."""
        app: ASGIApp = socketio.ASGIApp(self, other_asgi_app=other, socketio_path=path)
        return app

    def close_all(self) -> None:
        """Close every transport; what is queued is still sent."""
        for socket in list(self.eio.sockets.values()):
            socket.close()

    @property
    def pids(self) -> Collection[str]:
        """The sessions that are in use."""
        return self._by_pid.keys()

    @property
    def idle(self) -> bool:
        """Whether every table is empty, and no disconnect is being handled."""
        tables = (self.connections, self._by_pid, self._locks, self._deadlines, self._unauthenticated)
        return not (any(tables) or self.eio.sockets or self._tasks)

    async def emit(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: an empty room would mean everybody. The hub sends."""
        raise NotImplementedError

    async def enter_room(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: a client that has just disconnected would leave an empty room. The hub has the rooms."""
        raise NotImplementedError

    def _engineio_server_class(self) -> type[EngineServer]:
        return EngineServer

    def _on_open(self, eio_sid: str, _: Any) -> None:
        self._locks[eio_sid] = asyncio.Lock()
        self._require_authentication(eio_sid)

    def _on_close(self, eio_sid: str) -> None:
        self._remove(eio_sid)
        self._locks.pop(eio_sid, None)
        self._cancel_deadline(eio_sid)

    async def _on_message(self, eio_sid: str, data: Any) -> None:
        lock = self._locks.get(eio_sid)
        if lock is None:
            return
        async with lock:
            try:
                packet = parse(data)
                if packet.packet_type != wire.CONNECT and packet.namespace not in (None, "/"):
                    raise ValueError
                match packet.packet_type:
                    case wire.CONNECT:
                        await self._connect(eio_sid, packet)
                    case wire.EVENT:
                        await self._handle(self.connections[eio_sid], packet)
                    case wire.DISCONNECT:
                        if eio_sid not in self._deadlines or self.connections[eio_sid].identity:
                            self._require_authentication(eio_sid)
                        self._remove(eio_sid, permanent=True)
                    case wire.ACK:
                        pass  # The server never requests one.
                    case _:
                        raise ValueError
            except Exception as error:
                logger.warning("a socket was closed: %s", type(error).__name__)
                self._abort(eio_sid)

    async def _connect(self, eio_sid: str, packet: wire.Packet) -> None:
        if packet.namespace not in (None, "/"):
            invalid = {"message": "Invalid namespace"}
            self._send(eio_sid, wire.Packet(wire.CONNECT_ERROR, data=invalid, namespace=packet.namespace))
            return
        if eio_sid in self.connections:
            raise ValueError
        connection = Connection(self.eio.generate_id(), self.eio.sockets[eio_sid])
        try:
            welcome, then = await self._on_connect(connection, packet.data)
        except (LogUnavailable, KeysUnavailable):
            raise  # Nothing is wrong with this client. It should come back, so its transport is closed.
        except Refusal as refusal:
            refused = {"message": str(refusal), "data": {"code": refusal.code}}
            self._send(eio_sid, wire.Packet(wire.CONNECT_ERROR, data=refused))
            return
        if connection.gone:
            return  # The handler has made no device then.
        self.connections[eio_sid] = connection
        identity = {"sid": connection.sid}
        if connection.pid is not None:
            identity["pid"] = connection.pid
            older = self._by_pid.get(connection.pid)
            self._by_pid[connection.pid] = connection
            if older is not None:
                older.socket.abort()
        self._send(eio_sid, wire.Packet(wire.CONNECT, data=identity))
        if welcome:
            connection.emit("authenticated", welcome)
        then()
        self._set_expiry(eio_sid, connection)
        if connection.identity is None and eio_sid not in self._deadlines:
            # The deadline passed while the handler ran.
            self._expired(eio_sid, "authentication_required", "unauthenticated")

    async def _handle(self, connection: Connection, packet: wire.Packet) -> None:
        match packet.data:
            case [str(name), *arguments]:
                ack, then = await self._answer(connection, name, arguments)
            case _:
                raise ValueError
        eio_sid = connection.socket.sid
        if packet.id is not None:
            self._send(eio_sid, wire.Packet(wire.ACK, data=[dict(ack)], id=packet.id))
        then()
        self._set_expiry(eio_sid, connection)

    async def _answer(self, connection: Connection, name: str, arguments: list[Any]) -> Answer:
        handler = self._handlers.get(name)
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

    def _remove(self, eio_sid: str, *, permanent: bool = False) -> None:
        connection = self.connections.pop(eio_sid, None)
        if connection is None:
            return
        if connection.device is not None:
            connection.device.close()
        if connection.pid is not None and self._by_pid.get(connection.pid) is connection:
            del self._by_pid[connection.pid]
            task = asyncio.create_task(self._on_disconnect(connection, permanent))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _require_authentication(self, eio_sid: str) -> None:
        self._set_deadline(eio_sid, self._auth_timeout, "authentication_required", "unauthenticated")
        if eio_sid in self._locks:
            self._unauthenticated[eio_sid] = None
        if len(self._unauthenticated) > MAX_UNAUTHENTICATED:
            logger.warning("a socket is closed: the limit of unauthenticated sockets is reached")
            oldest = next(iter(self._unauthenticated))
            self._cancel_deadline(oldest)
            self._abort(oldest)

    def _set_expiry(self, eio_sid: str, connection: Connection) -> None:
        """Once a connection is authenticated, its deadline is the expiry of its token, if there is one."""
        if connection.identity is None:
            return
        self._cancel_deadline(eio_sid)
        if connection.identity.expires_at is not None:
            seconds = (connection.identity.expires_at - self._clock()).total_seconds()
            self._set_deadline(eio_sid, seconds, "authentication_expired", "token_expired")

    def _set_deadline(self, eio_sid: str, seconds: float, notice: str, code: str) -> None:
        self._cancel_deadline(eio_sid)
        if eio_sid in self._locks:
            loop = asyncio.get_running_loop()
            self._deadlines[eio_sid] = loop.call_later(seconds, self._expired, eio_sid, notice, code)

    def _cancel_deadline(self, eio_sid: str) -> None:
        self._unauthenticated.pop(eio_sid, None)
        deadline = self._deadlines.pop(eio_sid, None)
        if deadline is not None:
            deadline.cancel()

    def _expired(self, eio_sid: str, notice: str, code: str) -> None:
        self._cancel_deadline(eio_sid)
        connection = self.connections.get(eio_sid)
        if connection is not None:
            if connection.device is not None:
                connection.device.close()
            connection.emit(notice, {"code": code})
        socket = self.eio.sockets.get(eio_sid)
        if socket is not None:
            socket.finish()

    def _abort(self, eio_sid: str) -> None:
        socket = self.eio.sockets.get(eio_sid)
        if socket is not None:
            socket.abort()

    def _send(self, eio_sid: str, packet: wire.Packet) -> None:
        socket = self.eio.sockets.get(eio_sid)
        if socket is not None:
            socket.buffer.put(frame(packet))


def _nack(code: str, message: str) -> Answer:
    return {"ok": False, "code": code, "message": message}, lambda: None
