"""One client's Engine.IO session over polling or a WebSocket, by the protocol's specification."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import engineio
from engineio import exceptions
from engineio.packet import CLOSE, MESSAGE, PING, PONG, UPGRADE, Packet
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from adapters import TRANSPORT, WRITE_FRAME
from adapters.realtime import frames
from adapters.realtime.send_buffer import BoundedSendBuffer

#: Seconds in which an upgrade must complete: nothing is sent to the client meanwhile.
UPGRADE_TIMEOUT = 5.0

#: Seconds that a client has to take the last packets before a WebSocket's transport is aborted.
CLOSE_GRACE = 1.0

#: Packets in one polling answer or one pass of the writer; python-engineio's client refuses more in one answer.
MAX_BATCH = 16
#: Packets in one polling request, and what separates them.
_MAX_POSTED: Final = 256
SEPARATOR: Final = "\x1e"


class EngineSocket:
    """One session: its heartbeat, its transports, and the buffer of what waits for its client."""

    __slots__ = (
        "_finishing", "_heartbeat", "_lock", "_polling", "_send", "_server", "_transport", "_write_frame", "_writer",
        "buffer", "connected", "sid", "upgraded", "upgrading",
    )  # fmt: skip

    def __init__(self, server: engineio.AsyncServer, sid: str) -> None:
        """`server` has the table of sessions, the ping times and the handlers."""
        self.sid = sid
        self.buffer = BoundedSendBuffer[bytes](len, self.abort, self.finish, self._start_writer)
        #: A request has opened the session.
        self.connected = False
        #: A WebSocket is about to take over from polling; or is the transport.
        self.upgrading = self.upgraded = False
        self._server = server
        self._transport: asyncio.WriteTransport | None = None
        #: Sends an ASGI message on the WebSocket; writes a frame to it at once, or returns False.
        self._send: Send | None = None
        self._write_frame: Callable[[bytes], bool] = _never
        #: Sends the waiting frames while there are any.
        self._writer: asyncio.Task[None] | None = None
        #: Until the next ping, or until the last one must be answered.
        self._heartbeat: asyncio.TimerHandle | None = None
        self._polling = False
        self._lock = asyncio.Lock()
        #: Close once the buffer is empty and the client polls again.
        self._finishing = False

    @property
    def gone(self) -> bool:
        """Whether nothing can be sent any more."""
        return self.buffer.closed

    def schedule_ping(self) -> None:
        """Restart the heartbeat: the session is new, or its client has answered a ping."""
        self._set_heartbeat(self._server.ping_interval, self._ping)

    def _ping(self) -> None:
        self.buffer.put(frames.PING)
        self._set_heartbeat(self._server.ping_timeout, self.close)

    def _set_heartbeat(self, seconds: float, then: Callable[[], None]) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if not self.gone:
            self._heartbeat = asyncio.get_running_loop().call_later(seconds, then)

    def check_progress(self) -> None:
        """Called every `PROGRESS_INTERVAL`: abort if the client reads nothing."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        self.buffer.check_progress(unsent, paused=self.upgrading)

    def abort(self) -> None:
        """End the transport now and drop what waits. The disconnect handler runs after this call has returned."""
        asyncio.get_running_loop().call_soon(partial(self.close, abort=True))
        _abort(self._transport)

    def finish(self) -> None:
        """Send what waits, then close."""
        if self.upgraded or not len(self.buffer):
            self.close()
        else:
            self._finishing = True
            asyncio.get_running_loop().call_later(CLOSE_GRACE, self.close)

    def close(self, *, abort: bool = False) -> None:
        """Close without waiting for the client. `abort`: send nothing that still waits.

        Sends no CLOSE packet, after which python-socketio's client does not reconnect: the next poll is refused.
        """
        if not self.gone:
            self.buffer.close()
            if self.upgraded:
                self._start_writer()
            if self._heartbeat is not None:
                self._heartbeat.cancel()
            self._server.sockets.pop(self.sid, None)
            self._server.handlers["disconnect"](self)
            asyncio.get_running_loop().call_later(CLOSE_GRACE, _abort, self._transport)
        if abort:
            self.buffer.clear()

    async def answer_poll(self) -> Sequence[bytes]:
        """The packets that answer a polling request; none: it is refused, because another one is waiting."""
        if self.upgrading:
            return [frames.NOOP]
        if self._polling:
            self.close()
            return []
        if self._finishing and not len(self.buffer):
            self.close()
        self._polling = True
        try:
            return await self.buffer.take(MAX_BATCH) or [frames.NOOP]
        finally:
            self._polling = False

    async def handle_post(self, request: Request) -> None:
        """Handle the packets of a polling request. Raises if there are none, or they are malformed."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._server.max_http_buffer_size:
                raise exceptions.ContentTooLongError
        packets = body.decode().split(SEPARATOR)
        if len(packets) > _MAX_POSTED:
            raise exceptions.ContentTooLongError
        for received in [Packet(encoded_packet=packet) for packet in packets]:
            await self._handle(received)
            await asyncio.sleep(0)  # Let other clients run between two packets of this one.

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a WebSocket until it ends: of a new session, or one that takes over from polling."""
        extensions = scope.get("extensions", {})
        transport = extensions.get(TRANSPORT)
        # Clients that offer subprotocols fail unless one is accepted.
        await send({"type": "websocket.accept", "subprotocol": next(iter(scope.get("subprotocols", ())), None)})
        if self.upgrading or self.upgraded:
            await send({"type": "websocket.close"})
            asyncio.get_running_loop().call_later(CLOSE_GRACE, _abort, transport)
            return
        self._transport = transport
        if self.connected and not await self._upgrade(receive, send):
            self._transport = None  # Polling continues.
            return
        self.connected = self.upgraded = True
        self._send, self._write_frame = send, extensions.get(WRITE_FRAME, _never)
        self._start_writer()
        # Until the WebSocket ends, a frame is malformed, or the server shuts down.
        with contextlib.suppress(Exception, asyncio.CancelledError):
            while True:
                with contextlib.suppress(exceptions.UnknownPacketError):
                    await self._handle(self._parse(await receive()))
                await asyncio.sleep(0)  # As in `handle_post`.
        self.close(abort=True)
        if self._writer is not None:
            await self._writer

    async def _upgrade(self, receive: Receive, send: Send) -> bool:
        """Take over from polling, within `UPGRADE_TIMEOUT`."""
        self.upgrading = True
        timeout = asyncio.get_running_loop().call_later(UPGRADE_TIMEOUT, _abort, self._transport)
        try:
            probe = self._parse(await receive())
            if (probe.packet_type, probe.data) != (PING, "probe"):
                return False
            await send({"type": "websocket.send", "text": Packet(PONG, data="probe").encode()})
            if self._polling:
                self.buffer.put(frames.NOOP)
            self.upgraded = self._parse(await receive()).packet_type == UPGRADE and not self.gone
        except Exception:
            return False
        finally:
            self.upgrading = False
            timeout.cancel()
        return self.upgraded

    async def _handle(self, received: Packet) -> None:
        kind = received.packet_type
        if kind == PONG:
            self.schedule_ping()
        elif kind == MESSAGE:
            # Two polling requests may arrive at once: their messages are handled one after the other.
            async with self._lock:
                if not self.gone:
                    await self._server.handlers["message"](self, received.data)
        elif kind == UPGRADE:
            self.buffer.put(frames.NOOP)
        elif kind == CLOSE:
            self.close(abort=True)
        else:
            raise exceptions.UnknownPacketError

    def _parse(self, message: Message) -> Packet:
        """The packet in an ASGI message. Raises if the WebSocket has ended, or this is none."""
        frame = message.get("text") or message.get("bytes")
        if message["type"] != "websocket.receive" or not frame or len(frame) > self._server.max_http_buffer_size:
            raise ConnectionError
        return Packet(encoded_packet=frame)

    def _start_writer(self) -> None:
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_waiting())

    async def _write_waiting(self) -> None:
        assert self._send is not None
        with contextlib.suppress(Exception):  # The WebSocket has ended: reading from it ends, too.
            while len(self.buffer):
                for frame in await self.buffer.take(MAX_BATCH):
                    packet = frames.packet_in(frame).decode()
                    await self._send({"type": "websocket.send", "text": packet})
            if self.gone:
                await self._send({"type": "websocket.close"})
            else:
                self._writer = None
                self.buffer.write = self._write_frame


def _never(frame: bytes) -> bool:
    return False


def _abort(transport: asyncio.WriteTransport | None) -> None:
    if transport is not None:
        transport.abort()
