"""One client's Engine.IO session over polling or a WebSocket, by the protocol's specification."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import engineio
from engineio import exceptions
from engineio.packet import CLOSE, MESSAGE, NOOP, PING, PONG, UPGRADE, Packet
from starlette.types import Message, Receive, Scope, Send

from adapters import TRANSPORT, WRITE_FRAME
from adapters.realtime import frames
from adapters.realtime.send_buffer import BoundedSendBuffer

#: Seconds in which an upgrade must complete: nothing is sent to the client meanwhile.
UPGRADE_TIMEOUT = 5.0

#: Seconds that a client has to begin an upgrade while other nodes live.
UPGRADE_WAIT = 0.3

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
        "_finishing", "_heartbeat", "_held", "_last_tag", "_lock", "_polling", "_releasing", "_send", "_server",
        "_transport", "_write_frame", "_writer", "buffer", "connected", "sid", "upgraded", "upgrading",
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
        self._last_tag = ""
        self._lock = asyncio.Lock()
        #: Messages that are held back, and the task that handles them at last. ``None``: none are.
        self._held: list[str] | None = None
        self._releasing: asyncio.Task[None] | None = None
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

    def check_progress(self) -> bool:
        """Called every `PROGRESS_INTERVAL`: abort, and return True, if the client reads nothing."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self.buffer.check_progress(unsent, paused=self.upgrading)

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

    async def answer_poll(self, tag: str = "") -> Sequence[bytes]:
        """The packets that answer a polling request; none: it is refused, and the session is over.

        It is refused if another one is waiting, and if its tag is that of the one before: then a balancer has repeated
        it, because the answer was lost with the node that passed it on.
        """
        if self.upgrading:
            return [frames.NOOP]
        if self._polling or (tag and tag == self._last_tag):
            self.close()
            return []
        self._last_tag = tag
        if self._finishing and not len(self.buffer):
            self.close()
        self._polling = True
        try:
            return await self.buffer.take(MAX_BATCH) or [frames.NOOP]
        finally:
            self._polling = False

    def hold_back(self) -> None:
        """Handle no message until the client has upgraded or `UPGRADE_WAIT` is over: it may upgrade on another node."""
        self._held = []

    async def handle_post(self, body: bytes) -> None:
        """Handle the packets of a polling request. Raises if there are none, or they are malformed."""
        packets = body.decode().split(SEPARATOR)
        if len(body) > self._server.max_http_buffer_size or len(packets) > _MAX_POSTED:
            raise exceptions.ContentTooLongError
        for packet, received in [(packet, Packet(encoded_packet=packet)) for packet in packets]:
            if self._held is not None and self._releasing is None and received.packet_type == MESSAGE:
                self._hold(packet)
                continue
            await self._released()
            await self._handle(received)
            await asyncio.sleep(0)  # Let other clients run between two packets of this one.

    def _hold(self, packet: str) -> None:
        assert self._held is not None
        self._held.append(packet)
        if len(self._held) > MAX_BATCH:
            self._release()
        elif len(self._held) == 1:
            asyncio.get_running_loop().call_later(UPGRADE_WAIT, self._wait_no_longer)

    def _wait_no_longer(self) -> None:
        if not self.upgrading:
            self._release()

    def _release(self) -> None:
        """Handle the messages that were held back."""
        if self._held is not None and self._releasing is None:
            self._releasing = asyncio.create_task(self._handle_held(self._held))

    async def _handle_held(self, packets: Sequence[str]) -> None:
        for packet in packets:
            await self._handle(Packet(encoded_packet=packet))
        self._held = None

    async def _released(self) -> None:
        if self._held is not None and self._releasing is not None:
            await asyncio.wait([self._releasing])

    async def serve(self, scope: Scope, receive: Receive, send: Send, *, forwarded: bool = False) -> None:
        """Run a WebSocket until it ends: of a new session, or one that takes over from polling.

        `forwarded`: its client is connected to another node.
        """
        await accept(scope, send)
        if self.upgrading or self.upgraded:
            await close(scope, send)
            return
        self._transport = scope.get("extensions", {}).get(TRANSPORT)
        if self.connected and not await self._upgrade(receive, send, forwarded):
            self._transport = None  # Polling continues, unless the session is left to the other node.
            self._release()
            return
        await self._run(scope, receive, send)

    async def take_over(self, held: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the WebSocket of a session that another node has opened, and begin with the packets that it has held."""
        self._transport = scope.get("extensions", {}).get(TRANSPORT)
        self._held = held.split(SEPARATOR) if held else None
        await self._run(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.connected = self.upgraded = True
        self._send, self._write_frame = send, scope.get("extensions", {}).get(WRITE_FRAME, _never)
        self._start_writer()
        self._release()
        await self._released()
        # Until the WebSocket ends, a frame is malformed, or the server shuts down.
        with contextlib.suppress(Exception, asyncio.CancelledError):
            while True:
                with contextlib.suppress(exceptions.UnknownPacketError):
                    await self._handle(self._parse(await receive()))
                await asyncio.sleep(0)  # As in `handle_post`.
        self.close(abort=True)
        if self._writer is not None:
            await self._writer

    async def _upgrade(self, receive: Receive, send: Send, forwarded: bool) -> bool:
        """Take over from polling, within `UPGRADE_TIMEOUT`. False: it has failed, or another node continues."""
        self.upgrading = True
        timeout = asyncio.get_running_loop().call_later(UPGRADE_TIMEOUT, _abort, self._transport)
        try:
            probe = self._parse(await receive())
            if (probe.packet_type, probe.data) != (PING, "probe"):
                return False
            await send({"type": "websocket.send", "text": Packet(PONG, data="probe").encode()})
            if self._polling:
                self.buffer.put(frames.NOOP)
            if self._parse(await receive()).packet_type != UPGRADE or self.gone:
                return False
            if not forwarded:
                self.upgraded = True
            elif self._held is not None and self._releasing is None:
                # Nothing of the session exists yet but its id: the other node continues alone.
                held, self._held = SEPARATOR.join(self._held).encode(), None
                self.close()
                await send({"type": "websocket.send", "bytes": held})
            else:
                await send({"type": "websocket.send", "text": Packet(NOOP).encode()})
                self.upgraded = True
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


async def accept(scope: Scope, send: Send) -> None:
    """Accept a WebSocket. Clients that offer subprotocols fail unless one is accepted."""
    await send({"type": "websocket.accept", "subprotocol": next(iter(scope.get("subprotocols", ())), None)})


async def close(scope: Scope, send: Send) -> None:
    """Close a WebSocket, also if its client does not read."""
    with contextlib.suppress(Exception):  # It has ended.
        await send({"type": "websocket.close"})
    asyncio.get_running_loop().call_later(CLOSE_GRACE, _abort, scope.get("extensions", {}).get(TRANSPORT))


def _never(frame: bytes) -> bool:
    return False


def _abort(transport: asyncio.WriteTransport | None) -> None:
    if transport is not None:
        transport.abort()
