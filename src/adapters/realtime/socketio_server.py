"""python-socketio's server, with the doors closed that it leaves open.

What goes through here is untrusted, so this class, and not the library, reads packets, keeps the table of
connections and calls the handlers:

- only the declared events reach a handler; ``connect`` and ``disconnect`` sent as ordinary events do not;
- events of one socket are handled one after the other, and each is acknowledged if an ack was asked for,
  whatever its arguments are and whatever the handler does;
- binary packets, packets out of turn, and what cannot be parsed close the transport;
- a transport that has not authenticated in time is closed, also if it never sent CONNECT;
- DISCONNECT is never sent, since official clients then stay away: the transport is closed, and they return;
- rooms are the projection's: `emit` of the library, whose empty room means everybody, is not available.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import socketio
from engineio import packet as engine
from socketio import packet as wire

from adapters.realtime.engineio_server import EngineServer, EngineSocket
from adapters.realtime.socketio_projection import Device
from domain.errors import LogUnavailable, Refusal
from domain.identity import Identity, KeysUnavailable
from domain.ports import Clock

logger = logging.getLogger(__name__)

#: Seconds until a transport has to be authenticated.
PATIENCE: Final = 15.0
#: Transports that may be unauthenticated at once; beyond that the oldest is closed. Polling ones cost no connection.
MAX_UNAUTHENTICATED: int = 10_000


@dataclass(eq=False, slots=True)
class Connection:
    """One client's connection to the default namespace."""

    sid: str
    outbox: EngineSocket
    #: Present once the connection is authenticated.
    device: Device | None = None
    #: Who it has proved to be.
    identity: Identity | None = None
    #: Whether its client can recover: see `api.realtime.sockets`.
    recovery: bool = True
    #: The session that its client may take up again; ``None``: none.
    pid: str | None = None
    #: How far its client had come in a session that cannot be taken up again.
    offset: object = None

    @property
    def gone(self) -> bool:
        """Whether the transport is closed: nothing may be attached to it any more."""
        return self.outbox.gone

    def emit(self, name: str, data: Mapping[str, Any]) -> None:
        """Send one event to this client alone."""
        self.outbox.put(_message(wire.Packet(wire.EVENT, data=[name, dict(data)])))


#: The ack, and what is to be done once it is on its way.
Answer = tuple[Mapping[str, Any], Callable[[], None]]
#: Called with a connection and the event's one argument, or the handshake's ``auth``. A `Refusal` refuses.
Handler = Callable[[Connection, Any], Awaitable[Answer]]


class SocketServer(socketio.AsyncServer):  # type: ignore[misc]  # python-socketio has no types
    """See the module."""

    eio: EngineServer

    def __init__(
        self,
        *,
        greet: Handler,
        handlers: Mapping[str, Handler],
        leaves: Callable[[Connection, bool], Coroutine[Any, Any, None]],
        clock: Clock,
        patience: float = PATIENCE,
    ) -> None:
        """`leaves` is told of each connection that ends, and whether its client said that it does not come back."""
        # The libraries log what clients sent, tracebacks included: they are not heard.
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
        self._greet = greet
        self._handlers = handlers
        self._clock = clock
        self._patience = patience
        self._leaves = leaves
        #: By the session that their clients may take up again.
        self._by_pid: dict[str, Connection] = {}
        #: By Engine.IO session.
        self.connections: dict[str, Connection] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        #: The Engine.IO sessions that are not authenticated, the oldest first.
        self._unauthenticated: dict[str, None] = {}

    async def close_all(self) -> None:
        """Close every transport; what is queued is still sent."""
        for socket in list(self.eio.sockets.values()):
            await socket.close(wait=False)

    @property
    def pids(self) -> Collection[str]:
        """The sessions that are in use."""
        return self._by_pid.keys()

    @property
    def idle(self) -> bool:
        """Whether every table is empty, and nobody is being seen off any more."""
        tables = (self.connections, self._by_pid, self._turns, self._deadlines, self._unauthenticated)
        return not (any(tables) or self.eio.sockets or self.eio.tasks)

    async def emit(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: an empty room would mean everybody. The projection sends."""
        raise NotImplementedError

    async def enter_room(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: a client that has just left would leave an empty room behind. The projection has rooms."""
        raise NotImplementedError

    def _engineio_server_class(self) -> type[EngineServer]:
        return EngineServer

    async def _handle_eio_connect(self, eio_sid: str, environ: Mapping[str, Any]) -> None:
        self._turns[eio_sid] = asyncio.Lock()
        self._wait_for_somebody(eio_sid)

    async def _handle_eio_disconnect(self, eio_sid: str, reason: str) -> None:
        self._leave(eio_sid)
        self._turns.pop(eio_sid, None)
        self._forgive(eio_sid)

    async def _handle_eio_message(self, eio_sid: str, data: Any) -> None:
        turn = self._turns.get(eio_sid)
        if turn is None:
            return
        async with turn:  # Two polling requests may arrive at once.
            try:
                packet = _parse(data)
                if packet.packet_type != wire.CONNECT and packet.namespace not in (None, "/"):
                    raise ValueError
                match packet.packet_type:
                    case wire.CONNECT:
                        await self._arrive(eio_sid, packet)
                    case wire.EVENT:
                        await self._handle(self.connections[eio_sid], packet)
                    case wire.DISCONNECT:
                        if eio_sid not in self._deadlines or self.connections[eio_sid].identity:
                            self._wait_for_somebody(eio_sid)
                        self._leave(eio_sid, for_good=True)
                    case wire.ACK:
                        pass  # Nobody asked for one.
                    case _:
                        raise ValueError
            except Exception as error:
                logger.warning("a socket was closed: %s", type(error).__name__)
                self._abort(eio_sid)

    async def _arrive(self, eio_sid: str, packet: wire.Packet) -> None:
        if packet.namespace not in (None, "/"):
            invalid = {"message": "Invalid namespace"}
            self._send(eio_sid, wire.Packet(wire.CONNECT_ERROR, data=invalid, namespace=packet.namespace))
            return
        if eio_sid in self.connections:
            raise ValueError
        connection = Connection(self.eio.generate_id(), self.eio.sockets[eio_sid])
        try:
            hello, then = await self._greet(connection, packet.data)
        except (LogUnavailable, KeysUnavailable):
            raise  # Nothing is wrong with this client: it should come back, so its transport is closed.
        except Refusal as refusal:
            refused = {"message": str(refusal), "data": {"code": refusal.code}}
            self._send(eio_sid, wire.Packet(wire.CONNECT_ERROR, data=refused))
            return
        if connection.gone:
            return  # And the greeting has attached nothing.
        self.connections[eio_sid] = connection
        identity = {"sid": connection.sid}
        if connection.pid is not None:
            identity["pid"] = connection.pid
            older = self._by_pid.get(connection.pid)
            self._by_pid[connection.pid] = connection
            if older is not None:
                older.outbox.abort()
        self._send(eio_sid, wire.Packet(wire.CONNECT, data=identity))
        if hello:
            connection.emit("authenticated", hello)
        then()
        self._settle(eio_sid, connection)
        if connection.identity is None and eio_sid not in self._deadlines:
            # Its time ran out while it came.
            self._overdue(eio_sid, "authentication_required", "unauthenticated")

    async def _handle(self, connection: Connection, packet: wire.Packet) -> None:
        match packet.data:
            case [str(name), *arguments]:
                ack, then = await self._answer(connection, name, arguments)
            case _:
                raise ValueError
        eio_sid = connection.outbox.sid
        if packet.id is not None:
            self._send(eio_sid, wire.Packet(wire.ACK, data=[dict(ack)], id=packet.id))
        then()
        self._settle(eio_sid, connection)

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

    def _leave(self, eio_sid: str, *, for_good: bool = False) -> None:
        connection = self.connections.pop(eio_sid, None)
        if connection is None:
            return
        if connection.device is not None:
            connection.device.close()
        if connection.pid is not None and self._by_pid.get(connection.pid) is connection:
            del self._by_pid[connection.pid]
            self.eio.spawn(self._leaves(connection, for_good))

    def _wait_for_somebody(self, eio_sid: str) -> None:
        self._expect(eio_sid, self._patience, "authentication_required", "unauthenticated")
        if eio_sid in self._turns:
            self._unauthenticated[eio_sid] = None
        if len(self._unauthenticated) > MAX_UNAUTHENTICATED:
            logger.warning("a socket is closed: the limit of unauthenticated sockets is reached")
            oldest = next(iter(self._unauthenticated))
            self._forgive(oldest)
            self._abort(oldest)

    def _settle(self, eio_sid: str, connection: Connection) -> None:
        """From being authenticated on, the deadline is the end of the proof, if it has one."""
        if connection.identity is None:
            return
        self._forgive(eio_sid)
        if connection.identity.expires_at is not None:
            left = (connection.identity.expires_at - self._clock()).total_seconds()
            self._expect(eio_sid, left, "authentication_expired", "token_expired")

    def _expect(self, eio_sid: str, seconds: float, notice: str, code: str) -> None:
        self._forgive(eio_sid)
        if eio_sid in self._turns:
            loop = asyncio.get_running_loop()
            self._deadlines[eio_sid] = loop.call_later(seconds, self._overdue, eio_sid, notice, code)

    def _forgive(self, eio_sid: str) -> None:
        self._unauthenticated.pop(eio_sid, None)
        deadline = self._deadlines.pop(eio_sid, None)
        if deadline is not None:
            deadline.cancel()

    def _overdue(self, eio_sid: str, notice: str, code: str) -> None:
        self._forgive(eio_sid)
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
            socket.put(_message(packet))


def _nack(code: str, message: str) -> Answer:
    return {"ok": False, "code": code, "message": message}, lambda: None


def _parse(data: Any) -> wire.Packet:
    """The packet a client sent. Raises, mostly ValueError, where there is none."""
    if not isinstance(data, str) or not data:
        raise ValueError
    return wire.Packet(encoded_packet=data)


def _message(packet: wire.Packet) -> engine.Packet:
    return engine.Packet(engine.MESSAGE, data=packet.encode())
